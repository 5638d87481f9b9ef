"""Encoder-decoder models: a stack over the source, and one over the target that attends to the first one's output.

T5 and its kin, as transformers 5.23 runs them (modeling_t5.py) with scaled_dot_product_attention. Source and target
both have the plan's sequence length. What differs from a decoder:

- A learned bias by relative position, (1, A, S, S), is added to the scores of every self-attention. The kernel takes
  it as an additive mask of which each block makes a copy, and computes a gradient for, (B, A, S, S), before it is
  summed over the batch.
- The encoder's output and each stack's bias get a gradient from every block. The last block's backward allocates it,
  the others add in place: the first, the last and the blocks between are three kinds of segment.
- The norm multiplies its input in the activations' format by fp32 statistics, so that it keeps the input, too.

Letters: B batch, S sequence, H hidden, A heads, D head size, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.errors import NotCovered
from planner.ledger.embedding import embed
from planner.ledger.loss_head import project
from planner.ledger.mlp import activate
from planner.ledger.operations import Operations
from planner.ledger.tape import Dims, Node, Tensor
from planner.model.shape import Attention, Block, Mlp, ModelShape, Tower

__all__ = ["encoder_of", "run_encoder_decoder"]

_FAMILIES = frozenset({"t5"})


@dataclass(slots=True)
class _Shared:
    """What the blocks of one stack hand on to each other: the position biases, and the encoder's output."""

    bias: Tensor | None = None
    cross_bias: Tensor | None = None
    context: Tensor | None = None


def encoder_of(shape: ModelShape) -> Tower | None:
    """The encoder that the main stack attends to, if the model has one."""
    return next((tower for tower in shape.towers if tower.role == "encoder"), None)


def run_encoder_decoder(
    t: Operations, shape: ModelShape, encoder: Tower, live: list[Tensor], *, recomputed: bool
) -> tuple[list[int], int]:
    """Record the forward pass after `input_ids` and append the loss to `live`; returns the segments in order.

    The first segment, 0 (the encoder's embedding), is not in the list; the second result is the head's.
    Raises NotCovered for families and attention functions that are not described.
    """
    if shape.model_type not in _FAMILIES or t.attention != "sdpa":
        raise NotCovered(f"activations of {shape.model_type} with {t.attention} attention are not in the ledger.")
    assert shape.embedding is not None and shape.head is not None
    source = _Shared()
    flow = [embed(t, shape.embedding)]
    order = _run_stack(t, encoder.blocks, flow, source, 1, recomputed)
    middle = max(order, default=0) + 1
    _begin(t, middle)
    x = _norm(t, encoder.final_norm_name, flow.pop())
    context = t.dropout(x, encoder.final_dropout)
    del x
    t.model_locals.clear()
    del source
    target = _Shared(context=context)
    ids = t.constant("decoder_input_ids", ("B", "S"), "int64")
    flow.append(embed(t, shape.embedding))
    layers = _run_stack(t, shape.blocks, flow, target, middle + 1, recomputed)
    head = max(layers, default=middle) + 1
    _begin(t, head)
    x = _norm(t, shape.head.norm_name, flow.pop())
    x = t.dropout(x, shape.head.dropout)
    t.model_locals.clear()
    del target
    if shape.head.scaled:
        x = t.scale(x)
    logits = project(t, shape.head, x)
    del x, context
    live.append(_cross_entropy(t, logits))
    del ids
    return [*order, middle, *layers], head


def _begin(t: Operations, segment: int) -> None:
    t.begin("forward", segment)
    t.prefix = ""


def _run_stack(
    t: Operations, blocks: tuple[Block, ...], flow: list[Tensor], shared: _Shared, first: int, recomputed: bool
) -> list[int]:
    """Run the first, one of the equal blocks between, and the last; returns the segment of every block."""
    segments: dict[tuple[bool, bool, Block], int] = {}
    order: list[int] = []
    for index, block in enumerate(blocks):
        key = (index == 0, index == len(blocks) - 1, block)
        segment = segments.get(key)
        if segment is None:
            segment = segments[key] = first + len(segments)
            t.begin("forward", segment)
            t.prefix = f"{segment}:"
            flow.append(
                _checkpointed(t, block, flow[0], shared, t.prefix) if recomputed else _block(t, block, flow[0], shared)
            )
            flow.pop(0)
        order.append(segment)
    return order


