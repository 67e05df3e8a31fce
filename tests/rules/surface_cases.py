"""Cases for placing, resampling, statistics, recurrent layers and the wider affine and norm families."""

import torch
from cases import case, gaussian, plain
from torch import Tensor
from torch.nn import functional as F

from bayespass.moments import Moments
from bayespass.rules.placing import assign, copied


def positive(*shape, seed=0):
    """A Gaussian whose sd is at most 0.2 of its mean."""
    x = gaussian(*shape, seed=seed)
    mean = 1 + x.mean.abs()
    return Moments(mean, (0.2 * mean * x.var.clamp(max=1)).square())


def around(mean, sd=0.1):
    return Moments(mean, torch.full_like(mean, sd**2))


def cell(size, hidden, gates, seed=0):
    shapes = ((gates * hidden, size), (gates * hidden, hidden), (gates * hidden,), (gates * hidden,))
    return [around(0.4 * plain(*shape, seed=seed + i), 0.15) for i, shape in enumerate(shapes)]


NORMED = [
    case(gaussian(2, 3, 32), plain(32)),
    case(gaussian(2, 32, sd=0.3), gaussian(32, seed=1, sd=0.3)),
]
ATTENTION = (12, 3)
MASK = torch.tensor([[True, False, True], [False, False, True]])
SOURCE_INDEX = torch.tensor([[0, 2, 1, 0], [1, 0, 2, 2]])


def attention_case(query, *, layers=None, **kwargs):
    """Multi-head attention whose random part is the value and output projection."""
    e = query.shape[-1]
    q, k, v = (0.5 * plain(e, e, seed=i) for i in (1, 2, 3))
    return case(
        query,
        query,
        query,
        e,
        2,
        None,
        around(plain(3 * e, seed=4), 0.0),
        None,
        None,
        False,
        0.0,
        around(plain(e, e, seed=6), 0.0).mean,
        gaussian(e, seed=5, sd=0.3),
        training=False,
        use_separate_proj_weight=True,
        q_proj_weight=q,
        k_proj_weight=k,
        v_proj_weight=v,
        **kwargs,
    )


RECURRENT = {
    torch.lstm_cell: [case(plain(2, 3), (gaussian(2, 4, sd=0.3), gaussian(2, 4, seed=1, sd=0.5)), *cell(3, 4, 4))],
    torch.gru_cell: [
        case(gaussian(2, 3, sd=0.3), gaussian(2, 4, sd=0.3), *cell(3, 4, 3)),
        case(plain(2, 3), plain(2, 4), *cell(3, 4, 3)[:2]),
    ],
    torch.rnn_tanh_cell: [case(plain(2, 3), gaussian(2, 4, sd=0.5), *cell(3, 4, 1))],
    torch.rnn_relu_cell: [case(plain(2, 3), gaussian(2, 4, sd=0.5), *cell(3, 4, 1))],
}


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.float64)


LAYERS = {
    torch.lstm: [
        case(
            plain(1, 2, 2),
            (zeros(2, 1, 2), zeros(2, 1, 2)),
            [*cell(2, 2, 4), *cell(2, 2, 4, 7)],
            True,
            2,
            0.0,
            False,
            False,
            True,
        ),
        case(
            gaussian(2, 1, 2, sd=0.3),
            (zeros(2, 1, 2), zeros(2, 1, 2)),
            [*cell(2, 2, 4)[:2], *cell(2, 2, 4, 9)[:2]],
            False,
            1,
            0.0,
            False,
            True,
            False,
        ),
    ],
    torch.gru: [case(plain(2, 4, 3), zeros(1, 2, 4), cell(3, 4, 3), True, 1, 0.0, False, False, True)],
    torch.rnn_tanh: [case(plain(2, 3, 3), zeros(1, 2, 4), cell(3, 4, 1), True, 1, 0.0, False, False, True)],
    torch.rnn_relu: [case(plain(2, 3, 3), zeros(1, 2, 4), cell(3, 4, 1), True, 1, 0.0, False, False, True)],
}

