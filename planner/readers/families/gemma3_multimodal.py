"""Gemma 3 with images: SigLIP's tower, pooled to 256 tokens an image, and the text decoder of Gemma 3.

Gemma Team 2025 (arXiv:2503.19786).
"""

from __future__ import annotations

from dataclasses import replace

from planner.ledger.weights.norm import norm_weights
from planner.model.shape import ModelShape, Norm
from planner.readers.config_view import ConfigView
from planner.readers.families.encoder import parameter
from planner.readers.families.multimodal import text_decoder, vision_tower, with_towers

__all__ = ["READERS"]


def _gemma3(view: ConfigView) -> ModelShape:
    """The projection is a bare matrix, no linear layer, so adapters cannot be attached to it."""
    text = text_decoder(view, "gemma3_text")
    tower = vision_tower(view, "siglip_vision_model", "model.vision_tower")
    path = "model.multi_modal_projector"
    projector = (
        parameter(f"{path}.mm_input_projection_weight", tower.hidden, text.hidden),
        *norm_weights(Norm(kind="rmsnorm_1p"), f"{path}.mm_soft_emb_norm", tower.hidden),
    )
    view.ignore("mm_tokens_per_image")
    return with_towers(
        view,
        text,
        towers=(replace(tower, extra=tower.extra + projector),),
        uncovered=("patch embedding of the image", "pooling and projection of image tokens"),
        tied=True,
    )


READERS = {"gemma3": _gemma3}
