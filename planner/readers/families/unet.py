"""The U-Net of Stable Diffusion: convolutions with skip connections, and transformers at the lower resolutions.

Rombach et al. 2021 (arXiv:2112.10752), Podell et al. 2023 for SDXL (arXiv:2307.01952). The config is the one of
`UNet2DConditionModel` of diffusers. Nothing in it follows a kind that the ledger describes, so it is given as weights
alone. Text encoders and the autoencoder are models of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from planner.errors import ModelConfigError
from planner.ledger.weights.convolution import convolution_weights
from planner.ledger.weights.linear import linear_weights
from planner.ledger.weights.norm import norm_weights
from planner.model.shape import Component, ModelShape, Weight
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import LAYER_NORM, MOST_LAYERS

__all__ = ["READERS"]

_PLAIN_DOWN, _CROSS_DOWN = "DownBlock2D", "CrossAttnDownBlock2D"
_PLAIN_UP, _CROSS_UP = "UpBlock2D", "CrossAttnUpBlock2D"
_MLP_RATIO: Final = 4
# Options of the class that add or replace tensors, with the value that SD 1.x, 2.x and SDXL leave them at.
_FIXED: Final = {
    "addition_embed_type_num_heads": 64,
    "attention_type": "default",
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What all levels share."""

    channels: tuple[int, ...]
    resnets: int
    depths: tuple[int, ...]  # transformer blocks in one attention, for each level
    time: int
    context: int  # width of the text that is attended to
    linear: bool  # linear layers instead of 1 x 1 convolutions around the transformers


def _convolution(name: str, out: int, into: int, size: int = 3) -> tuple[Weight, ...]:
    return convolution_weights(name, out, into, (size, size), bias=True, component="other")


def _resnet(path: str, out: int, into: int, time: int) -> Iterator[Weight]:
    """Two 3 x 3 convolutions with the timestep added between them; a 1 x 1 shortcut where the width changes."""
    yield from norm_weights(LAYER_NORM, f"{path}.norm1", into)
    yield from _convolution(f"{path}.conv1", out, into)
    yield from linear_weights(f"{path}.time_emb_proj", out, time, bias=True, component="other")
    yield from norm_weights(LAYER_NORM, f"{path}.norm2", out)
    yield from _convolution(f"{path}.conv2", out, out)
    if into != out:
        yield from _convolution(f"{path}.conv_shortcut", out, into, 1)


def _projection(name: str, width: int, *, linear: bool) -> tuple[Weight, ...]:
    if linear:
        return linear_weights(name, width, width, bias=True, component="attention")
    return _convolution(name, width, width, 1)


def _attention(path: str, width: int, context: int) -> Iterator[Weight]:
    part: Component = "attention"
    yield from linear_weights(f"{path}.to_q", width, width, bias=False, component=part)
    yield from linear_weights(f"{path}.to_k", width, context, bias=False, component=part)
    yield from linear_weights(f"{path}.to_v", width, context, bias=False, component=part)
    yield from linear_weights(f"{path}.to_out.0", width, width, bias=True, component=part)


def _transformer(path: str, width: int, depth: int, plan: _Plan) -> Iterator[Weight]:
    """Self-attention, attention to the text, and a gated feed-forward layer, `depth` times."""
    yield from norm_weights(LAYER_NORM, f"{path}.norm", width)
    yield from _projection(f"{path}.proj_in", width, linear=plan.linear)
    for index in range(depth):
        block = f"{path}.transformer_blocks.{index}"
        for name in ("norm1", "norm2", "norm3"):
            yield from norm_weights(LAYER_NORM, f"{block}.{name}", width)
        yield from _attention(f"{block}.attn1", width, width)
        yield from _attention(f"{block}.attn2", width, plan.context)
        inner = _MLP_RATIO * width
        yield from linear_weights(f"{block}.ff.net.0.proj", 2 * inner, width, bias=True, component="mlp_dense")
        yield from linear_weights(f"{block}.ff.net.2", width, inner, bias=True, component="mlp_dense")
    yield from _projection(f"{path}.proj_out", width, linear=plan.linear)


def _down(plan: _Plan, kinds: list[str]) -> Iterator[Weight]:
    """Each level: residual layers, transformers where its kind has them, and a strided convolution but for the last."""
    into = plan.channels[0]
    for level, (kind, out) in enumerate(zip(kinds, plan.channels, strict=True)):
        path = f"down_blocks.{level}"
        for index in range(plan.resnets):
            yield from _resnet(f"{path}.resnets.{index}", out, into if index == 0 else out, plan.time)
            if kind == _CROSS_DOWN:
                yield from _transformer(f"{path}.attentions.{index}", out, plan.depths[level], plan)
        if level < len(kinds) - 1:
            yield from _convolution(f"{path}.downsamplers.0.conv", out, out)
        into = out


