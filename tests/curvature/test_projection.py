import warnings

import pytest
import torch
from torch import nn

from bayespass import InvalidInput
from bayespass.curvature import projection
from bayespass.curvature.krylov import BlockFactors, Sweeps, factorise
from bayespass.curvature.operator import RowOperator
from bayespass.curvature.projection import plan, project
from bayespass.curvature.row_blocks import split_blocks
from bayespass.demo.models import SmallCNN, SmallViT

ITERATIVE = ("lsmr", "lsmr_plain", "cgmn", "gk", "cyclic")


def operator_of(model=None, n=12, shape=(6,), dtype=torch.float64, size=4, **options):
    torch.manual_seed(0)
    model = (
        (nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)) if model is None else model()).to(dtype).eval()
    )
    inputs, targets = torch.randn(n, *shape, dtype=dtype), torch.arange(n) % 3
    names = [name for name, _ in model.named_parameters()]
    return RowOperator(model, names, split_blocks([(inputs, targets)], size), **options)


def matrix_of(operator):
    unit = torch.eye(operator.width, dtype=operator.dtype)
    return torch.cat([operator.times(b, unit) for b in range(len(operator.blocks))], 1).mT


def kernel_of(matrix, cut=1e-9):
    _, s, vh = torch.linalg.svd(matrix.double())
    row_space = vh[: int((s > cut * s[0]).sum())]
    return torch.eye(matrix.shape[1], dtype=torch.float64) - row_space.mT @ row_space


def noise(operator, size=3, seed=1):
    return torch.randn(size, operator.width, generator=torch.Generator().manual_seed(seed), dtype=operator.dtype)


@pytest.mark.parametrize("ridge", [0.0, 0.2])
def test_direct_is_the_projection(ridge):
    operator = operator_of(ridge=ridge)
    vectors = noise(operator)
    kept = vectors.clone()
    found = project(operator, vectors, "direct", 1e-6)
    matrix = matrix_of(operator)
    torch.testing.assert_close(found.vectors, vectors @ kernel_of(matrix), rtol=1e-5, atol=1e-6)
    assert torch.equal(vectors, kept)
    assert found.converged
    assert found.residual < 1e-6
    assert float((found.vectors @ matrix.mT).norm() / (vectors @ matrix.mT).norm()) == pytest.approx(
        found.residual, rel=0.1, abs=1e-12
    )
    again = project(operator, found.vectors, "direct", 1.0)
    torch.testing.assert_close(again.vectors, found.vectors, rtol=1e-6, atol=1e-6)
    inner = matrix[:, : operator.n_params]
    expected = torch.linalg.eigvalsh(inner @ inner.mT)
    assert found.rank == pytest.approx(float((expected / (expected + ridge)).sum()), abs=1e-3)


@pytest.mark.parametrize("kind", ["mlp", "cnn", "vit"])
@pytest.mark.parametrize(
    ("dtype", "solver", "limit"),
    [(torch.float64, "direct", 1e-6), (torch.float32, "direct", 1e-3), (torch.float32, "lsmr", 1e-2)],
)
def test_training_outputs_do_not_move(kind, dtype, solver, limit):
    make, shape = {
        "mlp": (None, (6,)),
        "cnn": (lambda: SmallCNN(2, 3), (1, 8, 8)),
        "vit": (lambda: SmallViT(8, 1, 2, 3), (1, 8, 8)),
    }[kind]
    operator = operator_of(make, 12, shape, dtype)
    assert operator.n_rows < operator.n_params
    vectors = noise(operator)
    found = project(operator, vectors, solver, limit)
    moved, before = (
        torch.cat([operator.times(b, v) for b in range(len(operator.blocks))], 1).norm()
        for v in (found.vectors, vectors)
    )
    assert float(moved / before) <= limit
    assert found.converged
    assert float(found.vectors.norm()) > 0.5 * float(vectors.norm())


@pytest.mark.parametrize("solver", ITERATIVE)
@pytest.mark.parametrize("ridge", [0.0, 1.0])
def test_the_limit_of_every_iteration_is_the_direct_one(solver, ridge):
    operator = operator_of(n=6, size=2, ridge=ridge)
    vectors = noise(operator)
    exact = project(operator, vectors, "direct", 1e-6).vectors
    slow = solver == "cyclic" and not ridge
    found = project(operator, vectors, solver, 1e-3 if slow else 1e-7, 2000)
    assert found.converged
    assert found.solver == solver
    assert found.history[-1] == (found.epochs, found.residual)
    assert float((found.vectors - exact).norm() / (vectors - exact).norm()) < (0.1 if slow else 1e-5)


def test_sweeps_come_monotonically_closer_and_gearhart_koshy_is_never_worse():
    operator = operator_of(n=8, size=2)
    vectors = noise(operator)
    exact = vectors @ kernel_of(matrix_of(operator))
    factors = BlockFactors(operator, 2**30)
    distances = {}
    for memory in (0, 1, 8):
        method = Sweeps(operator, factors, memory)
        state = method.start(vectors)
        distances[memory] = []
        for _ in range(15):
            method.step(state)
            distances[memory].append(float((state["vectors"] - exact).norm()))
        assert distances[memory] == sorted(distances[memory], reverse=True)
    assert distances[8][-1] < distances[1][-1] < distances[0][-1]


