import pytest
import torch
from problems import linear_regression
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

from bayespass import InvalidInput, NotFitted, Posterior
from bayespass.posterior.null_space import NullSpace
from bayespass.testing import check_posterior


def network(inputs=4, hidden=20, outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs)).double().eval()


def data(n=10, seed=1, inputs=4):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, inputs, generator=generator, dtype=torch.float64)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


def trained(steps=150):
    model, (x, y) = network(), data(12)
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def jacobian(model, x):
    found = jacrev(lambda theta: functional_call(model, theta, (x,)))(dict(model.named_parameters()))
    return torch.cat([value.detach().flatten(x.dim()).flatten(2) for value in found.values()], 2).flatten(0, 1)


def flat(posterior):
    return torch.cat([d.flatten(1) for d in posterior.displacements.values()], 1)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def test_functions_vary_off_the_data_alone_with_the_noise_free_kernel_covariance():
    model, (x, y) = network(), data()
    method = NullSpace(model, n_samples=6000, prior_precision=0.5).fit([(x[:4], y[:4]), (x[4:], y[4:])])
    report = method.report_
    assert (report.method, report.solver, report.n_rows, report.n_params) == ("null_space", "direct", 30, 163)
    assert report.residual < 1e-6
    assert report.train_logit_sd < 1e-5
    assert report.rank == pytest.approx(30, abs=0.01)
    assert report.rank_error is None
    displacements = flat(method.posterior())
    squared = displacements.square().sum(1) * 0.5
    assert float(squared.mean()) == pytest.approx(163 - 30, abs=5 * (2 * 133 / 6000) ** 0.5)
    test = data(3, seed=5)[0]
    a, b = jacobian(model, test), jacobian(model, x)
    kernel = (a @ a.mT - a @ b.mT @ torch.linalg.solve(b @ b.mT, b @ a.mT)) / 0.5
    moved = displacements @ a.mT
    assert relative(moved.mT @ moved / 6000, kernel) < 0.1
    assert float((displacements @ b.mT).norm() / moved.norm()) < 1e-5


def test_laplace_samples_have_the_inverse_curvature_as_covariance():
    model, (x, y) = network(hidden=3), data(8)
    method = NullSpace(model, kind="laplace", prior_precision=0.7, n_samples=20_000).fit([(x, y)])
    outputs = jacobian(model, x)
    p = model(x).detach().softmax(-1)
    hessian = torch.block_diag(*(torch.diag_embed(p) - p[:, :, None] * p[:, None]))
    precision = outputs.mT @ hessian @ outputs + 0.7 * torch.eye(outputs.shape[1], dtype=torch.float64)
    found = flat(method.posterior())
    assert relative(found.mT @ found / 20_000, torch.linalg.inv(precision)) < 0.05
    whitened = found @ torch.linalg.cholesky(precision)
    assert relative(whitened.mT @ whitened / 20_000, torch.eye(len(precision)).double()) < 0.05
    assert method.posterior().info.method == "linearised_laplace"
    spectrum = torch.linalg.eigvalsh(precision) - 0.7
    assert method.report_.rank == pytest.approx(float((spectrum / (spectrum + 0.7)).sum()), abs=1e-6)
    with pytest.raises(NotImplementedError, match="inside the solve; fit NullSpace"):
        method.posterior(1.0)
    with pytest.raises(NotImplementedError, match="inside the solve"):
        method.optimize_prior_precision([(x, y)])


@pytest.mark.parametrize("solver", ["direct", "lsmr"])
def test_conjugate_linear_regression(solver):
    problem = linear_regression(60, 5, dtype=torch.float64)
    model = problem.model().eval()
    with torch.no_grad():
        model.weight.copy_(problem.mean[None])
    options = {
        "likelihood": "regression",
        "sigma_noise": problem.sigma_noise,
        "prior_precision": problem.prior_precision,
    }
    method = NullSpace(model, kind="laplace", n_samples=20_000, solver=solver, tolerance=1e-6, **options)
    posterior = method.fit([(problem.inputs, problem.targets)]).posterior()
    assert torch.equal(posterior.mean["weight"][0], problem.mean)
    found = flat(posterior)
    assert relative(found.mT @ found / 20_000, torch.linalg.inv(problem.precision)) < 0.05


