"""Softmax attention, eager and fused.

Letters: B batch, S sequence, T key/value sequence, H hidden, A query heads, K key/value heads, D head size, E value
head size; AD stands for A*D in one dim.
"""

from __future__ import annotations

from planner.ledger.norm import normalise
from planner.ledger.operations import Operations
from planner.ledger.tape import Tensor
from planner.model.shape import Attention

__all__ = ["attend", "core", "rotate", "rotary_tables"]


def attend(t: Operations, spec: Attention, x: Tensor, hidden: str, context: Tensor | None = None) -> Tensor:
    """out(core(q(x), k(x), v(x))); `context` gives the keys and values of cross-attention."""
    return t.linear(spec.out_name, _heads(t, spec, x, context), hidden, bias=spec.out_bias)


def _heads(t: Operations, spec: Attention, x: Tensor, context: Tensor | None) -> Tensor:
    batch, sequence = x.dims[:2]
    heads, groups = t.dim("A", spec.heads), t.dim("K", spec.kv_heads)
    size, value_size = t.dim("D", spec.head_dim), t.dim("E", spec.value_dim or spec.head_dim)
    wide_q = t.dim("AD", spec.heads * spec.head_dim)
    wide_k = t.dim("KD", spec.kv_heads * spec.head_dim)
    wide_v = t.dim("KE", spec.kv_heads * (spec.value_dim or spec.head_dim))
    source = x if context is None else context
    keys = source.dims[1]
    gate = None
    if len(spec.names) == 1:
        total = spec.heads * spec.head_dim + spec.kv_heads * (spec.head_dim + (spec.value_dim or spec.head_dim))
        packed = t.linear(spec.names[0], x, t.dim("QKV", total), bias=spec.q_bias)
        query, key, value = t.split(packed, [(batch, sequence, wide) for wide in (wide_q, wide_k, wide_v)])
        del packed
    else:
        name_q, name_k, name_v = spec.names
        if spec.gate:
            both = t.linear(name_q, x, t.dim("2AD", 2 * spec.heads * spec.head_dim), bias=spec.q_bias)
            query, gate = t.split(both, [(batch, sequence, wide_q)] * 2)
            gate = t.copy(gate)
            del both
        else:
            query = t.linear(name_q, x, wide_q, bias=spec.q_bias)
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
    if spec.rotary_dim:
        query, key = rotate(t, spec, query), rotate(t, spec, key)
    result = core(t, spec, query, key, value)
    del query, key, value
    if gate is not None:
        result = t.mul(result, t.map("sigmoid", gate, saves="output"))
    return result


def rotary_tables(t: Operations, sequence: str, size: int, dtype: str) -> None:
    """cos and sin of every position, (1, S, R) in the activations' format, shared by all blocks."""
    dims = ("1", sequence, t.dim("R", size))
    t.rotary = (t.constant("cos", dims, dtype), t.constant("sin", dims, dtype))
    t.hold(*t.rotary)


def rotate(t: Operations, spec: Attention, x: Tensor) -> Tensor:
    """x * cos + rotate_half(x) * sin on the first `rotary_dim` elements of each head; saves only cos and sin.

    The result is contiguous in (B, A, S, D), unlike x, which is a transposed view.
    """
    t.module = "rotary"
    if t.profile.fused_rope:
        return t.apply("rotary", [x], [(x.dims, x.dtype)])[0]
    cos, sin = t.rotary
    if spec.rotary_dim != spec.head_dim:
        rest = t.dim("D-R", spec.head_dim - spec.rotary_dim)
        turned, passed = t.slices(x, [(*x.dims[:-1], t.dim("R", spec.rotary_dim)), (*x.dims[:-1], rest)])
        return t.cat([_turn(t, spec, turned, cos, sin), passed], x.dims)
    return _turn(t, spec, x, cos, sin)


def _turn(t: Operations, spec: Attention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    straight = t.mul(x, cos, x.dims)
    half = (*x.dims[:-1], t.dim("R/2", spec.rotary_dim // 2))
    first, second = t.slices(x, [half, half])
    turned = t.cat([t.scale(second, "neg"), first], x.dims)
    return t.add(straight, t.mul(turned, sin, x.dims))


def core(t: Operations, spec: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T) v with its heads merged, (B, S, A*E)."""
    t.module = "attention"
    if t.attention == "eager" or spec.softcap:
        return _eager(t, spec, query, key, value)
    return _fused(t, spec, query, key, value)


def _fused(t: Operations, spec: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """FlashAttention-2 (torch's own or the flash_attn package).

    Saved: q, k, v, the output, and the log-sum-exp in fp32, (B, A, S).
    Backward (flash_api.cpp, mha_bwd): an fp32 accumulator for dq (B, A, S, D), the row sums of do * o in fp32
    (B, A, S), and, when K < A, dk and dv for all A heads before they are summed over each group.
    """
    batch, heads, sequence, size = query.dims
    keys = key.dims[2]
    if t.compute is not None:
        query, key, value = (t.to(tensor, t.compute) for tensor in (query, key, value))
    if not t.profile.grouped_attention and t.attention == "sdpa" and spec.kv_heads != spec.heads:
        key = t.copy(key, (batch, heads, keys, size), "repeat_kv")
        value = t.copy(value, (batch, heads, keys, value.dims[3]), "repeat_kv")
    wide = (batch, sequence, t.dim("AE", spec.heads * (spec.value_dim or spec.head_dim)))
    padded = t.dim("S128", (t.sizes[sequence] + 127) // 128 * 128)
    rounded = t.dim("D32", (spec.head_dim + 31) // 32 * 32)
    scratch = [((batch, heads, padded, rounded), "fp32"), ((batch, heads, padded), "fp32")]
    if key.dims[1] != heads:
        scratch += [((batch, heads, keys, size), key.dtype), ((batch, heads, keys, value.dims[3]), value.dtype)]
    (result,) = t.apply(
        "attention",
        [query, key, value],
        [(wide, query.dtype)],
        saves=[query, key, value],
        saves_outputs=(0,),
        extra_saved=[((batch, heads, sequence), "fp32")],
        backward_scratch=scratch,
    )
    return result


def _eager(t: Operations, spec: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scores in memory: matmul, scale, (soft cap,) mask, softmax in fp32, cast, dropout, matmul.

    Saved per score (bf16): softmax output in fp32, 4; its cast for the product with v, 2; with dropout the cast is
    kept by nobody, the dropped scores are, 2, and their mask, 1.
    """
    batch, heads, sequence, _ = query.dims
    keys = key.dims[2]
    if spec.kv_heads != spec.heads:
        key = t.copy(key, (batch, heads, keys, key.dims[3]), "repeat_kv")
        value = t.copy(value, (batch, heads, keys, value.dims[3]), "repeat_kv")
    scores = t.scale(t.matmul(query, key, (batch, heads, sequence, keys)))
    if spec.softcap:
        scores = t.scale(t.map("tanh", t.scale(scores, "div"), saves="output"))
    if spec.causal:
        scores = t.add(scores, t.mask(sequence, keys, scores.dtype))
    weights = t.softmax_fp32(scores)
    del scores
    weights = t.dropout(weights, spec.dropout)
    result = t.matmul(weights, value, (batch, heads, sequence, value.dims[3]))
    del weights
    result = t.copy(result)
    return t.view(result, (batch, sequence, t.dim("AE", spec.heads * (spec.value_dim or spec.head_dim))))
