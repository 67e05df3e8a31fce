import pytest
import torch
from problems import linear_regression
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap

from bayespass import InvalidInput, MonteCarlo, PosteriorInfo
from bayespass.posterior.ensemble import anchored_penalty, anchors, ensemble, noised_targets
from bayespass.testing import check_posterior


def network(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    model[1].weight.data.uniform_(0.5, 1.5)
    model[1].bias.data.normal_()
    for _ in range(3):  # statistics of its own
        model(torch.randn(50, 3) * (1 + seed) + seed)
    return model.eval()


@pytest.mark.parametrize("as_states", [False, True])
def test_an_ensemble_predicts_as_its_members_do(as_states):
    """Batch norms with different running statistics included."""
    models, inputs = [network(seed) for seed in range(4)], torch.randn(6, 3)
    members = [model.state_dict() for model in models] if as_states else models
    posterior = ensemble(members, PosteriorInfo(n_data=50), model=models[2])
    prediction = MonteCarlo(models[2], posterior, n_samples=4)(inputs)
    outputs = torch.stack([model(inputs) for model in models])
    torch.testing.assert_close(prediction.probs, outputs.softmax(-1).mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(prediction.logit_variance, outputs.var(0), rtol=1e-4, atol=1e-5)


def test_the_contract():
    members = [network(seed) for seed in range(20)]
    check_posterior(ensemble(members), members[0])


def test_members_are_copies():
    models = [nn.Linear(2, 1) for _ in range(2)]
    posterior = ensemble(models)
    before = posterior.members[0]["weight"].clone()
    models[0].weight.data.zero_()
    assert torch.equal(posterior.members[0]["weight"], before)


def randomised_map(problem, size, temperature):
    """K members at the minimum of the library's anchored loss, as a posterior."""
    model, n = problem.model(), len(problem.inputs)
    drawn = [anchors(model, problem.prior_precision, seed, temperature) for seed in range(size)]
    anchor = {name: torch.stack([one[name] for one in drawn]) for name in drawn[0]}
    targets = torch.stack(
        [noised_targets(problem.targets, problem.sigma_noise, seed, temperature) for seed in range(size)]
    )

    def loss(parameters, anchor, targets):
        errors = functional_call(model, parameters, (problem.inputs,)) - targets
        data = errors.square().mean() / (2 * problem.sigma_noise**2)
        return data + anchored_penalty(parameters, anchor, problem.prior_precision, n)

    members = {name: torch.zeros_like(value) for name, value in anchor.items()}
    gradient = vmap(grad(loss))(members, anchor, targets)["weight"].squeeze(1)
    curvature = vmap(jacrev(grad(loss)))(members, anchor, targets)["weight"]["weight"][:, 0, :, 0]
    members = {"weight": -torch.linalg.solve(curvature, gradient)[:, None]}  # one Newton step, exact on a quadratic
    assert vmap(grad(loss))(members, anchor, targets)["weight"].abs().max() < 1e-9
    info = PosteriorInfo(
        "regression", n, problem.prior_precision, temperature, problem.sigma_noise, "anchored ensemble"
    )
    return ensemble([{name: value[k] for name, value in members.items()} for k in range(size)], info, model=model)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_an_anchored_ensemble_spreads_as_the_posterior(temperature):
    """K = 400 members: covariance T Sigma within 12 % of its largest entries, mean within 4 standard errors."""
    problem = linear_regression(n=120, d=4, dtype=torch.float64)
    posterior = randomised_map(problem, 400, temperature)
    covariance = temperature * torch.linalg.inv(problem.precision)
    sd = covariance.diagonal().sqrt()
    draws = torch.stack([member["weight"].squeeze(0) for member in posterior.members])
    error = (draws.T.cov() - covariance) / torch.outer(sd, sd)
    assert error.abs().max() < 0.12
    torch.testing.assert_close(posterior.variance["weight"].squeeze(0), covariance.diagonal(), rtol=0.12, atol=0)
    assert ((draws.mean(0) - problem.mean) / (sd / 20)).abs().max() < 4


def test_anchors_are_draws_of_the_prior():
    model = nn.Sequential(nn.Linear(200, 100), nn.Linear(100, 1))
    model[1].weight.requires_grad_(False)
    first, again, other = (anchors(model, 4.0, seed, 0.5) for seed in (0, 0, 1))
    assert set(first) == {"0.weight", "0.bias", "1.bias"}
    assert torch.equal(first["0.weight"], again["0.weight"])
    assert not torch.equal(first["0.weight"], other["0.weight"])
    assert float(first["0.weight"].var()) == pytest.approx(0.5 / 4, rel=0.05)
    shifted = anchors(model, 4.0, 0, 0.5, {"0.bias": torch.full((100,), 7.0)})
    torch.testing.assert_close(shifted["0.bias"], first["0.bias"] + 7)


def test_the_penalty_by_hand():
    parameters = {"w": torch.tensor([1.0, 2.0]), "frozen": torch.ones(3)}
    assert float(anchored_penalty(parameters, {"w": torch.tensor([0.0, 4.0])}, 3.0, 10)) == pytest.approx(3 * 5 / 20)


def test_mistakes_are_named():
    models = [nn.Linear(2, 1) for _ in range(2)]
    with pytest.raises(InvalidInput, match="pass model="):
        ensemble([model.state_dict() for model in models])
    with pytest.raises(InvalidInput, match="pass model="):
        ensemble([])
    with pytest.raises(InvalidInput, match="at least one member"):
        ensemble([], model=models[0])
    with pytest.raises(InvalidInput, match="member 1 lacks bias"):
        ensemble([models[0], {"weight": torch.zeros(1, 2)}])
    with pytest.raises(InvalidInput, match=r"weight has shape \(1, 3\) in member 1"):
        ensemble([models[0], nn.Linear(3, 1)])
    with pytest.raises(InvalidInput, match="bias differs in member 1 but is not random"):
        ensemble(models, names=["weight"])
    with pytest.raises(InvalidInput, match=r"running statistics of 1 differ in member 1.*add them to names"):
        ensemble([network(0), network(1)], names=lambda name: name != "1.bias")
    with pytest.raises(InvalidInput, match="anchor has weight"):
        anchored_penalty({}, anchors(models[0], 1.0, 0), 1.0, 10)
    with pytest.raises(InvalidInput, match="prior_precision must be a positive"):
        anchors(models[0], 0.0, 0)
    with pytest.raises(InvalidInput, match="Class labels stay as they are"):
        noised_targets(torch.tensor([1, 2]), 0.5, 0)
    with pytest.raises(InvalidInput, match="one number"):
        noised_targets(torch.zeros(2), "predicted", 0)
