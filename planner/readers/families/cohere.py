"""Cohere's Command and Aya, Nvidia's Nemotron and Baidu's dense ERNIE 4.5."""

from __future__ import annotations

from dataclasses import replace

from planner.model.shape import Attention, Block, Head, Mlp, ModelShape, Norm
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import (
    FULL,
    RMS_NORM,
    SLIDING,
    assemble,
    blocks_by_kind,
    gated_mlp,
    grouped_attention,
    read_trunk,
    window_kinds,
)

__all__ = ["READERS"]

_NORM = Norm(kind="layernorm")  # weight alone, computed by hand in fp32


def _parallel(attention: Attention, mlp: Mlp) -> Block:
    """Both branches behind one norm."""
    return Block(mixer=attention, ffn=mlp, residual="parallel", norm=_NORM, norm_names=("input_layernorm",))


def _cohere(view: ConfigView) -> ModelShape:
    trunk = read_trunk(view, hidden=8192, layers=40, vocab=256_000, positions=8192, tied=True)
    bias = view.bool("attention_bias", False)
    view.ignore(
        "logit_scale", "model_max_length", "use_embedding_sharing", "use_gated_activation", "use_parallel_block"
    )
    attention = grouped_attention(
        view,
        trunk.hidden,
        heads=64,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=_NORM if view.bool("use_qk_norm", False) else None,
        qk_norm_over="heads",
    )
    block = _parallel(attention, gated_mlp(view, 22_528))
    head = Head(rows=trunk.vocab, tied=trunk.tied, norm=_NORM, scaled=True)
    return assemble(view, trunk, (block,) * trunk.layers, norm=_NORM, head=head)


def _cohere2(view: ConfigView) -> ModelShape:
    """Three sliding layers with rotary positions to each full one without positions."""
    trunk = read_trunk(view, hidden=8192, layers=40, vocab=256_000, positions=8192, tied=True)
    bias = view.bool("attention_bias", False)
    view.ignore(
        "logit_scale", "model_max_length", "use_embedding_sharing", "use_gated_activation", "use_parallel_block"
    )
    view.ignore("use_parallel_embedding", "order_of_interleaved_layers", "position_embedding_type", "rotary_pct")
    view.ignore("use_qk_norm")
    window = view.maybe_int("sliding_window", 4096)
    pattern = view.int("sliding_window_pattern", 4) if view.has("sliding_window_pattern") else 4
    attention = grouped_attention(view, trunk.hidden, heads=64, qkv_bias=bias, out_bias=bias)
    mlp = gated_mlp(view, 22_528)
    mixers = {SLIDING: replace(attention, window=window), FULL: replace(attention, rotary_dim=0)}
    kinds = window_kinds(view, trunk.layers, lambda layer: (layer + 1) % pattern != 0)
    blocks = blocks_by_kind(kinds, lambda kind: _parallel(mixers[kind], mlp))
    head = Head(rows=trunk.vocab, tied=trunk.tied, norm=_NORM, scaled=True)
    return assemble(view, trunk, blocks, norm=_NORM, head=head)


def _nemotron(view: ConfigView) -> ModelShape:
    """Layer norms whose weight is added to one, squared ReLU without a gate, half of each head rotated."""
    trunk = read_trunk(view, vocab=256_000, positions=4096, tied=False)
    norm = Norm(kind="layernorm", bias=True, fp32=False)
    bias, mlp_bias = view.bool("attention_bias", False), view.bool("mlp_bias", False)
    attention = grouped_attention(
        view,
        trunk.hidden,
        heads=48,
        qkv_bias=bias,
        out_bias=bias,
        rotary=view.float("rope_percent", 0.5, maximum=1.0),
    )
    mlp = Mlp(
        width=view.int("intermediate_size", 24_576),
        gated=False,
        activation=view.str("hidden_act", "relu2"),
        names=("mlp.up_proj", "mlp.down_proj"),
        up_bias=mlp_bias,
        down_bias=mlp_bias,
    )
    view.ignore("kv_channels")
    block = Block(mixer=attention, ffn=mlp, norm=norm)
    return assemble(view, trunk, (block,) * trunk.layers, norm=norm)


def _ernie4_5(view: ConfigView) -> ModelShape:
    """Llama with one switch for the biases of all layers."""
    trunk = read_trunk(view, vocab=103_424, positions=131_072, tied=True)
    bias = view.bool("use_bias", False)
    attention = grouped_attention(view, trunk.hidden, heads=16, kv_heads=2, head_dim=128, qkv_bias=bias, out_bias=bias)
    block = Block(mixer=attention, ffn=gated_mlp(view, 3072, bias=bias), norm=RMS_NORM)
    return assemble(view, trunk, (block,) * trunk.layers, norm=RMS_NORM)


READERS = {"cohere": _cohere, "cohere2": _cohere2, "ernie4_5": _ernie4_5, "nemotron": _nemotron}
