"""Adapters against the libraries they read: laplace-torch, ivon-opt.

Runs where those are installed (docs of the environment: peers), not where bayespass is tested:

    python benchmarks/adapters_check.py            # largest relative errors; exits 1 on a mismatch
    python benchmarks/adapters_check.py --record   # also writes the fixture of tests/integrations

The fixture holds, for every structure, what laplace-torch had fitted and the covariance that laplace-torch made
of it, so that the tests compare with its numbers without it.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from bayespass.errors import InvalidInput
from bayespass.integrations.ivon_opt import from_ivon_opt
from bayespass.integrations.laplace_torch import from_laplace_torch
from bayespass.posterior.base import Posterior

DATA = Path(__file__).parent.parent / "tests" / "integrations" / "data"
TOLERANCE = 1e-4  # float32 inverses of matrices with a condition number of up to 1e3
ROWS = 60
SUBNETWORK = [0, 3, 5, 14, 20, 21]


@dataclass(frozen=True)
class Case:
    """One fitted object of laplace-torch.

    Args:
        network: of `NETWORKS`.
        likelihood: as laplace-torch calls it.
        subset: subset_of_weights.
        structure: hessian_structure.
        prior: a scalar prior precision, or one drawn per layer or per parameter.
        settings: further arguments of `Laplace`.
    """

    network: str
    likelihood: str
    subset: str
    structure: str
    prior: str = "scalar"
    settings: dict[str, float | bool] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Short and unique."""
        extra = "".join(f"-{key}={value:g}" for key, value in self.settings.items())
        return f"{self.network}-{self.likelihood}-{self.subset}-{self.structure}-{self.prior}{extra}"


def mlp() -> nn.Sequential:
    """Two linear layers, 26 parameters."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).eval()


def conv() -> nn.Sequential:
    """A convolution with two input channels and a linear layer."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)).eval()


NETWORKS = {"mlp": mlp, "conv": conv}

STRUCTURES = ("diag", "kron", "full")
NOISY: dict[str, float | bool] = {"sigma_noise": 0.3, "temperature": 0.5}

CASES = [
    *(
        Case("mlp", likelihood, subset, structure)
        for likelihood in ("classification", "regression")
        for subset in ("all", "last_layer")
        for structure in STRUCTURES
    ),
    *(Case("mlp", "regression", "all", structure, "layerwise", NOISY) for structure in STRUCTURES),
    Case("mlp", "regression", "last_layer", "diag", "diagonal", NOISY),  # a last layer takes one per layer as kron only
    Case("mlp", "regression", "last_layer", "kron", "layerwise", NOISY),
    Case("mlp", "regression", "last_layer", "full", "diagonal", NOISY),
    *(Case("mlp", "classification", "all", s, "diagonal", {"prior_mean": 0.7}) for s in ("diag", "full")),
    Case("mlp", "classification", "all", "kron", "scalar", {"damping": True}),
    *(Case("mlp", "regression", "subnetwork", s, "scalar", {"sigma_noise": 0.5}) for s in ("diag", "full")),
    *(Case("conv", "classification", "all", structure, "layerwise") for structure in STRUCTURES),
]


