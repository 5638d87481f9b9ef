"""Weights of the final norm and of the projection to logits."""

from __future__ import annotations

from planner.ledger.weights.linear import linear_weights
from planner.ledger.weights.norm import norm_weights
from planner.model.shape import Head, Weight

__all__ = ["head_weights"]


def head_weights(head: Head | None, hidden: int) -> tuple[Weight, ...]:
    """The final norm, the projection to another width, and the (rows, H) matrix unless it is the embedding itself."""
    if head is None:
        return ()
    weights = norm_weights(head.norm, head.norm_name, hidden)
    width = hidden
    if head.projection is not None:
        weights += linear_weights(head.projection_name, head.projection, hidden, bias=False, component="other")
        width = head.projection
    if head.rows:
        output = linear_weights(head.name, head.rows, width, bias=head.bias, component="lm_head")
        weights += output[1:] if head.tied else output
    return weights + head.extra
