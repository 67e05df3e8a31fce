"""LSTM, GRU and plain recurrent layers, step by step.

Assumption: gates, states and weights are independent within a step. One weight's noise is the same
at every step, so what steps add to a cell state adds up; with `shared="carry"` the shared parts of
the old state and of the update add as standard deviations.

The equations are those of the documentation of `torch.nn.LSTM`, `GRU` and `RNN`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bayespass.approximation import Approximation
from bayespass.errors import UnsupportedOp
from bayespass.moments import Moments, add, as_moments, bilinear, carry, move, total
from bayespass.rules.activation import relu, sigmoid, tanh
from bayespass.rules.affine import linear
from bayespass.rules.placing import cat, stack
from bayespass.rules.registry import Accuracy, rule

ACCURACY = Accuracy(0.5, 0.5)
OVER_STEPS = Accuracy(0.5, 0.8)
LARGEST = 1e15
State = tuple[Moments, ...]
Cell = Callable[..., State]


def _gates(x: Any, h: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any, approximation: Approximation) -> Moments:
    return _plus(linear(x, w_ih, b_ih, approximation=approximation), linear(h, w_hh, b_hh, approximation=approximation))


def _plus(a: Moments, b: Moments) -> Moments:
    """A + b whose shared parts come from the same weights."""
    result = add(a, b)
    if a.shared is None or b.shared is None or result.var is None or result.shared is None:
        return result
    both = 2 * (a.shared * b.shared).sqrt()
    return Moments(result.mean, result.var + both, result.shared + both)


def _held(x: Moments) -> Moments:
    """Variances that a linearised recurrence blows up, held where their squares are still numbers."""
    return carry(x.mean, lambda v: v.clamp(max=LARGEST), x)


@rule(torch.lstm_cell, accuracy=ACCURACY, knows_shared=True)
def lstm_cell(
    input: Any, hx: Sequence[Any], w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None, *,
    approximation: Approximation,
) -> State:  # fmt: skip
    """C' = f c + i g, h' = o tanh(c'). Bounds (mean in output sd, variance relative): 0.5 and 0.5."""
    h, c = (as_moments(state) for state in hx)
    gates = _gates(input, h, w_ih, w_hh, b_ih, b_hh, approximation)
    i, f, g, o = move(Tensor.chunk, gates, 4, -1)
    i, f, o = (sigmoid(gate, approximation=approximation) for gate in (i, f, o))
    g = tanh(g, approximation=approximation)
    kept, new = bilinear(torch.mul, f, c), bilinear(torch.mul, i, g)
    c = _held(_plus(kept, new))
    return bilinear(torch.mul, o, tanh(c, approximation=approximation)), c


@rule(torch.gru_cell, accuracy=ACCURACY, knows_shared=True)
def gru_cell(
    input: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None, *, approximation: Approximation
) -> Moments:  # fmt: skip
    """H' = (1 - z) n + z h with n = tanh(W x + r (U h)); z moves h' by (h - n). Bounds 0.5 and 0.5."""
    h = as_moments(hx)
    from_x = linear(input, w_ih, b_ih, approximation=approximation)
    from_h = linear(h, w_hh, b_hh, approximation=approximation)
    (xr, xz, xn), (hr, hz, hn) = (move(Tensor.chunk, part, 3, -1) for part in (from_x, from_h))
    r, z = (sigmoid(_plus(a, b), approximation=approximation) for a, b in ((xr, hr), (xz, hz)))
    n = tanh(_plus(xn, bilinear(torch.mul, r, hn)), approximation=approximation)
    rest = Moments(1 - z.mean, z.var, z.shared)
    mixed = _plus(bilinear(torch.mul, rest.mean, n), bilinear(torch.mul, z.mean, h))
    gap = Moments(h.mean - n.mean, total(h.var, n.var), total(h.shared, n.shared))
    second = bilinear(torch.mul, Moments(torch.zeros_like(z.mean), z.var, z.shared), gap)
    return _held(add(mixed, second))


def _rnn_cell(activation: Callable[..., Moments]) -> Callable[..., Moments]:
    def cell(
        input: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None, *, approximation: Approximation
    ) -> Moments:  # fmt: skip
        """H' = f(W x + U h). Bounds (mean in output sd, variance relative): 0.5 and 0.5."""
        return activation(_gates(input, hx, w_ih, w_hh, b_ih, b_hh, approximation), approximation=approximation)

    cell.__name__ = f"rnn_{activation.__name__}_cell"
    return cell


rnn_tanh_cell, rnn_relu_cell = _rnn_cell(tanh), _rnn_cell(relu)
rule(torch.rnn_tanh_cell, accuracy=ACCURACY, knows_shared=True)(rnn_tanh_cell)
rule(torch.rnn_relu_cell, accuracy=ACCURACY, knows_shared=True)(rnn_relu_cell)


def _layers(operation: Callable[..., Any], cell: Callable[..., Any], n_states: int) -> Callable[..., Any]:
    """The rule of a whole stack of layers from the rule of its cell."""

    def recurrent(*args: Any, approximation: Approximation) -> tuple[Moments, ...]:
        """Steps, directions and layers of the cell's rule. Bounds 0.5 and 0.8 for short sequences.

        Takes the two spellings of the operation: (input, hx, weights, has_biases, num_layers,
        dropout, train, bidirectional, batch_first), or (data, batch_sizes, hx, ...) when packed.

        Raises:
            UnsupportedOp: dropout between layers in training mode, or projected states.
        """
        packed = isinstance(args[1], Tensor) and not args[1].is_floating_point()
        if packed:
            data, batch_sizes, hx, weights, biased, layers, dropout, train, both = args
            sizes, batch_first = batch_sizes.tolist(), False
            steps = list(move(Tensor.split, as_moments(data), sizes))
        else:
            data, hx, weights, biased, layers, dropout, train, both, batch_first = args
            steps = list(move(Tensor.unbind, as_moments(data), 1 if batch_first else 0))
            sizes = [steps[0].mean.shape[0]] * len(steps)
        states = [as_moments(part) for part in (hx if n_states == 2 else [hx])]
        per_cell = 4 if biased else 2
        if len(weights) != layers * (2 if both else 1) * per_cell:
            msg = "no Gaussian rule for recurrent layers with projected states (proj_size)"
            raise UnsupportedOp(msg)
        if train and dropout:
            msg = "no Gaussian rule for dropout between recurrent layers in training mode; call model.eval()"
            raise UnsupportedOp(msg)
        finals: list[State] = []
        for layer in range(layers):
            outputs = []
            for direction in range(2 if both else 1):
                place = layer * (2 if both else 1) + direction
                own = weights[place * per_cell : (place + 1) * per_cell]
                start = tuple(move(Tensor.select, state, 0, place) for state in states)
                out, final = _run(cell, steps, sizes, start, own, direction == 1, approximation)
                outputs.append(out)
                finals.append(final)
            steps = [cat(parts, -1) if both else parts[0] for parts in zip(*outputs, strict=True)]
        joined = cat(steps, 0) if packed else stack(steps, 1 if batch_first else 0)
        last = [stack([final[i] for final in finals], 0) for i in range(n_states)]
        return (joined, *last)

    recurrent.__name__ = operation.__name__
    return recurrent


def _run(
    cell: Callable[..., Any], steps: list[Moments], sizes: list[int], state: State, weights: Any, backward: bool,
    approximation: Approximation,
) -> tuple[list[Moments], State]:  # fmt: skip
    """One direction of one layer; rows that have ended (in packed input) keep their state."""
    order = range(len(steps) - 1, -1, -1) if backward else range(len(steps))
    outputs: list[Any] = [None] * len(steps)
    for t in order:
        rows = sizes[t]
        now = [move(Tensor.narrow, s, 0, 0, rows) for s in state]
        new = cell(steps[t], tuple(now) if len(now) > 1 else now[0], *weights, approximation=approximation)
        new = new if isinstance(new, tuple) else (new,)
        outputs[t] = new[0]
        ended = state[0].mean.shape[0] - rows
        state = tuple(
            cat([n, move(Tensor.narrow, s, 0, rows, ended)]) if ended else n for n, s in zip(new, state, strict=True)
        )
    return outputs, state


for _operation, _cell, _n in (
    (torch.lstm, lstm_cell, 2), (torch.gru, gru_cell, 1), (torch.rnn_tanh, rnn_tanh_cell, 1),
    (torch.rnn_relu, rnn_relu_cell, 1),
):  # fmt: skip
    rule(_operation, accuracy=OVER_STEPS, knows_shared=True)(_layers(_operation, _cell, _n))


@rule(torch._pack_padded_sequence, knows_shared=True)
def pack_padded_sequence(input: Moments, lengths: Tensor, batch_first: bool) -> tuple[Moments, Tensor]:
    """The rows that are still running, step by step: exact."""
    _, sizes = torch._pack_padded_sequence(input.mean, lengths, batch_first)
    return move(lambda t: torch._pack_padded_sequence(t, lengths, batch_first)[0], input), sizes


@rule(torch._pad_packed_sequence, knows_shared=True)
def pad_packed_sequence(
    input: Moments, batch_sizes: Tensor, batch_first: bool, padding_value: float, total_length: int
) -> tuple[Moments, Tensor]:
    """The reverse of `pack_padded_sequence`; padding has no variance. Exact."""

    def padded(t: Tensor, value: float) -> tuple[Tensor, Tensor]:
        return torch._pad_packed_sequence(t, batch_sizes, batch_first, value, total_length)

    mean, lengths = padded(input.mean, padding_value)
    return carry(mean, lambda t: padded(t.expand_as(input.mean), 0.0)[0], input), lengths
