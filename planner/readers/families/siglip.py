"""The vision transformer of SigLIP: CLIP's without class token and first norm (Zhai et al. 2023, arXiv:2303.15343)."""

from __future__ import annotations

from planner.ledger.weights.convolution import convolution_weights
from planner.ledger.weights.linear import linear_weights
from planner.ledger.weights.norm import norm_weights
from planner.model.shape import Component, Tower, Weight
from planner.readers.config_view import ConfigView
from planner.readers.families.clip import clip_block
from planner.readers.families.decoder import LAYER_NORM, MOST_LAYERS
from planner.readers.families.encoder import parameter, square_patches

__all__ = ["siglip_vision_tower"]


def _pooling_head(path: str, hidden: int, width: int) -> tuple[Weight, ...]:
    """One learned query that attends to all patches, and a feed-forward layer after it."""
    part: Component = "vision_or_audio"
    return (
        parameter(f"{path}.probe", 1, 1, hidden),
        parameter(f"{path}.attention.in_proj_weight", 3 * hidden, hidden),
        parameter(f"{path}.attention.in_proj_bias", 3 * hidden, kind="bias"),
        *linear_weights(f"{path}.attention.out_proj", hidden, hidden, bias=True, component=part),
        *norm_weights(LAYER_NORM, f"{path}.layernorm", hidden),
        *linear_weights(f"{path}.mlp.fc1", width, hidden, bias=True, component=part),
        *linear_weights(f"{path}.mlp.fc2", hidden, width, bias=True, component=part),
    )


def siglip_vision_tower(view: ConfigView, path: str) -> Tower:
    """The tower at the module `path`; language models switch its pooling head off (`vision_use_head: false`)."""
    hidden = view.int("hidden_size", 768)
    patches, side = square_patches(view, image=224, patch=16)
    convolution = convolution_weights(
        f"{path}.embeddings.patch_embedding",
        hidden,
        view.int("num_channels", 3),
        (side, side),
        bias=True,
        component="vision_or_audio",
    )
    positions = parameter(f"{path}.embeddings.position_embedding.weight", patches, hidden, kind="embedding")
    block = clip_block(view, hidden, heads=12, width=3072, act="gelu_pytorch_tanh")
    pooling: tuple[Weight, ...] = ()
    if view.bool("vision_use_head", True):
        pooling = _pooling_head(f"{path}.head", hidden, view.int("intermediate_size", 3072))
    return Tower(
        name=f"{path}.encoder.layers",
        role="vision",
        hidden=hidden,
        blocks=(block,) * view.int("num_hidden_layers", 12, maximum=MOST_LAYERS),
        tokens=patches,
        final_norm=LAYER_NORM,
        final_norm_name=f"{path}.post_layernorm",
        extra=(*convolution, positions, *pooling),
    )
