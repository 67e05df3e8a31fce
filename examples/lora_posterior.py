"""A posterior over LoRA adapters: a vision transformer learns to read digits lying on their side.

    python examples/lora_posterior.py

The base network is trained on upright digits and frozen. Adapters of rank 4 and a last
layer of its own learn the rotated ones from 300 images with IVON, which makes them random; they
alone are stored. Nothing is downloaded.
"""

import argparse
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

import bayespass
from bayespass.integrations.peft import check_adapters


def digits() -> tuple[Tensor, Tensor]:
    """1,797 images and their labels, shuffled."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(pixels, dtype=torch.float32)[order].view(-1, 1, 8, 8) / 16, torch.tensor(labels)[order]


def upright_network(images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    """A vision transformer of 40,000 weights, trained by AdamW."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=2, num_channels=1, num_labels=10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]).logits, labels[rows]).backward()
            optimizer.step()
    return model.eval()


def fit_adapters(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> bayespass.Posterior:
    """The posterior of everything that requires gradients: the adapters, since PEFT froze the rest.

    Colder than Bayes: few numbers that act on every weight of a layer together are sensitive to noise.
    """
    method = bayespass.IVON(
        model.named_parameters(), lr=0.5, n_data=len(labels), prior_precision=2.0, temperature=0.1, betas=(0.9, 0.999)
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(method, epochs)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(50):
            with method.sampled():
                F.cross_entropy(model(images[rows]).logits, labels[rows]).backward()
            method.step()
        schedule.step()
    return method.posterior()


def main() -> None:
    """Adapt, predict the rotated test digits, and store the adapters' posterior."""
    parser = argparse.ArgumentParser(description="Posterior of LoRA adapters by IVON.")
    parser.add_argument("--epochs", type=int, default=50, help="of the adapters")
    parser.add_argument("--output", type=Path, default=Path("output/lora_posterior"), help="folder for the posterior")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT uses an old name of transformers

    images, labels = digits()
    rotated, test = images.rot90(1, (2, 3)), slice(1200, None)
    torch.manual_seed(0)
    base = upright_network(images[:800], labels[:800], epochs=20)
    weights = sum(parameter.numel() for parameter in base.parameters())
    adapted = ["q_proj", "v_proj", "fc1", "fc2"]
    model = get_peft_model(base, LoraConfig(r=4, target_modules=adapted, modules_to_save=["classifier"])).eval()
    with torch.no_grad():
        for name, inputs in {"upright": images, "rotated": rotated}.items():
            right = model(inputs[test]).logits.argmax(-1) == labels[test]
            print(f"base network on {name} digits: accuracy {float(right.float().mean()):.3f}")

    posterior = fit_adapters(model, rotated[800:1100], labels[800:1100], options.epochs)
    check_adapters(model, posterior)
    # The outputs of an adapted layer share the noise of four inner numbers: scales put that right.
    scales = bayespass.fit_scales(model, posterior, rotated[1100:1200], "shared")
    path = options.output / "adapters.safetensors"
    posterior.save(path, model, scales)
    n_random = sum(mean.numel() for mean in posterior.mean.values())
    print(f"{n_random} random parameters beside {weights} frozen ones, {path.stat().st_size} bytes in {path}")

    with torch.no_grad():
        for name, predictor in {
            "mean weights": bayespass.MeanNetwork(model, posterior),
            "single pass": bayespass.SinglePass(model, posterior, "shared", scales),
            "64 draws": bayespass.MonteCarlo(model, posterior, 64),
        }.items():
            scores = bayespass.evaluate(predictor(rotated[test]), labels[test])
            print(name, {figure: str(scores[figure]) for figure in ("accuracy", "nll", "ece", "aurc")})


if __name__ == "__main__":
    main()
