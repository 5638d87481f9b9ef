"""litgpt's transformer block and adapters, in the shape of its own modules.

litgpt at 5895df10 (2024-04-26), model.py (Block, CausalSelfAttention, apply_rope, LLaMAMLP, GptNeoxMLP, GemmaMLP) and
lora.py (LoRALinear, LoRAQKVLinear). What differs from transformers: one projection for q, k and v, of which v stays a
view; rotary tables in fp32, so that q and k pass through fp32; a concatenation after the rotation even where nothing
is left to pass by; k and v repeated for grouped heads; adapters in the weights' format.

Letters: B batch, S sequence, H hidden, A query heads, K key/value heads, D head size, r rank.
"""

from __future__ import annotations

from dataclasses import replace

from planner.ledger.attention_kernels import attend_fused, merged_width
from planner.ledger.mlp import activate
from planner.ledger.norm import normalise
from planner.ledger.operations import Operations
from planner.ledger.tape import Tensor
from planner.model.shape import Attention, Block, Mlp

__all__ = ["run_block"]


def run_block(t: Operations, block: Block, x: Tensor) -> Tensor:
    """The block's output for input x, (B, S, H)."""
    assert isinstance(block.mixer, Attention) and isinstance(block.ffn, Mlp)
    normed = normalise(t, block.norm, block.norm_names[0], x)
    attended = _attend(t, block.mixer, normed)
    if block.residual == "sandwich":
        attended = normalise(t, block.norm, block.post_norm_names[0], attended)
    if block.residual == "parallel":
        if len(block.norm_names) > 1:
            normed = normalise(t, block.norm, block.norm_names[1], x)
        return t.add(t.add(_feed_forward(t, block.ffn, normed), attended), x)
    x = t.add(attended, x)
    normed = normalise(t, block.norm, block.norm_names[1], x)
    fed = _feed_forward(t, block.ffn, normed)
    if block.residual == "sandwich":
        fed = normalise(t, block.norm, block.post_norm_names[1], fed)
    return t.add(fed, x)


def _attend(t: Operations, spec: Attention, x: Tensor) -> Tensor:
    batch, sequence = x.dims[:2]
    heads, groups, size = t.dim("A", spec.heads), t.dim("K", spec.kv_heads), t.dim("D", spec.head_dim)
    packed = _qkv(t, spec, x)
    wide, narrow = t.dim("AD", spec.heads * spec.head_dim), t.dim("KD", spec.kv_heads * spec.head_dim)
    query, key, value = t.split(packed, [(batch, sequence, part) for part in (wide, narrow, narrow)])
    query = t.view(query, (batch, heads, sequence, size))
    key = t.view(key, (batch, groups, sequence, size))
    value = t.view(value, (batch, groups, sequence, size))
    if spec.kv_heads != spec.heads:  # a group's heads lie side by side: q is copied as well
        query = t.copy(query)
        key, value = (t.copy(tensor, (batch, heads, sequence, size), "repeat_kv") for tensor in (key, value))
    query_roped = _rotate(t, spec, query)
    key_roped = _rotate(t, spec, key)
    query = _cat_rest(t, spec, query_roped, query)
    key = _cat_rest(t, spec, key_roped, key)
    equal = replace(spec, kv_heads=spec.heads)
    y = _softcapped(t, query, key, value) if spec.softcap else attend_fused(t, equal, query, key, value)
    y = t.view(y, (batch, sequence, merged_width(t, spec)))
    return t.linear(spec.out_name, y, x.dims[-1], bias=spec.out_bias)


