"""The vision towers of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5, with the mergers that shorten their output.

Wang et al. 2024 (arXiv:2409.12191), Bai et al. 2025 (arXiv:2502.13923).
Images keep their own size, so the number of patches is left to the plan.
"""

from __future__ import annotations

from dataclasses import replace

from planner.errors import ModelConfigError
from planner.ledger.weights.convolution import convolution_weights
from planner.ledger.weights.linear import linear_weights
from planner.ledger.weights.norm import norm_weights
from planner.model.shape import Attention, Block, Mlp, Norm, Tower, Weight
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import LAYER_NORM, MOST_LAYERS, RMS_NORM
from planner.readers.families.encoder import bidirectional_attention, parameter, plain_mlp

__all__ = ["qwen2_5_vision_tower", "qwen2_vision_tower", "qwen3_vision_tower"]

_NORMS = ("norm1", "norm2")


def _attention(view: ConfigView, hidden: int) -> Attention:
    heads = view.int("num_heads", 16)
    return bidirectional_attention(view, hidden, heads, rotary=True, names=("attn.qkv",), out_name="attn.proj")


def _patches(view: ConfigView, path: str, hidden: int, side: int, *, bias: bool) -> tuple[Weight, ...]:
    """A convolution over `temporal_patch_size` frames of one patch each."""
    kernel = (view.int("temporal_patch_size", 2), side, side)
    channels = view.int("in_channels", 3, also=("in_chans",))
    name = f"{path}.patch_embed.proj"
    return convolution_weights(name, hidden, channels, kernel, bias=bias, component="vision_or_audio")


def _merger(path: str, norm: Norm, hidden: int, merged: int, out: int) -> tuple[Weight, ...]:
    """Qwen2: a norm on each patch, then two layers on the patches of one square together."""
    return (
        *norm_weights(norm, f"{path}.ln_q", hidden),
        *linear_weights(f"{path}.mlp.0", merged, merged, bias=True, component="vision_or_audio"),
        *linear_weights(f"{path}.mlp.2", out, merged, bias=True, component="vision_or_audio"),
    )


def _merger_3(path: str, hidden: int, merged: int, out: int) -> tuple[Weight, ...]:
    """Qwen3: the same under other names; `hidden` is the width that the norm sees."""
    return (
        *norm_weights(LAYER_NORM, f"{path}.norm", hidden),
        *linear_weights(f"{path}.linear_fc1", merged, merged, bias=True, component="vision_or_audio"),
        *linear_weights(f"{path}.linear_fc2", out, merged, bias=True, component="vision_or_audio"),
    )


def _merge_area(view: ConfigView) -> int:
    """How many patches become one token."""
    return view.int("spatial_merge_size", 2) ** 2


def qwen2_vision_tower(view: ConfigView, path: str) -> Tower:
    """Qwen2-VL: CLIP's block with one matrix for q, k and v, and rotary positions. `hidden_size` is the output."""
    hidden, side = view.int("embed_dim", 1280), view.int("patch_size", 14)
    out = view.int("hidden_size", 3584)
    ratio = view.float("mlp_ratio", 4.0)
    view.ignore("spatial_patch_size", "in_chans")
    mlp = plain_mlp(int(hidden * ratio), view.str("hidden_act", "quick_gelu"), ("mlp.fc1", "mlp.fc2"))
    block = Block(mixer=_attention(view, hidden), ffn=mlp, norm=LAYER_NORM, norm_names=_NORMS)
    merger = _merger(f"{path}.merger", LAYER_NORM, hidden, hidden * _merge_area(view), out)
    return Tower(
        name=f"{path}.blocks",
        role="vision",
        hidden=hidden,
        blocks=(block,) * view.int("depth", 32, maximum=MOST_LAYERS),
        extra=_patches(view, path, hidden, side, bias=False) + merger,
    )


def qwen2_5_vision_tower(view: ConfigView, path: str) -> Tower:
    """Qwen2.5-VL: RMS norms, a gated feed-forward layer, and attention within windows in all but a few layers.

    A window of `window_size` pixels square holds (window_size / patch_size)^2 patches, which attend to each other.
    """
    hidden, side = view.int("hidden_size", 1280), view.int("patch_size", 14)
    depth = view.int("depth", 32, maximum=MOST_LAYERS)
    full = view.ints("fullatt_block_indexes") or [7, 15, 23, 31]
    chunk = (view.int("window_size", 112) // side) ** 2
    view.ignore("tokens_per_second", "spatial_patch_size")
    mlp = Mlp(
        width=view.int("intermediate_size", 3420),
        gated=True,
        activation=view.str("hidden_act", "silu"),
        up_bias=True,
        down_bias=True,
    )
    whole = _attention(view, hidden)
    everywhere = Block(mixer=whole, ffn=mlp, norm=RMS_NORM, norm_names=_NORMS)
    within = replace(everywhere, mixer=replace(whole, chunk=chunk))
    out = view.int("out_hidden_size", 3584)
    merger = _merger(f"{path}.merger", RMS_NORM, hidden, hidden * _merge_area(view), out)
    return Tower(
        name=f"{path}.blocks",
        role="vision",
        hidden=hidden,
        blocks=tuple(everywhere if layer in full else within for layer in range(depth)),
        extra=_patches(view, path, hidden, side, bias=False) + merger,
    )


def qwen3_vision_tower(view: ConfigView, path: str, *, deepstack: bool) -> Tower:
    """Qwen3-VL and Qwen3.5: learned positions beside rotary ones; `deepstack` allows mergers at inner layers.

    Each inner merger's output is added to the text stream at one of the first decoder layers.
    """
    hidden, side = view.int("hidden_size", 1152), view.int("patch_size", 16)
    depth = view.int("depth", 27, maximum=MOST_LAYERS)
    out, merged = view.int("out_hidden_size", 3584), hidden * _merge_area(view)
    names = ("mlp.linear_fc1", "mlp.linear_fc2")
    mlp = plain_mlp(view.int("intermediate_size", 4304), view.str("hidden_act", "gelu_pytorch_tanh"), names)
    block = Block(mixer=_attention(view, hidden), ffn=mlp, norm=LAYER_NORM, norm_names=_NORMS)
    stated = view.ints("deepstack_visual_indexes")
    taps = ([8, 16, 24] if stated is None else stated) if deepstack else []
    if any(tap >= depth for tap in taps):
        raise ModelConfigError(f'{view.owner} config: "deepstack_visual_indexes" {taps} exceed depth {depth}.')
    extra = _patches(view, path, hidden, side, bias=True)
    rows = view.int("num_position_embeddings", 2304)
    extra += (parameter(f"{path}.pos_embed.weight", rows, hidden, kind="embedding"),)
    extra += _merger_3(f"{path}.merger", hidden, merged, out)
    for index in range(len(taps)):
        extra += _merger_3(f"{path}.deepstack_merger_list.{index}", merged, merged, out)
    return Tower(name=f"{path}.blocks", role="vision", hidden=hidden, blocks=(block,) * depth, extra=extra)
