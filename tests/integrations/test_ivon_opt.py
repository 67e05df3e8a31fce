"""A stand-in with the layout of ivon-opt 0.1.3: flat `hess` per group, the mean in one memory outside of draws.

benchmarks/adapters_check.py compares with 20,000 draws of the real one.
"""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from bayespass import InvalidInput, MonteCarlo, Posterior
from bayespass.integrations.ivon_opt import from_ivon_opt


class Recorded:
    """What of the optimizer is read, and its draws."""

    def __init__(self, groups, ess=80.0, weight_decay=0.01):
        generator = torch.Generator().manual_seed(0)
        self.current_step = 0
        self.param_groups = []
        for group in groups:
            size = sum(p.numel() for p in group["params"])
            hess = torch.rand(size, generator=generator) + 0.2
            self.param_groups.append({"ess": ess, "weight_decay": weight_decay, "hess": hess, **group})

    def _place(self, flat):
        start = 0
        for parameter in (p for group in self.param_groups for p in group["params"]):
            parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
            start += parameter.numel()

    def step(self):
        self._place(torch.cat([p.detach().flatten() for g in self.param_groups for p in g["params"]]))
        self.current_step += 1

    @contextmanager
    def sampled_params(self):
        before = torch.cat([p.detach().flatten() for g in self.param_groups for p in g["params"]])
        sd = torch.cat([(1 / (g["ess"] * (g["hess"] + g["weight_decay"]))).sqrt() for g in self.param_groups])
        draw, start = before + sd * torch.randn(len(sd)), 0
        for parameter in (p for group in self.param_groups for p in group["params"]):
            parameter.data = draw[start : start + parameter.numel()].clone().view(parameter.shape)
            start += parameter.numel()
        yield
        self._place(before)

    def state_dict(self):
        start, groups = 0, []
        for group in self.param_groups:
            indices = list(range(start, start + len(group["params"])))
            groups.append({**group, "params": indices})
            start += len(indices)
        return {"state": {"count": 0}, "param_groups": groups}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).eval()


def test_variance_by_hand(model):
    optimizer = Recorded([{"params": list(model.parameters())}])
    posterior = from_ivon_opt(optimizer, model)
    expected = 1 / (80 * (optimizer.param_groups[0]["hess"] + 0.01))
    assert posterior.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    torch.testing.assert_close(torch.cat([v.flatten() for v in posterior.variance.values()]), expected)
    for name, parameter in model.named_parameters():
        assert torch.equal(posterior.mean[name], parameter)
        assert posterior.mean[name].data_ptr() != parameter.data_ptr()  # training on does not move the posterior
    assert posterior.info.n_data == 80
    assert posterior.info.temperature == 1
    assert posterior.info.prior_precision == pytest.approx(0.8)


def test_draws_of_the_optimizer_have_the_variance(model):
    """In two groups whose order is not that of the model, with different priors: z-test of 4,000 draws."""
    groups = [{"params": list(model[2].parameters()), "weight_decay": 0.5}, {"params": list(model[0].parameters())}]
    optimizer = Recorded(groups)
    optimizer.step()
    posterior = from_ivon_opt(optimizer, model)
    assert posterior.names == ("2.weight", "2.bias", "0.weight", "0.bias")
    torch.manual_seed(1)
    draws = {name: [] for name in posterior.names}
    for _ in range(4000):
        with optimizer.sampled_params():
            for name, parameter in model.named_parameters():
                draws[name].append(parameter.detach().clone())
    for name, values in draws.items():
        square = (torch.stack(values) - posterior.mean[name]).square().mean(0)
        assert ((square / posterior.variance[name] - 1).abs() < 5 * (2 / 4000) ** 0.5).all()


def test_n_data_and_temperature(model):
    optimizer = Recorded([{"params": list(model.parameters())}], ess=1000.0, weight_decay=0.02)
    info = from_ivon_opt(optimizer, model, "regression", 0.3, n_data=100).info
    assert (info.likelihood, info.sigma_noise, info.n_data) == ("regression", 0.3, 100)
    assert info.temperature == pytest.approx(0.1)
    assert info.prior_precision == pytest.approx(0.02 * 100)  # precision (N h + a0) / T = ess (h + weight_decay)
    flat = Recorded([{"params": list(model.parameters())}], weight_decay=0.0)
    assert 0 < from_ivon_opt(flat, model).info.prior_precision < 1e-30


def test_its_state_dict(model):
    optimizer = Recorded([{"params": list(model.parameters())}])
    live, stored = from_ivon_opt(optimizer, model), from_ivon_opt(optimizer.state_dict(), model)
    assert all(torch.equal(live.variance[n], stored.variance[n]) for n in live.names)
    model[0].requires_grad_(False)
    part = Recorded([{"params": list(model[2].parameters())}])
    assert from_ivon_opt(part.state_dict(), model).names == ("2.weight", "2.bias")
    two = Recorded([{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}])
    with pytest.raises(InvalidInput, match="state dict of 2 groups does not say which"):
        from_ivon_opt(two.state_dict(), model)
    odd = Recorded([{"params": [model[0].weight]}])
    with pytest.raises(InvalidInput, match="is about 1 parameters, the model has 4"):
        from_ivon_opt(odd.state_dict(), model)


def test_inside_a_draw_it_is_refused(model):
    optimizer = Recorded([{"params": list(model.parameters())}])
    optimizer.step()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with optimizer.sampled_params(), pytest.raises(InvalidInput, match=r"as inside sampled_params\(\)"):
        from_ivon_opt(optimizer, model)
    posterior = from_ivon_opt(optimizer, model)
    assert all(torch.equal(posterior.mean[name], value) for name, value in before.items())
    model.double()  # apart again, and no draw: the state dict is the way
    with pytest.raises(InvalidInput, match=r"pass optimizer\.state_dict\(\)"):
        from_ivon_opt(optimizer, model)
    assert from_ivon_opt(optimizer.state_dict(), model).mean["0.weight"].dtype == torch.float64


def test_predictions_and_files(model, tmp_path):
    posterior = from_ivon_opt(Recorded([{"params": list(model.parameters())}]), model)
    posterior.save(tmp_path / "p.safetensors", model)
    loaded = Posterior.load(tmp_path / "p.safetensors", model)
    assert loaded.info == posterior.info
    assert MonteCarlo(model, loaded, n_samples=50)(torch.ones(2, 3)).logit_variance.min() > 0


def test_what_cannot_be_read(model):
    with pytest.raises(InvalidInput, match="group 0 lacks ess, hess"):
        from_ivon_opt(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(InvalidInput, match="there is no parameter group"):
        from_ivon_opt({}, model)
    optimizer = Recorded([{"params": list(model.parameters())}])
    with pytest.raises(InvalidInput, match=r"of shape \(4, 3\) that the model lacks"):
        from_ivon_opt(optimizer, nn.Linear(1, 1))
    optimizer.param_groups[0]["hess"] -= 1
    with pytest.raises(InvalidInput, match="not positive everywhere; the training run has diverged"):
        from_ivon_opt(optimizer, model)
    optimizer.param_groups[0]["hess"] = torch.ones(3)
    with pytest.raises(InvalidInput, match="hess has 3 entries for 4 parameters"):
        from_ivon_opt(optimizer, model)
    optimizer = Recorded([{"params": list(model.parameters())}])
    with pytest.raises(InvalidInput, match="n_data must be a whole number"):
        from_ivon_opt(optimizer, model, n_data=0)