def test_plain_lsmr_lowers_the_residual_at_every_step():
    operator = operator_of()
    vectors, method = noise(operator), projection.LSMR(operator)
    state = method.start(vectors)
    matrix = matrix_of(operator)
    before = vectors
    for _ in range(20):
        method.step(state)
        new, old = ((v @ matrix.mT).norm(dim=1) for v in (state["vectors"], before))
        assert (new <= old * (1 + 1e-9)).all()
        before = state["vectors"].clone()


def test_the_primal_side_gives_the_same_as_the_dual():
    small = lambda: nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 3))  # noqa: E731
    for ridge in (0.0, 0.3):
        operator = operator_of(small, n=20, ridge=ridge)
        assert operator.n_params < operator.n_rows
        vectors = noise(operator)
        expected = vectors @ kernel_of(matrix_of(operator))
        found = project(operator, vectors, "direct", 1e-5)
        torch.testing.assert_close(found.vectors, expected, rtol=1e-5, atol=1e-5)
        assert found.rank is not None


def test_duplicate_rows_and_dead_inputs_are_no_trouble():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).double().eval()
    inputs = torch.randn(8, 6, dtype=torch.float64)
    inputs[:, 2] = 0.0
    inputs = torch.cat([inputs, inputs[:4], torch.zeros(2, 6, dtype=torch.float64)])
    blocks = split_blocks([(inputs, torch.zeros(14, dtype=torch.int64))], 5)
    operator = RowOperator(model, [n for n, _ in model.named_parameters()], blocks)
    vectors = noise(operator)
    matrix = matrix_of(operator)
    expected = vectors @ kernel_of(matrix, 1e-7)
    rank = int(torch.linalg.matrix_rank(matrix, rtol=1e-7))
    assert rank < operator.n_rows
    for solver in ("direct", "lsmr", "gk", "cgmn"):
        found = project(operator, vectors, solver, 1e-6, 3000)
        assert found.converged
        assert float((found.vectors - expected).norm() / (vectors - expected).norm()) < 1e-3
        if solver == "direct":
            assert found.rank == pytest.approx(rank, abs=0.01)
    zero = RowOperator(model, ["0.weight"], [(torch.zeros(3, 6).double(), torch.zeros(3, dtype=torch.int64))])
    for solver in ("direct", *ITERATIVE):
        found = project(zero, noise(zero), solver)
        torch.testing.assert_close(found.vectors, noise(zero))
        assert found.residual == 0


def test_the_cut_is_relative():
    torch.manual_seed(0)
    root = torch.randn(5, 5, dtype=torch.float64)
    for scale in (1e-8, 1.0, 1e8):
        matrix = root @ root.mT * scale
        factor, added = factorise(matrix.clone(), 0.0, 1e-10)
        torch.testing.assert_close(factor @ factor.mT, matrix, rtol=1e-6, atol=1e-9 * scale)
        assert added == pytest.approx(1e-10 * float(matrix.diagonal().mean()))
    assert factorise(root @ root.mT, 0.5, 1e-10)[1] == 0.5
    flat = torch.ones(4, 4, dtype=torch.float64)
    factor, added = factorise(flat - 1e-9 * torch.eye(4, dtype=torch.float64), 0.0, 1e-10)
    assert 1e-9 <= added < 1e-6
    with pytest.raises(InvalidInput, match="no Cholesky factor"):
        factorise(torch.diag(torch.tensor([1.0, -1.0, 4.0])).double(), 0.0, 1e-10)
    with pytest.raises(InvalidInput, match="NaN or infinite"):
        factorise(torch.full((2, 2), torch.nan).double(), 0.0, 1e-10)


def test_factors_that_do_not_fit_are_made_again():
    operator = operator_of()
    vectors = noise(operator)
    one = BlockFactors(operator, 12 * 12 * 8)
    assert [len(one._kept) for b in range(3) if one(b) is not None] == [1, 1, 1]
    many = project(operator, vectors, "gk", 1e-3, 400)
    few = project(operator, vectors, "gk", 1e-3, 400, max_memory=1)
    torch.testing.assert_close(few.vectors, many.vectors)


