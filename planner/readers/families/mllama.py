"""Llama 3.2 Vision: Llama's decoder with cross-attention layers between its own, which read a tiled image.

Grattafiori et al. 2024 (arXiv:2407.21783), section 7; the reference class is `MllamaForConditionalGeneration`.
"""

from __future__ import annotations

from dataclasses import replace

from planner.errors import ModelConfigError
from planner.ledger.weights.convolution import convolution_weights
from planner.ledger.weights.linear import linear_weights
from planner.ledger.weights.norm import norm_weights
from planner.model.shape import Attention, Block, Embedding, ModelShape, Tower, Weight
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import (
    LAYER_NORM,
    MOST_LAYERS,
    RMS_NORM,
    Trunk,
    assemble,
    gated_mlp,
    grouped_attention,
)
from planner.readers.families.encoder import bidirectional_attention, parameter, plain_mlp, square_patches
from planner.readers.families.multimodal import with_towers

__all__ = ["READERS"]

_IMAGE_ROWS = 8  # embeddings of special tokens above the vocabulary that the output matrix does not score
_TILE_MULTIPLE = 8  # the positions of one tile are padded to a multiple of this


def _text(view: ConfigView) -> ModelShape:
    """Layers listed in `cross_attention_layers` attend to the image alone; tanh gates scale both of their branches."""
    trunk = Trunk(
        hidden=view.int("hidden_size", 4096),
        layers=view.int("num_hidden_layers", 40, maximum=MOST_LAYERS),
        vocab=view.int("vocab_size", 128_256),
        max_positions=view.maybe_int("max_position_embeddings", 131_072),
        tied=view.bool("tie_word_embeddings", False),
    )
    attention = grouped_attention(view, trunk.hidden, heads=32, kv_heads=8)
    attention = replace(attention, dropout=view.float("dropout", 0.0, maximum=1.0))
    own = Block(mixer=attention, ffn=gated_mlp(view, 14_336), norm=RMS_NORM)
    across = replace(
        own,
        mixer=replace(
            attention,
            names=tuple(f"cross_attn.{part}_proj" for part in "qkv"),
            out_name="cross_attn.o_proj",
            rotary_dim=0,
            causal=False,
            cross=True,
            qk_norm=RMS_NORM,
            qk_norm_names=("cross_attn.q_norm", "cross_attn.k_norm"),
        ),
        extra=tuple(parameter(f"cross_attn_{part}_gate", 1, component="attention") for part in ("attn", "mlp")),
    )
    crossing = view.ints("cross_attention_layers")
    if crossing is None:
        crossing = [3, 8, 13, 18, 23, 28, 33, 38]
    if any(layer >= trunk.layers for layer in crossing):
        raise ModelConfigError(f"mllama config: cross_attention_layers {crossing} exceed {trunk.layers} layers.")
    blocks = tuple(across if layer in crossing else own for layer in range(trunk.layers))
    embedding = Embedding(rows=trunk.vocab + _IMAGE_ROWS, size=trunk.hidden)
    return assemble(
        view,
        trunk,
        blocks,
        norm=RMS_NORM,
        embedding=embedding,
        uncovered=("tanh gates of the cross-attention layers",),
    )


def _vision_blocks(view: ConfigView, hidden: int, layers: int, *, gated: bool) -> tuple[Block, ...]:
    mixer: Attention = bidirectional_attention(view, hidden, view.int("attention_heads", 16), bias=False)
    mlp = plain_mlp(view.int("intermediate_size", 5120), view.str("hidden_act", "gelu"), ("mlp.fc1", "mlp.fc2"))
    gates = tuple(parameter(f"gate_{part}", 1) for part in ("attn", "ffn"))
    return (Block(mixer=mixer, ffn=mlp, norm=LAYER_NORM, extra=gates if gated else ()),) * layers


def _towers(view: ConfigView, text_hidden: int) -> tuple[Tower, ...]:
    """Local layers, then gated global layers, over up to `max_num_tiles` tiles of one image at once.

    The projector reads the last output beside the outputs of `intermediate_layers_indices`: `vision_output_dim`.
    """
    path, hidden = "model.vision_model", view.int("hidden_size", 1280)
    patches, side = square_patches(view, image=448, patch=14)
    tiles, positions = view.int("max_num_tiles", 4), patches + 1
    ratios = (view.length("supported_aspect_ratios") or 8) + 1  # the first one stands for padding
    view.ignore("intermediate_layers_indices", "max_aspect_ratio_id")
    tokens = tiles * -(-positions // _TILE_MULTIPLE) * _TILE_MULTIPLE

    def gated_table(name: str, columns: int) -> tuple[Weight, ...]:
        table = parameter(f"{path}.{name}.embedding.weight", ratios, columns, kind="embedding")
        return (parameter(f"{path}.{name}.gate", 1), table)

    patch_embedding = convolution_weights(
        f"{path}.patch_embedding",
        hidden,
        view.int("num_channels", 3),
        (side, side),
        bias=False,
        component="vision_or_audio",
    )
    projector = linear_weights(
        "model.multi_modal_projector",
        text_hidden,
        view.int("vision_output_dim", 7680),
        bias=True,
        component="vision_or_audio",
    )
    place = f"{path}.gated_positional_embedding"
    front = (
        parameter(f"{path}.class_embedding", hidden),
        *patch_embedding,
        parameter(f"{place}.gate", 1),
        parameter(f"{place}.embedding", positions, hidden),
        parameter(f"{place}.tile_embedding.weight", ratios, tiles * positions * hidden, kind="embedding"),
        *gated_table("pre_tile_positional_embedding", tiles * hidden),
        *norm_weights(LAYER_NORM, f"{path}.layernorm_pre", hidden),
    )
    local = Tower(
        name=f"{path}.transformer.layers",
        role="vision",
        hidden=hidden,
        blocks=_vision_blocks(view, hidden, view.int("num_hidden_layers", 32, maximum=MOST_LAYERS), gated=False),
        tokens=tokens,
        final_norm=LAYER_NORM,
        final_norm_name=f"{path}.layernorm_post",
        extra=front,
    )
    global_layers = view.int("num_global_layers", 8, maximum=MOST_LAYERS)
    whole = Tower(
        name=f"{path}.global_transformer.layers",
        role="vision",
        hidden=hidden,
        blocks=_vision_blocks(view, hidden, global_layers, gated=True),
        tokens=tokens,
        extra=(*gated_table("post_tile_positional_embedding", tiles * hidden), *projector),
    )
    return local, whole


def _mllama(view: ConfigView) -> ModelShape:
    text = _text(view.sub("text_config", "mllama_text_model"))
    towers = _towers(view.sub("vision_config", "mllama_vision_model"), text.hidden)
    uncovered = (
        "patch and tile embeddings of the image",
        "tanh gates of the global vision layers",
        "kept outputs of the intermediate vision layers and the projector",
    )
    return with_towers(view, text, towers=towers, uncovered=uncovered, tied=False)


READERS = {"mllama": _mllama, "mllama_text_model": _text}
