"""Whisper: two convolutions over a mel spectrogram, an encoder, and a decoder that attends to its output.

The plan's sequence length is the decoder's. The encoder always sees 30 seconds, 1500 positions. As transformers 5.23
runs it (modeling_whisper.py); the spectrogram comes in the format of the weights, as the modules do not cast it.

What differs from other decoders: queries are scaled before the product, and queries, keys and values are each copied
so that heads come before positions; the first residual of the encoder has channels before positions, which every sum
after it inherits, so that each norm works on a copy laid out anew.

The encoder's output gets a gradient from every decoder block. The last block's backward allocates it, the others add
in place: the first, the last and the blocks between are three kinds of segment.

Letters: B batch, S decoder positions, T encoder positions, M mel bins, H hidden, A heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

from planner.ledger.attention_kernels import core_and_weights
from planner.ledger.encoders import check_positions, check_setting
from planner.ledger.loss_head import cross_entropy, project
from planner.ledger.masks import eager_mask
from planner.ledger.mlp import activate
from planner.ledger.norm import normalise
from planner.ledger.operations import Operations
from planner.ledger.tape import Node, Tensor
from planner.model.shape import Attention, Block, Embedding, Mlp, ModelShape, Tower

__all__ = ["made_leaf", "run_speech"]

FRAMES_PER_POSITION = 2  # the second convolution's stride
KERNEL = 3


def run_speech(
    t: Operations, shape: ModelShape, encoder: Tower, live: list[Tensor], *, recomputed: bool, loss: str
) -> tuple[list[int], int]:
    """Record the forward pass of Whisper and append the loss to `live`, which holds the labels.

    Returns the segments of the blocks in order, with the one between the stacks, and the segment of the head.
    Raises NotCovered for losses of decoders, for other implementations, and for packed weights.
    """
    assert shape.embedding is not None and shape.head is not None
    check_setting(t, shape.model_type, loss)
    t.family = shape.model_type
    t.dim("T", encoder.tokens)
    features = _spectrogram(t, encoder)
    live.append(features)
    ids = t.constant("decoder_input_ids", ("B", "S"), "int64")
    flow = [_encoder_input(t, encoder, features, live)]
    del features
    order = _run_stack(t, encoder.blocks, flow, 1, _encoder_block, None, recomputed)
    middle = max(order, default=0) + 1
    _begin(t, middle)
    context = normalise(t, encoder.final_norm, encoder.final_norm_name, _dense(t, flow.pop()))
    t.model_locals.clear()
    flow.append(_decoder_input(t, shape.embedding, ids, live))
    decoder = shape.blocks[0].mixer
    if t.attention == "eager" and isinstance(decoder, Attention):
        eager_mask(t, decoder, "S", flow[0].dtype)
    layers = _run_stack(t, shape.blocks, flow, middle + 1, _decoder_block, context, recomputed)
    head = max(layers, default=middle) + 1
    _begin(t, head)
    x = normalise(t, shape.head.norm, shape.head.norm_name, flow.pop())
    t.model_locals.clear()
    if not recomputed:
        t.masks.clear()
    logits = project(t, shape.head, x)
    t.module = "loss"
    live.append(cross_entropy(t, logits, None))
    del ids, x, context
    return [*order, middle, *layers], head


def _begin(t: Operations, segment: int) -> None:
    t.begin("forward", segment)
    t.prefix = ""


Program = Callable[[Operations, Block, Tensor, Tensor | None], Tensor]


def _run_stack(
    t: Operations,
    blocks: tuple[Block, ...],
    flow: list[Tensor],
    first: int,
    run: Program,
    context: Tensor | None,
    recomputed: bool,
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
            program = _program(t, block, run, f"{segment}:")
            inputs = [context] if context is not None else []
            flow.append(t.checkpoint(program, flow[0], *inputs) if recomputed else program(flow[0], *inputs))
            flow.pop(0)
        order.append(segment)
    return order


def _program(t: Operations, block: Block, run: Program, prefix: str) -> Callable[..., Tensor]:
    """A block's forward pass, which names its weights itself, as it may run again in backward."""

    def program(x: Tensor, context: Tensor | None = None) -> Tensor:
        t.prefix = prefix
        return run(t, block, x, context)

    return program


# ---- what enters the stacks ---------------------------------------------------------------------------------------


def _spectrogram(t: Operations, encoder: Tower) -> Tensor:
    mels = next(weight.shape[1] for weight in encoder.extra if weight.name.endswith("conv1.weight"))
    frames = t.dim("frames", FRAMES_PER_POSITION * t.sizes["T"])
    path = encoder.name.rpartition(".")[0]
    dtype = "fp32" if t.compute is not None else t.weight_dtype(f"{path}.conv1.weight")
    t.module = path
    return t.constant("input_features", ("B", t.dim("M", mels), frames), dtype)


def made_leaf(t: Operations, x: Tensor, live: list[Tensor]) -> None:
    """Make x need a gradient where none of its weights trains (enable_input_require_grads): it then stays to the end,
    and so does its gradient."""
    if t.inputs_require_grad and not x.requires_grad:
        x.requires_grad = True
        x.node = Node("leaf", t.module, t.segment, 1)
        live.append(x)


