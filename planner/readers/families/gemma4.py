"""Gemma 4: Gemma's sandwich of norms, with global layers whose values are their keys, and experts beside a dense layer.

The reference class is `Gemma4ForConditionalGeneration` of transformers 5. Read here: the models whose config has no
per-layer inputs, no layers that share keys and values, and no audio part, such as 26B-A4B.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.ledger.weights.linear import linear_weights
from planner.ledger.weights.norm import norm_weights
from planner.model.shape import Attention, Block, Embedding, Head, Mlp, ModelShape, Moe, Tower, Weight
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import (
    FULL,
    MOST_LAYERS,
    RMS_NORM,
    SLIDING,
    assemble,
    blocks_by_kind,
    check_heads,
    read_trunk,
    window_kinds,
)
from planner.readers.families.encoder import parameter
from planner.readers.families.moe import check_routing
from planner.readers.families.multimodal import text_decoder, with_towers

__all__ = ["READERS"]

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def _sandwich(mixer: Attention, ffn: Mlp | Moe, extra: tuple[Weight, ...] = ()) -> Block:
    """A norm before and after each branch."""
    return Block(
        mixer=mixer,
        ffn=ffn,
        residual="sandwich",
        norm=RMS_NORM,
        norm_names=("input_layernorm", "pre_feedforward_layernorm"),
        post_norm_names=("post_attention_layernorm", "post_feedforward_layernorm"),
        extra=extra,
    )


def _refuse(view: ConfigView) -> None:
    """Raise for the parts of smaller Gemma 4 models that add tensors not described here."""
    if view.int("hidden_size_per_layer_input", 256, minimum=0):
        raise view.fail("hidden_size_per_layer_input", "0; per-layer inputs are not covered")
    if view.int("num_kv_shared_layers", 0, minimum=0):
        raise view.fail("num_kv_shared_layers", "0; layers that share keys and values are not covered")
    view.ignore("vocab_size_per_layer_input", "use_double_wide_mlp")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """What tells one layer's attention from another's."""

    kind: str
    head_dim: int
    kv_heads: int


def _layer_kinds(view: ConfigView, layers: int) -> list[_Kind]:
    """Local layers have `head_dim`; global ones `global_head_dim` and `num_global_key_value_heads`.

    Configs saved by newer versions list the differing layers in `per_layer_config` instead.
    """
    size, kv_heads = view.int("head_dim", 256), view.int("num_key_value_heads", 4)
    listed = view.sub("per_layer_config") if view.has("per_layer_config") else None
    few = view.maybe_int("num_global_key_value_heads") if view.bool("attention_k_eq_v", False) else None
    view.ignore("num_global_key_value_heads")
    everywhere = (size, kv_heads) if listed else (view.int("global_head_dim", 512), few or kv_heads)
    names = window_kinds(view, layers, lambda layer: (layer + 1) % 6 != 0)
    names[-1] = FULL  # the reference class forces it
    kinds = []
    for layer, kind in enumerate(names):
        own = everywhere if kind == FULL else (size, kv_heads)
        if listed and listed.has(str(layer)):
            other = listed.sub(str(layer))
            own = (other.maybe_int("head_dim") or size, other.maybe_int("num_key_value_heads") or kv_heads)
        kinds.append(_Kind(kind=kind, head_dim=own[0], kv_heads=own[1]))
    return kinds


def _attention(view: ConfigView, layer: _Kind) -> Attention:
    """Local layers have a window; global ones, with `attention_k_eq_v`, no value projection.

    The rotation of global layers is "proportional": most angles are zero, but whole heads are multiplied.
    """
    heads, same = view.int("num_attention_heads", 8), view.bool("attention_k_eq_v", False)
    window = view.int("sliding_window", 512)
    check_heads(view, heads, layer.kv_heads)
    bias = view.bool("attention_bias", False)
    return Attention(
        heads=heads,
        kv_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        q_bias=bias,
        k_bias=bias,
        v_bias=bias,
        out_bias=bias,
        rotary_dim=layer.head_dim,
        qk_norm=RMS_NORM,
        value_norm=True,
        value_from_key=same and layer.kind == FULL,
        window=window if layer.kind == SLIDING else None,
        causal=view.str("use_bidirectional_attention", "") != "all",
        dropout=view.float("attention_dropout", 0.0, maximum=1.0),
    )


def _feed_forward(view: ConfigView, hidden: int) -> tuple[Mlp | Moe, tuple[Weight, ...]]:
    """The feed-forward part and the weights around it: with experts, each of the two branches has norms of its own."""
    activation = view.str("hidden_activation", "gelu_pytorch_tanh")
    dense = Mlp(width=view.int("intermediate_size", 9216), gated=True, activation=activation)
    if not view.bool("enable_moe_block", False):
        view.ignore("num_experts", "top_k_experts", "moe_intermediate_size")
        return dense, ()
    moe = Moe(
        experts=view.int("num_experts"),
        top_k=view.int("top_k_experts"),
        width=view.int("moe_intermediate_size"),
        activation=activation,
        router_name="router.proj",
        experts_name="experts",
        shared=dense,
    )
    check_routing(view, moe)
    names = ("post_feedforward_layernorm_1", "post_feedforward_layernorm_2", "pre_feedforward_layernorm_2")
    extra = (
        parameter("router.scale", hidden, component="router"),
        parameter("router.per_expert_scale", moe.experts, component="router"),
    )
    for name in names:
        extra += norm_weights(RMS_NORM, name, hidden)
    return moe, extra


def _text(view: ConfigView) -> ModelShape:
    """Five local layers to each global one."""
    trunk = read_trunk(view, vocab=262_144, positions=131_072, tied=True)
    _refuse(view)
    ffn, extra = _feed_forward(view, trunk.hidden)
    blocks = blocks_by_kind(
        _layer_kinds(view, trunk.layers), lambda kind: _sandwich(_attention(view, kind), ffn, extra)
    )
    uncovered = ("normalisation of the values", "one scalar that multiplies each block's output")
    if isinstance(ffn, Moe):
        uncovered += ("norms around the dense and the routed branch, and inside the router",)
    return assemble(
        view,
        trunk,
        blocks,
        norm=RMS_NORM,
        embedding=Embedding(rows=trunk.vocab, size=trunk.hidden, scaled=True),
        head=Head(
            rows=trunk.vocab,
            tied=trunk.tied,
            norm=RMS_NORM,
            softcap=view.float("final_logit_softcapping", 0.0) > 0,
        ),
        uncovered=uncovered,
    )


def _tower(view: ConfigView, text_hidden: int) -> Tower:
    """The text block without window or experts, over patches at two-dimensional positions; pooled 3 x 3 after it."""
    path, hidden = "model.vision_tower", view.int("hidden_size", 768)
    heads, kv_heads = view.int("num_attention_heads", 12), view.int("num_key_value_heads", 12)
    check_heads(view, heads, kv_heads)
    size, side = view.int("head_dim", 64), view.int("patch_size", 16)
    view.ignore("global_head_dim", "max_position_embeddings", "pooling_kernel_size", "default_output_length")
    view.ignore("standardize", "use_clipped_linears", "attention_bias")
    mixer = Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size,
        names=tuple(f"self_attn.{part}_proj.linear" for part in "qkv"),
        out_name="self_attn.o_proj.linear",
        rotary_dim=size,
        qk_norm=RMS_NORM,
        value_norm=True,
        causal=False,
        dropout=view.float("attention_dropout", 0.0, maximum=1.0),
    )
    mlp = Mlp(
        width=view.int("intermediate_size", 3072),
        gated=True,
        activation=view.str("hidden_activation", "gelu_pytorch_tanh"),
        names=tuple(f"mlp.{name}.linear" for name in _PROJECTIONS),
    )
    rows = view.int("position_embedding_size", 10_240)
    extra = (
        parameter(f"{path}.patch_embedder.position_embedding_table", 2, rows, hidden, kind="embedding"),
        *linear_weights(
            f"{path}.patch_embedder.input_proj", hidden, 3 * side * side, bias=False, component="vision_or_audio"
        ),
        *linear_weights(
            "model.embed_vision.embedding_projection", text_hidden, hidden, bias=False, component="vision_or_audio"
        ),
    )
    blocks = (_sandwich(mixer, mlp),) * view.int("num_hidden_layers", 16, maximum=MOST_LAYERS)
    return Tower(name=f"{path}.encoder.layers", role="vision", hidden=hidden, blocks=blocks, extra=extra)


def _gemma4(view: ConfigView) -> ModelShape:
    if view.has("audio_config"):
        raise view.fail("audio_config", "null; the audio tower is not covered")
    text = text_decoder(view, "gemma4_text")
    towers: tuple[Tower, ...] = ()
    uncovered: tuple[str, ...] = ()
    if view.has("vision_config"):
        towers = (_tower(view.sub("vision_config", "gemma4_vision"), text.hidden),)
        uncovered = ("patch embedding of the image", "pooling and projection of image tokens")
    view.ignore("vision_soft_tokens_per_image")
    return with_towers(view, text, towers=towers, uncovered=uncovered, tied=True)


READERS = {"gemma4": _gemma4, "gemma4_text": _text}
