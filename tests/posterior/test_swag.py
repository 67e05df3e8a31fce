import pytest
import torch
from problems import linear_regression
from torch import nn

from bayespass import InvalidInput, NotFitted
from bayespass.posterior.swag import SWAG
from bayespass.testing import check_posterior


def walk(model, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(p.shape, generator=generator) + 3 for name, p in model.named_parameters()}
        for _ in range(steps)
    ]


def collected(model, states, **settings):
    swag = SWAG(model.named_parameters(), n_data=10, **settings)
    for state in states:
        model.load_state_dict(state)
        swag.collect()
    return swag


@pytest.mark.parametrize(("steps", "rank"), [(9, 4), (3, 20)])
def test_the_closed_formula_on_a_fixed_list(steps, rank):
    """mean, diag / 2 with diag = average of theta^2 - mean^2, and the last deviations / sqrt(2 (K - 1))."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    states = walk(model, steps)
    posterior = collected(model, states, rank=rank).posterior()
    for name in posterior.names:
        theta = torch.stack([state[name] for state in states]).double()
        mean = theta.mean(0)
        deviations = torch.stack([theta[i] - theta[: i + 1].mean(0) for i in range(steps)])[-rank:]
        diagonal = ((theta**2).mean(0) - mean**2).clamp(min=0)
        torch.testing.assert_close(posterior.mean[name].double(), mean, rtol=1e-6, atol=1e-6)
        kept = min(rank, steps)
        expected = diagonal / 2 + deviations.square().sum(0) / (2 * (kept - 1))
        torch.testing.assert_close(posterior.variance[name].double(), expected, rtol=1e-5, atol=1e-6)
    assert posterior.rank == min(rank, steps)


def test_draws_follow_the_formula():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    posterior = collected(model, walk(model, 6), rank=4).posterior()
    check_posterior(posterior, model.eval())


def test_after_sgd_with_a_constant_rate():
    """The walk of minibatch SGD around the optimum: the right centre, and a width."""
    problem = linear_regression()
    model = problem.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(0)
    swag = SWAG(model.named_parameters(), 400, likelihood="regression", sigma_noise=problem.sigma_noise)
    for step in range(1500):
        optimizer.zero_grad()
        problem.loss(model, torch.randint(400, (20,), generator=generator)).backward()
        optimizer.step()
        if step >= 500 and step % 20 == 0:
            swag.collect()
    posterior = swag.posterior()
    gap = (posterior.mean["weight"].squeeze() - problem.mean) * problem.precision.diagonal().sqrt()
    assert gap.abs().max() < 1
    assert posterior.variance["weight"].min() > 0
    assert posterior.info.method == "swag"


def test_a_state_resumes_exactly():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    states = walk(model, 8)
    whole = collected(model, states, rank=3).posterior()
    half = collected(model, states[:4], rank=3).state_dict()
    second = SWAG(model.named_parameters(), n_data=10, rank=3)
    second.load_state_dict(half)
    for state in states[4:]:
        model.load_state_dict(state)
        second.collect()
    for name in whole.names:
        assert torch.equal(second.posterior().mean[name], whole.mean[name])
        assert torch.equal(second.posterior().variance[name], whole.variance[name])
    with pytest.raises(InvalidInput, match="other parameters"):
        SWAG(nn.Linear(4, 2).named_parameters(), n_data=10).load_state_dict(half)


def test_constant_and_half_precision_weights():
    model = nn.Linear(3, 2).bfloat16()
    swag = SWAG(model.named_parameters(), n_data=10)
    for _ in range(3):
        swag.collect()
    posterior = swag.posterior()
    assert posterior.variance["weight"].dtype == torch.float32
    assert posterior.variance["weight"].max() == 0


def test_bad_input_is_named():
    model = nn.Linear(3, 2)
    with pytest.raises(InvalidInput, match="rank must be at least 2"):
        SWAG(model.named_parameters(), n_data=10, rank=1)
    with pytest.raises(InvalidInput, match="needs names"):
        SWAG(model.parameters(), n_data=10)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="no parameter requires a gradient"):
        SWAG(nn.Linear(3, 2).requires_grad_(False).named_parameters(), n_data=10)
    swag = SWAG(model.named_parameters(), n_data=10)
    swag.collect()
    with pytest.raises(NotFitted, match="at least two collections, it has 1"):
        swag.posterior()
    model.weight.data[0, 0] = torch.nan
    with pytest.raises(InvalidInput, match="weight is NaN"):
        swag.collect()
