"""Weights of dense feed-forward layers: gate, up and down, or up and down."""

from __future__ import annotations

from planner.ledger.weights.linear import linear_weights
from planner.model.shape import Component, Mlp, Weight

__all__ = ["mlp_weights"]


def mlp_weights(mlp: Mlp, hidden: int, component: Component = "mlp_dense") -> tuple[Weight, ...]:
    """(F, H) for each of gate and up, or (2F, H) when they are fused under one name, and (H, F) for down."""
    *inputs, down = mlp.names
    fused = 2 if mlp.gated and len(inputs) == 1 else 1
    weights: tuple[Weight, ...] = ()
    for name in inputs:
        weights += linear_weights(name, fused * mlp.width, hidden, bias=mlp.up_bias, component=component)
    return weights + linear_weights(down, hidden, mlp.width, bias=mlp.down_bias, component=component)
