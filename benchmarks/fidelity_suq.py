r"""SUQ's own package (0.1.0, Li et al. 2024, arXiv 2411.18425) on the networks it takes, from any diagonal posterior.

`suq_predictions` starts this file under an interpreter that has the package, $BAYESPASS_PEERS_PYTHON or
.peers/bin/python, and passes weights, variances and inputs through files. That environment:

    python3 -m venv .peers && .peers/bin/pip install torch==2.13.0 numpy safetensors tqdm
    .peers/bin/pip install --no-deps suq==0.1.0

Neither wheel nor source distribution carries `suq/utils`, from which `suq` imports one data set of three arrays; a
`TensorDataset` made here takes its place, everything else is the package's own.

What it takes, and what is random in it (`random_names`):

    mlp   `nn.Sequential` of linear layers and activations (`Flatten`, `Dropout` and `Identity` are left
          out, a missing bias is a zero one without variance): every weight and bias
    vit   a network built as `bayespass.demo.models.SmallViT`: pre-norm blocks, a class token. The package knows
          one ViT of its own; the weights are put into modules of those names. Random are the head and, in every
          block, either both MLP weights (part="mlp") or the value weight (part="value"), never both, never biases,
          queries, keys, norms or the embedding. It has no more to offer; the rest of the posterior is left out.

Every prediction is made with scale 1 and with the scale that the package fits to labels (it divides variances by
it), two ways. `shipped`: `fit_scale_factor` as it is called by default, whose labels of shape (N, 1) meet a batch of
distributions, so that every prediction is scored against every label of its batch of 16; learning rate and epochs
of the package's ViT example. `corrected`: the same method on the same moments by its other path (speedup=False), where
labels have the right shape, with steps long enough to converge. A fit may diverge: the scale is then NaN, or
negative, and there is no prediction.

Attention is at the package's default, `attention_diag_cov=False`: the other setting multiplies by the square of the
output weight where its transpose belongs. Regression needs the class behind `streamline_mlp`, which passes on
no `sigma_noise`. Its mean is the mean network's, which is checked.
"""

import argparse
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

if TYPE_CHECKING:
    from bayespass import Posterior, Prediction

ROOT = Path(__file__).resolve().parent.parent
BATCH, SCALE_BATCH = 256, 16  # the second is the package's own
FITS = {"none": None, "shipped": (1e-3, 50), "corrected": (0.01, 200)}  # learning rate, epochs
ACTIVATIONS = {cls.__name__: cls for cls in (nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.ELU)}
MEAN_TOLERANCE = 1e-4


@dataclass(frozen=True)
class SuqFit:
    """One prediction by SUQ's package.

    Args:
        prediction: None where the fit of the scale diverged.
        scale: that its variances are divided by.
    """

    prediction: "Prediction | None"
    scale: float


def kind_of(model: nn.Module) -> str | None:
    """Which of the package's networks the model can be written as: "mlp", "vit", or None."""
    if isinstance(model, nn.Sequential):
        layers = _layers(model)
        known = all(isinstance(layer, nn.Linear) or _activation(layer) for layer in layers)
        return "mlp" if known and layers and isinstance(layers[-1], nn.Linear) else None
    names = {name.split(".", 2)[-1] for name, _ in model.named_parameters() if name.startswith("blocks.")}
    linear = ("attention.query", "attention.key", "attention.value", "attention.out", "mlp.0", "mlp.2")
    needed = {f"{path}.{end}" for path in (*linear, "norm1", "norm2") for end in ("weight", "bias")}
    outside = ("norm.weight", "norm.bias", "head.weight", "head.bias")
    whole = names == needed and set(outside) <= {name for name, _ in model.named_parameters()}
    return "vit" if whole and hasattr(model.get_submodule("blocks.0.attention"), "heads") else None


def random_names(model: nn.Module, part: str = "mlp") -> tuple[str, ...]:
    """Names of the parameters that the package makes random, in the order of its variance vector.

    Args:
        model: for which `kind_of` is not None.
        part: of the blocks of a ViT, "mlp" or "value".
    """
    if kind_of(model) == "mlp":
        return tuple(name for name, _ in model.named_parameters())
    ends = {"mlp": ("mlp.0.weight", "mlp.2.weight"), "value": ("attention.value.weight",)}[part]
    blocks = range(len(model.get_submodule("blocks")))  # type: ignore[arg-type]
    return (*(f"blocks.{block}.{end}" for block in blocks for end in ends), "head.weight", "head.bias")


