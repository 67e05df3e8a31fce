"""A network that others trained, on real images: the claims of benchmarks/real_weights.py in small.

The data are not part of the project; without them these tests are skipped.
"""

import functools
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from bayespass import DiagonalGaussian, MonteCarlo, SinglePass, fit_scales

ROOT = Path(__file__).parent.parent
DATA = (ROOT / os.environ.get("BAYESPASS_DATA", "../shared/data")).resolve()
FOLDERS = (DATA / "cifar10_weights", DATA / "cifar10")

pytestmark = pytest.mark.skipif(
    not all(folder.is_dir() for folder in FOLDERS),
    reason=f"no cifar10 and cifar10_weights in {DATA}; set BAYESPASS_DATA to a folder that has them",
)


def load_module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def resnet_and_images(n=16):
    """ResNet-20, the first test images, and the logits that came with them."""
    models, unpack = load_module(DATA / "cifar10_weights" / "models.py"), load_module(DATA / "unpack.py")
    pixels, labels = unpack.load(DATA / "cifar10" / "cifar10_test1017.pk.npz")
    with np.load(DATA / "cifar10_weights" / "expected_logits_test1017.npz") as logits:
        expected = torch.from_numpy(logits["resnet20"][:n])
    return models.build("resnet20"), models.normalise(pixels[:n], "resnet20"), torch.as_tensor(labels[:n]), expected


def posterior(model, relative_sd):
    """Every weight with this share of its layer's root mean square as standard deviation."""
    mean = {name: p.detach() for name, p in model.named_parameters()}
    variance = {
        name: torch.full_like(p, float(relative_sd * p.square().mean().sqrt()) ** 2) for name, p in mean.items()
    }
    return DiagonalGaussian(mean, variance)


def test_the_weights_give_the_logits_they_came_with():
    model, images, labels, expected = resnet_and_images()
    with torch.inference_mode():
        logits = model(images)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (logits.argmax(-1) == labels).float().mean() > 0.8


def test_without_variance_one_pass_is_the_plain_forward():
    model, images, _, expected = resnet_and_images()
    with torch.inference_mode():
        prediction = SinglePass(model, posterior(model, 0.0), "shared")(images)
    torch.testing.assert_close(prediction.logit_mean, expected, rtol=1e-4, atol=1e-4)
    assert prediction.logit_variance.max() == 0


def test_one_pass_comes_close_to_monte_carlo_once_calibrated():
    """Median variance ratio on 16 images against 64 draws, sd 1 % of each layer's root mean square.

    Uncalibrated, "shared" gave 0.17 and "cvp", which averages the noise of a weight over positions,
    0.03: channels are still taken as independent. Scales from 16 other images bring it within 2x.
    """
    model, images, _, _ = resnet_and_images(32)
    others, images = images.split(16)
    narrow = posterior(model, 0.01)
    with torch.inference_mode():
        truth = MonteCarlo(model, narrow, 64, seed=0)(images).logit_variance
        scales = fit_scales(model, narrow, others, "shared", n_samples=20, seed=1)

        def ratio(name, scales=None):
            return float((SinglePass(model, narrow, name, scales)(images).logit_variance / truth).median())

        assert 0.1 < ratio("shared") < 0.4
        assert ratio("cvp") < ratio("shared") / 3
        assert 0.5 < ratio("shared", scales) < 2
