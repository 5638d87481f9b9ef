"""Weights of normalisations."""

from __future__ import annotations

from planner.model.shape import Component, Norm, Weight

__all__ = ["norm_weights"]


def norm_weights(
    norm: Norm | None, name: str, shape: int | tuple[int, ...], component: Component = "norm"
) -> tuple[Weight, ...]:
    """The weight and bias of one normalisation called `name`; none when it is not affine or not there."""
    if norm is None or not norm.affine or not name:
        return ()
    sizes = (shape,) if isinstance(shape, int) else shape
    weights = (Weight(name=f"{name}.weight", shape=sizes, component=component, kind="norm"),)
    if norm.bias:
        weights += (Weight(name=f"{name}.bias", shape=sizes, component=component, kind="norm"),)
    return weights
