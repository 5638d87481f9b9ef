"""Vision transformers: patches of an image as tokens, with a class token before them.

As transformers 5.23 runs them (modeling_vit.py). A micro-batch counts images; every image makes as many tokens as the
model's image and patch sizes say, whatever the plan's sequence length is. Images come in fp32, as image processors
make them, and the model casts them to the format of its patch embedding.

Letters: B images, S tokens of an image, C channels, P pixels along a side, H hidden.
"""

from __future__ import annotations

from planner.ledger.operations import Operations
from planner.ledger.tape import Tensor
from planner.model.shape import ModelShape, Weight

__all__ = ["IMAGE_MODELS", "embed_image", "image_input"]

IMAGE_MODELS = frozenset({"vit"})


def image_input(t: Operations, shape: ModelShape) -> Tensor:
    """The batch of images, fp32 (B, C, height, width)."""
    assert shape.image is not None
    channels, height, width = shape.image
    return t.constant("pixel_values", ("B", t.dim("C", channels), t.dim("P", height), t.dim("P", width)), "fp32")


def embed_image(t: Operations, shape: ModelShape, pixels: Tensor) -> Tensor:
    """Hidden states (B, S, H): patches behind a class token, plus learned positions.

    The cast images and the result are variables of the model's forward, which live until the last block is done.
    """
    projection = _weight(shape, "patch_embeddings.projection.weight")
    path = projection.name.removesuffix(".weight")
    if t.compute is None:
        t.module = path
        pixels = t.to(pixels, t.weight_dtype(projection.name))
    t.model_locals.append(pixels.storage)
    x = _with_positions(t, shape, path, projection, pixels)
    t.model_locals.append(x.storage)
    return x


def _with_positions(t: Operations, shape: ModelShape, path: str, projection: Weight, pixels: Tensor) -> Tensor:
    hidden, side = t.dim("H", shape.hidden), t.dim("side", projection.shape[-1])
    patches = ("B", t.dim("S-1", t.sizes["S"] - 1), hidden)
    embedded = t.convolution(path, pixels, patches, (hidden, pixels.dims[1], side, side))
    if t.inputs_require_grad and not embedded.requires_grad:
        embedded.requires_grad = True
        t.hold(embedded)
    base = path.rpartition(".patch_embeddings")[0]
    t.module = base
    token = t.weight(f"{base}.cls_token", ("1", "1", hidden))
    embedded = t.to(embedded, token.dtype)  # autocast's cat takes the widest format
    whole = (("B", "S", hidden), embedded.dtype)
    (embedded,) = t.apply("cat", [embedded, token], [whole], alias=[True, False], viewed=[True, False])
    places = t.weight(f"{base}.position_embeddings", ("1", "S", hidden))
    (embedded,) = t.apply("add", [embedded, places], [whole], alias=True, raw_gradients=[None, whole])
    return t.dropout(embedded, shape.blocks[0].dropout)


def _weight(shape: ModelShape, ending: str) -> Weight:
    return next(weight for weight in shape.extra if weight.name.endswith(ending))
