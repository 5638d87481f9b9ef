"""Llama and the families that follow its block: pre-norm, rotary grouped-query attention, gated feed-forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from planner.model.shape import Block, Embedding, Head, Mlp, ModelShape
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import (
    FULL,
    RMS_NORM,
    assemble,
    blocks_by_kind,
    gated_mlp,
    grouped_attention,
    read_trunk,
    window_kinds,
    windowed,
)

__all__ = ["READERS"]


def _llama(view: ConfigView) -> ModelShape:
    trunk = read_trunk(view, vocab=32_000, positions=2048, tied=False)
    view.ignore("is_llama_config", "rope_interleaved")
    bias = view.bool("attention_bias", False)
    attention = grouped_attention(view, trunk.hidden, heads=32, qkv_bias=bias, out_bias=bias)
    mlp = gated_mlp(view, 11_008, bias=view.bool("mlp_bias", False))
    block = Block(mixer=attention, ffn=mlp, norm=RMS_NORM)
    return assemble(view, trunk, (block,) * trunk.layers, norm=RMS_NORM)


def _granite(view: ConfigView) -> ModelShape:
    """Llama with constant multipliers on embeddings, branches and logits."""
    view.ignore("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
    shape = _llama(view)
    assert shape.embedding is not None and shape.head is not None
    block = replace(shape.blocks[0], branch_scaled=True)
    return replace(
        shape,
        blocks=(block,) * len(shape.blocks),
        embedding=replace(shape.embedding, scaled=True),
        head=replace(shape.head, scaled=True),
    )


def _mistral(view: ConfigView) -> ModelShape:
    """Every layer slides where `sliding_window` is set; absent means 4096, null means none."""
    trunk = read_trunk(view, vocab=32_000, positions=131_072, tied=False)
    window = view.maybe_int("sliding_window", 4096)
    attention = grouped_attention(view, trunk.hidden, heads=32, kv_heads=8, window=window)
    block = Block(mixer=attention, ffn=gated_mlp(view, 14_336), norm=RMS_NORM)
    return assemble(view, trunk, (block,) * trunk.layers, norm=RMS_NORM)


def _ministral(view: ConfigView) -> ModelShape:
    trunk = read_trunk(view, vocab=32_000, positions=131_072, tied=False)
    window = view.maybe_int("sliding_window", 4096)
    attention = grouped_attention(view, trunk.hidden, heads=32, kv_heads=8)
    mlp = gated_mlp(view, 14_336)
    kinds = window_kinds(view, trunk.layers, lambda layer: window is not None)
    blocks = blocks_by_kind(kinds, lambda kind: Block(mixer=windowed(attention, kind, window), ffn=mlp, norm=RMS_NORM))
    return assemble(view, trunk, blocks, norm=RMS_NORM)


def _ministral3(view: ConfigView) -> ModelShape:
    trunk = read_trunk(view, hidden=4096, layers=34, vocab=131_072, positions=262_144, tied=False)
    window = view.maybe_int("sliding_window", None)
    attention = grouped_attention(view, trunk.hidden, heads=32, kv_heads=8, head_dim=128, window=window)
    block = Block(mixer=attention, ffn=gated_mlp(view, 14_336), norm=RMS_NORM)
    return assemble(view, trunk, (block,) * trunk.layers, norm=RMS_NORM)


def upper_window(view: ConfigView) -> tuple[int | None, Callable[[int], bool]]:
    """The window of Qwen, and which layers slide: those from `max_window_layers` on, when it is switched on."""
    if not view.bool("use_sliding_window", False):
        view.ignore("sliding_window", "max_window_layers")
        return None, lambda layer: False
    window = view.maybe_int("sliding_window", 4096)
    first = view.int("max_window_layers", 28, minimum=0)
    return window, lambda layer: window is not None and layer >= first


def _qwen2(view: ConfigView) -> ModelShape:
    """Biases on q, k and v only."""
    trunk = read_trunk(view, vocab=151_936, positions=32_768, tied=False)
    window, slides = upper_window(view)
    attention = grouped_attention(view, trunk.hidden, heads=32, kv_heads=32, qkv_bias=True)
    mlp = gated_mlp(view, 22_016)
    blocks = blocks_by_kind(
        window_kinds(view, trunk.layers, slides),
        lambda kind: Block(mixer=windowed(attention, kind, window), ffn=mlp, norm=RMS_NORM),
    )
    return assemble(view, trunk, blocks, norm=RMS_NORM)


def _qwen3(view: ConfigView) -> ModelShape:
    """RMS norms over each query and key head, no biases unless asked for."""
    trunk = read_trunk(view, vocab=151_936, positions=32_768, tied=False)
    window, slides = upper_window(view)
    bias = view.bool("attention_bias", False)
    attention = grouped_attention(
        view, trunk.hidden, heads=32, kv_heads=32, head_dim=128, qkv_bias=bias, out_bias=bias, qk_norm=RMS_NORM
    )
    mlp = gated_mlp(view, 22_016)
    blocks = blocks_by_kind(
        window_kinds(view, trunk.layers, slides),
        lambda kind: Block(mixer=windowed(attention, kind, window), ffn=mlp, norm=RMS_NORM),
    )
    return assemble(view, trunk, blocks, norm=RMS_NORM)


def _smollm3(view: ConfigView) -> ModelShape:
    """Every fourth layer has no rotary positions; those may slide."""
    trunk = read_trunk(view, hidden=2048, layers=36, vocab=128_256, positions=32_768, tied=True)
    bias = view.bool("attention_bias", False)
    attention = grouped_attention(view, trunk.hidden, heads=16, kv_heads=4, qkv_bias=bias, out_bias=bias)
    mlp = gated_mlp(view, 11_008, bias=view.bool("mlp_bias", False))
    interval = view.int("no_rope_layer_interval", 4)
    rotates = view.ints("no_rope_layers", length=trunk.layers)  # 1 where the layer rotates, whatever the key says
    if rotates is None:
        rotates = [int((layer + 1) % interval != 0) for layer in range(trunk.layers)]
    size = view.maybe_int("sliding_window", None)
    window = size if view.bool("use_sliding_window", False) else None
    kinds = window_kinds(view, trunk.layers, lambda layer: window is not None and not rotates[layer])

    def make(kind: tuple[str, int]) -> Block:
        mixer = windowed(attention, kind[0], window)
        return Block(mixer=mixer if kind[1] else replace(mixer, rotary_dim=0), ffn=mlp, norm=RMS_NORM)

    return assemble(view, trunk, blocks_by_kind(list(zip(kinds, rotates, strict=True)), make), norm=RMS_NORM)


def _exaone4(view: ConfigView) -> ModelShape:
    """Norms after each branch only, norms over heads, three sliding layers to each full one.

    Full layers of a hybrid model do not rotate.
    """
    trunk = read_trunk(view, vocab=102_400, positions=2048, tied=False)
    window = view.maybe_int("sliding_window", 4096)
    pattern = view.int("sliding_window_pattern", 4) if window is not None else 0
    attention = grouped_attention(view, trunk.hidden, heads=32, kv_heads=32, qk_norm=RMS_NORM)
    mlp = gated_mlp(view, 16_384)

    def make(kind: str) -> Block:
        mixer = windowed(attention, kind, window)
        if window is not None and kind == FULL:
            mixer = replace(mixer, rotary_dim=0)
        return Block(
            mixer=mixer,
            ffn=mlp,
            norm=RMS_NORM,
            residual="post_only",
            norm_names=(),
            post_norm_names=("post_attention_layernorm", "post_feedforward_layernorm"),
        )

    kinds = window_kinds(view, trunk.layers, lambda layer: pattern > 0 and (layer + 1) % pattern != 0)
    return assemble(view, trunk, blocks_by_kind(kinds, make), norm=RMS_NORM)


def _glm(view: ConfigView) -> ModelShape:
    """Biases on q, k and v, half of each head rotated, gate and up in one matrix."""
    trunk = read_trunk(view, hidden=4096, layers=40, vocab=151_552, positions=131_072, tied=False)
    attention = grouped_attention(
        view,
        trunk.hidden,
        heads=32,
        kv_heads=2,
        head_dim=128,
        qkv_bias=view.bool("attention_bias", True),
        rotary=0.5,
    )
    mlp = replace(gated_mlp(view, 13_696), names=("mlp.gate_up_proj", "mlp.down_proj"))
    block = Block(mixer=attention, ffn=mlp, norm=RMS_NORM)
    if view.owner == "glm4":
        block = replace(block, residual="sandwich", post_norm_names=("post_self_attn_layernorm", "post_mlp_layernorm"))
    return assemble(view, trunk, (block,) * trunk.layers, norm=RMS_NORM)


def _internlm2(view: ConfigView) -> ModelShape:
    """Llama's sizes under the names of InternLM 2 (code in its repository, not in the library)."""
    trunk = read_trunk(view, vocab=103_168, positions=2048, tied=False)
    bias = view.bool("bias", True)
    attention = grouped_attention(
        view,
        trunk.hidden,
        heads=32,
        qkv_bias=bias,
        out_bias=bias,
        names=("attention.wqkv",),
        out_name="attention.wo",
    )
    mlp = replace(gated_mlp(view, 11_008), names=("feed_forward.w1", "feed_forward.w3", "feed_forward.w2"))
    block = Block(mixer=attention, ffn=mlp, norm=RMS_NORM, norm_names=("attention_norm", "ffn_norm"))
    return assemble(
        view,
        trunk,
        (block,) * trunk.layers,
        norm=RMS_NORM,
        embedding=Embedding(rows=trunk.vocab, size=trunk.hidden, name="model.tok_embeddings"),
        head=Head(rows=trunk.vocab, tied=trunk.tied, norm=RMS_NORM, name="output"),
    )


def _baichuan(view: ConfigView) -> ModelShape:
    """Llama's sizes with one matrix for q, k and v (code in its repository); the 13B uses linear position biases.

    The file does not say which: 7B has `max_position_embeddings`, 13B has `model_max_length` alone.
    """
    trunk = read_trunk(view, vocab=64_000, positions=None, tied=False)
    attention = grouped_attention(view, trunk.hidden, heads=32, names=("self_attn.W_pack",))
    if trunk.max_positions is None:
        attention = replace(attention, rotary_dim=0, position_bias="alibi")
        trunk = replace(trunk, max_positions=view.maybe_int("model_max_length", 4096))
    view.ignore("model_max_length", "z_loss_weight")
    mlp: Mlp = gated_mlp(view, 11_008)
    block = Block(mixer=attention, ffn=mlp, norm=RMS_NORM)
    return assemble(view, trunk, (block,) * trunk.layers, norm=RMS_NORM)


READERS = {
    "baichuan": _baichuan,
    "exaone4": _exaone4,
    "glm": _glm,
    "glm4": _glm,
    "granite": _granite,
    "internlm2": _internlm2,
    "llama": _llama,
    "ministral": _ministral,
    "ministral3": _ministral3,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "smollm3": _smollm3,
}
