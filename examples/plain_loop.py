"""Handwritten digits with the plain loop: a trained network, its posterior, one forward pass.

    python examples/plain_loop.py

AdamW trains the weights, IVON turns them into a posterior, both with the same function. Kill it at
any moment and run it again: it continues from output/plain_loop and ends in the same numbers.
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

import bayespass
from bayespass.training import train


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,000 images for training and 797 for the test."""
    pixels, labels = load_digits(return_X_y=True)
    inputs, targets = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    return TensorDataset(inputs[:1000], targets[:1000]), TensorDataset(inputs[1000:], targets[1000:])


def main() -> None:
    """Train, predict and print the figures of the network at its mean and of the single pass."""
    parser = argparse.ArgumentParser(description="Posterior of a small digits network by the plain loop.")
    parser.add_argument("--epochs", type=int, default=20, help="of either phase")
    parser.add_argument("--output", type=Path, default=Path("output/plain_loop"), help="folder for checkpoints")
    options = parser.parse_args()

    data, test = digits()
    loader = DataLoader(data, batch_size=50, shuffle=True)
    steps = options.epochs * len(loader)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))

    # 1. the weights
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    train(
        model, optimizer, loader, options.epochs, nn.functional.cross_entropy,
        checkpoint=options.output / "weights.safetensors", progress=True,
    )  # fmt: skip

    # 2. a posterior around them, somewhat colder than Bayes
    method = bayespass.IVON(
        model.named_parameters(), lr=0.1, n_data=len(data), temperature=0.1, hess_init=0.1, betas=(0.9, 0.999)
    )
    log = train(
        model, method, loader, options.epochs, scheduler=CosineAnnealingLR(method, steps),
        checkpoint=options.output / "posterior.safetensors", checkpoint_every=50, progress=True,
    )  # fmt: skip
    print(f"{log.steps} steps of IVON, loss {log.losses[0]:.3f} -> {log.losses[-1]:.3f}")

    # 3. mean and uncertainty in one forward pass
    posterior = method.posterior()
    batches = DataLoader(test, batch_size=200)
    for name, predictor in {
        "mean weights": bayespass.MeanNetwork(model, posterior),
        "single pass": bayespass.SinglePass(model, posterior),
    }.items():
        scores = bayespass.evaluate(bayespass.predict_dataset(predictor, batches), test.tensors[1])
        print(name, {figure: str(scores[figure]) for figure in ("accuracy", "nll", "ece", "aurc")})


if __name__ == "__main__":
    main()
