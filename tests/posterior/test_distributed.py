"""Two ranks with one draw each are one rank with two draws on the same noise."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from methods import METHODS
from problems import linear_regression
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel

from bayespass import InvalidInput

PROBLEM = linear_regression(n=60, d=4)
STEPS = 5
NAMES = ("ivon", "ivon_pairs", "score_vi", "score_vi_kron", "score_vi_sgd", "elbo", "elbo_stl")


def build(name, model, distributed, wrapped=False):
    prefix = "module." if wrapped else ""
    named = [(name.removeprefix(prefix), parameter) for name, parameter in model.named_parameters()]
    options = {"n_data": 60, "prior_precision": 2.0, "distributed": distributed}
    return METHODS[name](named, **options, **({"basis_every": 2} if "kron" in name else {}))


def rows_of(step, rank):
    return torch.randperm(60, generator=torch.Generator().manual_seed(step))[rank * 30 : (rank + 1) * 30]


def on_rank(rank, path, port):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    results = {}
    for wrapped in (False, True):
        for name in NAMES if not wrapped else NAMES[:1]:
            model = PROBLEM.model()
            if wrapped:
                model = DistributedDataParallel(model)
                model.register_comm_hook(None, noop_hook)
            method = build(name, model, distributed=True, wrapped=wrapped)
            for step in range(STEPS):
                for _ in range(method.n_samples):
                    with method.sampled():
                        PROBLEM.loss(model, rows_of(step, rank)).backward()
                method.step()
            posterior = method.posterior()
            results[name, wrapped] = (posterior.mean["weight"], posterior.variance["weight"])
    torch.save([*results.items()], f"{path}/rank{rank}.pt")
    dist.destroy_process_group()


def on_one(name):
    """The same draws in the same order: rank 0's and rank 1's noise in turn, each on its half of the rows."""
    model = PROBLEM.model()
    method = build(name, model, distributed=False)
    for step in range(STEPS):
        draws = method.n_samples
        order = [(rank, k) for rank in range(2) for k in range(draws)]
        for rank, k in order:
            pairs = draws // 2 if method.antithetic else draws
            index = step * pairs + (k // 2 if method.antithetic else k)
            stream = index * 2 + rank
            method._draws = 2 * stream + k % 2 if method.antithetic else stream
            with method.sampled():
                PROBLEM.loss(model, rows_of(step, rank)).backward()
        method.step()
    posterior = method.posterior()
    return posterior.mean["weight"], posterior.variance["weight"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_two_ranks_are_one_rank_with_two_draws(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(on_rank, args=(str(tmp_path), port), nprocs=2)
    ranks = [dict(torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)) for rank in range(2)]
    for key, (mean, variance) in ranks[0].items():
        assert torch.equal(mean, ranks[1][key][0]), key
        assert torch.equal(variance, ranks[1][key][1]), key
        expected_mean, expected_variance = on_one(key[0])
        torch.testing.assert_close(
            mean, expected_mean, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )
        torch.testing.assert_close(
            variance, expected_variance, rtol=1e-4, atol=0, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_distributed_needs_a_process_group():
    model = PROBLEM.model()
    method = build("ivon", model, distributed=True)
    with pytest.raises(InvalidInput, match="init_process_group"), method.sampled():
        pass