def inputs_of(case: Case, rows: int = ROWS, seed: int = 0) -> Tensor:
    """Inputs for its network."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, *((3,) if case.network == "mlp" else (2, 3, 3)), generator=generator)


def fitted(case: Case) -> tuple[Any, nn.Module]:
    """The object of laplace-torch, and the network it was fitted on."""
    from laplace import Laplace
    from torch.utils.data import DataLoader, TensorDataset

    model, inputs = NETWORKS[case.network](), inputs_of(case)
    generator = torch.Generator().manual_seed(3)
    classes, values = torch.randint(2, (ROWS,), generator=generator), torch.randn(ROWS, 2, generator=generator)
    loader = DataLoader(
        TensorDataset(inputs, classes if case.likelihood == "classification" else values), batch_size=20
    )
    parts = list((model if case.subset == "all" else model[-1]).parameters())
    sizes = {"scalar": 0, "layerwise": len(parts), "diagonal": sum(p.numel() for p in parts)}
    prior = torch.rand(sizes[case.prior], generator=generator) * 3 + 0.5 if sizes[case.prior] else 2.0
    chosen = {"subnetwork_indices": torch.tensor(SUBNETWORK)} if case.subset == "subnetwork" else {}
    la = Laplace(
        model,
        case.likelihood,
        subset_of_weights=case.subset,
        hessian_structure=case.structure,
        prior_precision=prior,
        **chosen,
        **case.settings,
    )
    la.fit(loader)
    return la, model


def covariance_of(la: Any, case: Case) -> Tensor:
    """The dense covariance that laplace-torch itself makes of its posterior, over the flat vector."""
    if case.structure == "diag":
        found = torch.diag(la.posterior_variance)
    elif case.structure == "full":
        found = la.posterior_covariance
    else:
        found = la.posterior_precision.to_matrix(exponent=-1)
    if case.subset != "subnetwork":
        return found.detach()
    places = la.backend.subnetwork_indices
    whole = torch.zeros(la.n_params, la.n_params)
    whole[places[:, None], places] = found.detach()
    return whole


def dense(posterior: Posterior) -> Tensor:
    """Our covariance over the flat vector of its own parameters, column by column."""
    size = sum(mean.numel() for mean in posterior.mean.values())
    columns = []
    for k in range(size):
        unit = torch.zeros(size)
        unit[k] = 1
        parts = unit.split([mean.numel() for mean in posterior.mean.values()])
        vector = {n: part.view(m.shape) for (n, m), part in zip(posterior.mean.items(), parts, strict=True)}
        columns.append(torch.cat([value.flatten() for value in posterior.covariance_times(vector).values()]))
    return torch.stack(columns, 1)


def places_of(posterior: Posterior, model: nn.Module, subset: str) -> Tensor:
    """Where the posterior's entries lie in the flat vector of laplace-torch."""
    start, found = 0, []
    for name, parameter in model.named_parameters():
        if subset == "last_layer" and name not in posterior.names:
            continue
        if name in posterior.names:
            found.append(torch.arange(start, start + parameter.numel()))
        start += parameter.numel()
    return torch.cat(found)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest |difference| of two covariances, in units of the standard deviations of row and column."""
    sd = expected.diagonal().clamp(min=1e-12).sqrt()
    return float(((found - expected) / torch.outer(sd, sd)).abs().max())


def check_laplace(case: Case, record: dict[str, Tensor]) -> tuple[float, float, float | None, dict[str, Any]]:
    """Errors of mean, covariance and output covariance, and the fixture's entry."""
    la, model = fitted(case)
    posterior = from_laplace_torch(la, model)
    expected, places = covariance_of(la, case), places_of(posterior, model, case.subset)
    outside = torch.ones(len(expected), dtype=torch.bool)
    outside[places] = False
    assert float(expected[outside].abs().max()) == 0 if outside.any() else True
    flat = torch.cat([mean.flatten() for mean in posterior.mean.values()])
    mean_error = float((flat - la.mean[places]).abs().max())
    error = relative_error(dense(posterior), expected[places[:, None], places])
    output_error = None
    if case.likelihood == "regression":  # la(x) returns the output covariance of the linearised network
        inputs = inputs_of(case, rows=5, seed=9)
        base = dict(model.named_parameters())

        def outputs(values: dict[str, Tensor]) -> Tensor:
            return functional_call(model, {**base, **values}, (inputs,))

        jacobian = jacrev(outputs)({name: base[name].detach() for name in posterior.names})
        flat_jacobian = torch.cat([jacobian[name].flatten(2) for name in posterior.names], 2)
        ours = flat_jacobian @ dense(posterior) @ flat_jacobian.mT
        theirs = la(inputs)[1].detach()
        output_error = max(relative_error(a, b) for a, b in zip(ours, theirs, strict=True))
    entry = {**asdict(case), "n_data": la.n_data, "temperature": la.temperature, "sigma_noise": float(la.sigma_noise)}
    key = case.name
    record |= {f"{key}/mean": la.mean, f"{key}/covariance": expected, f"{key}/prior": la.prior_precision}
    precision = la.posterior_precision
    if case.structure == "kron":
        entry |= {"factors": [len(values) for values in precision.eigenvalues], "is_damped": precision.damping}
        record |= {f"{key}/deltas": precision.deltas}
        for i, (vectors, values) in enumerate(zip(precision.eigenvectors, precision.eigenvalues, strict=True)):
            record |= {f"{key}/vectors/{i}/{j}": vector for j, vector in enumerate(vectors)}
            record |= {f"{key}/values/{i}/{j}": value for j, value in enumerate(values)}
    else:
        record |= {f"{key}/precision": precision}
    return mean_error, error, output_error, entry


