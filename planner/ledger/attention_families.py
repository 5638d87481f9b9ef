"""Attention modules that families wrote for themselves, before the library had shared attention functions.

Each program has the shape of its module's forward: GPT-J, GPT-Neo, BLOOM, MPT and Falcon (modeling_*.py of
transformers). Letters as in `planner.ledger.attention`. The first four have no `sdpa` form: the library runs their
eager one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from planner.errors import NotCovered
from planner.ledger.attention_kernels import attend_fused, dense_copy, merged_width
from planner.ledger.masks import eager_mask
from planner.ledger.operations import Operations
from planner.ledger.rotary import rotate_both, turn
from planner.ledger.tape import Tensor
from planner.model.shape import Attention

__all__ = ["OWN_ATTENTION", "attention_of"]

_WITHOUT_SDPA = frozenset({"gptj", "gpt_neo", "bloom", "mpt", "gemma2"})  # _supports_sdpa is unset or False


def attention_of(family: str, attention: str) -> str:
    """What the library runs when a plan asks for `attention`: eager, for families that have no `sdpa` form."""
    if family not in _WITHOUT_SDPA or attention == "eager":
        return attention
    if attention != "sdpa" and family != "gemma2":
        raise NotCovered(f"{attention} attention of {family} is not in the ledger; eager is.")
    return "eager" if attention == "sdpa" else attention


Program = Callable[[Operations, Attention, Tensor, str], tuple[Tensor, Tensor | None]]


def _three_views(t: Operations, spec: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values from three projections, (B, A, S, D) as views of (B, S, A*D)."""
    wide = t.dim("AD", spec.heads * spec.head_dim)
    dims = (x.dims[0], t.dim("A", spec.heads), x.dims[1], t.dim("D", spec.head_dim))
    query, key, value = (t.linear(name, x, wide) for name in spec.names)
    return t.view(query, dims), t.view(key, dims), t.view(value, dims)


