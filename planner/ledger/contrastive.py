"""CLIP: a vision transformer and a text transformer, trained to match the pairs of a batch.

A micro-batch counts pairs of an image and a text; the plan's sequence length is the text's. As transformers 5.23 runs
it (modeling_clip.py): images first, then texts, and both stacks' last hidden states stay variables of the model's
forward until the loss is there.

Letters: B pairs, S tokens of a text, T tokens of an image, N patches, H hidden (of either stack), P projection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from planner.ledger.block import run_block
from planner.ledger.encoders import check_positions, check_setting
from planner.ledger.loss_head import cross_entropy
from planner.ledger.masks import eager_mask
from planner.ledger.norm import normalise
from planner.ledger.operations import Operations
from planner.ledger.speech import made_leaf
from planner.ledger.tape import Tensor
from planner.ledger.vision import image_input
from planner.model.shape import Attention, Block, Embedding, ModelShape, Norm, Tower, Weight

__all__ = ["run_contrastive"]


def run_contrastive(
    t: Operations, shape: ModelShape, live: list[Tensor], *, recomputed: bool, loss: str
) -> tuple[list[int], int]:
    """Record the forward pass of CLIP and append the loss to `live`, which holds the token ids.

    Returns the segments of the blocks in order, with the one between the stacks, and the segment of the head.
    Raises NotCovered for other implementations and losses.
    """
    check_setting(t, shape.model_type, loss)
    assert shape.embedding is not None and shape.head is not None
    t.family = shape.model_type
    tower = next(tower for tower in shape.towers if tower.role == "vision")
    t.dim("T", tower.tokens)
    width = next(weight.shape[0] for weight in shape.extra if weight.name == "visual_projection.weight")
    projected = t.dim("P", width)
    pixels = image_input(t, shape)
    live.append(pixels)
    flow = [_image_tokens(t, tower, pixels, live)]
    del pixels
    t.model_locals.append(flow[0].storage)
    order = _run_stack(t, tower.blocks, flow, 1, recomputed)
    middle = max(order, default=0) + 1
    _begin(t, middle)
    seen = flow.pop()
    t.model_locals.clear()
    image = _projected_image(t, tower, seen, projected)
    flow.append(_text_tokens(t, shape.embedding, live))
    t.model_locals.append(flow[0].storage)
    first = shape.blocks[0].mixer
    if t.attention == "eager" and isinstance(first, Attention):
        eager_mask(t, first, "S", flow[0].dtype)
    layers = _run_stack(t, shape.blocks, flow, middle + 1, recomputed)
    head = max(layers, default=middle) + 1
    _begin(t, head)
    read = normalise(t, shape.head.norm, shape.head.norm_name, flow.pop())
    t.model_locals.clear()
    if not recomputed:
        t.masks.clear()
    text = _projected_text(t, read, projected)
    live.append(_matched(t, image, text))
    del seen, read
    return [*order, middle, *layers], head


def _begin(t: Operations, segment: int) -> None:
    t.begin("forward", segment)
    t.prefix = ""


def _run_stack(t: Operations, blocks: Sequence[Block], flow: list[Tensor], first: int, recomputed: bool) -> list[int]:
    """Run the first block and one of the equal ones after it; returns the segment of every block."""
    segments: dict[tuple[bool, Block], int] = {}
    order: list[int] = []
    for index, block in enumerate(blocks):
        key = (index == 0, block)
        segment = segments.get(key)
        if segment is None:
            segment = segments[key] = first + len(segments)
            t.begin("forward", segment)
            program = _program(t, block, f"{segment}:")
            flow.append(t.checkpoint(program, flow[0]) if recomputed else program(flow[0]))
            flow.pop(0)
        order.append(segment)
    return order


def _program(t: Operations, block: Block, prefix: str) -> Callable[[Tensor], Tensor]:
    """A block's forward pass, which names its weights itself, as it may run again in backward."""

    def program(x: Tensor) -> Tensor:
        t.prefix = prefix
        return run_block(t, block, x)

    return program


def _weight(tower: Tower, ending: str) -> Weight:
    return next(weight for weight in tower.extra if weight.name.endswith(ending))


