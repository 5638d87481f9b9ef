"""Softmax attention, eager and fused, in the manner of the library's shared attention functions.

Letters: B batch, S sequence, H hidden, A query heads, K key/value heads, D head size, E value head size; AD stands
for A*D in one dim. Local variables live as long as in the reference module: queries, keys and values until it returns.

Which kernel `scaled_dot_product_attention` takes on CUDA (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp):

    format      mask    K < A                      kernel
    16-bit      none    as it is                   flash, for head sizes that are equal and at most 256
    16-bit      some    repeated beforehand        memory-efficient
    fp32        none    as it is                   math (no fused kernel takes grouped heads in fp32)
    fp32        any     no, or repeated            memory-efficient
"""

from __future__ import annotations

from typing import Any

import numpy as np

from planner.errors import NotCovered
from planner.ledger.norm import normalise
from planner.ledger.operations import Operations
from planner.ledger.prompt_tuning import extend_with_prefix
from planner.ledger.tape import Tensor
from planner.model.shape import Attention, ModelShape

__all__ = [
    "attend",
    "attend_fused",
    "core",
    "core_and_weights",
    "dense_copy",
    "eager_mask",
    "heads_merged",
    "merged_width",
    "reaches",
    "rotary_tables",
    "rotate",
    "rotate_both",
    "shared_masks",
    "turn",
]

FLASH_MAX_HEAD_SIZE = 256