def check_ivon(groups: int, steps: int) -> tuple[float, float]:
    """Largest deviation of the draws' variance and mean from the converted ones, in standard errors."""
    import ivon

    model = mlp()
    settings = {"lr": 0.1, "ess": 80.0, "weight_decay": 1e-2, "hess_init": 0.3, "beta2": 0.9}
    one = [{"params": list(model.parameters())}]
    two = [{"params": list(model[2].parameters()), "weight_decay": 0.2}, {"params": list(model[0].parameters())}]
    optimizer = ivon.IVON(one if groups == 1 else two, **settings)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        inputs = torch.randn(20, 3, generator=generator)
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), (inputs[:, 0] > 0).long()).backward()
        optimizer.step()
    posterior = from_ivon_opt(optimizer, model)
    if groups == 1:
        from_state = from_ivon_opt(optimizer.state_dict(), model)
        assert all(torch.equal(from_state.variance[n], posterior.variance[n]) for n in posterior.names)
    if steps:
        with optimizer.sampled_params():
            refusal = ""
            try:
                from_ivon_opt(optimizer, model)
            except InvalidInput as error:
                refusal = str(error)
        assert "sampled_params" in refusal
    draws: dict[str, list[Tensor]] = {name: [] for name in posterior.names}
    torch.manual_seed(0)
    for _ in range(20_000):
        with optimizer.sampled_params():
            for name, parameter in model.named_parameters():
                draws[name].append(parameter.detach().clone())
    variance_z, mean_z = [], []
    for name, values in draws.items():
        gap = torch.stack(values).double() - posterior.mean[name]
        expected = posterior.variance[name].double()
        variance_z.append(((gap.square().mean(0) / expected - 1).abs() / (2 / len(gap)) ** 0.5).max())
        mean_z.append((gap.mean(0).abs() / (expected / len(gap)).sqrt()).max())
    return float(max(variance_z)), float(max(mean_z))


def main() -> int:
    """Check everything; 1 if something does not fit."""
    record: dict[str, Tensor] = {}
    entries, failed = {}, False
    print(f"{'laplace-torch':<72}{'mean':>10}{'covariance':>12}{'outputs':>10}")
    for case in CASES:
        mean_error, error, output_error, entries[case.name] = check_laplace(case, record)
        bad = max(mean_error, error, output_error or 0.0) > TOLERANCE
        failed |= bad
        shown = "" if output_error is None else f"{output_error:.1e}"
        print(f"{case.name:<72}{mean_error:>10.1e}{error:>12.1e}{shown:>10}{'  MISMATCH' if bad else ''}")
    print(f"{'ivon-opt, 20,000 draws':<72}{'mean z':>10}{'variance z':>12}")
    for groups, steps in ((1, 0), (1, 50), (2, 50)):
        variance_z, mean_z = check_ivon(groups, steps)
        bad = max(variance_z, mean_z) > 4.5
        failed |= bad
        print(f"{f'{groups} groups, {steps} steps':<72}{mean_z:>10.2f}{variance_z:>12.2f}{'  MISMATCH' if bad else ''}")
    if "--record" in sys.argv and not failed:
        from importlib.metadata import version

        DATA.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().contiguous().clone() for k, v in record.items()}, DATA / "laplace_torch.safetensors")
        header = {"laplace-torch": version("laplace-torch"), "torch": torch.__version__, "cases": entries}
        (DATA / "laplace_torch.json").write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
