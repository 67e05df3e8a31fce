"""Handwritten digits, a network that is trained already: three posteriors after the fact, predicted linearised.

    python examples/after_training.py

Laplace and its coverage table, a null-space posterior whose training predictions stay what they are, and
the exact margin between the two likeliest classes. Digits turned by 90 degrees show what each one knows.
"""

import argparse
import warnings
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bayespass


def digits() -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Images for training, for tuning and for the test."""
    pixels, labels = load_digits(return_X_y=True)
    images, targets = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
    parts = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0)).split([300, 300, 1197])
    train, tune, test = (TensorDataset(images[rows], targets[rows]) for rows in parts)
    return train, tune, test


def main() -> None:
    """Train once, then print what every posterior says of the test digits and of the turned ones."""
    parser = argparse.ArgumentParser(description="Posteriors of a trained digits network.")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--output", type=Path, default=Path("output/after_training"), help="folder for the posteriors")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)

    train, tune, test = digits()
    loader, held_out = DataLoader(train, batch_size=50, shuffle=True), DataLoader(tune, batch_size=100)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    bayespass.train(model, optimizer, loader, options.epochs, nn.functional.cross_entropy)
    warnings.simplefilter("ignore", UserWarning)  # that a posterior does not beat a temperature is printed below

    # 1. Laplace: Kronecker factors, the prior precision from held-out digits at the cost of one pass over them
    laplace = bayespass.Laplace(model, hessian_structure="kron").fit(loader)
    print(laplace.coverage())
    tuning = laplace.optimize_prior_precision("gridsearch", held_out, predictor=bayespass.Linearised)
    print("laplace:", tuning.verdict)

    # 2. the null space: draws that leave every training prediction alone
    null_space = bayespass.NullSpace(model, n_samples=32).fit(loader)
    print("null space:", null_space.optimize_prior_precision(held_out).verdict)
    print(null_space.report_)

    # 3. what they say
    batches = DataLoader(test, batch_size=200)
    turned = torch.rot90(test.tensors[0], 1, (2, 3))
    for name, posterior in {"laplace": laplace.posterior(), "null space": null_space.posterior()}.items():
        predictor = bayespass.Linearised(model, posterior)
        prediction = bayespass.predict_dataset(predictor, batches)
        scores = bayespass.evaluate(prediction, test.tensors[1])
        unsure, expected = doubt(bayespass.predict_dataset(predictor, [turned])), doubt(prediction)
        labels = torch.cat([torch.ones_like(unsure), torch.zeros_like(expected)])
        auroc = roc_auc_score(labels, torch.cat([unsure, expected]))
        figures = {figure: str(scores[figure]) for figure in ("accuracy", "nll", "aurc")}
        print(f"{name}: {figures}, AUROC of the logit variance against turned digits {auroc:.3f}")
        posterior.save(options.output / f"{name.replace(' ', '_')}.safetensors", model)

    # 4. the margin of the likeliest class, in one forward and one backward pass
    diagonal = bayespass.Laplace(model, prior_precision=laplace.prior_precision).fit(loader).posterior()
    margin = bayespass.Margin(model, diagonal)(test.tensors[0])
    worst = int(margin.error_probability.argmax())
    print(f"least certain: digit {int(test.tensors[1][worst])}, read as {int(margin.labels[worst])}, "
          f"perhaps {int(margin.runner_up[worst])}: {float(margin.error_probability[worst]):.2f}")  # fmt: skip


def doubt(prediction: bayespass.Prediction) -> Tensor:
    """Summed variance of the logits of every row."""
    assert isinstance(prediction, bayespass.ClassificationPrediction)
    return prediction.logit_variance.sum(-1)


if __name__ == "__main__":
    main()
