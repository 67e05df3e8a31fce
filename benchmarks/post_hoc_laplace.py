r"""The Laplace family beside laplace-torch 0.3: the same posteriors, their time and memory, and what each fits.

    python benchmarks/post_hoc_laplace.py --output FILE [--seeds 0]

under an interpreter that has both libraries; `rows` starts it there, $BAYESPASS_PEERS_PYTHON or
.peers/bin/python. That environment (never with torchvision, with which `import laplace` fails):

    python3 -m venv .peers && . .peers/bin/activate
    pip install torch==2.13.0 numpy scikit-learn scipy
    echo 'torch==2.13.0' > constraints.txt
    pip install --no-deps laplace-torch==0.3 asdfghjkl==0.1a4 backpack-for-pytorch==1.7.1 \
        curvlinops-for-pytorch==3.0.1 einconv==0.1.0 einops==0.8.2 linear-operator==0.6.1 unfoldNd==0.2.3 \
        opt-einsum==3.4.0 torchmetrics==1.9.0 lightning-utilities==0.15.3 packaging tqdm
    pip install -c constraints.txt jaxtyping safetensors rich typer matplotlib jinja2
    pip install -e . --no-deps

`digits` (1,293 training, 360 test rows) and one thread. Networks: the MLP 64-128-128-10 with ReLU, and two
convolutions of 8 and 16 channels with pooling; 30 epochs of Adam. Kinds: diag and kron of all weights; full and
kron of the last layer; prior precision 100 in both libraries. Every (network, kind, library) is a process of its own:

    fit, predict    CPU seconds, the least of several runs; predict is the linearised predictive of the test rows,
                    ours with `Linearised` (joint covariance), theirs pred_type="glm", link_approx="probit"
    memory          growth of the peak resident memory (VmHWM) over fit and predict, from after the imports

laplace-torch runs with both of its backends, BackPACK and curvlinops, and each ratio takes the better of the two
(diag of all weights with BackPACK alone: curvlinops took 100 times as long and 10 GiB).
`difference` is the largest relative difference of marginal posterior variances from the last backend that runs.
The libraries agree on the Gauss-Newton matrix and, with curvlinops, on its Kronecker factors ("expand", biases with
the block G of their own). BackPACK's for a convolution are others: its inputs' factor is a sum, not a mean, over
positions. Probabilities differ: ours keep the correlation of logits.

`tuning` times marginal likelihood and grid search (kron, MLP, 144 held-out rows) per grid point. `thousand` is a
last layer of 1,000 classes on 512 features: fit on 320 rows, predict 32, theirs under an address space of 12 GiB.
`architectures` are tiny networks: does kron of all weights fit and predict?
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
PRIOR = 100.0
KINDS = {"diag": ("all", "diag"), "kron": ("all", "kron"), "last full": ("last_layer", "full")} | {
    "last kron": ("last_layer", "kron")
}
THEIRS = ("BackPackGGN", "CurvlinopsGGN")
ADDRESS_SPACE = 12 * 2**30
GRID = [10 ** (0.8 * k - 4) for k in range(11)]
Row = dict[str, Any]


def rows(seeds: tuple[int, ...] = (0,)) -> list[Row]:
    """Every figure, computed by the interpreter that has laplace-torch.

    Args:
        seeds: of the networks.
    """
    python = os.environ.get("BAYESPASS_PEERS_PYTHON", str(ROOT / ".peers" / "bin" / "python"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [python, __file__, "--output", str(path), "--seeds", *map(str, seeds)]
        subprocess.run(command, check=True)
        return json.loads(path.read_text(encoding="utf-8"))["table"]


def summary(table: list[Row]) -> dict[str, float]:
    """Named figures: geometric means over networks, kinds and seeds of ours over theirs.

    Args:
        table: what `rows` returns.
    """
    found = {}
    for figure, key in (("fit_time", "fit_s"), ("predict_time", "predict_s"), ("memory", "memory_mib")):
        ratios = [_ratio(table, row, key) for row in table if row.get("library") == "bayespass" and key in row]
        found[f"laplace.{figure}_over_laplace_torch"] = geometric_mean(ratios)
    found["laplace.max_posterior_difference"] = max(row["difference"] for row in table if "difference" in row)
    thousand = [row for row in table if row["task"] == "thousand" and row["library"] == "bayespass"]
    found["last_layer_1000_classes.megabytes"] = max(row["memory_mib"] for row in thousand) * 2**20 / 1e6
    nets = [row for row in table if row["task"] == "architectures"]
    found["laplace.architectures_here"] = sum(row["bayespass"] == "ok" for row in nets)
    found["laplace.architectures_only_here"] = sum(
        row["bayespass"] == "ok" and all(row[name] != "ok" for name in THEIRS) for row in nets
    )
    for search in ("marglik", "gridsearch"):
        ours, theirs = (
            next(row[f"{search}_s_per_point"] for row in table if row["task"] == "tuning" and row["library"] == library)
            for library in ("bayespass", THEIRS[0])
        )
        found[f"laplace.{search}_time_per_point_over_laplace_torch"] = ours / theirs
    return found


def _ratio(table: list[Row], ours: Row, key: str) -> float:
    """Ours over the better of their backends."""
    same = [r for r in table if all(r.get(k) == ours.get(k) for k in ("task", "kind", "seed")) and r is not ours]
    theirs = [row[key] for row in same if key in row]
    return ours[key] / min(theirs) if theirs else math.nan


def geometric_mean(values: list[float]) -> float:
    """Of the finite values."""
    logs = [math.log(value) for value in values if math.isfinite(value)]
    return math.exp(sum(logs) / len(logs))


def measured(seeds: list[int]) -> list[Row]:
    """All cells, each in a process of its own."""
    table: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed in seeds:
            for task in ("mlp", "cnn"):
                save_file(trained(task, seed).state_dict(), folder / f"{task}-{seed}.safetensors")
                for kind in KINDS:
                    table += compared(task, kind, seed, folder)
        for library in ("bayespass", THEIRS[0]):
            table.append(cell("tuning", "kron", library, seeds[0], folder))
        for kind in ("diag", "kron"):
            for library in ("bayespass", THEIRS[1]):
                table.append(cell("thousand", kind, library, seeds[0], folder))
        for name in ARCHITECTURES:
            row = {"task": "architectures", "kind": name}
            for library in ("bayespass", *THEIRS):
                row[library] = cell("architectures", name, library, 0, folder)["status"]
            table.append(row)
    return table


def compared(task: str, kind: str, seed: int, folder: Path) -> list[Row]:
    """One kind of posterior in all libraries; ours with the largest relative difference of variances."""
    libraries = ("bayespass", *(THEIRS[:1] if kind == "diag" else THEIRS))
    found = [cell(task, kind, library, seed, folder) for library in libraries]
    own, other = (folder / f"{task}-{kind}-{library}-{seed}" for library in (libraries[0], libraries[-1]))
    found[0]["difference"] = float((load_file(own)["variance"] / load_file(other)["variance"] - 1).abs().max())
    return found


def cell(task: str, kind: str, library: str, seed: int, folder: Path) -> Row:
    """Run one cell in a new process."""
    command = [sys.executable, __file__, "--cell", task, kind, library, str(seed), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    told = {"task": task, "kind": kind, "library": library, "seed": seed}
    if done.returncode or not lines:
        return {**told, "status": (done.stderr.strip().splitlines() or ["killed"])[-1][:200]}
    row = {**told, **json.loads(lines[-1])}
    print(json.dumps(row), file=sys.stderr)
    return row


def run_cell(task: str, kind: str, library: str, seed: int, folder: Path) -> Row:
    """The cell itself."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    warnings.simplefilter("ignore")
    if task == "architectures":
        return {"status": fits(kind, library)}
    if task == "thousand":
        return thousand(kind, library)
    model = network(task if task != "tuning" else "mlp")
    model.load_state_dict(load_file(folder / f"{'mlp' if task == 'tuning' else task}-{seed}.safetensors"))
    model.eval()
    data = digits()
    if task == "tuning":
        return tuned(model, library, data)
    inputs, batches = data["test"][0], loader(data["train"])
    imported(library)
    before = peak()
    fit = ours(model, kind) if library == "bayespass" else theirs(model, kind, library)
    slow = library == "CurvlinopsGGN"
    fit_s, made = least(lambda: fit(batches), 1 if slow else 5)
    predict_s, _ = least(lambda: predict(model, made, library, inputs), 1 if slow else 3)
    variance = variances(made, library)
    save_file({"variance": variance.float().contiguous()}, folder / f"{task}-{kind}-{library}-{seed}")
    return {"fit_s": fit_s, "predict_s": predict_s, "memory_mib": peak() - before, "status": "ok"}


