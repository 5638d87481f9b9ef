"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: the text decoders of Qwen2 and Qwen3 with a vision tower beside them."""

from __future__ import annotations

from planner.model.shape import ModelShape
from planner.readers.config_view import ConfigView
from planner.readers.families.multimodal import text_decoder, with_towers
from planner.readers.families.qwen_vision import qwen2_5_vision_tower, qwen2_vision_tower, qwen3_vision_tower

__all__ = ["READERS"]

_SAME_AS = {
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
_UNCOVERED = ("patch embedding of the image", "patch merger")


def _qwen2_vl(view: ConfigView) -> ModelShape:
    """The published configs are flat: the text part stands at the top level."""
    tower = qwen2_vision_tower(view.sub("vision_config", "qwen2_vl_vision"), "model.visual")
    text = text_decoder(view, "qwen2_vl_text", _SAME_AS)
    return with_towers(view, text, towers=(tower,), uncovered=_UNCOVERED, tied=False)


def _qwen2_5_vl(view: ConfigView) -> ModelShape:
    tower = qwen2_5_vision_tower(view.sub("vision_config", "qwen2_5_vl_vision"), "model.visual")
    text = text_decoder(view, "qwen2_5_vl_text", _SAME_AS)
    return with_towers(view, text, towers=(tower,), uncovered=_UNCOVERED, tied=False)


def _qwen3_vl(view: ConfigView) -> ModelShape:
    """Dense, or with routed experts (`qwen3_vl_moe`)."""
    tower = qwen3_vision_tower(view.sub("vision_config", f"{view.owner}_vision"), "model.visual", deepstack=True)
    text = text_decoder(view, f"{view.owner}_text", _SAME_AS)
    uncovered = (*_UNCOVERED, "deepstack features added to the first decoder layers")
    return with_towers(view, text, towers=(tower,), uncovered=uncovered, tied=False)


READERS = {
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen2_vl": _qwen2_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": _qwen3_vl,
}