def _encoder_input(t: Operations, encoder: Tower, features: Tensor, live: list[Tensor]) -> Tensor:
    """gelu(conv2(gelu(conv1(features)))) + positions, channels first in memory; the positions never train."""
    path = encoder.name.rpartition(".")[0]
    hidden, kernel = t.dim("H", encoder.hidden), t.dim("kernel", KERNEL)
    x = t.convolution(f"{path}.conv1", features, ("B", hidden, features.dims[2]), (hidden, features.dims[1], kernel))
    made_leaf(t, x, live)
    x = activate(t, "gelu", x)
    x = t.convolution(f"{path}.conv2", x, ("B", hidden, "T"), (hidden, hidden, kernel))
    x = activate(t, "gelu", x)
    x = t.view(x, ("B", "T", hidden))
    t.model_locals.append(x.storage)
    t.module = f"{path}.embed_positions"
    every = t.constant("arange", ("T",), "int64")
    t.model_locals.append(every.storage)
    table = t.weight(f"{path}.embed_positions.weight", ("T", hidden), trainable=False)
    places = t.apply("embedding", [table], [(("T", hidden), table.dtype)])[0]
    return t.dropout(t.add(x, places), encoder.dropout)


def _decoder_input(t: Operations, spec: Embedding, ids: Tensor, live: list[Tensor]) -> Tensor:
    """Tokens + positions, both of which stay variables of the decoder's forward, as the positions' numbers do."""
    check_positions(t, spec)
    size = t.dim("H", spec.size)
    t.module = spec.name
    table = t.weight(f"{spec.name}.weight", (t.dim("V", spec.rows), size))
    (tokens,) = t.apply("embedding", [table], [(("B", "S", size), table.dtype)], saves=[ids])
    made_leaf(t, tokens, live)
    numbers = t.constant("position_ids", ("B", "S"), "int64")
    places = t.weight(f"{spec.position_name}.weight", (t.dim("positions", spec.positions), size))
    (place,) = t.apply("index", [places], [(("B", "S", size), places.dtype)], saves=[numbers])
    t.model_locals.extend((tokens.storage, numbers.storage, place.storage))
    return t.dropout(t.add(tokens, place), spec.dropout)


# ---- blocks -------------------------------------------------------------------------------------------------------


def _encoder_block(t: Operations, block: Block, x: Tensor, _: Tensor | None) -> Tensor:
    x = _attended(t, block, block.mixer, block.norm_names[0], x, None, _dense)
    x = _fed(t, block, x, _dense)
    return t.map("clamp", x) if x.dtype == "fp16" else x


def _decoder_block(t: Operations, block: Block, x: Tensor, context: Tensor | None) -> Tensor:
    x = _attended(t, block, block.mixer, block.norm_names[0], x, None, _as_it_is)
    x = _attended(t, block, block.cross, block.cross_norm_name, x, context, _as_it_is)
    return _fed(t, block, x, _as_it_is)


def _dense(t: Operations, x: Tensor) -> Tensor:
    """Positions before channels, as a norm wants it."""
    return t.copy(x, operator="contiguous")


def _as_it_is(t: Operations, x: Tensor) -> Tensor:
    return x


Layout = Callable[[Operations, Tensor], Tensor]


def _attended(
    t: Operations, block: Block, spec: object, norm: str, x: Tensor, context: Tensor | None, layout: Layout
) -> Tensor:
    """x + dropout(attention(norm(x)))."""
    assert isinstance(spec, Attention)
    mixed = normalise(t, block.norm, norm, layout(t, x))
    mixed, _weights = _attention(t, spec, mixed, context)
    mixed = t.dropout(mixed, block.dropout)
    return t.add(x, mixed)


def _attention(t: Operations, spec: Attention, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
    source = x if context is None else context
    wide = t.dim("AD", spec.heads * spec.head_dim)
    query = _by_heads(t, spec, t.scale(t.linear(spec.names[0], x, wide, bias=spec.q_bias)))
    key = _by_heads(t, spec, t.linear(spec.names[1], source, wide, bias=spec.k_bias))
    value = _by_heads(t, spec, t.linear(spec.names[2], source, wide, bias=spec.v_bias))
    heads, weights = core_and_weights(t, spec, query, key, value)
    heads = t.linear(spec.out_name, heads, x.dims[-1], bias=spec.out_bias)
    return heads, weights


def _by_heads(t: Operations, spec: Attention, x: Tensor) -> Tensor:
    """(B, A, S, D) in this order in memory: a copy. Its gradient comes back in the same order and is laid out anew,
    unless the kernel wrote it with positions first, as the memory-efficient one does."""
    dims = (x.dims[0], t.dim("A", spec.heads), x.dims[1], t.dim("D", spec.head_dim))
    by_positions = t.attention == "sdpa" and x.dtype == "fp32"
    (view,) = t.apply("view", [x], [(dims, x.dtype)], view=True, copies=not by_positions)
    return t.copy(view)


def _fed(t: Operations, block: Block, x: Tensor, layout: Layout) -> Tensor:
    """x + dropout(down(dropout(act(up(norm(x))))))."""
    assert isinstance(block.ffn, Mlp)
    up, down = block.ffn.names
    inner = normalise(t, block.norm, block.norm_names[1], layout(t, x))
    inner = activate(t, block.ffn.activation, t.linear(up, inner, t.dim("F", block.ffn.width), bias=True))
    inner = t.dropout(inner, block.ffn.dropout)
    inner = t.linear(down, inner, x.dims[-1], bias=True)
    inner = t.dropout(inner, block.dropout)
    return t.add(x, inner)
