"""Phi, Phi-3 and Phi-MoE."""

from __future__ import annotations

from dataclasses import replace

from planner.model.shape import Block, Embedding, Head, Mlp, ModelShape, Moe
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import (
    LAYER_NORM,
    RMS_NORM,
    assemble,
    gated_mlp,
    grouped_attention,
    read_trunk,
)

__all__ = ["READERS"]


def _phi(view: ConfigView) -> ModelShape:
    """Branches beside each other behind one layer norm, half of each head rotated, biases everywhere."""
    trunk = read_trunk(view, vocab=51_200, positions=2048, tied=False)
    attention = grouped_attention(
        view,
        trunk.hidden,
        heads=32,
        qkv_bias=True,
        out_bias=True,
        rotary=0.5,
        out_name="self_attn.dense",
        qk_norm=LAYER_NORM if view.bool("qk_layernorm", False) else None,
        qk_norm_names=("self_attn.q_layernorm", "self_attn.k_layernorm"),
    )
    mlp = Mlp(
        width=view.int("intermediate_size", 8192),
        gated=False,
        activation=view.str("hidden_act", "gelu_new"),
        names=("mlp.fc1", "mlp.fc2"),
        up_bias=True,
        down_bias=True,
    )
    block = Block(
        mixer=attention,
        ffn=mlp,
        residual="parallel",
        norm=LAYER_NORM,
        norm_names=("input_layernorm",),
        dropout=view.float("resid_pdrop", 0.0, maximum=1.0),
    )
    return assemble(
        view,
        trunk,
        (block,) * trunk.layers,
        norm=LAYER_NORM,
        embedding=Embedding(rows=trunk.vocab, size=trunk.hidden, dropout=view.float("embd_pdrop", 0.0, maximum=1.0)),
        head=Head(rows=trunk.vocab, tied=trunk.tied, bias=True, norm=LAYER_NORM, norm_name="model.final_layernorm"),
    )


def _phi3(view: ConfigView) -> ModelShape:
    """Llama's block with q, k and v in one matrix and gate and up in another."""
    trunk = read_trunk(view, vocab=32_064, positions=4096, tied=False)
    view.ignore("original_max_position_embeddings", "embd_pdrop")
    attention = grouped_attention(
        view,
        trunk.hidden,
        heads=32,
        names=("self_attn.qkv_proj",),
        window=view.maybe_int("sliding_window", None),
    )
    mlp = replace(gated_mlp(view, 8192), names=("mlp.gate_up_proj", "mlp.down_proj"))
    view.ignore("attention_bias", "mlp_bias", "lm_head_bias", "full_attn_mod", "interpolate_factor")
    dropout = view.float("resid_pdrop", 0.0, maximum=1.0)
    block = Block(mixer=attention, ffn=mlp, norm=RMS_NORM, dropout=dropout)
    return assemble(view, trunk, (block,) * trunk.layers, norm=RMS_NORM)


def _phimoe(view: ConfigView) -> ModelShape:
    """Sixteen experts in every layer, layer norms, a bias on the head, noise on what the experts see."""
    trunk = read_trunk(view, hidden=4096, layers=32, vocab=32_064, positions=131_072, tied=False)
    bias = view.bool("attention_bias", False)
    attention = grouped_attention(
        view,
        trunk.hidden,
        heads=32,
        kv_heads=8,
        qkv_bias=bias,
        out_bias=bias,
        window=view.maybe_int("sliding_window", None),
    )
    view.ignore("original_max_position_embeddings", "hidden_dropout", "router_jitter_noise", "num_experts")
    moe = Moe(
        experts=view.int("num_local_experts", 16),
        top_k=view.int("num_experts_per_tok", 2),
        width=view.int("intermediate_size", 6400),
        activation=view.str("hidden_act", "silu"),
        router_name="mlp.router",
        jitter=view.float("input_jitter_noise", 0.0),
    )
    block = Block(mixer=attention, ffn=moe, norm=LAYER_NORM)
    return assemble(
        view,
        trunk,
        (block,) * trunk.layers,
        norm=LAYER_NORM,
        head=Head(rows=trunk.vocab, tied=trunk.tied, bias=view.bool("lm_head_bias", False), norm=LAYER_NORM),
    )


READERS = {"phi": _phi, "phi3": _phi3, "phimoe": _phimoe}
