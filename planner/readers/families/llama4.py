"""Llama 4: routed experts beside a shared one, attention in chunks of tokens in three layers out of four, and images.

Meta 2025; the reference class is `Llama4ForConditionalGeneration` of transformers.
"""

from __future__ import annotations

from dataclasses import replace

from planner.ledger.weights.linear import linear_weights
from planner.ledger.weights.norm import norm_weights
from planner.model.shape import Block, Mlp, ModelShape, Moe, Norm, Tower
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import (
    LAYER_NORM,
    MOST_LAYERS,
    RMS_NORM,
    assemble,
    blocks_by_kind,
    grouped_attention,
    read_trunk,
)
from planner.readers.families.encoder import bidirectional_attention, parameter, plain_mlp, square_patches
from planner.readers.families.moe import check_routing
from planner.readers.families.multimodal import text_decoder, with_towers

__all__ = ["READERS"]

_L2_NORM = Norm(kind="rmsnorm", affine=False)
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def _text(view: ConfigView) -> ModelShape:
    """Layers that rotate attend within `attention_chunk_size` tokens; every fourth neither rotates nor chunks."""
    trunk = read_trunk(view, vocab=202_048, positions=131_072, tied=False)
    layers, bias = trunk.layers, view.bool("attention_bias", False)
    attention = grouped_attention(view, trunk.hidden, heads=40, kv_heads=8, head_dim=128, qkv_bias=bias, out_bias=bias)
    local = replace(
        attention,
        chunk=view.maybe_int("attention_chunk_size", 8192),
        qk_norm=_L2_NORM if view.bool("use_qk_norm", True) else None,
    )
    activation, width = view.str("hidden_act", "silu"), view.int("intermediate_size", 8192)
    dense = Mlp(
        width=view.int("intermediate_size_mlp", 16_384),
        gated=True,
        activation=activation,
        names=tuple(f"feed_forward.{name}" for name in _PROJECTIONS),
    )
    shared = replace(dense, width=width, names=tuple(f"feed_forward.shared_expert.{name}" for name in _PROJECTIONS))
    moe = Moe(
        experts=view.int("num_local_experts", 16),
        top_k=view.int("num_experts_per_tok", 1),
        width=width,
        activation=activation,
        router_name="feed_forward.router",
        experts_name="feed_forward.experts",
        shared=shared,
        layout="in-out",
        every_expert=True,
        jitter=view.float("router_jitter_noise", 0.0),
    )
    check_routing(view, moe)
    interval, step = view.int("no_rope_layer_interval", 4), view.int("interleave_moe_layer_step", 1)
    rotates = view.ints("no_rope_layers", length=layers)  # 1 where the layer rotates, whatever the key says
    rotates = rotates or [int((layer + 1) % interval != 0) for layer in range(layers)]
    sparse = view.ints("moe_layers")
    sparse = list(range(step - 1, layers, step)) if sparse is None else sparse
    view.ignore("attn_temperature_tuning", "floor_scale", "attn_scale", "layer_types", "for_llm_compressor")
    kinds = [(bool(rotates[layer]), layer in sparse) for layer in range(layers)]

    def make(kind: tuple[bool, bool]) -> Block:
        mixer = local if kind[0] else replace(attention, rotary_dim=0)
        return Block(mixer=mixer, ffn=moe if kind[1] else dense, norm=RMS_NORM)

    return assemble(view, trunk, blocks_by_kind(kinds, make), norm=RMS_NORM)


def _tower(view: ConfigView, text_hidden: int) -> Tower:
    """A class token at the end, rotary and learned positions, then four patches to one token and two layers more."""
    path, hidden = "vision_model", view.int("hidden_size", 768)
    patches, side = square_patches(view, image=448, patch=14)
    width = view.int("intermediate_size", 5632)
    out, into = view.int("projector_output_dim", 4096), view.int("projector_input_dim", 4096)
    view.ignore("hidden_act", "pixel_shuffle_ratio", "vision_feature_select_strategy", "projector_dropout")
    view.ignore("multi_modal_projector_bias", "vision_feature_layer")
    mixer = bidirectional_attention(
        view,
        hidden,
        view.int("num_attention_heads", 16),
        rotary=True,
        dropout=view.float("attention_dropout", 0.0, maximum=1.0),
    )
    block = Block(mixer=mixer, ffn=plain_mlp(width, "gelu", ("mlp.fc1", "mlp.fc2")), norm=LAYER_NORM)
    embedding = linear_weights(
        f"{path}.patch_embedding.linear",
        hidden,
        view.int("num_channels", 3) * side * side,
        bias=False,
        component="vision_or_audio",
    )
    adapter = f"{path}.vision_adapter.mlp"
    vision_out = view.int("vision_output_dim", 7680)
    extra = (
        parameter(f"{path}.class_embedding", hidden),
        parameter(f"{path}.positional_embedding_vlm", patches + 1, hidden),
        *embedding,
        *norm_weights(LAYER_NORM, f"{path}.layernorm_pre", hidden),
        *linear_weights(f"{adapter}.fc1", into, width, bias=False, component="vision_or_audio"),
        *linear_weights(f"{adapter}.fc2", out, out, bias=False, component="vision_or_audio"),
        *linear_weights(
            "multi_modal_projector.linear_1", text_hidden, vision_out, bias=False, component="vision_or_audio"
        ),
    )
    return Tower(
        name=f"{path}.model.layers",
        role="vision",
        hidden=hidden,
        blocks=(block,) * view.int("num_hidden_layers", 34, maximum=MOST_LAYERS),
        tokens=patches + 1,
        final_norm=LAYER_NORM,
        final_norm_name=f"{path}.layernorm_post",
        extra=extra,
    )


def _llama4(view: ConfigView) -> ModelShape:
    text = text_decoder(view, "llama4_text")
    tower = _tower(view.sub("vision_config", "llama4_vision_model"), text.hidden)
    return with_towers(
        view,
        text,
        towers=(tower,),
        uncovered=("patch embedding of the image", "pixel shuffle, vision adapter and projector"),
        tied=False,
        path="language_model.model",
        head_name="language_model.lm_head",
    )


READERS = {"llama4": _llama4, "llama4_text": _text}
