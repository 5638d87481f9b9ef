"""FLUX.1: image and text tokens in joint blocks, then in one stream (Black Forest Labs 2024).

The config is the one of `FluxTransformer2DModel` of diffusers. Its blocks follow no kind that the ledger describes, so
they are given as weights alone. Text encoders (T5-XXL, CLIP-L) and the autoencoder are models of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from planner.ledger.weights.linear import linear_weights
from planner.ledger.weights.norm import norm_weights
from planner.model.shape import Component, ModelShape, Weight
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import MOST_LAYERS, RMS_NORM

__all__ = ["READERS"]

_FREQUENCIES: Final = 256  # sinusoids of the embedders of timestep and guidance
_MLP_RATIO: Final = 4


def _linear(name: str, out: int, into: int, component: Component = "other") -> tuple[Weight, ...]:
    return linear_weights(name, out, into, bias=True, component=component)


def _embedder(name: str, into: int, hidden: int) -> tuple[Weight, ...]:
    """Two layers that bring a condition to the model's width."""
    return _linear(f"{name}.linear_1", hidden, into) + _linear(f"{name}.linear_2", hidden, hidden)


def _joint_block(path: str, hidden: int, head_dim: int) -> Iterator[Weight]:
    """Image and text tokens each have projections, norms and a feed-forward layer; attention sees both."""
    for norm in ("norm1", "norm1_context"):
        yield from _linear(f"{path}.{norm}.linear", 6 * hidden, hidden)
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        yield from norm_weights(RMS_NORM, f"{path}.attn.{name}", head_dim)
    names = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    for name in names:
        yield from _linear(f"{path}.attn.{name}", hidden, hidden, "attention")
    for name in ("ff", "ff_context"):
        yield from _linear(f"{path}.{name}.net.0.proj", _MLP_RATIO * hidden, hidden, "mlp_dense")
        yield from _linear(f"{path}.{name}.net.2", hidden, _MLP_RATIO * hidden, "mlp_dense")


def _single_block(path: str, hidden: int, head_dim: int) -> Iterator[Weight]:
    """One stream: attention and feed-forward in parallel, with one output projection for both."""
    yield from _linear(f"{path}.norm.linear", 3 * hidden, hidden)
    yield from _linear(f"{path}.proj_mlp", _MLP_RATIO * hidden, hidden, "mlp_dense")
    yield from _linear(f"{path}.proj_out", hidden, (1 + _MLP_RATIO) * hidden, "mlp_dense")
    for name in ("norm_q", "norm_k"):
        yield from norm_weights(RMS_NORM, f"{path}.attn.{name}", head_dim)
    for name in ("to_q", "to_k", "to_v"):
        yield from _linear(f"{path}.attn.{name}", hidden, hidden, "attention")


def _flux(view: ConfigView) -> ModelShape:
    """FLUX.1-dev has `guidance_embeds: true`, FLUX.1-schnell false."""
    head_dim, heads = view.int("attention_head_dim", 128), view.int("num_attention_heads", 24)
    hidden, channels, side = head_dim * heads, view.int("in_channels", 64), view.int("patch_size", 1)
    conditions = {"timestep_embedder": _FREQUENCIES, "text_embedder": view.int("pooled_projection_dim", 768)}
    if view.bool("guidance_embeds", False):
        conditions["guidance_embedder"] = _FREQUENCIES
    view.ignore("axes_dims_rope")
    weights: list[Weight] = []
    for name, into in conditions.items():
        weights += _embedder(f"time_text_embed.{name}", into, hidden)
    weights += _linear("context_embedder", hidden, view.int("joint_attention_dim", 4096), "embed_in")
    weights += _linear("x_embedder", hidden, channels, "embed_in")
    for layer in range(view.int("num_layers", 19, maximum=MOST_LAYERS)):
        weights += _joint_block(f"transformer_blocks.{layer}", hidden, head_dim)
    for layer in range(view.int("num_single_layers", 38, maximum=MOST_LAYERS)):
        weights += _single_block(f"single_transformer_blocks.{layer}", hidden, head_dim)
    weights += _linear("norm_out.linear", 2 * hidden, hidden)
    weights += _linear("proj_out", side * side * (view.maybe_int("out_channels") or channels), hidden)
    return ModelShape(
        name="",
        model_type=view.owner,
        hidden=hidden,
        blocks=(),
        embedding=None,
        head=None,
        extra=tuple(weights),
        uncovered=("activations of every block of FLUX",),
    )


READERS = {"FluxTransformer2DModel": _flux}
