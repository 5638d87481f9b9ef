"""LLaVA: the patches of a vision transformer, through a two-layer projector, into a text decoder.

Liu et al. 2023 (arXiv:2304.08485, arXiv:2310.03744 for 1.5).
"""

from __future__ import annotations

from dataclasses import replace

from planner.ledger.weights.linear import linear_weights
from planner.model.shape import ModelShape, Weight
from planner.readers.config_view import ConfigView
from planner.readers.families.multimodal import text_decoder, vision_tower, with_towers

__all__ = ["READERS", "feature_layers", "two_layer_projector"]


def feature_layers(view: ConfigView) -> int:
    """From how many layers of the tower the projector reads: one, unless `vision_feature_layer` is a list."""
    return view.length("vision_feature_layer") or 1


def two_layer_projector(path: str, into: int, out: int, *, bias: bool) -> tuple[Weight, ...]:
    """`linear_1` from the tower to the decoder's width, and `linear_2` within it."""
    first = linear_weights(f"{path}.linear_1", out, into, bias=bias, component="vision_or_audio")
    return first + linear_weights(f"{path}.linear_2", out, out, bias=bias, component="vision_or_audio")


def _llava(view: ConfigView) -> ModelShape:
    """LLaVA 1.5, and Pixtral-12B, which is published under the same type."""
    text = text_decoder(view, "llama")
    tower = vision_tower(view, "clip_vision_model", "model.vision_tower")
    projector = two_layer_projector(
        "model.multi_modal_projector",
        tower.hidden * feature_layers(view),
        text.hidden,
        bias=view.bool("multimodal_projector_bias", True),
    )
    view.ignore("image_seq_length", "projector_hidden_act", "vision_feature_select_strategy")
    return with_towers(
        view,
        text,
        towers=(replace(tower, extra=tower.extra + projector),),
        uncovered=("patch embedding of the image", "projector from the vision tower"),
        tied=False,
    )


READERS = {"llava": _llava}
