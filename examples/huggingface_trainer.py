"""A transformers model, trained by transformers' Trainer into a posterior.

    python examples/huggingface_trainer.py

A small vision transformer on handwritten digits: first its weights, by the Trainer as it comes, then a
posterior around them. There the method takes the optimizer's place, one callback draws the weights
for every update, and everything else is the Trainer's own: schedule, gradient accumulation,
evaluation, checkpoints.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Dataset, default_collate
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import bayespass
from bayespass.integrations.trainer import BayesianTrainingCallback


class Digits(Dataset):
    """8 x 8 images as the dicts that transformers models take."""

    def __init__(self, rows: slice) -> None:
        digits = load_digits()
        self.images = torch.tensor(digits.images[rows], dtype=torch.float32)[:, None] / 8 - 1
        self.labels = torch.tensor(digits.target[rows])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[row], "labels": self.labels[row]}


def main() -> None:
    """Train, predict and print the figures of the network at its mean and of the single pass."""
    parser = argparse.ArgumentParser(description="Posterior of a small vision transformer by the Trainer.")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--images", type=int, default=1000, help="for training")
    parser.add_argument("--output", type=Path, default=Path("output/huggingface_trainer"))
    options = parser.parse_args()

    data, test = Digits(slice(options.images)), Digits(slice(1000, None))
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, num_labels=10,
    )  # fmt: skip
    model = ViTForImageClassification(config)

    def settings(folder: str, **changes: Any) -> TrainingArguments:
        return TrainingArguments(
            output_dir=str(options.output / folder), num_train_epochs=options.epochs, per_device_train_batch_size=25,
            gradient_accumulation_steps=2, lr_scheduler_type="cosine", eval_strategy="epoch", save_strategy="epoch",
            save_total_limit=1, logging_strategy="epoch", report_to="none", dataloader_pin_memory=False, **changes,
        )  # fmt: skip

    # 1. the weights
    Trainer(model=model, args=settings("weights", learning_rate=3e-3), train_dataset=data, eval_dataset=test).train()

    # 2. a posterior around them, somewhat colder than Bayes
    method = bayespass.IVON(
        model.named_parameters(), lr=0.03, n_data=len(data), prior_precision=0.1, temperature=0.01, hess_init=0.3,
        betas=(0.9, 0.999), max_grad_norm=1.0,
    )  # fmt: skip
    Trainer(
        model=model,
        args=settings("posterior", max_grad_norm=0),  # the method clips, after it has read the curvature
        train_dataset=data,
        eval_dataset=test,
        optimizers=(method, None),  # type: ignore[arg-type]  # the Trainer makes its own schedule
        callbacks=[BayesianTrainingCallback(method, save_posterior=True)],
    ).train()

    # 3. mean and uncertainty in one forward pass
    model.eval().cpu()
    posterior = bayespass.Posterior.load(options.output / "posterior" / "posterior.safetensors", model)
    batches = DataLoader(test, batch_size=200, collate_fn=default_collate)  # type: ignore[arg-type]
    for name, predictor in {
        "mean weights": bayespass.MeanNetwork(model, posterior),
        "single pass": bayespass.SinglePass(model, posterior),
    }.items():
        scores = bayespass.evaluate(bayespass.predict_dataset(predictor, batches), test.labels)
        print(name, {figure: str(scores[figure]) for figure in ("accuracy", "nll", "ece", "aurc")})


if __name__ == "__main__":
    main()
