"""OLMo: norms without weights in the first version, norms after the branches and over q and k from the second on."""

from __future__ import annotations

from planner.model.shape import Block, ModelShape, Norm
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import (
    FULL,
    RMS_NORM,
    assemble,
    blocks_by_kind,
    clamped,
    gated_mlp,
    grouped_attention,
    read_trunk,
    window_kinds,
    windowed,
)

__all__ = ["READERS"]


def _olmo(view: ConfigView) -> ModelShape:
    trunk = read_trunk(view, vocab=50_304, positions=2048, tied=False)
    bias = view.bool("attention_bias", False)
    norm = Norm(kind="layernorm", affine=False)
    attention = grouped_attention(view, trunk.hidden, heads=32, qkv_bias=bias, out_bias=bias)
    block = Block(mixer=attention, ffn=gated_mlp(view, 11_008), norm=norm)
    return assemble(view, trunk, (block,) * trunk.layers, norm=norm, uncovered=clamped(view))


def _olmo2(view: ConfigView) -> ModelShape:
    """OLMo 2, and OLMo 3, where three layers of four slide."""
    trunk = read_trunk(view, vocab=50_304, positions=2048, tied=False)
    bias = view.bool("attention_bias", False)
    attention = grouped_attention(
        view, trunk.hidden, heads=32, qkv_bias=bias, out_bias=bias, qk_norm=RMS_NORM, qk_norm_over="width"
    )
    mlp = gated_mlp(view, 11_008)
    kinds, window = [FULL] * trunk.layers, None
    if view.owner == "olmo3":
        window = view.maybe_int("sliding_window", 4096)
        kinds = window_kinds(view, trunk.layers, lambda layer: (layer + 1) % 4 != 0)
    blocks = blocks_by_kind(
        kinds,
        lambda kind: Block(
            mixer=windowed(attention, kind, window),
            ffn=mlp,
            residual="post_only",
            norm=RMS_NORM,
            norm_names=(),
            post_norm_names=("post_attention_layernorm", "post_feedforward_layernorm"),
        ),
    )
    return assemble(view, trunk, blocks, norm=RMS_NORM)


READERS = {"olmo": _olmo, "olmo2": _olmo2, "olmo3": _olmo2}
