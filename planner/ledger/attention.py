"""Softmax attention in the manner of the library's shared attention functions: projections, rotation, core, output.

Letters: B batch, S sequence, H hidden, A query heads, K key/value heads, D head size, E value head size; AD stands
for A*D in one dim. Local variables live as long as in the reference module: queries, keys and values until it returns.
"""

from __future__ import annotations

from planner.errors import NotCovered
from planner.ledger.attention_kernels import core, run_core
from planner.ledger.norm import normalise
from planner.ledger.operations import Operations
from planner.ledger.prompt_tuning import extend_with_prefix
from planner.ledger.rotary import ROTATES_INLINE, rotate_both
from planner.ledger.tape import Tensor
from planner.model.shape import Attention

__all__ = ["attend", "heads_merged"]

_SLICED = frozenset({"phi3"})  # cut the fused projection by slices, each with a gradient of the full size
_SCALES_QUERIES = frozenset({"opt"})  # scale queries by themselves, before the product


def attend(
    t: Operations, spec: Attention, x: Tensor, hidden: str, context: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """out(core(q(x), k(x), v(x))), and the attention weights where the module returns them.

    `context` gives the keys and values of cross-attention.
    """
    _check_covered(spec)
    query, key, value, gate = _projections(t, spec, x, context)
    if spec.rotary_dim:
        if t.family in ROTATES_INLINE:
            t.call_locals.extend((query, key))
        query, key = rotate_both(t, spec, query, key)
    if t.past is not None:
        key, value = extend_with_prefix(t, key, value)
    result, weights = _recomputed(t, spec, query, key, value) if t.selective else run_core(t, spec, query, key, value)
    if gate is not None:
        result = t.mul(result, t.map("sigmoid", gate, saves="output"))
    result = t.linear(spec.out_name, result, hidden, bias=spec.out_bias)
    t.call_locals.clear()
    return result, weights


def _recomputed(t: Operations, spec: Attention, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
    """The core under a checkpoint of its own: q, k and v are kept, and it runs again in backward (arXiv:2205.05198)."""
    t.selected = True
    return t.checkpoint(lambda query, key, value: core(t, spec, query, key, value), query, key, value), None


def heads_merged(
    t: Operations, spec: Attention, x: Tensor, context: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """What `attend` does before the output projection, (B, S, A*E), for modules that keep it a name of its own."""
    _check_covered(spec)
    query, key, value, _ = _projections(t, spec, x, context)
    return run_core(t, spec, query, key, value)


def _check_covered(spec: Attention) -> None:
    """Raise NotCovered for what the general program does not describe."""
    parts = {
        "chunked local attention": spec.chunk is not None,
        "keys and values shared between blocks": spec.shares_kv,
        "values taken from keys": spec.value_from_key,
        "normalised values": spec.value_norm,
        f"{spec.position_bias} position biases": spec.position_bias != "none",
    }
    missing = [part for part, present in parts.items() if present]
    if missing:
        raise NotCovered(f"activations of attention with {' and '.join(missing)} are not in the ledger.")


def _projections(
    t: Operations, spec: Attention, x: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, keys and values as (B, heads, S, D), and the output gate, (B, S, A*D), where there is one."""
    batch, sequence = x.dims[:2]
    heads, groups = t.dim("A", spec.heads), t.dim("K", spec.kv_heads)
    value_dim = spec.value_dim or spec.head_dim
    size, value_size = t.dim("D", spec.head_dim), t.dim("E", value_dim)
    wide_q = t.dim("AD", spec.heads * spec.head_dim)
    wide_k = t.dim("KD", spec.kv_heads * spec.head_dim)
    wide_v = t.dim("KE", spec.kv_heads * value_dim)
    source = x if context is None else context
    keys = source.dims[1]
    gate = None
    if len(spec.names) == 1:
        total = spec.heads * spec.head_dim + spec.kv_heads * (spec.head_dim + value_dim)
        packed = t.linear(spec.names[0], x, t.dim("QKV", total), bias=spec.q_bias)
        parts = [(batch, sequence, wide) for wide in (wide_q, wide_k, wide_v)]
        query, key, value = t.slices(packed, parts) if t.family in _SLICED else t.split(packed, parts)
    else:
        name_q, name_k, name_v = spec.names
        if spec.gate:
            both = t.linear(name_q, x, t.dim("2AD", 2 * spec.heads * spec.head_dim), bias=spec.q_bias)
            query, gate = t.split(both, [(batch, sequence, wide_q)] * 2)
            gate = t.copy(gate)
            del both
        else:
            query = t.linear(name_q, x, wide_q, bias=spec.q_bias)
        if t.family in _SCALES_QUERIES:
            query = t.scale(query)
        key = t.linear(name_k, source, wide_k, bias=spec.k_bias)
        value = t.linear(name_v, source, wide_v, bias=spec.v_bias)
    if spec.qk_norm is not None and spec.qk_norm_over == "width":
        query = normalise(t, spec.qk_norm, spec.qk_norm_names[0], query)
        key = normalise(t, spec.qk_norm, spec.qk_norm_names[1], key)
    query = t.view(query, (batch, heads, sequence, size))
    key = t.view(key, (batch, groups, keys, size))
    value = t.view(value, (batch, groups, keys, value_size))
    if spec.qk_norm is not None and spec.qk_norm_over == "head":
        query = normalise(t, spec.qk_norm, spec.qk_norm_names[0], query)
        key = normalise(t, spec.qk_norm, spec.qk_norm_names[1], key)
    elif spec.qk_norm is not None and spec.qk_norm_over == "heads":
        query = _normalise_each(t, spec, spec.qk_norm_names[0], query)
        key = _normalise_each(t, spec, spec.qk_norm_names[1], key)
    return query, key, value, gate


def _normalise_each(t: Operations, spec: Attention, name: str, x: Tensor) -> Tensor:
    """One norm for each head, with weights of its own, over views of x; the results are put together again."""
    part = (x.dims[0], "1", *x.dims[2:])
    heads = t.split(x, [part] * int(t.sizes[x.dims[1]]))
    normed = [normalise(t, spec.qk_norm, f"{name}.norms.{index}", head) for index, head in enumerate(heads)]
    return t.cat(normed, x.dims)


# ---- positions ------------------------------------------------------------------------------------------------
