"""Multi-head latent attention as it trains: keys and values unpacked from the latent for all heads.

DeepSeek-V2 (arXiv:2405.04434), equations 9-17, in the modules of transformers 5.23 (modeling_deepseek_v2.py,
modeling_deepseek_v3.py). Queries and keys have N + R elements a head, values E, so that scaled_dot_product_attention
takes the memory-efficient kernel where flash would need equal sizes; the flash_attn package gets values padded to
N + R elements, whose padding is cut off again.

Letters: B batch, S sequence, H hidden, A heads, N unrotated and R rotated elements of a head, E value head size.
"""

from __future__ import annotations

from planner.errors import NotCovered
from planner.ledger.attention_kernels import core, merged_width
from planner.ledger.norm import normalise
from planner.ledger.operations import Operations
from planner.ledger.tape import Dims, Tensor
from planner.model.shape import Attention, LatentAttention

__all__ = ["attend_latent"]


def attend_latent(t: Operations, spec: LatentAttention, x: Tensor, hidden: str) -> Tensor:
    """out(core(q(x), k(latent(x)), v(latent(x))))."""
    if spec.index_heads:
        raise NotCovered("the sparse-attention indexer's activations are not in the ledger.")
    heads, size = t.dim("A", spec.heads), t.dim("D", spec.nope_dim + spec.rope_dim)
    return t.linear("self_attn.o_proj", _attended(t, spec, x, heads, size), hidden, bias=spec.bias)


def _attended(t: Operations, spec: LatentAttention, x: Tensor, heads: str, size: str) -> Tensor:
    batch, sequence = x.dims[:2]
    nope, rope = t.dim("N", spec.nope_dim), t.dim("R", spec.rope_dim)
    states = t.view(_queries(t, spec, x), (batch, heads, sequence, size))
    passed, turned = t.split(_transposed(t, states), [(*states.dims[:3], nope), (*states.dims[:3], rope)])
    latent = t.dim("latent", spec.kv_rank)
    packed = t.linear(
        "self_attn.kv_a_proj_with_mqa", x, t.dim("latent+R", spec.kv_rank + spec.rope_dim), bias=spec.bias
    )
    compressed, key_turned = t.split(packed, [(batch, sequence, latent), (batch, sequence, rope)])
    compressed = normalise(t, spec.norm, "self_attn.kv_a_layernorm", compressed)
    key_turned = t.view(key_turned, (batch, "1", sequence, rope))
    turned, key_turned = _rotated(t, spec, turned, key_turned)
    query = t.cat([passed, turned], states.dims)
    key, value = _unpacked(t, spec, compressed, key_turned, heads, size)
    return _core(t, spec, query, key, value)


def _queries(t: Operations, spec: LatentAttention, x: Tensor) -> Tensor:
    wide = t.dim("AD", spec.heads * (spec.nope_dim + spec.rope_dim))
    if spec.q_rank is None:
        return t.linear("self_attn.q_proj", x, wide)
    return t.linear(
        "self_attn.q_b_proj",
        normalise(
            t,
            spec.norm,
            "self_attn.q_a_layernorm",
            t.linear("self_attn.q_a_proj", x, t.dim("q_rank", spec.q_rank), bias=spec.bias),
        ),
        wide,
    )


def _transposed(t: Operations, x: Tensor) -> Tensor:
    """Heads before positions, as a view; the gradient is laid out anew for the projection it goes back to."""
    return t.apply("transpose", [x], [(x.dims, x.dtype)], view=True, copies=True)[0]


def _unpacked(
    t: Operations, spec: LatentAttention, latent: Tensor, turned: Tensor, heads: str, size: str
) -> tuple[Tensor, Tensor]:
    """Keys and values of all heads. Keys are put together in a tensor of their own, values stay a view."""
    batch, sequence = latent.dims[:2]
    both = t.dim("N+E", spec.nope_dim + spec.value_dim)
    wide = t.linear("self_attn.kv_b_proj", latent, t.dim("A(N+E)", spec.heads * (spec.nope_dim + spec.value_dim)))
    wide = _transposed(t, t.view(wide, (batch, heads, sequence, both)))
    nope, value_size = t.dim("N", spec.nope_dim), t.dim("E", spec.value_dim)
    passed, value = t.split(wide, [(batch, heads, sequence, nope), (batch, heads, sequence, value_size)])
    expanded = t.apply(
        "expand", [turned], [((batch, heads, sequence, turned.dims[3]), turned.dtype)], view=True, copies=True
    )
    key = t.constant("new_empty", (batch, heads, sequence, size), latent.dtype)
    key = _copied_into(t, key, passed)
    key = _copied_into(t, key, expanded[0])
    return key, value


