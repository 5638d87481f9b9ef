"""Kimi K2.5: the text decoder of Kimi K2 and the MoonViT tower, four patches to one token.

The reference class is `Kimi_K25ForConditionalGeneration` of transformers 5; the published config still carries the
keys of the code in its own repository (`vt_hidden_size`, ...), which read the same.
"""

from __future__ import annotations

from typing import Final

from planner.ledger.weights.convolution import convolution_weights
from planner.ledger.weights.linear import linear_weights
from planner.ledger.weights.norm import norm_weights
from planner.model.shape import Block, ModelShape, Tower
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import LAYER_NORM, MOST_LAYERS
from planner.readers.families.encoder import bidirectional_attention, parameter, plain_mlp
from planner.readers.families.multimodal import text_decoder, with_towers

__all__ = ["READERS"]

_CHANNELS: Final = 3
_PATCHES_PER_TOKEN: Final = 4  # `merge_kernel_size` 2 x 2, the only one that is published


def _tower(view: ConfigView, text_hidden: int, normed: int) -> Tower:
    """LayerNorms and biases everywhere; learned positions beside two-dimensional rotary ones."""
    path, hidden = "model.vision_tower", view.int("vt_hidden_size", 1152, also=("hidden_size",))
    side = view.int("patch_size", 14)
    if view.ints("merge_kernel_size") not in (None, [2, 2]):
        raise view.fail("merge_kernel_size", "[2, 2]")
    view.str("mm_projector_type", "patchmerger", among=("patchmerger",))
    view.str("pos_emb_type", "divided_fixed", among=("divided_fixed",))
    view.ignore("init_pos_emb_time", "pos_emb_time", "merge_type", "text_hidden_size")
    view.ignore("video_attn_type", "projector_hidden_act", "projector_ln_eps")
    mixer = bidirectional_attention(
        view,
        hidden,
        view.int("vt_num_attention_heads", 16, also=("num_attention_heads",)),
        rotary=True,
        names=tuple(f"attn.{part}_proj" for part in "qkv"),
        out_name="attn.proj",
    )
    width = view.int("vt_intermediate_size", 4304, also=("intermediate_size",))
    mlp = plain_mlp(width, view.str("hidden_act", "gelu_pytorch_tanh"), ("mlp.fc1", "mlp.fc2"))
    block = Block(mixer=mixer, ffn=mlp, norm=LAYER_NORM, norm_names=("norm1", "norm2"))
    rows = view.int("init_pos_emb_height", 64, also=("pos_emb_height",))
    columns = view.int("init_pos_emb_width", 64, also=("pos_emb_width",))
    merged, projector = _PATCHES_PER_TOKEN * hidden, "model.mm_projector"
    extra = (
        *convolution_weights(
            f"{path}.patch_embed.proj", hidden, _CHANNELS, (side, side), bias=True, component="vision_or_audio"
        ),
        parameter(f"{path}.patch_embed.pos_emb.position_embeddings", rows, columns, hidden),
        *norm_weights(LAYER_NORM, f"{projector}.pre_norm", normed),
        *linear_weights(f"{projector}.in_proj", merged, merged, bias=True, component="vision_or_audio"),
        *linear_weights(f"{projector}.out_proj", text_hidden, merged, bias=True, component="vision_or_audio"),
    )
    layers = view.int("vt_num_hidden_layers", 27, maximum=MOST_LAYERS, also=("num_hidden_layers",))
    return Tower(
        name=f"{path}.layers",
        role="vision",
        hidden=hidden,
        blocks=(block,) * layers,
        final_norm=LAYER_NORM,
        final_norm_name=f"{path}.final_layernorm",
        extra=extra,
    )


def _kimi_k25(view: ConfigView) -> ModelShape:
    text = text_decoder(view, "deepseek_v3")
    vision = view.sub("vision_config", "kimi_k25_vision")
    normed = view.int("projection_hidden_size", vision.int("mm_hidden_size", 1152))
    tower = _tower(vision, text.hidden, normed)
    view.ignore("use_unified_vision_chunk", "video_placeholder", "ignore_index")
    uncovered = ("patch embedding of the image", "patch merger and projector")
    return with_towers(view, text, towers=(tower,), uncovered=uncovered, tied=False)


READERS = {"kimi_k25": _kimi_k25}
