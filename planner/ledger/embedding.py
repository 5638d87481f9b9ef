"""Token embedding and what is added to it.

Letters: B batch, S sequence, H hidden, V vocabulary.
"""

from __future__ import annotations

from planner.ledger.norm import normalise
from planner.ledger.operations import Operations
from planner.ledger.tape import Tensor
from planner.model.shape import Embedding

__all__ = ["embed"]

_SCALES_INSIDE = frozenset({"gemma", "gemma2", "gemma3_text"})  # the embedding module multiplies, not the model


def embed(t: Operations, spec: Embedding, batch: str = "B", sequence: str = "S") -> Tensor:
    """Hidden states (B, S, H) of token ids. A trained table's gradient is dense, (V, H) (embedding_dense_backward)."""
    rows, size = t.dim("V", spec.rows), t.dim("H", spec.size)
    t.module = spec.name
    table = t.weight(f"{spec.name}.weight", (rows, size))
    (x,) = t.apply("embedding", [table], [((batch, sequence, size), table.dtype)])
    inside = spec.scaled and t.family in _SCALES_INSIDE
    if inside:
        x = t.scale(x)
    t.model_locals.append(x.storage)  # the model's `inputs_embeds`
    if t.inputs_require_grad and not x.requires_grad:
        x.requires_grad = True
        t.hold(x)  # a leaf: the graph refers to it to the end
    if t.virtual is not None:
        x = t.virtual(t, x)
        t.model_locals[:] = [x.storage]
    if spec.scaled and not inside:
        x = t.scale(x)
        t.model_locals[:] = [x.storage]
    if spec.types:
        types = t.weight(f"{spec.type_name}.weight", (t.dim("types", spec.types), size))
        (kind,) = t.apply("embedding", [types], [((batch, sequence, size), types.dtype)])
        x = t.add(x, kind)
        del kind
    if spec.positions:
        places = t.weight(f"{spec.position_name}.weight", (t.dim("positions", spec.positions), size))
        rows_of = t.position_batch(batch)
        ids = t.constant("position_ids", (rows_of, sequence), "int64")
        (place,) = t.apply("embedding", [places], [((rows_of, sequence, size), places.dtype)], saves=[ids])
        del ids
        x = t.add(x, place)
        if not spec.types:
            t.model_locals.append(place.storage)  # a variable of the model's forward, where decoders add it
        del place
    x = normalise(t, spec.norm, spec.norm_name, x)
    x = t.dropout(x, spec.dropout)
    if spec.projection is not None:
        x = t.linear(spec.projection_name, x, t.dim("H", spec.projection))
    return x