def test_a_ridge_is_the_filter_of_the_dense_formula():
    model, (x, y) = network(hidden=3), data(8)
    method = NullSpace(model, kind="ridge_null", ridge=0.3, n_samples=4, seed=7).fit([(x, y)])
    j = jacobian(model, x)
    eps = torch.randn(4, j.shape[1], generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    expected = 0.3 * torch.linalg.solve(j.mT @ j + 0.3 * torch.eye(j.shape[1]).double(), eps.mT).mT
    torch.testing.assert_close(flat(method.posterior()), expected)
    assert method.posterior().info.settings["ridge"] == 0.3


def test_more_rows_than_parameters_are_called_by_their_name():
    model, (x, y) = network(hidden=3), data(40)
    with pytest.warns(
        UserWarning, match=r"120 rows leave 27 parameters no null space worth the name; this is a ridge filter"
    ):
        method = NullSpace(model, n_samples=5).fit([(x, y)])
    report, info = method.report_, method.posterior().info
    assert report.method == info.method == "ridge_null"
    j = jacobian(model, x)
    assert report.ridge == info.settings["ridge"] == pytest.approx(1e-4 * float(j.square().sum()) / 120, rel=0.9)
    eps = torch.randn(5, 27, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = report.ridge * torch.linalg.solve(j.mT @ j + report.ridge * torch.eye(27).double(), eps.mT).mT
    torch.testing.assert_close(flat(method.posterior()), expected)


def test_a_prior_per_parameter_is_projected_in_its_own_metric():
    model, (x, y) = network(), data()
    scale = {"0.weight": 3.0, "2.bias": 0.1}
    found = flat(NullSpace(model, prior_scale=scale, n_samples=4, seed=3).fit([(x, y)]).posterior())
    root = torch.cat([torch.full((k,), v) for k, v in ((80, 3.0), (20, 1.0), (60, 1.0), (3, 0.1))]).double()
    eps = torch.randn(4, 163, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    m = jacobian(model, x) * root
    expected = (eps - eps @ torch.linalg.pinv(m) @ m) * root
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_kernel_of_outputs_is_inside_that_of_losses():
    model, (x, y) = trained(10), data(12)
    loss = NullSpace(model, rows="loss", n_samples=3).fit([(x, y)])
    outputs = NullSpace(model, n_samples=3).fit([(x, y)])
    j = jacobian(model, x)
    slope = torch.block_diag(*(model(x).detach().softmax(-1) - F.one_hot(y, 3))[:, None])
    gradient = slope @ j
    for method in (loss, outputs):
        assert float((flat(method.posterior()) @ gradient.mT).norm() / gradient.norm()) < 1e-6
    assert loss.report_.n_rows == 12
    assert loss.report_.train_logit_sd > 0.1 > 1e-5 > outputs.report_.train_logit_sd
    few = NullSpace(model, rows="random", n_projections=2, n_samples=3).fit([(x, y)])
    assert few.report_.n_rows == 24
    own = NullSpace(model, rows=lambda f, z: F.cross_entropy(f, z, reduction="none")[:, None], n_samples=3).fit(
        [(x, y)]
    )
    torch.testing.assert_close(flat(own.posterior()), flat(loss.posterior()), rtol=1e-4, atol=1e-5)


def test_the_prior_precision_is_a_rescaling_tuned_on_held_out_data():
    model, validation = trained(), data(200, seed=9)
    method = NullSpace(model, n_samples=64).fit([data(12)])
    grid = [10 ** (k / 4) for k in range(-8, 25)]
    tuning = method.optimize_prior_precision(
        [(validation[0][:70], validation[1][:70]), (validation[0][70:], validation[1][70:])], grid
    )
    assert method.prior_precision == tuning.best
    assert not tuning.at_edge
    j, f, d = jacobian(model, validation[0]), model(validation[0]).detach(), flat(method.posterior(1.0))
    moved = (d @ j.mT).view(64, 200, 3)
    for alpha, score in zip(grid[::8], tuning.scores[::8], strict=True):
        probs = torch.softmax(f + torch.cat([moved, -moved]) / alpha**0.5, -1).mean(0)
        assert score == pytest.approx(float(F.nll_loss(probs.log(), validation[1])), abs=1e-6)
    assert tuning.map_score == pytest.approx(float(F.cross_entropy(f, validation[1])), abs=1e-6)
    assert tuning.scores[-1] == pytest.approx(tuning.map_score, abs=1e-3)
    assert min(tuning.scores) < tuning.map_score
    assert "beats the trained network" in tuning.verdict
    report = method.report_
    assert report.val_logit_sd == pytest.approx(float(moved.square().mean().sqrt()) / tuning.best**0.5)
    first, second = method.posterior(1.0), method.posterior(4.0)
    torch.testing.assert_close(flat(second), flat(first) / 2)
    torch.testing.assert_close(flat(first.rescaled(0.5)), flat(second))
    square = sum(float(p.detach().square().sum()) for p in model.parameters())
    assert method.mackay_precision_ == pytest.approx(36 / square, rel=1e-3)
    with pytest.warns(UserWarning, match="edge of the grid"):
        method.optimize_prior_precision([validation], [1e5, 1e6])


@pytest.mark.parametrize("sigma_noise", [0.3, "predicted"])
def test_regression(sigma_noise):
    model, x = network(outputs=2), data(9)[0]
    model = nn.Sequential(model, nn.Unflatten(1, (1, 2))).eval() if sigma_noise == "predicted" else model
    y = x[:, :1].sin() if sigma_noise == "predicted" else x[:, :2].sin()
    options = {"likelihood": "regression", "sigma_noise": sigma_noise, "n_samples": 8}
    method = NullSpace(model, **options).fit([(x, y)])
    assert method.report_.train_logit_sd < 1e-5
    with pytest.warns(UserWarning, match=r"prior_precision = "):
        tuning = method.optimize_prior_precision([(x + 0.5, y)], [10.0, 1e9])
    assert tuning.scores[1] == pytest.approx(tuning.map_score, abs=1e-3)
    assert tuning.temperature_score is None
    assert NullSpace(model, kind="laplace", rows="curvature", **options).fit([(x, y)]).report_.n_rows == 18


def test_iterating_solvers_agree_and_estimate_the_rank():
    model, (x, y) = network(), data()
    exact = flat(NullSpace(model, n_samples=40).fit([(x, y)]).posterior())
    method = NullSpace(model, n_samples=40, solver="lsmr", tolerance=1e-8, max_memory=30_000).fit([(x, y)])
    assert method.report_.solver == "lsmr"
    assert relative(flat(method.posterior()), exact) < 1e-4
    assert abs(method.report_.rank - 30) < 4 * method.report_.rank_error
    assert 0.5 < method.report_.rank_error / (2 * 133 / 40) ** 0.5 < 2


def test_float32_sorted_classes_checkpoints_and_seeds(tmp_path):
    model, (x, y) = network().float(), data(16)
    order = y.argsort()
    loader = [(x[order].float()[k : k + 4], y[order][k : k + 4]) for k in range(0, 16, 4)]
    options = {"n_samples": 3, "solver": "lsmr"}
    whole = NullSpace(model, **options).fit(loader)
    again = NullSpace(model, **options).fit(loader, checkpoint=tmp_path / "run.safetensors")
    resumed = NullSpace(model, **options).fit(loader, checkpoint=tmp_path / "run.safetensors", progress=True)
    assert torch.equal(flat(whole.posterior()), flat(again.posterior()))
    assert torch.equal(flat(whole.posterior()), flat(resumed.posterior()))
    assert not torch.equal(flat(NullSpace(model, seed=1, **options).fit(loader).posterior()), flat(whole.posterior()))
    with pytest.raises(InvalidInput, match="another projection"):
        NullSpace(model, seed=1, **options).fit(loader, checkpoint=tmp_path / "run.safetensors")


def test_the_posterior_is_one(tmp_path):
    model = network()
    method = NullSpace(model, n_samples=50, names=lambda name: name.startswith("2")).fit([data(6)])
    posterior = method.posterior()
    check_posterior(posterior, model)
    posterior.save(tmp_path / "p.safetensors", model)
    loaded = Posterior.load(tmp_path / "p.safetensors", model)
    assert loaded.info == posterior.info
    assert loaded.info.settings["rows"] == "outputs"


def test_training_the_model_later_changes_nothing():
    model, validation = trained(), data(50, seed=9)
    method = NullSpace(model, n_samples=16).fit([data(12)])
    with pytest.warns(UserWarning, match="edge of the grid"):
        before = method.optimize_prior_precision([validation], [0.1, 1e5]).scores
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    with pytest.warns(UserWarning, match="edge of the grid"):
        assert method.optimize_prior_precision([validation], [0.1, 1e5]).scores == before


def test_wrong_arguments_are_named():
    model = network()
    for options, message in (
        ({"kind": "image"}, "kind must be 'null', 'ridge_null' or 'laplace'"),
        ({"kind": "laplace", "rows": "outputs"}, "kind='laplace' takes rows='curvature' or 'loss'"),
        ({"ridge": 1.0}, "ridge belongs to kind='ridge_null'"),
        ({"kind": "ridge_null", "ridge": 0.0}, "ridge must be a positive number"),
        ({"prior_precision": -1.0}, "prior_precision must be a positive number"),
        ({"n_samples": 0}, "n_samples must be a whole number"),
        ({"solver": "ap"}, "solver must be one of"),
        ({"prior_scale": {"9.weight": 1.0}}, "prior_scale names 9.weight"),
        ({"likelihood": "regression"}, "needs sigma_noise"),
        ({"names": ["9.weight"]}, "no parameter named 9.weight"),
    ):
        with pytest.raises(InvalidInput, match=message):
            NullSpace(model, **options)
    with pytest.raises(InvalidInput, match="training mode"):
        NullSpace(network().train())
    method = NullSpace(model)
    for read in (
        method.posterior,
        lambda: method.report_,
        lambda: method.mackay_precision_,
        lambda: method.optimize_prior_precision([]),
    ):
        with pytest.raises(NotFitted, match="call fit"):
            read()
    with pytest.raises(InvalidInput, match="yields no batch"):
        method.fit([])
    with pytest.raises(InvalidInput, match="grid must hold positive"):
        NullSpace(model, n_samples=2).fit([data()]).optimize_prior_precision([data()], [0.0, 1.0])


class Keyword(nn.Module):
    """Called as a language model is: by keywords, and returning a mapping."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(6, 4), nn.Linear(4, 3)

    def forward(self, tokens, mask):
        return {"logits": self.head((self.table(tokens).tanh() * mask[..., None]).sum(1))}


def test_batches_of_keywords_and_of_different_lengths():
    torch.manual_seed(0)
    model = Keyword().double().eval()
    loader = [
        {
            "tokens": torch.randint(6, (2, length)),
            "mask": torch.ones(2, length).double(),
            "labels": torch.tensor([0, 2]),
        }
        for length in (3, 4, 5)
    ]
    for solver in ("direct", "lsmr"):
        method = NullSpace(model, n_samples=3, solver=solver, tolerance=1e-6).fit(loader)
        assert method.report_.n_rows == 18
        assert method.report_.train_logit_sd < 1e-4
        assert float(flat(method.posterior()).norm()) > 1


def test_an_autoencoder_keeps_its_reconstruction_errors():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).double().eval(), data(10)[0]

    def errors(f, target):
        return (f - target).square().sum(1, keepdim=True)

    method = NullSpace(model, "regression", 1.0, rows=errors, n_samples=5).fit([(x, x)])
    gradient = 2 * torch.block_diag(*(model(x).detach() - x)[:, None]) @ jacobian(model, x)
    assert method.report_.n_rows == 10
    assert float((flat(method.posterior()) @ gradient.mT).norm() / gradient.norm()) < 1e-6
    assert method.posterior().info.settings["rows"] == "a function"


def test_fitting_inside_inference_mode_changes_nothing():
    model, (x, y) = network(), data(6)
    expected = NullSpace(model, n_samples=2).fit([(x, y)])
    with torch.inference_mode():
        found = NullSpace(model, n_samples=2).fit([(x.clone(), y.clone())])
        with pytest.warns(UserWarning, match="edge of the grid") as caught:  # which points at this line
            found.optimize_prior_precision([(x.clone(), y.clone())], grid=[1.0, 10.0, 1e5])
    assert caught[0].filename == __file__
    assert torch.equal(flat(expected.posterior(1.0)), flat(found.posterior(1.0)))


def test_data_and_names_that_leave_nothing_are_named():
    model, (x, y) = network(), data(6)
    with pytest.raises(InvalidInput, match="every batch of the loader is empty"):
        NullSpace(model).fit([(x[:0], y[:0])])
    with pytest.raises(InvalidInput, match="pass a DataLoader"):
        NullSpace(model).fit(list(zip(x, y, strict=True)))
    method = NullSpace(model, n_samples=2).fit([(x[:0], y[:0]), (x, y)])
    assert method.n_data_ == 6
    with pytest.raises(InvalidInput, match="no block of data"):
        method.optimize_prior_precision([(x[:0], y[:0])])
    with pytest.raises(InvalidInput, match="grid must hold positive, finite"):
        method.optimize_prior_precision([(x, y)], grid=[1.0, float("nan")])
    with pytest.raises(InvalidInput, match=r"prior_scale of 0\.weight must be a positive number"):
        NullSpace(model, prior_scale={"0.weight": -1.0})
    frozen = network().requires_grad_(False)
    with pytest.raises(InvalidInput, match="no random parameter"):
        NullSpace(frozen)
    with pytest.raises(InvalidInput, match=r"0\.weight is frozen"):
        NullSpace(frozen, names=["0.weight"])