def suq_predictions(
    model: nn.Module,
    posterior: "Posterior",
    inputs: Tensor,
    calibration: tuple[Tensor, Tensor] | None = None,
    part: str = "mlp",
    fits: tuple[str, ...] = tuple(FITS),
) -> dict[str, SuqFit]:
    """Predictions of SUQ's package, one by way of fitting its scale.

    Args:
        model: in eval mode, with `kind_of(model)` not None.
        posterior: over at least `random_names(model, part)`; their marginal variances are used, other parameters
            are at their means.
        inputs: (N, ...) what the model takes.
        calibration: inputs and labels (or targets) that the scale is fitted to; needed unless fits is ("none",).
        part: see `random_names`.
        fits: names out of `FITS`.

    Returns:
        a `SuqFit` by name of the fit.

    Raises:
        ValueError: a network that the package does not take, or no calibration rows for a fit.
        RuntimeError: its mean is not the mean network's, or it failed; the message is its own.
    """
    from bayespass.predict.snapshot import snapshot

    kind = kind_of(model)
    if kind is None or (calibration is None and set(fits) != {"none"}):
        msg = f"SUQ takes an MLP or a SmallViT, and calibration rows for fits {fits}; got {type(model).__name__}"
        raise ValueError(msg)
    network, info = snapshot(model, posterior), posterior.info
    sets = {"inputs": inputs} if calibration is None else {"inputs": inputs, "calibration": calibration[0]}
    with torch.inference_mode():
        arrays = {f"data.{name}": _fed(network, kind, rows) for name, rows in sets.items()}
        expected = torch.cat([network(rows) for rows in inputs.split(BATCH)])
    if calibration is not None:
        arrays["labels"] = calibration[1]
    sigma = None if info.likelihood == "classification" else float(info.sigma_noise or 0.0)
    told: dict[str, Any] = {"kind": kind, "part": part, "fits": fits, "likelihood": info.likelihood, "sigma": sigma}
    if kind == "mlp":
        layers = _layers(network)
        told["layers"] = [type(layer).__name__ for layer in layers]
        marginals = _with_biases(network, dict(posterior.variance))
        linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
        for index, layer in enumerate(linear):
            bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias
            arrays |= {f"network.{index}.weight": layer.weight, f"network.{index}.bias": bias}
    else:
        told["heads"] = network.get_submodule("blocks.0.attention").heads
        told["activation"] = type(network.get_submodule("blocks.0.mlp.1")).__name__
        arrays |= {f"network.{name}": value for name, value in network.named_parameters()}
        marginals = [posterior.variance[name] for name in random_names(model, part)]
    arrays["variance"] = torch.cat([value.flatten() for value in marginals])
    found, scales = _run(told, {name: value.detach().cpu().clone() for name, value in arrays.items()})
    gap = float((found["mean"] - expected.cpu()).abs().max())
    if not gap <= MEAN_TOLERANCE * max(1.0, float(expected.abs().max())):
        msg = f"SUQ's mean is {gap:.2g} from the mean network's; the network was not carried over rightly"
        raise RuntimeError(msg)
    return {fit: _prediction(found, scales[fit], told) for fit in fits}


def _prediction(found: Mapping[str, Tensor], scale: float | None, told: dict[str, Any]) -> SuqFit:
    """The package's moments with this scale; its link is softmax(mean / sqrt(1 + pi / 8 variance))."""
    from bayespass import ClassificationPrediction
    from bayespass.prediction import regression_prediction

    if scale is None or not 0 < scale < float("inf"):
        return SuqFit(None, float("nan") if scale is None else scale)
    mean, variance = found["mean"], found["variance"] / scale
    notes = (f"scale {scale:.4g}", *((f"{told['part']} weights and head",) if told["kind"] == "vit" else ()))
    if told["likelihood"] == "regression":
        return SuqFit(regression_prediction(mean, variance, told["sigma"], "suq", notes), scale)
    probs = torch.softmax(mean / (1 + torch.pi / 8 * variance).sqrt(), -1)
    return SuqFit(ClassificationPrediction(probs, mean, variance, "suq", notes), scale)