def _weighted(t: Operations, spec: Attention, held: list[Tensor], value: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(scores) v with scores in fp32 already, the weights cast to v's format; heads merged.

    `held` is the one reference to the scores, which the softmax takes the place of.
    """
    weights = t.to(t.map("softmax", held.pop(), saves="output"), value.dtype)
    weights = t.dropout(weights, spec.dropout)
    result = t.copy(t.matmul(weights, dense_copy(t, value), value.dims))
    return t.view(result, (value.dims[0], value.dims[2], merged_width(t, spec))), weights


def _scores(t: Operations, query: Tensor, key: Tensor) -> Tensor:
    return t.matmul(dense_copy(t, query), dense_copy(t, key), (*query.dims[:3], key.dims[2]))


def _gptj(t: Operations, spec: Attention, x: Tensor, hidden: str) -> tuple[Tensor, Tensor | None]:
    """Rotation in pairs by tables gathered and spread in each layer; scores in fp32 from start to end."""
    query, key, value = _three_views(t, spec, x)
    t.module = "rotary"
    sequence, size = x.dims[1], t.dim("R", spec.rotary_dim)
    table = t.constant("repeat", ("1", t.dim("positions", t.positions), size), "fp32")
    places = t.constant("repeat", ("1", sequence, size), "int64")
    (both,) = t.apply("gather", [], [(("1", sequence, size), query.dtype)], scratch=[(("1", sequence, size), "fp32")])
    rest = t.dim("D-R", spec.head_dim - spec.rotary_dim)
    parts = [(*query.dims[:-1], size), (*query.dims[:-1], rest)]
    key_turned, key_passed = t.slices(key, parts)
    query_turned, query_passed = t.slices(query, parts)
    key_turned = _in_pairs(t, spec, key_turned)
    query_turned = _in_pairs(t, spec, query_turned)
    key = t.cat([key_turned, key_passed], key.dims)
    query = t.cat([query_turned, query_passed], query.dims)
    t.module = "attention"
    query_fp32, key_fp32 = t.to(query, "fp32"), t.to(key, "fp32")
    scores = t.scale(_scores(t, query_fp32, key_fp32))
    held = [t.add(scores, eager_mask(t, spec, sequence, query.dtype))]
    del scores
    result, weights = _weighted(t, spec, held, value)
    del query_fp32, key_fp32
    result = t.linear(spec.out_name, result, hidden, bias=spec.out_bias)
    del table, places, both
    return result, weights


def _in_pairs(t: Operations, spec: Attention, x: Tensor) -> Tensor:
    """x turned by sin and cos repeated for both elements of a pair, made anew for each call."""
    dims = ("1", x.dims[2], t.dim("R", spec.rotary_dim))
    shared, t.rotary = t.rotary, (t.constant("sin", dims, x.dtype), t.constant("cos", dims, x.dtype))
    result = turn(t, spec, x)
    t.rotary = shared
    return result


def _gpt_neo(t: Operations, spec: Attention, x: Tensor, hidden: str) -> tuple[Tensor, Tensor | None]:
    """Unscaled scores in fp32, cut by a mask that the module owns, and by the model's mask on top."""
    query, key, value = _three_views(t, spec, x)
    t.module = "attention"
    query_fp32, key_fp32 = t.to(query, "fp32"), t.to(key, "fp32")
    scores = _scores(t, query_fp32, key_fp32)
    scores = t.apply("where", [scores], [(scores.dims, "fp32")])[0]
    held = [t.add(scores, eager_mask(t, spec, x.dims[1], query.dtype))]
    del scores
    result, weights = _weighted(t, spec, held, value)
    del query_fp32, key_fp32
    return t.linear(spec.out_name, result, hidden, bias=spec.out_bias), weights


def _mpt(t: Operations, spec: Attention, x: Tensor, hidden: str) -> tuple[Tensor, Tensor | None]:
    """Scores plus fp32 position biases, so in fp32, then filled where a boolean mask says so, which is kept."""
    heads, sequence = t.dim("A", spec.heads), x.dims[1]
    wide = t.dim("AD", spec.heads * spec.head_dim)
    dims = (x.dims[0], heads, sequence, t.dim("D", spec.head_dim))
    packed = t.linear(spec.names[0], x, t.dim("QKV", 3 * spec.heads * spec.head_dim), bias=spec.q_bias)
    parts = t.split(packed, [(x.dims[0], sequence, wide)] * 3)
    query, key, value = (t.view(part, dims) for part in parts)
    parts.clear()
    t.module = "attention"
    square = (x.dims[0], heads, sequence, sequence)
    bias = t.shared("alibi", (heads, "1", t.dim("positions", t.positions)), "fp32")
    scores = t.scale(t.matmul(dense_copy(t, query), dense_copy(t, key), square))
    scores = t.apply("add", [scores, bias], [(square, "fp32")])[0]
    mask = t.shared("boolean mask", (x.dims[0], "1", sequence, sequence), "bool")
    scores = t.apply("masked_fill", [scores], [(square, "fp32")], saves=[mask])[0]
    result, weights = _weighted(t, spec, [scores], value)  # the scores keep their name, and so their memory
    return t.linear(spec.out_name, result, hidden, bias=spec.out_bias), weights


def _bloom(t: Operations, spec: Attention, x: Tensor, hidden: str) -> tuple[Tensor, Tensor | None]:
    """q, k and v picked from one projection by index; scores added to the position biases in one kernel (baddbmm).

    The derivative of baddbmm multiplies each product by its factor, in a tensor of its own.
    """
    heads, sequence = t.dim("A", spec.heads), x.dims[1]
    dims = (x.dims[0], heads, sequence, t.dim("D", spec.head_dim))
    packed = t.linear(spec.names[0], x, t.dim("QKV", 3 * spec.heads * spec.head_dim), bias=spec.q_bias)
    views = t.slices(packed, [dims] * 3)
    query, key, value = (dense_copy(t, view) for view in views)
    views.clear()
    t.module = "attention"
    square = (x.dims[0], heads, sequence, sequence)
    scratch = [(dims, query.dtype)]
    scores = t.apply("baddbmm", [query, key], [(square, query.dtype)], saves=[query, key], backward_scratch=scratch)[0]
    weights = t.add(scores, eager_mask(t, spec, sequence, query.dtype))
    weights_ = t.softmax_fp32(weights)
    dropped = t.dropout(weights_, spec.dropout)
    result = t.copy(t.matmul(dropped, value, dims))
    result = t.view(result, (x.dims[0], sequence, merged_width(t, spec)))
    return t.linear(spec.out_name, result, hidden, bias=spec.out_bias), dropped


def _falcon(t: Operations, spec: Attention, x: Tensor, hidden: str) -> tuple[Tensor, Tensor | None]:
    """One projection cut in three ways: one key/value head (7B), groups spread to all heads (40B), plain (RW).

    Indexing with a list copies, and its gradient is written into zeros of the projection's size.
    """
    if t.attention == "eager" or (spec.position_bias == "alibi" and t.attention == "flash"):
        raise NotCovered(f"{t.attention} attention of Falcon is not in the ledger; sdpa is.")
    heads, groups, sequence = t.dim("A", spec.heads), t.dim("K", spec.kv_heads), x.dims[1]
    size = t.dim("D", spec.head_dim)
    total = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    packed = t.linear(spec.names[0], x, t.dim("QKV", total), bias=spec.q_bias)
    dims = (x.dims[0], heads, sequence, size)
    if spec.kv_heads == spec.heads:
        query, key, value = t.slices(packed, [dims] * 3)
    else:
        few = (x.dims[0], groups, sequence, size)
        (query,) = t.slices(packed, [dims])
        key, value = (t.apply("index", [packed], [(few, x.dtype)])[0] for _ in range(2))
        if spec.kv_heads > 1:
            query, key, value = (t.copy(part, dims, "flatten") for part in (query, key, value))
            spec = replace(spec, kv_heads=spec.heads)
    if spec.rotary_dim:
        query, key = rotate_both(t, spec, query, key)
    result = attend_fused(t, spec, query, key, value)
    return t.linear(spec.out_name, result, hidden, bias=spec.out_bias), None


OWN_ATTENTION: dict[str, Program] = {
    "gptj": _gptj,
    "gpt_neo": _gpt_neo,
    "mpt": _mpt,
    "bloom": _bloom,
    "falcon": _falcon,
}
