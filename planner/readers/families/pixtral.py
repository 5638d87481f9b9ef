"""The vision transformer of Pixtral: Llama's block over patches, with two-dimensional rotary positions.

Agrawal et al. 2024 (arXiv:2410.07073).
"""

from __future__ import annotations

from planner.ledger.weights.convolution import convolution_weights
from planner.ledger.weights.norm import norm_weights
from planner.model.shape import Block, Mlp, Tower
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import MOST_LAYERS, RMS_NORM
from planner.readers.families.encoder import bidirectional_attention

__all__ = ["pixtral_tower"]


def pixtral_tower(view: ConfigView, path: str) -> Tower:
    """The tower at the module `path`; images keep their own size, so the number of patches is left to the plan."""
    hidden, side = view.int("hidden_size", 1024), view.int("patch_size", 16)
    view.ignore("image_size", "head_dim")  # the largest image; the class derives the size of a head
    mixer = bidirectional_attention(
        view,
        hidden,
        view.int("num_attention_heads", 16),
        bias=False,
        rotary=True,
        names=tuple(f"attention.{part}_proj" for part in "qkv"),
        out_name="attention.o_proj",
        dropout=view.float("attention_dropout", 0.0, maximum=1.0),
    )
    mlp = Mlp(
        width=view.int("intermediate_size", 4096),
        gated=True,
        activation=view.str("hidden_act", "gelu"),
        names=tuple(f"feed_forward.{part}_proj" for part in ("gate", "up", "down")),
    )
    block = Block(mixer=mixer, ffn=mlp, norm=RMS_NORM, norm_names=("attention_norm", "ffn_norm"))
    extra = convolution_weights(
        f"{path}.patch_conv",
        hidden,
        view.int("num_channels", 3),
        (side, side),
        bias=False,
        component="vision_or_audio",
    )
    return Tower(
        name=f"{path}.transformer.layers",
        role="vision",
        hidden=hidden,
        blocks=(block,) * view.int("num_hidden_layers", 24, maximum=MOST_LAYERS),
        extra=extra + norm_weights(RMS_NORM, f"{path}.ln_pre", hidden),
    )
