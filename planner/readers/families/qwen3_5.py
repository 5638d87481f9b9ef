"""Qwen3.5: three gated delta-rule layers to each gated attention layer, dense or with routed experts, and images."""

from __future__ import annotations

from dataclasses import replace

from planner.model.shape import Attention, Block, Mlp, ModelShape, Moe, Norm
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import assemble, blocks_by_kind, grouped_attention, read_trunk
from planner.readers.families.hybrid import gated_delta_net, linear_kinds
from planner.readers.families.moe import check_routing, shared_experts
from planner.readers.families.multimodal import text_decoder, with_towers
from planner.readers.families.qwen_vision import qwen3_vision_tower

__all__ = ["READERS"]

_NORM = Norm(kind="rmsnorm_1p")


def _attention(view: ConfigView, hidden: int, *, kv_heads: int) -> Attention:
    """The query projection is twice as wide: its second half gates the output."""
    bias = view.bool("attention_bias", False)
    if not view.bool("attn_output_gate", True):
        raise view.fail("attn_output_gate", "true; the reference class always gates")
    return grouped_attention(
        view,
        hidden,
        heads=16,
        kv_heads=kv_heads,
        head_dim=256,
        qkv_bias=bias,
        out_bias=bias,
        rotary=0.25,
        qk_norm=_NORM,
        gate=True,
    )


def _experts(view: ConfigView, activation: str) -> Moe:
    """Routed experts, and one shared expert whose output a sigmoid gate scales."""
    width = view.int("shared_expert_intermediate_size", 512)
    moe = Moe(
        experts=view.int("num_experts", 256),
        top_k=view.int("num_experts_per_tok", 8),
        width=view.int("moe_intermediate_size", 512),
        activation=activation,
        shared=shared_experts(1, width, activation, "mlp.shared_expert"),
        shared_gate="mlp.shared_expert_gate",
        routing="qwen",
        normalises_weights=True,
    )
    return check_routing(view, moe)


def _text(view: ConfigView) -> ModelShape:
    """The text decoder; heads that predict further tokens (`mtp_*`) are not part of the reference class."""
    sparse = view.owner == "qwen3_5_moe_text"
    trunk = read_trunk(view, vocab=248_320, positions=32_768, tied=False)
    recurrent = linear_kinds(view, trunk.layers)
    activation = view.str("hidden_act", "silu")
    attention = _attention(view, trunk.hidden, kv_heads=2 if sparse else 4)
    delta = replace(gated_delta_net(view), projections="split")
    if view.ints("mlp_only_layers"):
        raise view.fail("mlp_only_layers", "an empty list; the reference class has one kind of feed-forward layer")
    view.ignore("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype")
    if sparse:
        ffn: Mlp | Moe = _experts(view, activation)
        view.ignore("intermediate_size", "norm_topk_prob", "decoder_sparse_step")
    else:
        ffn = Mlp(width=view.int("intermediate_size", 12_288), gated=True, activation=activation)
    blocks = blocks_by_kind(recurrent, lambda kind: Block(mixer=delta if kind else attention, ffn=ffn, norm=_NORM))
    return assemble(view, trunk, blocks, norm=_NORM)


def _qwen3_5(view: ConfigView) -> ModelShape:
    tower = qwen3_vision_tower(view.sub("vision_config", f"{view.owner}_vision"), "model.visual", deepstack=False)
    text = text_decoder(view, f"{view.owner}_text")
    uncovered = ("patch embedding of the image", "patch merger")
    return with_towers(view, text, towers=(tower,), uncovered=uncovered, tied=False)


READERS = {
    "qwen3_5": _qwen3_5,
    "qwen3_5_moe": _qwen3_5,
    "qwen3_5_moe_text": _text,
    "qwen3_5_text": _text,
}