def imported(library: str) -> None:
    """Import everything that a run needs, so that its memory is not counted."""
    if library == "bayespass":
        import bayespass  # noqa: F401
        from bayespass.predict import linearised  # noqa: F401
    else:
        from laplace import Laplace, curvature  # noqa: F401


def ours(model: nn.Module, kind: str) -> Callable[[Any], Any]:
    """Fit with bayespass."""
    from bayespass import Laplace

    subset, structure = KINDS[kind]
    last = [name for name, _ in model.named_parameters()][-2:]
    names = last if subset == "last_layer" else None

    def fit(batches: Any) -> Any:
        laplace = Laplace(model, hessian_structure=structure, names=names, prior_precision=PRIOR)  # type: ignore[arg-type]
        return laplace.fit(batches).posterior()

    return fit


def theirs(model: nn.Module, kind: str, backend: str) -> Callable[[Any], Any]:
    """Fit with laplace-torch."""
    import laplace
    from laplace import curvature

    subset, structure = KINDS[kind]

    def fit(batches: Any) -> Any:
        found = laplace.Laplace(
            model,
            "classification",
            subset_of_weights=subset,
            hessian_structure=structure,
            prior_precision=PRIOR,
            backend=getattr(curvature, backend),
        )
        found.fit(batches)
        return found

    return fit