def _image_tokens(t: Operations, tower: Tower, pixels: Tensor, live: list[Tensor]) -> Tensor:
    """norm(class token and patches + positions), (B, T, H)."""
    kernel = _weight(tower, "patch_embedding.weight")
    path = kernel.name.removesuffix(".weight")
    base = path.rpartition(".")[0]
    t.module = path
    hidden, side = t.dim("H", tower.hidden), t.dim("side", kernel.shape[-1])
    patches = ("B", t.dim("N", t.sizes["T"] - 1), hidden)
    dtype = t.weight_dtype(kernel.name)
    x = t.convolution(path, t.to(pixels, dtype), patches, (hidden, pixels.dims[1], side, side), bias=False)
    made_leaf(t, x, live)
    token = t.weight(f"{base}.class_embedding", (hidden,))
    x = t.to(x, token.dtype)  # autocast's cat takes the widest format
    whole = (("B", "T", hidden), x.dtype)
    (x,) = t.apply("cat", [x, token], [whole], alias=[True, False], viewed=[True, False])
    table = t.weight(f"{base}.position_embedding.weight", ("T", hidden))
    (places,) = t.apply("embedding", [table], [(("1", "T", hidden), table.dtype)])
    x = t.apply("add", [x, places], [whole], alias=True, raw_gradients=[None, whole])[0]
    del places
    return normalise(t, _LAYER_NORM, base.removesuffix("embeddings") + "pre_layrnorm", x)


def _projected_image(t: Operations, tower: Tower, x: Tensor, projected: str) -> Tensor:
    """The class token alone, normalised and projected, (B, P)."""
    base = _weight(tower, "patch_embedding.weight").name.rpartition(".embeddings")[0]
    t.module = base
    (token,) = t.slices(x, [("B", x.dims[-1])])
    token = normalise(t, _LAYER_NORM, f"{base}.post_layernorm", t.copy(token))
    return t.linear("visual_projection", token, projected)


def _text_tokens(t: Operations, spec: Embedding, live: list[Tensor]) -> Tensor:
    check_positions(t, spec)
    size = t.dim("H", spec.size)
    t.module = spec.name
    table = t.weight(f"{spec.name}.weight", (t.dim("V", spec.rows), size))
    (tokens,) = t.apply("embedding", [table], [(("B", "S", size), table.dtype)])
    made_leaf(t, tokens, live)
    places = t.weight(f"{spec.position_name}.weight", (t.dim("positions", spec.positions), size))
    (place,) = t.apply("embedding", [places], [(("1", "S", size), places.dtype)])
    return t.add(tokens, place)


def _projected_text(t: Operations, x: Tensor, projected: str) -> Tensor:
    """The token that ends each text, picked by index and projected, (B, P)."""
    ends = [t.constant("index", ("B",), "int64") for _ in range(2)]
    dims = ("B", x.dims[-1])
    (token,) = t.apply("index", [x], [(dims, x.dtype)], saves=ends)
    ends.clear()
    return t.linear("text_projection", token, projected)


def _matched(t: Operations, image: Tensor, text: Tensor) -> Tensor:
    """Cosine of every text with every image, scaled by a learned factor; cross-entropy along both sides."""
    t.module = "loss"
    pairs = ("B", t.dim("pairs", t.sizes["B"]))
    image, text = _unit(t, image), _unit(t, text)
    logits = t.matmul(text, image, pairs)
    factor = t.weight("logit_scale", ())
    (scale,) = t.apply("exp", [factor], [((), factor.dtype)], saves_outputs=(0,))
    logits = t.mul(logits, scale, pairs)
    half = cross_entropy(t, logits, t.constant("arange", ("B",), "int64"))
    other = cross_entropy(t, logits, t.constant("arange", ("B",), "int64"))
    return t.scale(t.add(half, other), "div")


def _unit(t: Operations, x: Tensor) -> Tensor:
    """x over its length: the root of the sum of its squares."""
    square = t.map("pow", x)
    (total,) = t.apply("sum", [square], [((*x.dims[:-1], "1"), square.dtype)])
    del square
    return t.mul(x, t.map("pow", total), x.dims)


_LAYER_NORM = Norm(kind="layernorm", bias=True, fp32=False)