def _checkpointed(t: Operations, block: Block, x: Tensor, shared: _Shared, prefix: str) -> Tensor:
    """One recomputed block. The biases come in as arguments; the first block makes them, and again in backward.

    The zeros of cross-attention then require a gradient, too (T5Attention.forward), which stays with them.
    """
    assert isinstance(block.mixer, Attention)
    if shared.bias is not None:
        handed = [tensor for tensor in (shared.bias, shared.context, shared.cross_bias) if tensor is not None]

        def program(x: Tensor, *others: Tensor) -> Tensor:
            t.prefix = prefix
            bias, context, cross_bias = (*others, None, None)[:3]
            return _block(t, block, x, _Shared(bias=bias, context=context, cross_bias=cross_bias))

        return t.checkpoint(program, x, *handed)
    shared.bias = _position_bias(t, block.mixer, recomputed=True)
    made = [shared.bias]
    if block.cross is not None:
        shared.cross_bias = t.constant("zeros", shared.bias.dims, x.dtype)
        shared.cross_bias.requires_grad = True
        leaf = shared.cross_bias.node = Node("leaf", t.module, t.segment, 1)
        leaf.saved.append(shared.cross_bias.storage)  # a leaf's node holds the leaf, beside its gradient
        made.append(shared.cross_bias)
    sources = [(tensor.dims, tensor.dtype, tensor.node) for tensor in made]

    def first(x: Tensor, *others: Tensor) -> Tensor:
        t.prefix = prefix
        if t.enabled:  # the second run: every other block has let go of the first ones by now
            made[:] = _made_again(t, sources)
        bias, cross_bias = (*made, None)[:2]
        if t.enabled:
            made.clear()
        return _block(t, block, x, _Shared(bias=bias, context=others[0] if others else None, cross_bias=cross_bias))

    return t.checkpoint(first, x) if shared.context is None else t.checkpoint(first, x, shared.context)


def _made_again(t: Operations, sources: list[tuple[Dims, str, Node | None]]) -> list[Tensor]:
    """The first block's biases in its second run: new memory, whose gradients go where those of the first went."""
    made = [
        Tensor(t.allocate("bias", dims, dtype), dims, dtype, requires_grad=True, node=node, output=0)
        for dims, dtype, node in sources
    ]
    buckets = t.constant("buckets", ("S", "S"), "int64")
    made[0] = t.apply("permute", made[:1], [(made[0].dims, made[0].dtype)], view=True, saves=[buckets])[0]
    return made


def _block(t: Operations, block: Block, x: Tensor, shared: _Shared) -> Tensor:
    assert isinstance(block.mixer, Attention) and isinstance(block.ffn, Mlp)
    x = _self_attention(t, block, block.mixer, x, shared)
    if block.cross is not None:
        x = _cross_attention(t, block, block.cross, x, shared)
    fed = _norm(t, block.norm_names[1], x)
    fed = _feed_forward(t, block.ffn, fed, x.dims[-1])
    return t.add(x, t.dropout(fed, block.dropout))


def _norm(t: Operations, name: str, x: Tensor) -> Tensor:
    """weight * (x * rsqrt(mean(x32 ** 2) + eps)).to(dtype): keeps x, its fp32 copy, and the normalised value."""
    t.module = name
    (variance,) = t.apply("mean", [t.map("pow", t.to(x, "fp32"))], [((*x.dims[:-1], "1"), "fp32")])
    hidden = t.mul(x, t.map("rsqrt", t.scale(variance, "add scalar"), saves="output"), x.dims)
    hidden = t.to(hidden, x.dtype)
    return t.mul(t.weight(f"{name}.weight", (x.dims[-1],)), hidden)


def _feed_forward(t: Operations, mlp: Mlp, x: Tensor, hidden: str) -> Tensor:
    width = t.dim("F", mlp.width)
    if mlp.gated:
        gate, up, down = mlp.names
        opened = activate(t, mlp.activation, t.linear(gate, x, width))
        straight = t.linear(up, x, width)  # lives, as `opened` does, until the layer is done
        inner = t.mul(opened, straight)
    else:
        up, down = mlp.names
        inner = t.linear(up, x, width)
        inner = activate(t, mlp.activation, inner)
    inner = t.dropout(inner, mlp.dropout)
    return t.linear(down, inner, hidden)


# ---- attention ----------------------------------------------------------------------------------------------------


def _self_attention(t: Operations, block: Block, spec: Attention, x: Tensor, shared: _Shared) -> Tensor:
    normed = _norm(t, block.norm_names[0], x)
    query, key, value = _projections(t, spec, normed, normed)
    if shared.bias is None:
        shared.bias = _position_bias(t, spec)
    mixed = _merged(t, spec, query, key, value, _additive_mask(t, spec, shared.bias), x.dims[-1])
    return t.add(x, t.dropout(mixed, block.dropout))


