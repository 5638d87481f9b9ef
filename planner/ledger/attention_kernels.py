"""The core of softmax attention as each kernel runs it: flash, memory-efficient, math and eager.

Letters: B batch, S sequence, A query heads, K key/value heads, D head size, E value head size.

Which kernel `scaled_dot_product_attention` takes on CUDA (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp):

    format      mask    K < A                      kernel
    16-bit      none    as it is                   flash, for head sizes that are equal and at most 256
    16-bit      some    repeated beforehand        memory-efficient
    fp32        none    as it is                   math (no fused kernel takes grouped heads in fp32)
    fp32        any     no, or repeated            memory-efficient
"""

from __future__ import annotations

from planner.ledger.masks import mask_for
from planner.ledger.operations import Operations
from planner.ledger.rotary import TURNS_HALVES, concatenates
from planner.ledger.tape import Tensor
from planner.model.shape import Attention

__all__ = ["attend_fused", "core", "core_and_weights", "dense_copy", "merged_width", "run_core"]

FLASH_MAX_HEAD_SIZE = 256
_SOFTMAX_IN_PLACE_FORMAT = frozenset({"gpt2"})  # softmax in the scores' own format
_HEADS_FIRST = frozenset({"whisper"})  # copy queries, keys and values so that heads come before positions
_SOFTMAX_UNCAST = frozenset({"bert", "roberta", "xlm-roberta", "distilbert", "whisper"})  # the same, not cast after it


def merged_width(t: Operations, spec: Attention) -> str:
    """The dim of all value heads side by side."""
    return t.dim("AE", spec.heads * (spec.value_dim or spec.head_dim))


def core(t: Operations, spec: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T) v with its heads merged, (B, S, A*E)."""
    return run_core(t, spec, query, key, value)[0]


def core_and_weights(
    t: Operations, spec: Attention, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The same, and the attention weights where they exist in memory and the module returns them."""
    return run_core(t, spec, query, key, value)


def run_core(t: Operations, spec: Attention, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
    t.module = "attention"
    mask = mask_for(t, spec, query.dims[2], key.dims[2], query.dtype)
    if t.attention == "eager":
        return _eager(t, spec, query, key, value, mask)
    return _fused(t, spec, query, key, value, mask), None


def attend_fused(t: Operations, spec: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What scaled_dot_product_attention or the flash_attn package makes of q, k and v, (B, S, A*E)."""
    t.module = "attention"
    return _fused(t, spec, query, key, value, mask_for(t, spec, query.dims[2], key.dims[2], query.dtype))


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
    dense = concatenates(t, spec) or t.family in _HEADS_FIRST
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
    if rotated and (concatenates(t, spec) or t.family in TURNS_HALVES):
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
