"""Gemma: wide heads, scaled embeddings, norms that add one to their weight; from the second version on, norms on
both sides of each branch and alternating windows."""

from __future__ import annotations

from dataclasses import replace

from planner.model.shape import Attention, Block, Embedding, Head, Mlp, ModelShape, Norm
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import (
    Trunk,
    assemble,
    blocks_by_kind,
    gated_mlp,
    grouped_attention,
    read_trunk,
    window_kinds,
    windowed,
)

__all__ = ["READERS"]

_NORM = Norm(kind="rmsnorm_1p")
_SANDWICH = ("input_layernorm", "pre_feedforward_layernorm")
_SANDWICH_POST = ("post_attention_layernorm", "post_feedforward_layernorm")


def _whole(view: ConfigView, trunk: Trunk, blocks: tuple[Block, ...], *, softcap: bool) -> ModelShape:
    return assemble(
        view,
        trunk,
        blocks,
        norm=_NORM,
        embedding=Embedding(rows=trunk.vocab, size=trunk.hidden, scaled=True),
        head=Head(rows=trunk.vocab, tied=trunk.tied, norm=_NORM, softcap=softcap),
    )


def _gemma(view: ConfigView) -> ModelShape:
    """The first version; `hidden_act: gelu` in its files always meant the tanh approximation."""
    trunk = read_trunk(view, vocab=256_000, positions=8192, tied=True)
    bias = view.bool("attention_bias", False)
    attention = grouped_attention(view, trunk.hidden, heads=16, kv_heads=16, head_dim=256, qkv_bias=bias, out_bias=bias)
    mlp = gated_mlp(view, 24_576, act="gelu_pytorch_tanh")
    view.ignore("hidden_activation")
    if mlp.activation == "gelu":
        mlp = replace(mlp, activation="gelu_pytorch_tanh")
    block = Block(mixer=attention, ffn=mlp, norm=_NORM)
    return _whole(view, trunk, (block,) * trunk.layers, softcap=False)


def _sandwiched(mixer: Attention, mlp: Mlp) -> Block:
    return Block(
        mixer=mixer,
        ffn=mlp,
        norm=_NORM,
        residual="sandwich",
        norm_names=_SANDWICH,
        post_norm_names=_SANDWICH_POST,
    )


def _mlp(view: ConfigView) -> Mlp:
    width = view.int("intermediate_size", 9216)
    view.ignore("hidden_act")
    return Mlp(width=width, gated=True, activation=view.str("hidden_activation", "gelu_pytorch_tanh"))


def _gemma2(view: ConfigView) -> ModelShape:
    """Even layers slide; scores and logits go through a soft cap."""
    trunk = read_trunk(view, vocab=256_000, positions=8192, tied=True)
    bias = view.bool("attention_bias", False)
    window = view.maybe_int("sliding_window", 4096)
    attention = grouped_attention(
        view,
        trunk.hidden,
        heads=8,
        kv_heads=4,
        head_dim=256,
        qkv_bias=bias,
        out_bias=bias,
        softcap=_capped(view, "attn_logit_softcapping", 50.0),
    )
    mlp = _mlp(view)
    view.ignore("query_pre_attn_scalar", "use_bidirectional_attention")
    kinds = window_kinds(view, trunk.layers, lambda layer: layer % 2 == 0)
    blocks = blocks_by_kind(kinds, lambda kind: _sandwiched(windowed(attention, kind, window), mlp))
    return _whole(view, trunk, blocks, softcap=_capped(view, "final_logit_softcapping", 30.0))


def _gemma3_text(view: ConfigView) -> ModelShape:
    """Norms over heads, five sliding layers to each full one."""
    trunk = read_trunk(view, vocab=262_208, positions=131_072, tied=True)
    bias = view.bool("attention_bias", False)
    window = view.maybe_int("sliding_window", 4096)
    pattern = view.int("sliding_window_pattern", 6) if view.has("sliding_window_pattern") else 6
    attention = grouped_attention(
        view,
        trunk.hidden,
        heads=8,
        kv_heads=4,
        head_dim=256,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=_NORM,
        softcap=_capped(view, "attn_logit_softcapping", None),
    )
    if view.bool("use_bidirectional_attention", False):
        attention = replace(attention, causal=False)
        window = None if window is None else window // 2 + 1
    mlp = _mlp(view)
    view.ignore("query_pre_attn_scalar")
    kinds = window_kinds(view, trunk.layers, lambda layer: (layer + 1) % pattern != 0)
    blocks = blocks_by_kind(kinds, lambda kind: _sandwiched(windowed(attention, kind, window), mlp))
    return _whole(view, trunk, blocks, softcap=_capped(view, "final_logit_softcapping", None))


def _capped(view: ConfigView, key: str, default: float | None) -> bool:
    """Whether a soft cap applies: absent means the default, null means no."""
    if not view.says(key):
        return default is not None
    return view.has(key) and view.float(key) > 0


READERS = {"gemma": _gemma, "gemma2": _gemma2, "gemma3_text": _gemma3_text}