def predict(model: nn.Module, made: Any, library: str, inputs: Any) -> Tensor:
    """Class probabilities of the linearised network."""
    if library != "bayespass":
        return made(inputs, pred_type="glm", link_approx="probit")
    from bayespass.predict.linearised import Linearised

    return Linearised(model, made)(*inputs if isinstance(inputs, tuple) else (inputs,)).probs


def variances(made: Any, library: str) -> Tensor:
    """All marginal posterior variances, parameters in the model's order."""
    if library == "bayespass":
        return torch.cat([value.flatten() for value in made.variance.values()])
    precision = made.posterior_precision
    if hasattr(precision, "diag") and not isinstance(precision, Tensor):
        return precision.diag(exponent=-1)
    return 1 / precision if precision.dim() == 1 else made.posterior_covariance.diagonal()


def tuned(model: nn.Module, library: str, data: dict[str, tuple[Tensor, Tensor]]) -> Row:
    """CPU seconds per grid point or step of both searches."""
    batches, held_out = loader(data["train"]), loader(data["validation"])
    if library == "bayespass":
        from bayespass import Laplace
        from bayespass.predict.linearised import Linearised

        method = Laplace(model, hessian_structure="kron").fit(batches)
        n_points = len(GRID)
        marglik, _ = least(lambda: method.optimize_prior_precision("marglik", grid=GRID), 3)
        by_layer, _ = least(lambda: method.optimize_prior_precision("marglik", per_layer=True), 3)
        grid, tuning = least(lambda: method.optimize_prior_precision("gridsearch", held_out, GRID, Linearised), 1)
        found = {"marglik_by_layer_s": by_layer, "best": tuning.best}
        steps = n_points
    else:
        made = theirs(model, "kron", library)(batches)
        steps, n_points = 100, 5
        marglik, _ = least(lambda: made.optimize_prior_precision("glm", method="marglik", n_steps=steps), 1)
        search = {"val_loader": held_out, "grid_size": n_points, "prior_structure": "scalar"}
        grid, _ = least(lambda: made.optimize_prior_precision("glm", method="gridsearch", **search), 1)
        found = {"best": float(made.prior_precision)}
    return found | {
        "marglik_s_per_point": marglik / steps,
        "gridsearch_s_per_point": grid / n_points,
        "status": "ok",
    }


def thousand(kind: str, library: str) -> Row:
    """1,000 classes on 512 features: the growth of the peak memory, or the error."""
    model = nn.Sequential(nn.Linear(20, 512), nn.ReLU(), nn.Linear(512, 1000)).eval()
    batches = loader((torch.randn(320, 20), torch.randint(1000, (320,))), 32)
    imported(library)
    before = peak()
    if library == "bayespass":
        from bayespass import Laplace

        fit_s, made = least(
            lambda: Laplace(model, hessian_structure=kind, names=["2.weight", "2.bias"]).fit(batches).posterior(), 1
        )
    else:
        import laplace
        from laplace.curvature import CurvlinopsGGN

        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        made = laplace.Laplace(
            model, "classification", subset_of_weights="last_layer", hessian_structure=kind, backend=CurvlinopsGGN
        )
        fit_s, _ = least(lambda: made.fit(batches), 1)
    fitted = peak() - before
    predict_s, _ = least(lambda: predict(model, made, library, torch.randn(32, 20)), 1)
    return {
        "fit_s": fit_s, "predict_s": predict_s, "fit_memory_mib": fitted, "memory_mib": peak() - before, "status": "ok",
    }  # fmt: skip


