"""What encoders and vision towers have in common: bidirectional attention, patches, labels, single parameters."""

from __future__ import annotations

from typing import Any

from planner.errors import ModelConfigError, nearest
from planner.model.shape import Attention, Component, Mlp, Weight, WeightKind
from planner.readers.config_view import ConfigView

__all__ = ["architecture", "bidirectional_attention", "labels", "parameter", "plain_mlp", "square_patches"]


def architecture(view: ConfigView, default: str, among: tuple[str, ...]) -> str:
    """The class that the config names first, `default` when it names none.

    Raises ModelConfigError for a class outside `among`: another head means other weights.
    """
    stated = view.strings("architectures")
    named = stated or [default]
    if not stated:
        view.assume(f"architectures={default}")
    if named[0] not in among:
        raise ModelConfigError(f"{view.owner} config: the class {named[0]} is not covered; {nearest(named[0], among)}")
    return named[0]


def labels(view: ConfigView) -> int:
    """How many classes a classifier tells apart: the length of `id2label`, else `num_labels`, else 2."""
    stated = len(view.sub("id2label").keys())
    return stated or view.int("num_labels", 2)


def bidirectional_attention(
    view: ConfigView, hidden: int, heads: int, *, bias: bool = True, rotary: bool = False, **rest: Any
) -> Attention:
    """Multi-head attention in both directions with heads of size H/A; `bias` is on all four projections."""
    if hidden % heads:
        raise ModelConfigError(f"{view.owner} config: hidden size {hidden} is not a multiple of {heads} heads.")
    given: dict[str, Any] = {"q_bias": bias, "k_bias": bias, "v_bias": bias, "out_bias": bias, "causal": False}
    size = hidden // heads
    return Attention(heads=heads, kv_heads=heads, head_dim=size, rotary_dim=size if rotary else 0, **(given | rest))


def plain_mlp(width: int, activation: str, names: tuple[str, str], *, dropout: float = 0.0) -> Mlp:
    """Up, activation, down, with biases."""
    return Mlp(
        width=width,
        gated=False,
        activation=activation,
        names=names,
        up_bias=True,
        down_bias=True,
        dropout=dropout,
    )


def square_patches(view: ConfigView, *, image: int, patch: int) -> tuple[int, int]:
    """(number of patches of one image, patch side in pixels); the keyword values are the class defaults.

    A remainder at the border is dropped, as a convolution of stride `patch_size` does.
    """
    image_size, patch_size = view.int("image_size", image), view.int("patch_size", patch)
    if patch_size > image_size:
        raise ModelConfigError(
            f"{view.owner} config: a patch of {patch_size} pixels does not fit into an image of {image_size}."
        )
    return (image_size // patch_size) ** 2, patch_size


def parameter(name: str, *shape: int, kind: WeightKind = "other", component: Component = "vision_or_audio") -> Weight:
    """One tensor that belongs to no layer kind: a class token, a position table, a gate."""
    return Weight(name=name, shape=shape, component=component, kind=kind)
