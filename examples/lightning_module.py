"""A LightningModule whose optimizer is a posterior.

    python examples/lightning_module.py

Regression with Lightning's Trainer: ten measurements of 442 patients predict how their diabetes
progresses. `configure_optimizers` returns the method, one callback does the rest.
"""

import argparse
from pathlib import Path

import lightning
import torch
from sklearn.datasets import load_diabetes
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

import bayespass
from bayespass.integrations.lightning import BayesianTrainingCallback
from bayespass.training import likelihood_loss


class Progression(lightning.LightningModule):
    """A small network with Gaussian noise of a known standard deviation.

    Args:
        n_data: number of training rows.
        steps: updates in all, for the schedule.
    """

    def __init__(self, n_data: int, steps: int) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(10, 50), nn.Tanh(), nn.Linear(50, 1))
        self.n_data, self.steps = n_data, steps

    def configure_optimizers(self) -> dict:
        """The method, with a schedule per step."""
        method = bayespass.IVON(
            self.network.named_parameters(), lr=0.05, n_data=self.n_data, prior_precision=5.0, hess_init=1.0,
            betas=(0.9, 0.999), likelihood="regression", sigma_noise=0.7,
        )  # fmt: skip
        self.loss = likelihood_loss(method.info)
        schedule = CosineAnnealingLR(method, self.steps)
        return {"optimizer": method, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Negative log-likelihood, the mean over rows."""
        del batch_idx
        inputs, targets = batch
        return self.loss(self.network(inputs), targets)

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        """Squared error at the mean weights."""
        del batch_idx
        inputs, targets = batch
        self.log("error", (self.network(inputs) - targets).square().mean(), prog_bar=True)


def main() -> None:
    """Train, predict and print the figures of the network at its mean and of the single pass."""
    parser = argparse.ArgumentParser(description="Posterior of a small regression network by Lightning.")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("output/lightning_module"))
    options = parser.parse_args()

    values, progression = load_diabetes(return_X_y=True)
    inputs = torch.tensor(values, dtype=torch.float32) * 442**0.5  # unit variance
    targets = torch.tensor(progression, dtype=torch.float32)[:, None]
    targets = (targets - targets[:342].mean()) / targets[:342].std()
    loader = DataLoader(TensorDataset(inputs[:342], targets[:342]), batch_size=19, shuffle=True)
    test = DataLoader(TensorDataset(inputs[342:], targets[342:]), batch_size=100)

    lightning.seed_everything(0, verbose=False)
    module = Progression(n_data=342, steps=options.epochs * ((len(loader) + 1) // 2))
    trainer = lightning.Trainer(
        max_epochs=options.epochs, accumulate_grad_batches=2, callbacks=[BayesianTrainingCallback()], accelerator="cpu",
        default_root_dir=options.output, logger=False, log_every_n_steps=1, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader, test)

    posterior, network = trainer.optimizers[0].posterior(), module.network.eval()
    for name, predictor in {
        "mean weights": bayespass.MeanNetwork(network, posterior),
        "single pass": bayespass.SinglePass(network, posterior),
    }.items():
        scores = bayespass.evaluate(bayespass.predict_dataset(predictor, test), targets[342:])
        print(name, {figure: str(scores[figure]) for figure in ("rmse", "nll", "coverage_95")})


if __name__ == "__main__":
    main()