def _copied_into(t: Operations, whole: Tensor, part: Tensor) -> Tensor:
    """whole[..., a:b].copy_(part). Its gradient (autograd/functions/tensor.cpp, CopySlices) is a copy of the whole
    one, a copy of the part, and zeros written in its place.
    """
    scratch = [(part.dims, part.dtype)] if whole.requires_grad else [(whole.dims, whole.dtype)]
    return t.apply("copy slice", [whole, part], [(whole.dims, whole.dtype)], in_place=True, backward_scratch=scratch)[0]


def _core(t: Operations, spec: LatentAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    inner = spec.nope_dim + spec.rope_dim
    attention = Attention(
        heads=spec.heads, kv_heads=spec.heads, head_dim=inner, value_dim=spec.value_dim, rotary_dim=spec.rope_dim
    )
    if t.attention != "flash" or spec.value_dim == inner:
        return core(t, attention, query, key, value)
    batch, heads, sequence, size = query.dims
    (padded,) = t.apply("pad", [value], [(key.dims, value.dtype)])
    equal = Attention(heads=spec.heads, kv_heads=spec.heads, head_dim=inner, rotary_dim=spec.rope_dim)
    result = t.view(core(t, equal, query, key, padded), (batch, sequence, heads, size))
    (result,) = t.slices(result, [(batch, sequence, heads, t.dim("E", spec.value_dim))])
    merged: Dims = (batch, sequence, merged_width(t, attention))
    return t.view(t.copy(result, operator="merge heads"), merged)


# ---- positions ----------------------------------------------------------------------------------------------------


def _rotated(t: Operations, spec: LatentAttention, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    t.module = "rotary"
    if t.family == "deepseek_v2":
        return _as_complex(t, query, key)
    if t.family in _NOT_INTERLEAVED:
        return _half_turned(t, spec, query), _half_turned(t, spec, key)
    half = t.dim("R/2", spec.rope_dim // 2)
    q1, q2 = t.slices(query, [(*query.dims[:3], half)] * 2)
    k1, k2 = t.slices(key, [(*key.dims[:3], half)] * 2)
    return _pairs_turned(t, q1, q2, query.dims), _pairs_turned(t, k1, k2, key.dims)


def _pairs_turned(t: Operations, first: Tensor, second: Tensor, dims: Dims) -> Tensor:
    """cat(x1 cos - x2 sin, x2 cos + x1 sin) of even and odd elements: saves only cos and sin."""
    cos, sin = t.rotary
    return t.cat(
        [
            _subtract(t, t.mul(first, cos, first.dims), t.mul(second, sin, second.dims)),
            t.add(t.mul(second, cos, second.dims), t.mul(first, sin, first.dims)),
        ],
        dims,
    )


def _half_turned(t: Operations, spec: LatentAttention, x: Tensor) -> Tensor:
    cos, sin = t.rotary
    half = (*x.dims[:3], t.dim("R/2", spec.rope_dim // 2))

    def other() -> Tensor:
        first, second = t.slices(x, [half, half])
        return t.cat([t.scale(second, "neg"), first], x.dims)

    return t.add(t.mul(x, cos, x.dims), t.mul(other(), sin, x.dims))


def _as_complex(t: Operations, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs as fp32 complex numbers, times one table, and back: four fp32 tensors live until both are done."""
    table = t.rotary[0]
    query_, key_ = t.to(query, "fp32"), t.to(key, "fp32")
    turned = t.apply("complex mul", [query_, table], [(query.dims, "fp32")], saves=[table])[0]
    query = t.to(turned, query.dtype)
    del turned
    turned = t.apply("complex mul", [key_, table], [(key.dims, "fp32")], saves=[table])[0]
    return query, t.to(turned, key.dtype)


def _subtract(t: Operations, first: Tensor, second: Tensor) -> Tensor:
    return t.apply("sub", [first, second], [(first.dims, first.dtype)], alias=[True, False])[0]


_NOT_INTERLEAVED = frozenset({"glm4_moe_lite"})
