"""Llama models that Nvidia pruned by architecture search: every block has its own attention and width, or none.

Code in the repositories (DeciLM), not in the library; the widths are read as that code computes them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from planner.errors import ModelConfigError
from planner.model.shape import Block, Mlp, ModelShape
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import (
    RMS_NORM,
    assemble,
    blocks_by_kind,
    check_heads,
    grouped_attention,
    read_trunk,
)

__all__ = ["READERS"]

_WIDTH_MULTIPLE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """What tells one block from another: key/value heads and feed-forward width, None where the part is missing."""

    kv_heads: int | None
    width: int | None


def _read_kind(view: ConfigView, hidden: int, heads: int) -> _Kind:
    """One entry of `block_configs`; the width is 2/3 of the multiple of H, rounded up to 256."""
    attention, ffn = view.sub("attention"), view.sub("ffn")
    for part in (attention, ffn):
        if part.bool("replace_with_linear", False):
            raise part.fail("replace_with_linear", "false, the only form described here")
        part.ignore("sparsify", "num_sink_tokens", "unshifted_sink", "use_prefill_window_in_sink_attention")
    kv_heads = width = None
    if not attention.bool("no_op", False):
        attention.ignore("window_length")
        kv_heads = heads // attention.int("n_heads_in_group", maximum=heads)
        check_heads(view, heads, kv_heads)
    if not ffn.bool("no_op", False):
        wide = int(2 * ffn.float("ffn_mult", maximum=1000.0) * hidden / 3)
        width = -(-wide // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
    if kv_heads is None and width is None:
        raise ModelConfigError(f"{view.owner} config: a block without attention and without feed-forward.")
    return _Kind(kv_heads=kv_heads, width=width)


def _nemotron_nas(view: ConfigView) -> ModelShape:
    trunk = read_trunk(view, vocab=128_256, positions=131_072, tied=False)
    bias, mlp_bias = view.bool("attention_bias", False), view.bool("mlp_bias", False)
    view.ignore("intermediate_size", "num_key_value_heads")
    attention = grouped_attention(view, trunk.hidden, qkv_bias=bias, out_bias=bias)
    activation = view.str("hidden_act", "silu")
    kinds = [_read_kind(block, trunk.hidden, attention.heads) for block in view.subs("block_configs", trunk.layers)]

    def make(kind: _Kind) -> Block:
        mixer = None if kind.kv_heads is None else replace(attention, kv_heads=kind.kv_heads)
        ffn = None
        if kind.width is not None:
            ffn = Mlp(width=kind.width, gated=True, activation=activation, up_bias=mlp_bias, down_bias=mlp_bias)
        if mixer is not None and ffn is not None:
            return Block(mixer=mixer, ffn=ffn, norm=RMS_NORM)
        name = "post_attention_layernorm" if mixer is None else "input_layernorm"
        return Block(mixer=mixer, ffn=ffn, norm=RMS_NORM, residual="single", norm_names=(name,))

    return assemble(view, trunk, blocks_by_kind(kinds, make), norm=RMS_NORM)


READERS = {"nemotron-nas": _nemotron_nas}
