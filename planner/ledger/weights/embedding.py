"""Weights of the token embedding and of what is added to it."""

from __future__ import annotations

from planner.ledger.weights.linear import linear_weights
from planner.ledger.weights.norm import norm_weights
from planner.model.shape import Embedding, Weight

__all__ = ["embedding_weights"]


def embedding_weights(embedding: Embedding | None) -> tuple[Weight, ...]:
    """Tables of tokens, learned positions and token types; the norm after them; the projection to another width."""
    e = embedding
    if e is None:
        return ()
    tables = [
        (e.name, e.rows, e.size),
        (e.position_name, e.positions, e.position_size or e.size),
        (e.type_name, e.types, e.size),
    ]
    weights = tuple(
        Weight(name=f"{name}.weight", shape=(rows, size), component="embed_in", kind="embedding")
        for name, rows, size in tables
        if rows
    )
    weights += norm_weights(e.norm, e.norm_name, e.size)
    if e.projection is not None:
        weights += linear_weights(e.projection_name, e.projection, e.size, bias=False, component="other")
    return weights
