"""The options of `bayespass fit`, as its help shows them."""

from pathlib import Path
from typing import Annotated

import typer

from bayespass.cli.fit_settings import Calibrate, Method

DataPath = Annotated[
    Path,
    typer.Argument(help="npz, csv or parquet file, or a folder with one subfolder of images per class."),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for model, posterior, calibration and log.")]
MethodName = Annotated[Method, typer.Option(help="How the posterior is learned.")]
Likelihood = Annotated[str, typer.Option(help="classification or regression.")]
SigmaNoise = Annotated[
    str | None,
    typer.Option(help="Regression: sd of the noise, in the targets' unit, or `predicted` by the model's last axis."),
]
Names = Annotated[
    str | None,
    typer.Option(
        help="Random parameters: all, first or last layer that runs, or a regular expression. Default: all; "
        "first for first-layer."
    ),
]
Epochs = Annotated[
    int | None,
    typer.Option(min=1, help="Of the method. Default: 20; from random weights at least 2000 updates."),
]
MapEpochs = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Of AdamW before the method. Default: 0 for trained weights, 3 for a folder with a new head, "
        "as --epochs for random weights, which module:factory counts as without --weights.",
    ),
]
Rate = Annotated[
    float | None,
    typer.Option(
        help="Learning rate of the method, lowered to 0 by a cosine; constant for swag and sgld. "
        "Default: 0.1 ivon, 0.05 score-vi, 0.01 swag, 0.02 / N sgld, else 0.001."
    ),
]
MapRate = Annotated[
    float | None, typer.Option(help="The same for AdamW. Default: 2e-3 from random weights, else 5e-5.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows per batch.")]
PriorPrecision = Annotated[
    float | None,
    typer.Option(
        help="a0 of the prior N(0, 1/a0). Default: 2e-4 N; laplace and null-space tune it, first-layer takes "
        "1 / mean square weight."
    ),
]
WeightDecay = Annotated[float | None, typer.Option(help="Instead of the prior precision: a0 / N. AdamW uses it too.")]
Temperature = Annotated[
    float | None,
    typer.Option(help="Below 1 the posterior is colder than Bayes. Default: 1; 0.001 for ivon on a trained folder."),
]
HessInit = Annotated[
    float | None, typer.Option(help="ivon: initial curvature. Default: 0.5; 0.01 on a trained folder.")
]
Members = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Networks of ensemble (5), states of sgld (20), rank of swag (20), draws of null-space (32), "
        "components of score-vi-mixture (2).",
    ),
]
Structure = Annotated[str | None, typer.Option(help="laplace: diag, kron or full. Default: diag.")]
Projected = Annotated[
    str | None, typer.Option(help="null-space: what stays fixed on training rows, outputs or loss. Default: outputs.")
]
Samples = Annotated[int | None, typer.Option(min=1, help="Weight samples per step. Default: 1, or 2 if antithetic.")]
Antithetic = Annotated[bool, typer.Option("--antithetic", help="Weight samples in mirrored pairs: less noise.")]
Calibration = Annotated[
    Calibrate,
    typer.Option(help="Of the single pass on validation inputs; distill is closer to Monte Carlo and takes longer."),
]
Validation = Annotated[str, typer.Option(help="Share of the rows that is held out, or a file or folder like DATA.")]
Seed = Annotated[int, typer.Option(help="Seed of random weights, split, order and draws.")]
Target = Annotated[str | None, typer.Option(help="Column to predict; for npz the array, `targets` by default.")]
Text = Annotated[str | None, typer.Option(help="Column of texts, for the tokenizer in the model folder.")]
Features = Annotated[str | None, typer.Option(help="Comma-separated columns to use. Default: all but the target.")]
Standardize = Annotated[
    bool | None,
    typer.Option(
        "--standardize/--no-standardize",
        help="Columns to mean 0 and sd 1 of the training rows. Default: if the weights are random.",
    ),
]
ImageSize = Annotated[int | None, typer.Option(min=1, help="Resize images to this square, for module:factory.")]
Every = Annotated[int, typer.Option(min=1, help="Updates between checkpoints.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
