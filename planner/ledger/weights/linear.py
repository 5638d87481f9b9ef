"""Weights of one linear layer."""

from __future__ import annotations

from planner.model.shape import Component, Weight

__all__ = ["linear_weights"]


def linear_weights(name: str, out: int, into: int, *, bias: bool, component: Component) -> tuple[Weight, ...]:
    """The (out, into) matrix of the linear layer called `name`, and its bias of size `out` where it has one."""
    matrix = Weight(name=f"{name}.weight", shape=(out, into), component=component, kind="linear")
    if not bias:
        return (matrix,)
    return (matrix, Weight(name=f"{name}.bias", shape=(out,), component=component, kind="bias"))