def attend(
    t: Operations, spec: Attention, x: Tensor, hidden: str, context: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """out(core(q(x), k(x), v(x))), and the attention weights where the module returns them.

    `context` gives the keys and values of cross-attention.
    """
    _check_covered(spec)
    query, key, value, gate = _projections(t, spec, x, context)
    if spec.rotary_dim:
        if t.family in _ROTATES_INLINE:
            t.call_locals.extend((query, key))
        query, key = rotate_both(t, spec, query, key)
    if t.past is not None:
        key, value = extend_with_prefix(t, key, value)
    result, weights = _recomputed(t, spec, query, key, value) if t.selective else _core(t, spec, query, key, value)
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
    return _core(t, spec, query, key, value)


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
    if not _concatenates(t, spec):
        return turn(t, spec, x)
    rest = t.dim("D-R", spec.head_dim - spec.rotary_dim)
    turned, passed = t.slices(x, [(*x.dims[:-1], t.dim("R", spec.rotary_dim)), (*x.dims[:-1], rest)])
    turned = turn(t, spec, turned)
    if t.family in _ROTATES_INLINE:
        t.call_locals.append(turned)
    return t.cat([turned, passed], x.dims)


def _concatenates(t: Operations, spec: Attention) -> bool:
    """Whether the rotated part is put together with a rest, even an empty one: the result has heads first."""
    return 0 < spec.rotary_dim < spec.head_dim or (bool(spec.rotary_dim) and t.family in _ALWAYS_CONCATENATES)


def _turned_in_fp32(t: Operations, spec: Attention, x: Tensor) -> Tensor:
    """x.float() * cos + rotate_half(x.float()) * sin, each copy for itself."""
    cos, sin = t.rotary
    first = t.mul(t.to(x, "fp32"), cos, x.dims)
    return t.add(first, t.mul(_rotate_half(t, spec, t.to(x, "fp32")), sin, x.dims))


def turn(t: Operations, spec: Attention, x: Tensor) -> Tensor:
    if t.family in _TURNS_HALVES:
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


def reaches(t: Operations, sequence: str, window: int | None) -> bool:
    """Whether a window of this many tokens cuts anything off, so that a mask is made for it.

    Raises NotCovered for a grid of sequence lengths on both sides of the window: they run different kernels.
    """
    if window is None:
        return False
    reached: Any = np.asarray(t.sizes[sequence]) >= window
    if reached.all() != reached.any():
        raise NotCovered(f"sequence lengths below and above the window of {window} tokens need a grid each.")
    return bool(reached.all())


def shared_masks(t: Operations, shape: ModelShape, dtype: str) -> None:
    """Make the masks that the model hands to its blocks (masking_utils.py), before the first block runs.

    eager: an additive mask, (B, 1, S, S), for each kind of layer. sdpa: none where the kernel's own causal form will
    do, else a boolean one, (1, 1, S, S). flash: none.
    """
    t.module = "mask"
    if t.family in _COUNTS_ONE_SIDE:  # its blocks are not given the positions
        t.model_locals.append(t.constant("position_ids", ("1", "S"), "int64").storage)
    else:
        t.shared("position_ids", ("1", "S"), "int64")
    for block in dict.fromkeys(shape.blocks):
        if isinstance(block.mixer, Attention):
            if t.family in ("bloom", "falcon") and block.mixer.position_bias == "alibi":
                t.shared("alibi", ("B", t.dim("A", block.mixer.heads), "1", "S"), dtype)
                if t.family == "falcon":  # makes rotary tables all the same
                    for name in ("cos", "sin"):
                        t.shared(name, ("1", "S", t.dim("D", block.mixer.head_dim)), dtype)
            if t.family != "mpt":
                _mask(t, block.mixer, "S", "v+S" if t.method.name == "prefix" else "S", dtype)
            else:
                t.shared("alibi", (t.dim("A", block.mixer.heads), "1", t.dim("positions", t.positions)), "fp32")
                t.shared("boolean mask", ("B", "1", "S", "S"), "bool")


def _mask(t: Operations, spec: Attention, queries: str, keys: str, dtype: str) -> Tensor | None:
    window = spec.window // 2 if spec.window and t.family in _COUNTS_ONE_SIDE else spec.window
    window = window if reaches(t, keys, window) and t.family != "gpt_neo" else None
    if t.family == "falcon":
        return _falcon_mask(t, spec, keys, dtype)
    if t.attention == "flash" or spec.cross or (not spec.causal and window is None):
        return None
    if t.attention != "eager" and window is None and keys == queries:
        return None  # square: the kernel's own causal form will do
    name = (t.attention, f"{window} {queries} {keys}")
    known = t.masks.get(name)
    if known is None:
        square = ("1", "1", queries, keys)
        if t.attention == "eager":
            made = t.apply("mask", [], [(("B", "1", queries, keys), dtype)], scratch=[(square, "bool")] * 2)
        else:
            made = t.apply("mask", [], [(square, "bool")], scratch=[(square, "bool")] * 2)
        known = t.masks[name] = made[0]
    return known


def _falcon_mask(t: Operations, spec: Attention, keys: str, dtype: str) -> Tensor | None:
    """Falcon makes its mask whatever the kernel, boolean, or with position biases (B, A, S, S) in it."""
    if t.attention == "flash":
        return None
    if spec.position_bias == "alibi":
        return t.shared("alibi mask", ("B", t.dim("A", spec.heads), keys, keys), dtype)
    return t.shared("causal mask", ("1", "1", keys, keys), "bool")


def eager_mask(t: Operations, spec: Attention, sequence: str, dtype: str) -> Tensor:
    """The additive mask of eager attention, (B, 1, S, S)."""
    mask = _mask(t, spec, sequence, sequence, dtype)
    assert mask is not None
    return mask


# ---- the core -------------------------------------------------------------------------------------------------


def merged_width(t: Operations, spec: Attention) -> str:
    """The dim of all value heads side by side."""
    return t.dim("AE", spec.heads * (spec.value_dim or spec.head_dim))


def core(t: Operations, spec: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T) v with its heads merged, (B, S, A*E)."""
    return _core(t, spec, query, key, value)[0]


def core_and_weights(
    t: Operations, spec: Attention, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The same, and the attention weights where they exist in memory and the module returns them."""
    return _core(t, spec, query, key, value)


def _core(t: Operations, spec: Attention, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
    t.module = "attention"
    mask = _mask(t, spec, query.dims[2], key.dims[2], query.dtype)
    if t.attention == "eager":
        return _eager(t, spec, query, key, value, mask)
    return _fused(t, spec, query, key, value, mask), None


def attend_fused(t: Operations, spec: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What scaled_dot_product_attention or the flash_attn package makes of q, k and v, (B, S, A*E)."""
    t.module = "attention"
    return _fused(t, spec, query, key, value, _mask(t, spec, query.dims[2], key.dims[2], query.dtype))


def dense_copy(t: Operations, x: Tensor) -> Tensor:
    """x laid out with heads before positions, as a batched product wants it."""
    return t.copy(x, operator="dense")


def _fused(t: Operations, spec: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """The kernel that scaled_dot_product_attention or the flash_attn package runs."""
    batch, heads, sequence, _ = query.dims
    if t.compute is not None:
        query, key, value = (t.to(tensor, t.compute) for tensor in (query, key, value))
    grouped = spec.kv_heads != spec.heads
    equal = (spec.value_dim or spec.head_dim) == spec.head_dim <= FLASH_MAX_HEAD_SIZE
    repeats = t.attention == "sdpa" and not (t.profile.grouped_attention and mask is None and equal)
    if grouped and t.family != "falcon" and (repeats or t.family in t.profile.repeats_for_flash):
        key, value = _repeated(t, key, heads), _repeated(t, value, heads)
        grouped = False
    if t.attention != "sdpa" or (mask is None and equal and query.dtype != "fp32"):
        result = _flash(t, spec, query, key, value)
    elif not grouped:
        result = _memory_efficient(t, spec, query, key, value, mask)
    else:
        return t.view(_math(t, spec, query, key, value, mask), (batch, sequence, merged_width(t, spec)))
    return result


def _flash(t: Operations, spec: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """FlashAttention-2 (torch's own or the flash_attn package).

    Saved: q, k, v, the output, the log-sum-exp in fp32, (B, A, S), and two states of the random generator.
    The output takes the layout of q; where that has heads before positions, a copy of it goes on.
    Backward (flash_api.cpp, mha_bwd): an fp32 accumulator for dq (B, A, S, D), the row sums of do * o in fp32
    (B, A, S), and, when K < A, dk and dv for all A heads before they are summed over each group. The accumulator's
    sequence is rounded up to 128, its head size to 32 (64 above 128).
    """
    batch, heads, sequence, size = query.dims
    keys = key.dims[2]
    wide = (batch, sequence, merged_width(t, spec))
    padded = t.dim(f"{sequence}128", (t.sizes[sequence] + 127) // 128 * 128)
    step = 32 if spec.head_dim <= 128 else 64
    dense = _concatenates(t, spec) or t.family in _HEADS_FIRST
    rounded = t.dim("D'", (spec.head_dim + step - 1) // step * step)
    scratch = [((batch, heads, padded, rounded), "fp32"), ((batch, heads, padded), "fp32")]
    if key.dims[1] != heads and spec.kv_heads != spec.heads:
        scratch += [((batch, heads, keys, size), key.dtype), ((batch, heads, keys, value.dims[3]), value.dtype)]
    if dense:
        scratch.append((wide, query.dtype))  # the output laid out anew
    (result,) = t.apply(
        "attention",
        [query, key, value],
        [(wide, query.dtype)],
        saves=[query, key, value],
        saves_outputs=(0,),
        extra_saved=[((batch, heads, sequence), "fp32"), ((t.dim("2", 2),), "int64"), ((), "int64")],
        backward_scratch=scratch,
    )
    return t.copy(result) if dense else result


def _memory_efficient(
    t: Operations, spec: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    """The CUTLASS kernel: saves q, k, v, the output, the log-sum-exp (sequence rounded up to 32) and the mask.

    A boolean mask is first turned into an additive one in the format of q, (B, 1, S, S), by each layer for itself.
    Backward (attention_backward.cu): the row sums `delta`; for 16-bit inputs an fp32 accumulator for dq (above head
    size 128 for dk and dv, too, and forward one for the output) and 16 bytes a block of queries; for fp32 inputs the
    product of gradient and output that `delta` is summed from.
    """
    batch, heads, sequence, _ = query.dims
    wide = (batch, sequence, merged_width(t, spec))
    rows32 = t.dim(f"{sequence}32", (t.sizes[sequence] + 31) // 32 * 32)
    saves: list[Tensor | None] = [query, key, value]
    if mask is not None and mask.dtype != "bool":
        saves.append(mask)
    elif mask is not None:
        columns = t.dim(f"{mask.dims[3]}8", (t.sizes[mask.dims[3]] + 7) // 8 * 8)
        additive = ((batch, "1", sequence, columns), query.dtype)
        saves.append(t.apply("additive mask", [], [additive])[0])
    delta = ((batch, heads, sequence), "fp32")
    forward_scratch: list[tuple[tuple[str, ...], str]] = []
    if query.dtype == "fp32":
        scratch = [(wide, "fp32"), delta, delta]
    else:
        block = 64 if spec.head_dim <= 64 else 128
        blocks = t.dim(f"{sequence}/{block}", -(-t.sizes[sequence] // block))
        scratch = [delta, ((batch, heads, blocks, t.dim("16", 16)), "int8")]
        wide_head = spec.head_dim > 128
        for tensor in (query, key, value) if wide_head else (query,):
            rows, size = tensor.dims[2], t.sizes[tensor.dims[3]]
            rows64 = t.dim(f"{rows}64", (t.sizes[rows] + 63) // 64 * 64)
            column = tensor.dims[3] if wide_head else t.dim("D''", -(-size // block) * block)
            scratch.append(((batch, heads, rows64, column), "fp32"))
        if wide_head:
            forward_scratch = [(wide, "fp32")]
    (result,) = t.apply(
        "attention",
        [query, key, value],
        [(wide, query.dtype)],
        saves=saves,
        saves_outputs=(0,),
        extra_saved=[((batch, heads, rows32), "fp32")],
        scratch=forward_scratch,
        backward_scratch=scratch,
    )
    return result


def _math(t: Operations, spec: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """The composite form (attention.cpp, _scaled_dot_product_attention_math), for what no fused kernel takes.

    All in fp32; both q and k are scaled, by the root of the factor; key/value heads are repeated; the softmax keeps
    its output.
    """
    heads, sequence, keys = query.dims[1], query.dims[2], key.dims[2]
    dtype = query.dtype
    query, key, value = t.to(query, "fp32"), t.to(key, "fp32"), t.to(value, "fp32")
    scaled = t.scale(query)
    square = (sequence, keys) if mask is None else ("B", "1", sequence, keys)
    if mask is not None and mask.dtype == "bool":
        mask = t.apply("additive mask", [], [(square, "fp32")])[0]
    elif mask is None and spec.causal:
        mask = t.apply("mask", [], [(square, "fp32")], scratch=[(square, "bool")] * 2)[0]
    broadcasts = spec.kv_heads != spec.heads and t.family == "falcon"  # one head, expanded by the products themselves
    if spec.kv_heads != spec.heads and not broadcasts:
        key, value = _repeated(t, key, heads), _repeated(t, value, heads)
    scores = _scores(t, _dense(t, spec, scaled), _repeated(t, t.scale(key), heads) if broadcasts else t.scale(key))
    if mask is not None:
        scores = t.apply("add_", [scores], [(scores.dims, scores.dtype)], alias=True, in_place=True)[0]
    mask = None  # gone once added
    infinite = [(scores.dims, "bool"), (scores.dims[:-1], "bool")]
    scores = t.apply(
        "safe_softmax",
        [scores],
        [(scores.dims, "fp32")],
        saves_outputs=(0,),
        scratch=infinite,
        backward_scratch=[(scores.dims, "fp32")],
    )[0]
    scores_ = t.dropout(scores, spec.dropout)
    dims = (*query.dims[:3], value.dims[3])
    result = t.to(t.matmul(scores_, _repeated(t, value, heads) if broadcasts else value, dims), dtype)
    return t.copy(result)


def _scores(t: Operations, query: Tensor, key: Tensor) -> Tensor:
    return t.matmul(query, key, (*query.dims[:3], key.dims[2]))


def _repeated(t: Operations, x: Tensor, heads: str) -> Tensor:
    """Each key/value head copied once for every query head of its group."""
    return t.copy(x, (x.dims[0], heads, *x.dims[2:]), "repeat_kv")


def _expanded(t: Operations, x: Tensor, heads: str) -> Tensor:
    """The one key/value head seen once for every query head, without a copy."""
    dims = (x.dims[0], heads, *x.dims[2:])
    return t.apply("expand", [x], [(dims, x.dtype)], view=True, copies=True)[0]


def _dense(t: Operations, spec: Attention, x: Tensor, *, rotated: bool = True) -> Tensor:
    """x as a batched product wants it: heads before positions. Projections are laid out the other way around."""
    if rotated and (_concatenates(t, spec) or t.family in _TURNS_HALVES):
        return x
    if x.dims[2] == "v+S" or t.family in _HEADS_FIRST:
        return x  # put together with a prefix
    return t.copy(x, operator="dense")


def _eager(
    t: Operations, spec: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scores in memory: matmul, scale, (soft cap,) mask, softmax in fp32, cast, dropout, matmul.

    Saved per score (bf16): softmax output in fp32, 4; its cast for the product with v, 2; with dropout the cast is
    kept by nobody, the dropped scores are, 2, and their mask, 1.
    """
    batch, heads, sequence, _ = query.dims
    grouped = spec.kv_heads != spec.heads
    if spec.kv_heads == 1 and grouped:
        key, value = _expanded(t, key, heads), _expanded(t, value, heads)
        grouped = False
    elif grouped:
        key, value = _repeated(t, key, heads), _repeated(t, value, heads)
    rotated = spec.kv_heads > 1
    weights = t.scale(_scores(t, _dense(t, spec, query), key if grouped else _dense(t, spec, key, rotated=rotated)))
    if spec.softcap:
        weights = t.scale(weights, "div")
        weights = t.map("tanh", weights, saves="output")
        weights = t.scale(weights)
    if mask is not None:
        weights = t.add(weights, mask)
    if spec.sinks:
        weights = _softmax_with_sink(t, spec, weights)
    elif t.family in _SOFTMAX_UNCAST:
        weights = t.map("softmax", weights, saves="output")
    elif t.family in _SOFTMAX_IN_PLACE_FORMAT:
        weights = t.to(t.map("softmax", weights, saves="output"), value.dtype)  # autocast's softmax gives fp32
    else:
        weights = t.softmax_fp32(weights)
    weights = t.dropout(weights, spec.dropout)
    dims = (batch, heads, sequence, value.dims[3])
    result = t.matmul(weights, value if grouped else _dense(t, spec, value, rotated=False), dims)
    result = t.copy(result)
    return t.view(result, (batch, sequence, merged_width(t, spec))), weights


def _softmax_with_sink(t: Operations, spec: Attention, weights: Tensor) -> Tensor:
    """Softmax over the scores and one learned logit of each head, which is then cut off (modeling_gpt_oss.py)."""
    sink = t.weight(f"{spec.names[0].rpartition('.')[0]}.{spec.sinks_name}", (weights.dims[1],))
    wider = (*weights.dims[:3], t.dim(f"{weights.dims[3]}+1", t.sizes[weights.dims[3]] + 1))
    row = (*weights.dims[:3], "1")
    (both,) = t.apply("cat", [weights, sink], [(wider, weights.dtype)], alias=[True, False])
    (most,) = t.apply("max", [both], [(row, both.dtype)], extra_saved=[(row, "int64")])
    (both,) = t.apply(
        "sub", [both, most], [(wider, both.dtype)], alias=[True, False], raw_gradients=[None, (wider, both.dtype)]
    )
    both = t.map("softmax", both, saves="output")
    return t.slices(both, [weights.dims])[0]


_ALWAYS_CONCATENATES = frozenset({"gpt_neox", "phi", "phi3", "stablelm", "nemotron", "glm", "glm4", "minimax_m2"})
_ROTATES_INLINE = frozenset({"phi"})  # in the attention's own forward, whose variables live on
_FP32_TABLES = frozenset({"olmo", "olmo2", "olmo3", "ernie4_5_moe"})
_TWO_TABLES = frozenset({"gemma3_text", "olmo3", "modernbert"})  # one for sliding layers, one for the others
_REPEATS_TABLES = frozenset({"glm", "glm4", "ernie4_5_moe"})  # each layer spreads cos and sin over pairs for itself
_UPCASTS_QUERIES = frozenset({"cohere", "cohere2", "ernie4_5_moe"})  # queries and keys are rotated in fp32
_SLICED = frozenset({"phi3"})  # cut the fused projection by slices, each with a gradient of the full size
_SCALES_QUERIES = frozenset({"opt"})  # scale queries by themselves, before the product
_SOFTMAX_IN_PLACE_FORMAT = frozenset({"gpt2"})  # softmax in the scores' own format
_UPCASTS_TWICE = frozenset({"modernbert"})  # the same, with a copy for each of the two products
_COUNTS_ONE_SIDE = frozenset({"modernbert"})  # skip the mask only for sequences within one side of the window
_HEADS_FIRST = frozenset({"whisper"})  # copy queries, keys and values so that heads come before positions
_SOFTMAX_UNCAST = frozenset({"bert", "roberta", "xlm-roberta", "distilbert", "whisper"})  # the same, not cast after it
_TURNS_HALVES = frozenset({"gpt_oss"})  # rotates halves by themselves and puts them together
