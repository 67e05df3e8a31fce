"""Forecasters whose output is a mean and a log variance for every future step.

    model = PatchForecaster(context=336, horizon=96, channels=7)
    loss = gaussian_nll(model(inputs), targets)             # (B, context, C) -> (B, horizon, C, 2)

They are ordinary modules: train them with any method, with `likelihood="regression"` and
`sigma_noise="predicted"`, and predict with `SinglePass`, `MonteCarlo` or `MeanNetwork`; intervals
are those of `RegressionPrediction.interval`. Each window is standardised by its own mean and sd,
and the forecast is given back on the scale of the data. Channels share their weights and are
forecast apart, each step by its marginal. The loss is a mean over targets, so `n_data` counts
targets, not windows, and an observation once however many windows hold it.

Where a window is nearly constant and then moves, its own sd says nothing and the likelihood sees
targets many sd away, on which training diverges: raise `variance_floor` (0.1 for standardised series).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from bayespass.errors import InvalidInput, MissingExtra, require_count, require_positive

SMALL_PATCHTST: dict[str, Any] = dict(
    patch_length=16, patch_stride=8, d_model=32, num_attention_heads=4, num_hidden_layers=2, ffn_dim=64
)


class GaussianHead(nn.Module):
    """One linear layer from features to the mean and log variance of future values.

    Args:
        in_features: F, size of the last axis of the features.
        horizon: H, number of future steps.
        channels: C, forecast from the same features; None for a single series without that axis.
        heteroscedastic: predict a log variance too; without it the last axis is left out, for a
            known `sigma_noise`.

    `forward` maps features (..., F) to (..., H, 2), or (..., H, C, 2) with channels. The last axis
    is (mean, log variance).

    Raises:
        InvalidInput: a size that is not positive.
    """

    def __init__(
        self, in_features: int, horizon: int, channels: int | None = None, heteroscedastic: bool = True
    ) -> None:
        super().__init__()
        require_count(in_features=in_features, horizon=horizon, channels=1 if channels is None else channels)
        axes = [horizon] if channels is None else [horizon, channels]
        self.shape = (*axes, 2) if heteroscedastic else tuple(axes)
        self.linear = nn.Linear(in_features, math.prod(self.shape))

    def forward(self, features: Tensor) -> Tensor:
        """The forecast on the scale of the features."""
        return self.linear(features).unflatten(-1, self.shape)


class PatchForecaster(nn.Module):
    """PatchTST of transformers with a Gaussian head: attention over patches of every channel.

    Args:
        context: L, steps that are seen.
        horizon: H, steps that are forecast.
        channels: C.
        heteroscedastic: predict a log variance too, for `sigma_noise="predicted"`.
        variance_floor: added to the variance of a window before its root is taken.
        **settings: of `transformers.PatchTSTConfig`, over the small defaults in `SMALL_PATCHTST`.

    `forward` maps (B, L, C) to (B, H, C, 2), or (B, H, C) without log variance. Weights of a
    pretrained PatchTST load into `backbone`. `head_dropout` acts on the features of the head.

    Raises:
        InvalidInput: a setting that does not fit.
        MissingExtra: transformers is not installed.

    Source: Nie et al. 2023 (arXiv 2211.14730).
    """

    def __init__(
        self,
        context: int,
        horizon: int,
        channels: int,
        heteroscedastic: bool = True,
        variance_floor: float = 1e-5,
        **settings: Any,
    ) -> None:
        super().__init__()
        require_count(context=context, horizon=horizon, channels=channels)
        require_positive(variance_floor=variance_floor)
        try:
            from transformers import PatchTSTConfig, PatchTSTModel
        except ImportError as error:
            msg = "PatchForecaster needs transformers; run: pip install bayespass[transformers]"
            raise MissingExtra(msg) from error
        settings = SMALL_PATCHTST | {"minimum_scale": variance_floor} | settings
        config = PatchTSTConfig(context_length=context, num_input_channels=channels, **settings)
        fits = config.patch_length < context and config.scaling == "std" and not config.use_cls_token
        if not fits or config.do_mask_input:
            msg = (
                f"PatchForecaster needs patch_length < context, scaling='std', no class token and no masking; got "
                f"patch_length={config.patch_length}, context={context}, scaling={config.scaling!r}, "
                f"use_cls_token={config.use_cls_token} and do_mask_input={config.do_mask_input}"
            )
            raise InvalidInput(msg)
        self.context, self.channels = context, channels
        self.backbone = PatchTSTModel(config)
        patches = (context - config.patch_length) // config.patch_stride + 1
        self.dropout = nn.Dropout(config.head_dropout)
        self.head = GaussianHead(patches * config.d_model, horizon, heteroscedastic=heteroscedastic)
        self.heteroscedastic = heteroscedastic

    def forward(self, inputs: Tensor) -> Tensor:
        """Forecasts of a batch of windows, on the scale of the data.

        Raises:
            InvalidInput: windows of another shape.
        """
        _check_windows(inputs, self.context, self.channels)
        found = self.backbone(inputs)
        features = self.dropout(found.last_hidden_state.flatten(2))  # (B, C, patches d_model)
        return _on_data_scale(self.head(features).transpose(1, 2), found.loc, found.scale, self.heteroscedastic)


class KoopmanForecaster(nn.Module):
    """A learned linear operator carries an embedding of the past forward, segment by segment.

        e_i = encoder(segment i),  z_0 = D [e_1 .. e_n],  z_k = K z_(k-1),  forecast segment k = decoder(z_k)

    D reads the embeddings of all n segments (delay coordinates), K is square and starts at the
    identity. This is the time-invariant part of Koopa kept small: its Fourier filter and the operator
    that is solved anew for every window are left out, as the single pass has no rule for either.
    K acts several times; the single pass treats its noise as independent from one use to the next,
    so late segments are the ones to check against Monte Carlo.

    Args:
        context: L, steps that are seen, a multiple of `segment`.
        horizon: H, steps that are forecast.
        segment: steps of a segment.
        embedding: size of an embedding.
        hidden: width of encoder and decoder, which have one hidden layer each.
        heteroscedastic: predict a log variance too, for `sigma_noise="predicted"`.
        dropout: on the hidden layers.
        variance_floor: added to the variance of a window before its root is taken.

    `forward` maps (B, L, C) to (B, H, C, 2), or (B, H, C) without log variance, for any number of
    channels C.

    Raises:
        InvalidInput: sizes that do not fit.

    Source: in the manner of Liu et al. 2023 (Koopa, arXiv 2305.18803).
    """

    def __init__(
        self,
        context: int,
        horizon: int,
        segment: int = 24,
        embedding: int = 64,
        hidden: int = 128,
        heteroscedastic: bool = True,
        dropout: float = 0.0,
        variance_floor: float = 1e-5,
    ) -> None:
        super().__init__()
        sizes = {"context": context, "segment": segment, "embedding": embedding, "hidden": hidden}
        require_count(horizon=horizon, **sizes)
        require_positive(variance_floor=variance_floor)
        if context % segment:
            msg = f"context must be a multiple of segment; got {context} and {segment}"
            raise InvalidInput(msg)
        self.context, self.horizon, self.segment = context, horizon, segment
        self.heteroscedastic, self.variance_floor = heteroscedastic, variance_floor
        self.encoder = _mlp(segment, hidden, dropout, nn.Linear(hidden, embedding))
        self.delays = nn.Linear(context // segment * embedding, embedding)
        self.operator = nn.Linear(embedding, embedding, bias=False)
        head = GaussianHead(hidden, segment, heteroscedastic=heteroscedastic)
        self.decoder = _mlp(embedding, hidden, dropout, head)
        nn.init.eye_(self.operator.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        """Forecasts of a batch of windows, on the scale of the data.

        Raises:
            InvalidInput: windows of another shape.
        """
        _check_windows(inputs, self.context)
        loc = inputs.mean(1, keepdim=True)
        scale = (inputs.var(1, keepdim=True, correction=0) + self.variance_floor).sqrt()
        segments = ((inputs - loc) / scale).transpose(1, 2).unflatten(-1, (-1, self.segment))  # (B, C, n, segment)
        state = self.delays(self.encoder(segments).flatten(2))
        decoded = []
        for _ in range(math.ceil(self.horizon / self.segment)):
            state = self.operator(state)
            decoded.append(self.decoder(state))
        output = torch.cat(decoded, 2)[:, :, : self.horizon]  # (B, C, H, 2)
        return _on_data_scale(output.transpose(1, 2), loc, scale, self.heteroscedastic)


def windows(series: Tensor, context: int, horizon: int, stride: int = 1) -> tuple[Tensor, Tensor]:
    """Every window of a series with what follows it, as views of the series.

    Args:
        series: (T, C) or (T,) values in the order of time.
        context: L, steps of an input.
        horizon: H, steps of a target, right after its input.
        stride: steps between the starts of two windows.

    Returns:
        inputs (N, L, C) and targets (N, H, C), N = (T - L - H) // stride + 1; without C as the series.

    Raises:
        InvalidInput: a size that is not positive, or a series shorter than one window.

    >>> windows(torch.arange(6.0), context=3, horizon=2)[1]
    tensor([[3., 4.],
            [4., 5.]])
    """
    require_count(context=context, horizon=horizon, stride=stride)
    length = context + horizon
    if series.dim() not in (1, 2) or len(series) < length:
        msg = f"series must be (T,) or (T, C) with T >= context + horizon = {length}; got {tuple(series.shape)}"
        raise InvalidInput(msg)
    both = series.unfold(0, length, stride)
    both = both.transpose(1, 2) if series.dim() == 2 else both
    return both[:, :context], both[:, context:]


def _mlp(size: int, hidden: int, dropout: float, last: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size, hidden), nn.GELU(), nn.Dropout(dropout), last)


def _on_data_scale(output: Tensor, loc: Tensor, scale: Tensor, heteroscedastic: bool) -> Tensor:
    """Undo the standardisation of each window: mean times scale plus loc, log variance plus 2 log scale.

    output is (B, H, C, 2), or (B, H, C) without log variance; loc and scale are (B, 1, C).
    """
    if not heteroscedastic:
        return output * scale + loc
    factor = torch.stack([scale, torch.ones_like(scale)], -1)
    return output * factor + torch.stack([loc, 2 * scale.log()], -1)


def _check_windows(inputs: Tensor, context: int, channels: int | None = None) -> None:
    if inputs.dim() != 3 or inputs.shape[1] != context or channels not in (None, inputs.shape[2]):
        wanted = f"(B, {context}, {'C' if channels is None else channels})"
        msg = f"inputs must have shape {wanted}, as the model was made for; got {tuple(inputs.shape)}"
        raise InvalidInput(msg)