def _cross_attention(t: Operations, block: Block, spec: Attention, x: Tensor, shared: _Shared) -> Tensor:
    """Its bias is zeros, made by the first block and handed on like the learned one."""
    assert shared.context is not None
    normed = _norm(t, block.cross_norm_name, x)
    query, key, value = _projections(t, spec, normed, shared.context)
    if shared.cross_bias is None:
        shared.cross_bias = t.constant("zeros", ("1", query.dims[1], query.dims[2], key.dims[2]), query.dtype)
    mixed = _merged(t, spec, query, key, value, shared.cross_bias, x.dims[-1])
    return t.add(x, t.dropout(mixed, block.dropout))


def _projections(t: Operations, spec: Attention, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    heads, size = t.dim("A", spec.heads), t.dim("D", spec.head_dim)
    wide = t.dim("AD", spec.heads * spec.head_dim)
    query = t.view(t.linear(spec.names[0], x, wide), (x.dims[0], heads, x.dims[1], size))
    key = t.view(t.linear(spec.names[1], source, wide), (source.dims[0], heads, source.dims[1], size))
    value = t.view(t.linear(spec.names[2], source, wide), key.dims)
    return query, key, value


def _position_bias(t: Operations, spec: Attention, *, recomputed: bool = False) -> Tensor:
    """Values of a small table for the bucket of each pair of positions: the int64 buckets, (S, S), are kept.

    Beside them pass, at most: the relative position, which lives longest, one bool matrix, and three int64 matrices
    (four where both directions count).
    """
    t.module = spec.names[0].rpartition(".")[0]
    name = f"{t.module}.relative_attention_bias"
    table = t.weight(f"{name}.weight", (t.dim("buckets", spec.relative_buckets), t.dim("A", spec.heads)))
    square = ("S", "S")
    relative = t.constant("relative position", square, "int64")
    passing = [(square, "int64")] * (3 if spec.causal else 4) + [(square, "bool")]
    (buckets,) = t.apply("buckets", [], [(square, "int64")], scratch=passing)
    size = (("1", t.dim("A", spec.heads), *square), table.dtype)
    (bias,) = t.apply("embedding", [table], [size], saves=[None if recomputed else buckets])
    del relative
    return bias


def _additive_mask(t: Operations, spec: Attention, bias: Tensor) -> Tensor:
    """sdpa_attention.py, create_position_bias_mask: the bias, cut off above the diagonal, laid out densely."""
    t.module = "attention"
    if spec.causal:
        below = t.constant("ge", bias.dims[2:], "bool")
        (bias,) = t.apply("where", [bias], [(bias.dims, bias.dtype)], saves=[below])
    return t.copy(bias)


def _merged(
    t: Operations, spec: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, hidden: str
) -> Tensor:
    """The memory-efficient kernel with an additive mask, and the output projection.

    Backward (attention_backward.cu): row sums, for 16-bit inputs an fp32 accumulator of dq, its sequence rounded up
    to 64 and its heads to 64 or 128; and a gradient of the mask for each example of the batch.
    """
    t.module = "attention"
    batch, heads, sequence, _ = query.dims
    wide = (batch, sequence, t.dim("AD", spec.heads * spec.head_dim))
    rows = t.dim("S32", (t.sizes[sequence] + 31) // 32 * 32)
    delta = ((batch, heads, sequence), "fp32")
    if query.dtype == "fp32":
        scratch = [(wide, "fp32"), delta, delta]
    else:
        rows64 = t.dim("S64", (t.sizes[sequence] + 63) // 64 * 64)
        scratch = [((batch, heads, rows64, t.dim("D64", (spec.head_dim + 63) // 64 * 64)), "fp32"), delta]
    each = ((batch, heads, sequence, key.dims[2]), mask.dtype)
    (result,) = t.apply(
        "attention",
        [query, key, value, mask],
        [(wide, query.dtype)],
        saves=[query, key, value, mask],
        saves_outputs=(0,),
        extra_saved=[((batch, heads, rows), "fp32")],
        backward_scratch=scratch,
        raw_gradients=[None, None, None, each],
    )
    return t.linear(spec.out_name, result, hidden)


def _cross_entropy(t: Operations, logits: Tensor) -> Tensor:
    """Cross-entropy in the logits' own format, against the labels as they came in."""
    t.module = "loss"
    scores = t.map("log_softmax", logits, saves="output")
    return t.apply("nll_loss", [scores], [((), logits.dtype)])[0]
