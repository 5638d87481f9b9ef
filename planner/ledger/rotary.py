"""Rotary position embedding: the shared tables, and what turning queries and keys keeps.

Letters: B batch, S sequence, A query heads, K key/value heads, D head size, R rotated elements of a head.
"""

from __future__ import annotations

from planner.ledger.operations import Operations
from planner.ledger.tape import Tensor
from planner.model.shape import Attention

__all__ = ["ROTATES_INLINE", "TURNS_HALVES", "concatenates", "rotary_tables", "rotate", "rotate_both", "turn"]

# Families, by what their attention does in its own way (modeling_<family>.py).
_ALWAYS_CONCATENATES = frozenset({"gpt_neox", "phi", "phi3", "stablelm", "nemotron", "glm", "glm4", "minimax_m2"})
ROTATES_INLINE = frozenset({"phi"})  # in the attention's own forward, whose variables live on
_FP32_TABLES = frozenset({"olmo", "olmo2", "olmo3", "ernie4_5_moe"})
_TWO_TABLES = frozenset({"gemma3_text", "olmo3", "modernbert"})  # one for sliding layers, one for the others
_REPEATS_TABLES = frozenset({"glm", "glm4", "ernie4_5_moe"})  # each layer spreads cos and sin over pairs for itself
_UPCASTS_QUERIES = frozenset({"cohere", "cohere2", "ernie4_5_moe"})  # queries and keys are rotated in fp32
_UPCASTS_TWICE = frozenset({"modernbert"})  # the same, with a copy for each of the two products
TURNS_HALVES = frozenset({"gpt_oss"})  # rotates halves by themselves and puts them together


def rotary_tables(t: Operations, sequence: str, size: int, dtype: str) -> None:
    """cos and sin of every position, (1, S, R) in the activations' format (some: fp32), shared by all blocks."""
    dims = ("1", sequence, t.dim("R", size))
    if t.family == "gptj":
        return  # each layer gathers its own
    if t.family in _FP32_TABLES:
        dtype = "fp32"
    for _ in range(2 if t.family in _TWO_TABLES else 1):
        t.rotary = (t.constant("cos", dims, dtype), t.constant("sin", dims, dtype))
        if t.family in _REPEATS_TABLES and not t.recomputes:
            t.model_locals.extend(table.storage for table in t.rotary)
        else:
            t.hold(*t.rotary)


def rotate_both(t: Operations, spec: Attention, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Both rotated; what they were before lives until both are done, as the arguments of a function do."""
    t.module = "rotary"
    dtype = query.dtype
    shared = t.rotary
    if t.family in _REPEATS_TABLES:
        t.rotary = tuple(t.constant("repeat_interleave", table.dims, table.dtype) for table in shared)
    if t.family in _UPCASTS_TWICE:
        query, key = _turned_in_fp32(t, spec, query), _turned_in_fp32(t, spec, key)
        return t.to(query, dtype), t.to(key, dtype)
    if t.family in _UPCASTS_QUERIES:
        query, key = t.to(query, "fp32"), t.to(key, "fp32")
    query, key = rotate(t, spec, query), rotate(t, spec, key)
    t.rotary = shared
    return t.to(query, dtype), t.to(key, dtype)


def rotate(t: Operations, spec: Attention, x: Tensor) -> Tensor:
    """x * cos + rotate_half(x) * sin on the first `rotary_dim` elements of each head; saves only cos and sin."""
    t.module = "rotary"
    if t.profile.fused_rope:
        return t.apply("rotary", [x], [(x.dims, x.dtype)], view=True)[0]  # written over x, and its gradient over dy
    if not concatenates(t, spec):
        return turn(t, spec, x)
    rest = t.dim("D-R", spec.head_dim - spec.rotary_dim)
    turned, passed = t.slices(x, [(*x.dims[:-1], t.dim("R", spec.rotary_dim)), (*x.dims[:-1], rest)])
    turned = turn(t, spec, turned)
    if t.family in ROTATES_INLINE:
        t.call_locals.append(turned)
    return t.cat([turned, passed], x.dims)


def concatenates(t: Operations, spec: Attention) -> bool:
    """Whether the rotated part is put together with a rest, even an empty one: the result has heads first."""
    return 0 < spec.rotary_dim < spec.head_dim or (bool(spec.rotary_dim) and t.family in _ALWAYS_CONCATENATES)


def _turned_in_fp32(t: Operations, spec: Attention, x: Tensor) -> Tensor:
    """x.float() * cos + rotate_half(x.float()) * sin, each copy for itself."""
    cos, sin = t.rotary
    first = t.mul(t.to(x, "fp32"), cos, x.dims)
    return t.add(first, t.mul(_rotate_half(t, spec, t.to(x, "fp32")), sin, x.dims))


def turn(t: Operations, spec: Attention, x: Tensor) -> Tensor:
    if t.family in TURNS_HALVES:
        return _halves_turned(t, spec, x)
    cos, sin = t.rotary
    return t.add(t.mul(x, cos, x.dims), t.mul(_rotate_half(t, spec, x), sin, x.dims))


def _halves_turned(t: Operations, spec: Attention, x: Tensor) -> Tensor:
    """cat(a cos - b sin, b cos + a sin) of the two halves of each head, laid out heads first (gpt-oss)."""
    cos, sin = t.rotary
    (x,) = t.apply("transpose", [x], [(x.dims, x.dtype)], view=True, copies=True)
    half = (*x.dims[:-1], t.dim("R/2", spec.rotary_dim // 2))
    first, second = t.split(x, [half, half])
    first_ = t.apply("sub", [t.mul(first, cos, half), t.mul(second, sin, half)], [(half, x.dtype)], alias=[True, False])
    second_ = t.add(t.mul(second, cos, half), t.mul(first, sin, half))
    return t.cat([first_[0], second_], x.dims)


def _rotate_half(t: Operations, spec: Attention, x: Tensor) -> Tensor:
    half = (*x.dims[:-1], t.dim("R/2", spec.rotary_dim // 2))
    first, second = t.slices(x, [half, half])
    return t.cat([t.scale(second, "neg"), first], x.dims)


# ---- masks ----------------------------------------------------------------------------------------------------
