"""Weights of one convolution."""

from __future__ import annotations

from planner.model.shape import Component, Weight

__all__ = ["convolution_weights"]


def convolution_weights(
    name: str, out: int, into: int, kernel: tuple[int, ...], *, bias: bool, component: Component
) -> tuple[Weight, ...]:
    """The (out, into, *kernel) tensor of the convolution called `name`, and its bias of size `out` where it has one.

    The kernel has one size for each axis: (3,) for Conv1d, (14, 14) for Conv2d, (2, 14, 14) for Conv3d.
    """
    tensor = Weight(name=f"{name}.weight", shape=(out, into, *kernel), component=component, kind="conv")
    if not bias:
        return (tensor,)
    return (tensor, Weight(name=f"{name}.bias", shape=(out,), component=component, kind="bias"))