def _middle(plan: _Plan) -> Iterator[Weight]:
    width = plan.channels[-1]
    yield from _resnet("mid_block.resnets.0", width, width, plan.time)
    yield from _transformer("mid_block.attentions.0", width, plan.depths[-1], plan)
    yield from _resnet("mid_block.resnets.1", width, width, plan.time)


def _up(plan: _Plan, kinds: list[str]) -> Iterator[Weight]:
    """The levels backwards, with one residual layer more; each layer also reads one saved output of the way down."""
    channels, depths = plan.channels[::-1], plan.depths[::-1]
    before = channels[0]
    for level, (kind, out) in enumerate(zip(kinds, channels, strict=True)):
        path = f"up_blocks.{level}"
        below = channels[min(level + 1, len(channels) - 1)]
        for index in range(plan.resnets + 1):
            skip = below if index == plan.resnets else out
            stream = before if index == 0 else out
            yield from _resnet(f"{path}.resnets.{index}", out, stream + skip, plan.time)
            if kind == _CROSS_UP:
                yield from _transformer(f"{path}.attentions.{index}", out, depths[level], plan)
        if level < len(kinds) - 1:
            yield from _convolution(f"{path}.upsamplers.0.conv", out, out)
        before = out


def _levels(view: ConfigView, key: str, default: list[str]) -> list[str]:
    """The kinds of the levels."""
    among = (_PLAIN_DOWN, _CROSS_DOWN, _PLAIN_UP, _CROSS_UP)
    return view.strings(key, length=view.length(key), among=among) or default


def _depths(view: ConfigView, levels: int) -> tuple[int, ...]:
    """`transformer_layers_per_block`: one number for all levels, or one for each."""
    key = "transformer_layers_per_block"
    if view.length(key) is None:
        return (view.int(key, 1),) * levels
    return tuple(view.ints(key, length=levels, minimum=1) or ())


def _refuse(view: ConfigView) -> None:
    """Raise for options that add tensors not described here."""
    for key, usual in _FIXED.items():
        if view.has(key) and not view.equals(key, usual):
            raise view.fail(key, f"{'null' if usual is None else repr(usual)}; other values are not covered")
    view.ignore("act_fn", "attention_head_dim", "num_attention_heads", "sample_size", "center_input_sample", "dropout")
    view.ignore("downsample_padding", "flip_sin_to_cos", "freq_shift", "mid_block_scale_factor", "norm_num_groups")
    view.ignore("resnet_out_scale_factor", "upcast_attention", "norm_eps")


def _unet(view: ConfigView) -> ModelShape:
    """SD 1.x, SD 2.x and SDXL."""
    channels = tuple(view.ints("block_out_channels", minimum=1) or (320, 640, 1280, 1280))
    levels = len(channels)
    if levels < 2 or levels > MOST_LAYERS:
        raise ModelConfigError(f'{view.owner} config: "block_out_channels" needs two levels or more.')
    down = _levels(view, "down_block_types", [_CROSS_DOWN] * (levels - 1) + [_PLAIN_DOWN])
    up = _levels(view, "up_block_types", [_PLAIN_UP] + [_CROSS_UP] * (levels - 1))
    if not len(down) == len(up) == levels:
        raise ModelConfigError(
            f"{view.owner} config: {levels} block_out_channels, {len(down)} down_block_types and {len(up)} "
            "up_block_types need to be as many."
        )
    plan = _Plan(
        channels=channels,
        resnets=view.int("layers_per_block", 2, maximum=MOST_LAYERS),
        depths=_depths(view, levels),
        time=4 * channels[0],
        context=view.int("cross_attention_dim", 1280),
        linear=view.bool("use_linear_projection", False),
    )
    _refuse(view)
    weights = list(_convolution("conv_in", channels[0], view.int("in_channels", 4)))
    weights += linear_weights("time_embedding.linear_1", plan.time, channels[0], bias=True, component="other")
    weights += linear_weights("time_embedding.linear_2", plan.time, plan.time, bias=True, component="other")
    if view.str("addition_embed_type", "", among=("", "text_time")):
        into = view.int("projection_class_embeddings_input_dim")
        view.ignore("addition_time_embed_dim")
        weights += linear_weights("add_embedding.linear_1", plan.time, into, bias=True, component="other")
        weights += linear_weights("add_embedding.linear_2", plan.time, plan.time, bias=True, component="other")
    weights += [*_down(plan, down), *_middle(plan), *_up(plan, up)]
    weights += norm_weights(LAYER_NORM, "conv_norm_out", channels[0])
    weights += _convolution("conv_out", view.int("out_channels", 4), channels[0])
    return ModelShape(
        name="",
        model_type=view.owner,
        hidden=channels[0],
        blocks=(),
        embedding=None,
        head=None,
        extra=tuple(weights),
        uncovered=("activations of the whole U-Net",),
    )


READERS = {"UNet2DConditionModel": _unet}
