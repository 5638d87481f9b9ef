"""Mistral 3: Pixtral's tower, a merger of neighbouring patches, and the text decoder of Mistral or Ministral 3."""

from __future__ import annotations

from dataclasses import replace

from planner.ledger.weights.linear import linear_weights
from planner.ledger.weights.norm import norm_weights
from planner.model.shape import ModelShape
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import RMS_NORM
from planner.readers.families.llava import feature_layers, two_layer_projector
from planner.readers.families.multimodal import text_decoder, vision_tower, with_towers

__all__ = ["READERS"]


def _mistral3(view: ConfigView) -> ModelShape:
    text = text_decoder(view, "mistral")
    tower = vision_tower(view, "pixtral", "model.vision_tower")
    merged = tower.hidden * view.int("spatial_merge_size", 2) ** 2
    path = "model.multi_modal_projector"
    bias = view.bool("multimodal_projector_bias", False)
    projector = (
        *norm_weights(RMS_NORM, f"{path}.norm", tower.hidden),
        *linear_weights(
            f"{path}.patch_merger.merging_layer", tower.hidden, merged, bias=False, component="vision_or_audio"
        ),
        *two_layer_projector(path, tower.hidden * feature_layers(view), text.hidden, bias=bias),
    )
    view.ignore("projector_hidden_act")
    return with_towers(
        view,
        text,
        towers=(replace(tower, extra=tower.extra + projector),),
        uncovered=("patch embedding of the image", "patch merger and projector"),
        tied=True,
    )


READERS = {"mistral3": _mistral3}