@pytest.mark.parametrize("solver", ITERATIVE)
def test_an_interrupted_run_ends_in_the_same_bits(solver, tmp_path, monkeypatch):
    operator = operator_of(dtype=torch.float32)
    vectors = noise(operator)
    options = {"tolerance": 1e-9, "max_epochs": 24, "checkpoint_every": 4}
    with pytest.warns(UserWarning, match="stopped at residual"):
        whole = project(operator, vectors, solver, **options)
    path = tmp_path / "run.safetensors"
    method = projection._method

    def dying(run):
        made = method(run)
        step, count = made.step, 0

        def limited(state):
            nonlocal count
            count += made.epochs
            if count > 14:
                raise KeyboardInterrupt
            step(state)

        made.step = limited
        return made

    monkeypatch.setattr(projection, "_method", dying)
    with pytest.raises(KeyboardInterrupt):
        project(operator, vectors, solver, checkpoint=path, **options)
    monkeypatch.setattr(projection, "_method", method)
    assert projection.files.read(path)["place"]["epochs"] in (12, 14)
    with pytest.warns(UserWarning, match="stopped at residual"):
        resumed = project(operator, vectors, solver, checkpoint=path, **options)
    assert torch.equal(resumed.vectors, whole.vectors)
    assert resumed.history == whole.history
    assert (resumed.epochs, resumed.residual) == (whole.epochs, whole.residual)


def test_a_finished_run_returns_and_can_go_on(tmp_path, monkeypatch):
    operator = operator_of()
    vectors, path = noise(operator), tmp_path / "run.safetensors"
    first = project(operator, vectors, "lsmr", 1e-1, checkpoint=path)
    further = project(operator, vectors, "lsmr", 1e-4, checkpoint=path)
    assert further.epochs > first.epochs
    assert further.converged
    direct = project(operator, vectors, "direct", 1e-3, checkpoint=tmp_path / "direct.safetensors")
    monkeypatch.setattr(projection, "_direct", lambda run: pytest.fail("it was finished"))
    again = project(operator, vectors, "direct", 1e-3, checkpoint=tmp_path / "direct.safetensors")
    assert torch.equal(again.vectors, direct.vectors)
    assert again.rank == direct.rank


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    operator, path = operator_of(), tmp_path / "run.safetensors"
    vectors = noise(operator)
    project(operator, vectors, "lsmr", 1e-1, checkpoint=path)
    with pytest.raises(InvalidInput, match="another projection: the vectors is"):
        project(operator, noise(operator, seed=2), "lsmr", 1e-1, checkpoint=path)
    with pytest.raises(InvalidInput, match="another projection: solver is gk and was lsmr"):
        project(operator, vectors, "gk", 1e-1, checkpoint=path)
    with pytest.raises(InvalidInput, match="rows per block is"):
        project(operator.resized(3), vectors, "lsmr", 1e-1, checkpoint=path)
    with torch.no_grad():
        next(operator.model.parameters()).mul_(2)
    with pytest.raises(InvalidInput, match="the model's weights is"):
        project(operator, vectors, "lsmr", 1e-1, checkpoint=path)
    path.write_bytes(b"nothing")
    with pytest.raises(InvalidInput, match="cannot be read"):
        project(operator, vectors, "lsmr", checkpoint=path)


def test_stopping_above_the_tolerance_is_said():
    operator = operator_of()
    with pytest.warns(
        UserWarning, match=r"stopped at residual [0-9.e-]+ after 3 epochs of 'cyclic', above the tolerance 1e-06"
    ):
        found = project(operator, noise(operator), "cyclic", 1e-6, max_epochs=3)
    assert not found.converged
    assert found.residual > 1e-6


def test_many_blocks_are_watched_in_part_and_measured_whole_at_the_end():
    operator = operator_of(n=24, size=1, ridge=5.0)
    vectors = noise(operator)
    found = project(operator, vectors, "lsmr", 1e-3)
    matrix = matrix_of(operator)
    assert float((found.vectors @ matrix.mT).norm() / (vectors @ matrix.mT).norm()) == pytest.approx(
        found.residual, rel=1e-6
    )
    assert found.residual <= 1e-3


def test_auto_goes_by_memory():
    operator = operator_of()
    assert plan(operator)[0] == "direct"
    assert plan(operator, max_memory=1000)[0] == "lsmr_plain"
    wide = operator_of(lambda: nn.Sequential(nn.Linear(6, 400), nn.Tanh(), nn.Linear(400, 3)), n=300, size=300)
    solver, size = plan(wide, max_memory=4_000_000)
    assert solver == "lsmr"
    assert 21 < size < 300
    assert plan(wide, "cgmn", max_memory=1_000)[1] >= 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert project(operator, noise(operator), max_epochs=2, max_memory=1000).solver == "lsmr_plain"


def test_wrong_arguments_are_named():
    operator = operator_of()
    vectors = noise(operator)
    with pytest.raises(InvalidInput, match="solver must be one of 'auto', 'direct'"):
        project(operator, vectors, "cg")
    with pytest.raises(InvalidInput, match="tolerance must be a positive number"):
        project(operator, vectors, tolerance=0.0)
    with pytest.raises(InvalidInput, match="max_epochs must be a whole number"):
        project(operator, vectors, max_epochs=0)
    with pytest.raises(InvalidInput, match=r"vectors must be finite, of shape \(S, 103\); got shape \(3, 102\)"):
        project(operator, vectors[:, 1:])
    with pytest.raises(InvalidInput, match="vectors must be finite"):
        project(operator, vectors * torch.nan)