def _run(told: dict[str, Any], arrays: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float | None]]:
    """Moments at scale 1 and the fitted scales, by the other interpreter.

    Raises:
        RuntimeError: it failed.
    """
    python = os.environ.get("BAYESPASS_PEERS_PYTHON", str(ROOT / ".peers" / "bin" / "python"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file(arrays, folder / "arrays")
        (folder / "told.json").write_text(json.dumps(told), encoding="utf-8")
        done = subprocess.run([python, __file__, "--worker", name], capture_output=True, text=True, check=False)
        if done.returncode:
            told_why = [line for line in done.stderr.splitlines() if "Error: " in line] or ["killed"]
            msg = f"SUQ failed under {python}: {told_why[-1]}"
            raise RuntimeError(msg)
        return load_file(folder / "moments"), json.loads((folder / "scales.json").read_text(encoding="utf-8"))


def _layers(model: nn.Module) -> list[nn.Module]:
    """The leaves of nested `Sequential`s, without those that do nothing to rows of features."""
    idle = (nn.Flatten, nn.Dropout, nn.Identity)
    leaves = [m for m in model.modules() if not isinstance(m, nn.Sequential)]
    return [leaf for leaf in leaves if not isinstance(leaf, idle)]


def _activation(layer: nn.Module) -> bool:
    cls = ACTIVATIONS.get(type(layer).__name__)
    return cls is not None and repr(layer).replace("inplace=True", "") == repr(cls())


def _fed(network: nn.Module, kind: str, inputs: Tensor) -> Tensor:
    """What enters the first random layer: rows of features, or the tokens with their positions."""
    if kind == "mlp":
        return inputs.flatten(1).float()
    taken: list[Tensor] = []
    hook = network.get_submodule("blocks.0").register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    for rows in inputs.split(BATCH):
        network(rows)
    hook.remove()
    return torch.cat(taken)


def _with_biases(network: nn.Module, variance: dict[str, Tensor]) -> list[Tensor]:
    """Weight and bias variance of every linear layer, zero where there is none."""
    found = []
    for path, layer in network.named_modules():
        if isinstance(layer, nn.Linear):
            for name, shape in (("weight", layer.weight.shape), ("bias", (layer.out_features,))):
                found.append(variance.get(f"{path}.{name}", torch.zeros(shape)))
    return found


def work(folder: Path) -> None:
    """What the other interpreter does: build the package's network, propagate, fit its scale."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    _complete()
    arrays, told = load_file(folder / "arrays"), json.loads((folder / "told.json").read_text(encoding="utf-8"))
    model = _suq_mlp(arrays, told) if told["kind"] == "mlp" else _suq_vit(arrays, told)
    mean, variance = _latent(model, arrays["data.inputs"])
    scales: dict[str, float | None] = {}
    for fit in told["fits"]:
        settings = FITS[fit]
        scale = 1.0 if settings is None else _fitted_scale(model, arrays, told, fit, *settings)
        scales[fit] = scale if scale is not None and abs(scale) < float("inf") else None
    save_file({"mean": mean.contiguous(), "variance": variance.contiguous()}, folder / "moments")
    (folder / "scales.json").write_text(json.dumps(scales), encoding="utf-8")


def _complete() -> None:
    """Put the data set that the distributions of `suq` leave out where the package looks for it.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    if importlib.util.find_spec("suq") is None:
        msg = "no package suq here; pip install --no-deps suq==0.1.0"
        raise ModuleNotFoundError(msg)
    module = types.ModuleType("suq.utils.utils")

    def torch_dataset(mean: Any, variance: Any, labels: Any) -> TensorDataset:
        second = torch.cat([torch.as_tensor(variance), torch.as_tensor(labels).to(torch.float32)], 1)
        return TensorDataset(torch.as_tensor(mean), second)

    module.torch_dataset = torch_dataset  # type: ignore[attr-defined]
    sys.modules["suq.utils"], sys.modules["suq.utils.utils"] = types.ModuleType("suq.utils"), module


def _latent(model: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the output at scale 1."""
    parts = [tuple(t.detach() for t in model.forward_latent(part)) for part in rows.split(BATCH)]
    mean, variance = (torch.cat(values) for values in zip(*parts, strict=True))
    return mean, variance * model.scale_factor.detach()


def _fitted_scale(
    model: Any, arrays: dict[str, Tensor], told: dict[str, Any], fit: str, lr: float, epochs: int
) -> float | None:
    """The scale after the package's own fit; None where it is NaN, or where it has no such fit."""
    labels, rows = arrays["labels"], arrays["data.calibration"]
    fitted: Any = model
    if fit == "corrected":
        fitted = _propagated(told["likelihood"], told["sigma"])
        rows = torch.cat(_latent(model, rows), -1)
    elif told["likelihood"] == "regression":
        return None  # it raises: "Speed up not supported for regression atm"
    batches = DataLoader(TensorDataset(rows, labels), SCALE_BATCH, shuffle=True)
    try:
        fitted.fit_scale_factor(batches, epochs, lr, speedup=fit == "shipped")
    except ValueError:  # torch.distributions was handed NaN: a step took the scale below zero
        return None
    finally:
        scale = float(fitted.scale_factor.detach())
        model.scale_factor.data.fill_(1.0)
    return None if math.isnan(scale) else scale


def _propagated(likelihood: str, sigma: float | None) -> Any:
    """The package's model of moments that were computed already: its fit need not propagate in every epoch."""
    from suq.base_suq import SUQ_Base  # type: ignore[import-not-found]

    class Propagated(SUQ_Base):
        def forward(self, moments: Tensor) -> Any:
            """What its models return, at the present scale."""
            mean, variance = moments.chunk(2, -1)
            if sigma is not None:
                return mean, variance / self.scale_factor + sigma**2
            return self.probit_approximation(mean, variance / self.scale_factor)

    return Propagated(likelihood, 1.0)


def _suq_mlp(arrays: dict[str, Tensor], told: dict[str, Any]) -> Any:
    from suq.diag_suq_mlp import SUQ_MLP_Diag  # type: ignore[import-not-found]

    index = itertools.count()
    layers = [
        _linear(arrays, f"network.{next(index)}") if name == "Linear" else ACTIVATIONS[name]()
        for name in told["layers"]
    ]
    return SUQ_MLP_Diag(nn.Sequential(*layers), arrays["variance"], told["likelihood"], sigma_noise=told["sigma"])


def _suq_vit(arrays: dict[str, Tensor], told: dict[str, Any]) -> Any:
    from suq import streamline_vit  # type: ignore[import-not-found]

    depth = 1 + max(int(name.split(".")[2]) for name in arrays if name.startswith("network.blocks."))
    network = nn.Module()
    blocks = nn.ModuleList(_TheirBlock(arrays, f"network.blocks.{index}", told) for index in range(depth))
    network.transformer = nn.ModuleDict({"pte": _Tokens(), "h": blocks, "ln_f": _norm(arrays, "network.norm")})
    network.classifier = _linear(arrays, "network.head")
    fixed = {"MLP_deterministic": told["part"] != "mlp", "Attn_deterministic": told["part"] != "value"}
    fixed |= {"attention_diag_cov": False, "num_det_blocks": 0}
    return streamline_vit(network, arrays["variance"], "diag", "classification", **fixed)


class _Tokens(nn.Module):
    """The embedding, which is deterministic and was computed already."""

    def forward(self, tokens: Tensor, interpolate_pos_encoding: Any = None) -> Tensor:  # noqa: ARG002
        """The tokens themselves."""
        return tokens


class _TheirAttention(nn.Module):
    """Attention with the names that the package reads, returning its scores on demand."""

    def __init__(self, arrays: dict[str, Tensor], path: str, heads: int) -> None:
        super().__init__()
        self.n_head = heads
        self.query, self.key = _linear(arrays, f"{path}.query"), _linear(arrays, f"{path}.key")
        self.c_attn_v, self.c_proj = _linear(arrays, f"{path}.value"), _linear(arrays, f"{path}.out")

    def forward(self, x: Tensor, return_scores: bool = False) -> Any:
        """(B, T, D) -> (B, T, D), and (B, H, T, T) weights."""
        q, k, v = (
            layer(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2) for layer in (self.query, self.key, self.c_attn_v)
        )
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
        mixed = self.c_proj((weights @ v).transpose(1, 2).flatten(2))
        return (mixed, weights) if return_scores else mixed


class _TheirBlock(nn.Module):
    """Names of a block that the package reads; its own forward never runs."""

    def __init__(self, arrays: dict[str, Tensor], path: str, told: dict[str, Any]) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = _norm(arrays, f"{path}.norm1"), _norm(arrays, f"{path}.norm2")
        self.attn = _TheirAttention(arrays, f"{path}.attention", told["heads"])
        self.mlp = nn.Module()
        self.mlp.c_fc, self.mlp.c_proj = _linear(arrays, f"{path}.mlp.0"), _linear(arrays, f"{path}.mlp.2")
        self.mlp.gelu = ACTIVATIONS[told["activation"]]()


def _linear(arrays: dict[str, Tensor], path: str) -> nn.Linear:
    weight = arrays[f"{path}.weight"]
    return _loaded(nn.Linear(weight.shape[1], weight.shape[0]), arrays, path)


def _norm(arrays: dict[str, Tensor], path: str) -> nn.LayerNorm:
    return _loaded(nn.LayerNorm(len(arrays[f"{path}.weight"])), arrays, path)


def _loaded(layer: Any, arrays: dict[str, Tensor], path: str) -> Any:
    layer.load_state_dict({end: arrays[f"{path}.{end}"] for end in ("weight", "bias")})
    return layer


def main() -> None:
    """Run the worker in the folder it is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", type=Path, required=True, help="folder with arrays and told.json")
    work(parser.parse_args().worker)


if __name__ == "__main__":
    main()