def _softcapped(t: Operations, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scores in memory, capped by tanh, masked, softmax in fp32: CausalSelfAttention.scaled_dot_product_attention."""
    batch, heads, sequence, size = query.dims
    scores = t.scale(t.matmul(query, key, (batch, heads, sequence, sequence)))
    scores = t.scale(t.map("tanh", t.scale(scores, "div"), saves="output"))
    mask = t.constant("mask", (sequence, sequence), scores.dtype)
    scores = t.add(scores, mask)
    scores = t.softmax_fp32(scores)
    return t.copy(t.matmul(scores, value, (batch, heads, sequence, size)))


def _rotate(t: Operations, spec: Attention, x: Tensor) -> Tensor:
    """x * cos + cat(-x2, x1) * sin in fp32, then back: apply_rope."""
    t.module = "rotary"
    cos, sin = t.rotary
    whole = spec.rotary_dim == spec.head_dim
    part = (*x.dims[:-1], t.dim("R", spec.rotary_dim))
    rotating = x if whole else t.slices(x, [part])[0]
    half = (*x.dims[:-1], t.dim("R/2", spec.rotary_dim // 2))
    first, second = t.slices(rotating, [half, half])
    rotated = t.cat([t.scale(second, "neg"), first], part)
    roped = t.add(t.mul(rotating, cos, part), t.mul(rotated, sin, part))
    return t.to(roped, x.dtype)


def _cat_rest(t: Operations, spec: Attention, roped: Tensor, x: Tensor) -> Tensor:
    rest = t.dim("D-R", spec.head_dim - spec.rotary_dim)
    (passed,) = t.slices(x, [(*x.dims[:-1], rest)])
    return t.cat([roped, passed], x.dims)


def _feed_forward(t: Operations, mlp: Mlp, x: Tensor) -> Tensor:
    hidden, width = x.dims[-1], t.dim("F", mlp.width)
    if not mlp.gated:
        up, down = mlp.names
        x = t.linear(up, x, width, bias=mlp.up_bias)
        x = activate(t, mlp.activation, x)
        return t.linear(down, x, hidden, bias=mlp.down_bias)
    gate, up, down = mlp.names
    gated = t.linear(gate, x, width, bias=mlp.up_bias)
    upper = t.linear(up, x, width, bias=mlp.up_bias)
    x = t.mul(activate(t, mlp.activation, gated), upper)
    return t.linear(down, x, hidden, bias=mlp.down_bias)


def _qkv(t: Operations, spec: Attention, x: Tensor) -> Tensor:
    """LoRAQKVLinear: the fused projection, and one low-rank update for those of q, k and v that are adapted.

    The update's second factor is a convolution over (B, r, S) for each part; parts that are not adapted are filled up
    with zeros (zero_pad), in a copy of a tensor of zeros as wide as the projection.
    """
    widths = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.kv_heads * spec.head_dim)
    enabled = [t.targeted(name) for name in spec.names]
    wide = t.dim("QKV", sum(widths))
    pretrained = t.base_linear("self_attn.qkv", x, wide, bias=spec.q_bias)
    if not any(enabled):
        return pretrained
    t.module = "self_attn.qkv"
    rank = t.dim("r qkv", t.method.rank * sum(enabled))
    down = t.weight("self_attn.qkv.lora_A", (rank, x.dims[-1]), dtype=t.method.adapter_dtype, trainable=True)
    after = t.product(t.dropout(x, t.method.dropout), down, (*x.dims[:-1], rank))
    update = _convolutions(t, spec, [width for width, on in zip(widths, enabled, strict=True) if on], after)
    if not all(enabled):
        update = t.copy(update)
        dims = (*x.dims[:-1], wide)
        filled = t.apply("index_copy", [update], [(dims, update.dtype)], saves=[update], scratch=[(dims, update.dtype)])
        update = filled.pop()
    update = t.scale(update, "scaling")
    return t.add(pretrained, update)


def _convolutions(t: Operations, spec: Attention, widths: list[int], after: Tensor) -> Tensor:
    """conv1d: one grouped convolution where all parts are of one size, else one for each and a concatenation."""
    total = t.dim("lora_B", sum(widths))
    dims = (*after.dims[:-1], total)
    if spec.heads == spec.kv_heads:
        up = t.weight("self_attn.qkv.lora_B", (total, t.dim("r", t.method.rank)), dtype=after.dtype, trainable=True)
        return t.apply(
            "conv1d", [after, up], [(dims, after.dtype)], saves=[after], scratch=[(after.dims, after.dtype)]
        )[0]
    parts = []
    for index, (width, part) in enumerate(
        zip(widths, t.split(after, [(*after.dims[:-1], t.dim("r", t.method.rank))] * len(widths)), strict=True)
    ):
        out = t.dim("part", width)
        name = f"self_attn.qkv.lora_B.{index}"
        up = t.weight(name, (out, part.dims[-1]), dtype=after.dtype, trainable=True)
        parts.append(t.apply("conv1d", [part, up], [((*after.dims[:-1], out), after.dtype)], saves=[part])[0])
    return t.cat(parts, dims)