SURFACE_CASES = {
    F.conv3d: [case(gaussian(2, 4, 3, 4, 3), gaussian(4, 2, 2, 3, 2, seed=1), gaussian(4), 1, 1, 1, 2)],
    F.conv_transpose1d: [case(gaussian(2, 4, 5), gaussian(4, 3, 3, seed=1), gaussian(6), 2, 1, 1, 2)],
    F.conv_transpose2d: [
        case(gaussian(2, 3, 3, 4), gaussian(3, 2, 3, 2, seed=1), gaussian(2), (2, 1), (1, 0), 0, 1, 1),
        case(gaussian(1, 2, 3, 3), plain(2, 2, 2, 2), None, dilation=2),
    ],
    F.conv_transpose3d: [case(gaussian(1, 2, 2, 3, 2), gaussian(2, 2, 2, 2, 2, seed=1), None, 2)],
    torch.bilinear: [case(gaussian(3, 2), plain(3, 4), gaussian(2, 2, 4, seed=1), gaussian(2)), case(plain(3, 2), gaussian(3, 4), plain(2, 2, 4))],
    torch.baddbmm: [case(gaussian(2, 3, 4), gaussian(2, 3, 2, seed=1), gaussian(2, 2, 4, seed=2), beta=0.5, alpha=2.0)],
    torch.outer: [case(gaussian(3), gaussian(4, seed=1))],
    torch.einsum: [
        case("bqd,bkd->bqk", gaussian(2, 3, 4), gaussian(2, 5, 4, seed=1)),
        case("btd,de->bte", gaussian(2, 3, 4), plain(4, 2)),
        case("nm,bmd->bnd", plain(3, 4), gaussian(2, 4, 2)),
        case("bhqk,h,bkhd->bqhd", gaussian(1, 2, 3, 4), plain(2), gaussian(1, 4, 2, 3, seed=1)),
    ],
    torch.addcmul: [case(gaussian(3, 4), gaussian(3, 4, seed=1), gaussian(4, seed=2), value=0.5), case(plain(3), plain(3), gaussian(3))],
    torch.lerp: [case(gaussian(3), gaussian(3, seed=1), 0.3), case(gaussian(3), plain(3), plain(3))],
    torch.cumsum: [case(gaussian(3, 4), 1), case(gaussian(3, 4), dim=0)],
    F.rms_norm: [case(x, (32,), w) for (x, w), _ in NORMED] + [case(gaussian(3, 32), (32,), None, 1e-3)],
    F.group_norm: [case(gaussian(2, 8, 4, 4), 2, gaussian(8, seed=1, sd=0.3), plain(8)), case(gaussian(2, 4, 32), 1)],
    F.instance_norm: [case(gaussian(2, 3, 6, 6)), case(gaussian(2, 3, 4, 4), plain(3), plain(3).square(), use_input_stats=False)],
    torch.layer_norm: [case(gaussian(3, 32, scale=2.0), (32,), gaussian(32, seed=1, sd=0.3))],
    torch.group_norm: [case(gaussian(2, 8, 4, 4), 2, gaussian(8, seed=1, sd=0.3), plain(8))],
    torch.constant_pad_nd: [case(gaussian(2, 3), (1, 2), 1.5)],
    F.normalize: [case(gaussian(3, 32), dim=-1)],
    torch._weight_norm: [case(gaussian(4, 8, 3), gaussian(1, 1, 3, seed=1, sd=0.3), 2), case(gaussian(2, 32), plain(2, 1), 0)],
    F.softmin: [case(gaussian(3, 5), 1)],
    torch.log_softmax: [case(gaussian(3, 5), 1), case(gaussian(3, 5, sd=0.3), -1)],
    torch.logsumexp: [case(gaussian(3, 5), 1), case(gaussian(3, 5, sd=0.3), (0, 1), True)],
    F.adaptive_avg_pool3d: [case(gaussian(2, 2, 3, 4, 2), (2, 2, None))],
    F.avg_pool3d: [case(gaussian(1, 2, 4, 4, 2), 2), case(gaussian(1, 2, 3, 4, 2), (1, 2, 2), divisor_override=3)],
    torch.amax: [case(gaussian(3, 4), 1), case(gaussian(2, 3, 2), (0, 2), True)],
    torch.max_pool3d: [case(gaussian(1, 2, 2, 4, 2), 2), case(gaussian(1, 1, 2, 3, 3), (1, 2, 2), 1)],
    F.adaptive_max_pool1d: [case(gaussian(2, 3, 7), 3)],
    F.adaptive_max_pool2d: [case(gaussian(1, 2, 4, 5), (2, 2)), case(gaussian(1, 2, 3, 4), (None, 1))],
    F.adaptive_max_pool3d: [case(gaussian(1, 1, 2, 3, 2), (1, 2, 1))],
    F.glu: [case(gaussian(3, 8)), case(gaussian(4, 3, sd=0.3), 0)],
    F.embedding_bag: [case(torch.tensor([[0, 2], [3, 1]]), gaussian(4, 3), mode="sum"), case(torch.tensor([[0, 1, 2]]), gaussian(4, 3))],
    torch.hstack: [case([gaussian(2, 3), plain(2, 2)])],
    torch.vstack: [case([gaussian(2, 3), gaussian(1, 3)])],
    torch.dstack: [case([gaussian(2, 3), plain(2, 3)])],
    torch.column_stack: [case([gaussian(3), plain(3, 2)])],
    torch.where: [case(plain(3, 4) > 0, gaussian(3, 4), gaussian(4, seed=1)), case(plain(3, 4) > 0, plain(3, 4), gaussian(3, 1)), case(plain(3) > 0, gaussian(3), 1.5)],
    torch.masked_fill: [case(gaussian(3, 4), plain(3, 4) > 0, 2.0)],
    F.pad: [case(gaussian(2, 3, 4), (1, 2)), case(gaussian(2, 3, 4), (1, 1), "constant", 3.0), case(gaussian(2, 3, 4), (1, 2), "reflect"), case(gaussian(2, 3, 4), (1, 1), "circular")],
    torch.index_copy: [case(gaussian(3, 4), 0, torch.tensor([2, 0]), gaussian(2, 4, seed=1)), case(plain(3), 0, torch.tensor([1]), gaussian(1))],
    torch.scatter: [case(gaussian(3, 4), 0, SOURCE_INDEX[:1], gaussian(1, 4, seed=1))],
    torch.index_add: [case(plain(3, 4), 0, torch.tensor([2, 0, 2]), gaussian(3, 4, seed=1))],
    torch.scatter_add: [case(gaussian(3, 4), 0, SOURCE_INDEX, gaussian(2, 4, seed=1))],
    torch.select_scatter: [case(gaussian(3, 4), gaussian(3, seed=1), 1, 2)],
    torch.slice_scatter: [case(gaussian(3, 4), plain(3, 2), 1, 1, 3)],
    F.fold: [case(gaussian(1, 8, 4), (3, 3), 2)],
    F.interpolate: [
        case(gaussian(1, 2, 3, 4), scale_factor=2, mode="bilinear", align_corners=False),
        case(gaussian(1, 2, 4), 7, mode="linear", align_corners=True),
        case(gaussian(1, 1, 4, 4), (6, 3), mode="bicubic"),
        case(gaussian(1, 1, 6, 6), (3, 4), mode="bilinear", antialias=True),
        case(gaussian(1, 1, 2, 2), scale_factor=2),
        case(gaussian(1, 1, 2, 2, 2), (3, 2, 3), mode="trilinear"),
        case(gaussian(1, 1, 5, 4), (2, 2), mode="area"),
    ],
    F.grid_sample: [case(gaussian(1, 2, 3, 3), plain(1, 2, 2, 2).tanh(), "nearest", align_corners=False)],
    torch.var: [case(gaussian(3, 16), 1), case(gaussian(3, 16), -1, correction=0, keepdim=True)],
    torch.std: [case(gaussian(3, 16), 1)],
    torch.var_mean: [case(gaussian(3, 16), 1)],
    torch.linalg.vector_norm: [case(gaussian(3, 16), dim=1)],
    torch.norm: [case(gaussian(3, 16), dim=1), case(gaussian(16))],
    F.multi_head_attention_forward: [attention_case(plain(4, 2, 4)), attention_case(plain(3, 4), need_weights=False)],
    Tensor.__rtruediv__: [case(positive(5), 2.0)],
    assign: [case(gaussian(3, 4), (slice(None), 1), gaussian(3, seed=1)), case(gaussian(3), torch.tensor([True, False, True]), 2.0)],
    copied: [case(plain(2, 3), gaussian(3))],
    **RECURRENT, **LAYERS,
}  # fmt: skip
EXTRA = {
    torch.max_pool2d: [
        case(gaussian(1, 2, 5, 6), 2, 2, 0, 1, True),
        case(gaussian(1, 1, 6, 5), 3, 2, 1, ceil_mode=True),
    ],
    torch.div: [case(plain(5), positive(5)), case(gaussian(5), positive(5, seed=1))],
    torch.pow: [
        case(gaussian(5), 3),
        case(positive(5), 0.5),
        case(positive(5), -1),
        case(positive(5), -0.5),
        case(positive(5), 4),
    ],
}
