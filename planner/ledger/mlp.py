"""Dense feed-forward layers.

Letters: B batch, S sequence, H hidden, F feed-forward width.
"""

from __future__ import annotations

from planner.errors import NotCovered, nearest
from planner.ledger.operations import Operations
from planner.ledger.tape import Tensor
from planner.model.shape import Mlp

__all__ = ["activate", "feed_forward", "feed_forward_inline"]


def feed_forward(t: Operations, mlp: Mlp, x: Tensor, hidden: str) -> Tensor:
    """down(act(gate(x)) * up(x)), or down(act(up(x)))."""
    width = t.dim("F", mlp.width)
    if not mlp.gated:
        up, down = mlp.names
        inner = t.linear(up, x, width, bias=mlp.up_bias)
        inner = activate(t, mlp.activation, inner)
        inner = t.dropout(inner, mlp.dropout) if mlp.dropout else inner
        return t.linear(down, inner, hidden, bias=mlp.down_bias)
    if len(mlp.names) == 2:
        fused, down = mlp.names
        both = t.linear(fused, x, t.dim("2F", 2 * mlp.width), bias=mlp.up_bias)
        gate, up = t.split(both, [(*x.dims[:-1], width)] * 2)
        return t.linear(down, t.mul(up, activate(t, mlp.activation, gate)), hidden, bias=mlp.down_bias)
    gate, up, down = mlp.names
    return t.linear(
        down,
        gated(t, mlp.activation, t.linear(gate, x, width, bias=mlp.up_bias), t.linear(up, x, width, bias=mlp.up_bias))
        if t.profile.fused_glu
        else t.mul(
            activate(t, mlp.activation, t.linear(gate, x, width, bias=mlp.up_bias)),
            t.linear(up, x, width, bias=mlp.up_bias),
        ),
        hidden,
        bias=mlp.down_bias,
    )


def feed_forward_inline(t: Operations, mlp: Mlp, held: list[Tensor], hidden: str) -> Tensor:
    """down(act(up(x))) where nobody but `held` refers to x, so that it goes once `up` has run."""
    up, down = mlp.names
    x = t.linear(up, held.pop(), t.dim("F", mlp.width), bias=mlp.up_bias)
    x = activate(t, mlp.activation, x)
    return t.linear(down, x, hidden, bias=mlp.down_bias)


def gated(t: Operations, activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up in one kernel: saves both inputs and nothing in between (Liger, Transformer Engine).

    Liger's writes both gradients over the inputs (ops/swiglu.py, swiglu_backward).
    """
    memory = [gate.storage, up.storage] if t.profile.in_place_gradients else ()
    return t.apply(f"{activation} gate", [gate, up], [(gate.dims, gate.dtype)], saves=[gate, up], gradients_in=memory)[
        0
    ]


def activate(t: Operations, name: str, x: Tensor) -> Tensor:
    """The activation function `hidden_act` of transformers' activations.py."""
    if name in _SAVES_INPUT:
        return t.map(name, x)
    if name in _SAVES_OUTPUT:
        return t.map(name, x, saves="output")
    written_out = _WRITTEN_OUT.get(name)
    if written_out is None:
        accepted = (*_SAVES_INPUT, *_SAVES_OUTPUT, *_WRITTEN_OUT)
        raise NotCovered(f'activation "{name}" is not in the ledger; {nearest(name, accepted)}')
    return written_out(t, x)


def _gelu_new(t: Operations, x: Tensor) -> Tensor:
    """0.5 * x * (1 + tanh(c * (x + 0.044715 * x ** 3))), written in Python: NewGELUActivation.

    Python evaluates 0.5 * x first and keeps it while the rest is computed. Saved, each as wide as x (under autocast pow
    casts its input to fp32, and what follows from it is fp32):
        x            by pow                                              1
        0.5 * x      by the last product                                 1
        tanh(...)    by tanh itself                                      1
        1 + tanh     by the last product                                 1
    """
    return t.mul(
        t.scale(x),
        t.scale(t.map("tanh", t.scale(t.add(x, t.scale(t.map("pow", x)))), saves="output"), "add scalar"),
    )


def _bloom_gelu(t: Operations, x: Tensor) -> Tensor:
    """x * 0.5 * (1 + tanh(0.79788456 * x * (1 + 0.044715 * x * x))) in an autograd function that keeps x alone.

    Both ways are one long Python expression: 4 tensors as wide as x live at once forward, and 5 backward.
    """
    wide = (x.dims, x.dtype)
    return t.apply("bloom_gelu", [x], [wide], saves=[x], scratch=[wide] * 3, backward_scratch=[wide] * 4)[0]


def _quick_gelu(t: Operations, x: Tensor) -> Tensor:
    """x * sigmoid(1.702 * x): saves x and the sigmoid (once: the product and sigmoid keep the same tensor)."""
    return t.mul(x, t.map("sigmoid", t.scale(x), saves="output"))


def _relu_squared(t: Operations, x: Tensor) -> Tensor:
    """square(relu(x)), which is pow(..., 2): relu's output is kept once, by both."""
    return t.map("pow", t.map("relu", x, saves="output"))


_SAVES_INPUT = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_tanh", "mish")
_SAVES_OUTPUT = ("relu", "tanh", "sigmoid")
_WRITTEN_OUT = {"gelu_new": _gelu_new, "bloom_gelu": _bloom_gelu, "quick_gelu": _quick_gelu, "relu2": _relu_squared}
