"""Models known from papers or from code in other frameworks: PaLM, Gopher and Chinchilla, Grok-1.

Their keys are ours, in the words of the common configs; module names follow Llama's, for want of their own.
"""

from __future__ import annotations

from dataclasses import replace

from planner.model.shape import Block, Embedding, Head, ModelShape, Moe, Norm, Weight
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import (
    RMS_NORM,
    assemble,
    gated_mlp,
    grouped_attention,
    read_trunk,
)
from planner.readers.families.moe import check_routing

__all__ = ["READERS"]


def _palm(view: ConfigView) -> ModelShape:
    """PaLM (arXiv:2204.02311, section 2): parallel branches, one key/value head, SwiGLU, no biases, shared tables."""
    trunk = read_trunk(view, vocab=256_000, positions=2048, tied=True)
    norm = Norm(kind="layernorm")
    attention = grouped_attention(view, trunk.hidden, kv_heads=1)
    block = Block(mixer=attention, ffn=gated_mlp(view), residual="parallel", norm=norm, norm_names=("input_layernorm",))
    return assemble(view, trunk, (block,) * trunk.layers, norm=norm)


def _gopher(view: ConfigView) -> ModelShape:
    """Gopher (arXiv:2112.11446, section 3.1): GPT-2 with RMS norms and the relative positions of Transformer-XL.

    Those add a projection of H x H for the positions and two vectors of H for each layer.
    """
    trunk = read_trunk(view, vocab=32_000, positions=2048, tied=True)
    attention = grouped_attention(view, trunk.hidden, rotary=0.0)
    mlp = gated_mlp(view)
    plain = ("mlp.up_proj", "mlp.down_proj")
    wide = attention.heads * attention.head_dim
    positions = (
        Weight(name="self_attn.r_proj.weight", shape=(wide, trunk.hidden), component="attention", kind="linear"),
        Weight(name="self_attn.r_w_bias", shape=(wide,), component="attention", kind="bias"),
        Weight(name="self_attn.r_r_bias", shape=(wide,), component="attention", kind="bias"),
    )
    block = Block(mixer=attention, ffn=replace(mlp, gated=False, names=plain), norm=RMS_NORM, extra=positions)
    note = "relative positions of Transformer-XL (weights counted; activations not described)"
    return assemble(view, trunk, (block,) * trunk.layers, norm=RMS_NORM, uncovered=(note,))


def _grok1(view: ConfigView) -> ModelShape:
    """Grok-1 (github.com/xai-org/grok-1): norms on both sides of each branch, capped scores, eight gelu experts."""
    trunk = read_trunk(view, vocab=131_072, positions=8192, tied=True)
    attention = grouped_attention(view, trunk.hidden, kv_heads=8, head_dim=128, softcap=True)
    moe = Moe(
        experts=view.int("num_local_experts", 8, also=("num_experts",)),
        top_k=view.int("num_experts_per_tok", 2),
        width=view.int("intermediate_size"),
        activation=view.str("hidden_act", "gelu"),
    )
    view.ignore("attn_output_multiplier", "max_attn_value", "embedding_multiplier_scale", "output_multiplier_scale")
    block = Block(
        mixer=attention,
        ffn=check_routing(view, moe),
        residual="sandwich",
        norm=RMS_NORM,
        norm_names=("pre_attn_norm", "pre_moe_norm"),
        post_norm_names=("post_attn_norm", "post_moe_norm"),
    )
    return assemble(
        view,
        trunk,
        (block,) * trunk.layers,
        norm=RMS_NORM,
        embedding=Embedding(rows=trunk.vocab, size=trunk.hidden, scaled=True),
        head=Head(rows=trunk.vocab, tied=trunk.tied, norm=RMS_NORM, scaled=True),
    )


READERS = {"gopher": _gopher, "grok-1": _grok1, "palm": _palm}