def least(run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """The least CPU seconds of some runs, and what the last returned."""
    seconds, result = [], None
    for _ in range(repeats):
        start = time.process_time()
        result = run()
        seconds.append(time.process_time() - start)
    return min(seconds), result


def peak() -> float:
    """Peak resident memory of this process so far, in MiB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def digits() -> dict[str, tuple[Tensor, Tensor]]:
    """Training, validation and test rows of the 8 x 8 digits."""
    from sklearn.datasets import load_digits

    inputs, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(inputs, dtype=torch.float32) / 16, torch.tensor(labels, dtype=torch.long)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    parts = dict(zip(("train", "validation", "test"), order.split([1293, 144, 360]), strict=True))
    return {name: (x[place], y[place]) for name, place in parts.items()}


def loader(data: tuple[Tensor, Tensor], size: int = 128) -> Any:
    """Batches in order."""
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), size)


def network(task: str) -> nn.Sequential:
    """The MLP or the CNN, untrained."""
    if task == "mlp":
        return nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )  # fmt: skip
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def trained(task: str, seed: int) -> nn.Sequential:
    """30 epochs of Adam."""
    torch.manual_seed(seed)
    model, (inputs, labels) = network(task), digits()["train"]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(30):
        for rows_ in torch.randperm(len(inputs)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[rows_]), labels[rows_]).backward()
            optimizer.step()
    return model


class Custom(nn.Module):
    """A module of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.second(torch.tanh(self.first(x)))


class Reused(Custom):
    """A layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.second(torch.tanh(self.first(torch.tanh(self.first(x)))))


class Named(Custom):
    """Logits in a dict."""

    def forward(self, x: Tensor) -> Any:
        """Logits by name."""
        return {"logits": super().forward(x)}


class Encoder(nn.Module):
    """One transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.layer(x).mean(1))


class ViT(nn.Module):
    """A class token, attention by one linear layer for queries, keys and values, layer norms."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.last, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(torch.softmax(q @ k.mT / 8**0.5, -1) @ v)
        return self.head(self.last(x)[:, 0])


class Words(nn.Module):
    """Embedding and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4), Custom()
        self.head.first = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.table(x).mean(1))


class Recurrent(nn.Module):
    """An LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(5, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.cell(x)[0][:, -1])


def _floats(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(12, *shape)


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "MLP Sequential": (lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), _floats(5)),
    "custom Module": (Custom, _floats(5)),
    "CNN": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)), _floats(1, 6, 6),
    ),
    "CNN + BatchNorm2d": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)),
        _floats(1, 6, 6),
    ),
    "Conv1d": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)), _floats(2, 6)),
    "TransformerEncoderLayer": (Encoder, _floats(4, 8)),
    "ViT-like": (ViT, _floats(4, 8)),
    "Embedding + MLP": (Words, lambda: torch.randint(9, (12, 4))),
    "LSTM": (Recurrent, _floats(4, 5)),
    "reused Linear": (Reused, _floats(5)),
    "dict output": (Named, _floats(5)),
}  # fmt: skip


def fits(name: str, library: str) -> str:
    """Whether kron of all weights fits and predicts finite probabilities: "ok", or the error."""
    make, draw = ARCHITECTURES[name]
    model, inputs = make().eval(), draw()
    batches = loader((inputs, torch.arange(len(inputs)) % 3), 6)
    try:
        made = (ours(model, "kron") if library == "bayespass" else theirs(model, "kron", library))(batches)
        probs = predict(model, made, library, inputs)
    except Exception as error:  # whatever it says is the result
        return f"{type(error).__name__}: {error}".splitlines()[0][:120]
    good = bool(torch.isfinite(probs).all()) and float((probs.sum(-1) - 1).abs().max()) < 1e-3
    return "ok" if good else "probabilities that are not finite or do not sum to one"


def main() -> None:
    """Run all cells, or one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--cell", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        task, kind, library, seed, folder = arguments.cell
        print(json.dumps(run_cell(task, kind, library, int(seed), Path(folder))))
        return
    table = measured(arguments.seeds)
    text = json.dumps({"summary": summary(table), "table": table}, indent=1)
    arguments.output.write_text(text, encoding="utf-8")
    print(json.dumps(summary(table), indent=1))


if __name__ == "__main__":
    main()
