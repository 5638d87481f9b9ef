"""Attention masks: when the library makes one, of what shape and format, and who shares it.

Letters: B batch, S sequence.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from planner.errors import NotCovered
from planner.ledger.operations import Operations
from planner.ledger.tape import Tensor
from planner.model.shape import Attention, ModelShape

__all__ = ["eager_mask", "mask_for", "reaches", "shared_masks"]

_COUNTS_ONE_SIDE = frozenset({"modernbert"})  # skip the mask only for sequences within one side of the window


def reaches(t: Operations, sequence: str, window: int | None) -> bool:
    """Whether a window of this many tokens cuts anything off, so that a mask is made for it.

    Raises NotCovered for a grid of sequence lengths on both sides of the window: they run different kernels.
    """
    if window is None:
        return False
    reached: Any = np.asarray(t.sizes[sequence]) >= window
    if reached.all() != reached.any():
        raise NotCovered(f"sequence lengths below and above the window of {window} tokens need a grid each.")
    return bool(reached.all())


def shared_masks(t: Operations, shape: ModelShape, dtype: str) -> None:
    """Make the masks that the model hands to its blocks (masking_utils.py), before the first block runs.

    eager: an additive mask, (B, 1, S, S), for each kind of layer. sdpa: none where the kernel's own causal form will
    do, else a boolean one, (1, 1, S, S). flash: none.
    """
    t.module = "mask"
    if t.family in _COUNTS_ONE_SIDE:  # its blocks are not given the positions
        t.model_locals.append(t.constant("position_ids", ("1", "S"), "int64").storage)
    else:
        t.shared("position_ids", ("1", "S"), "int64")
    for block in dict.fromkeys(shape.blocks):
        if isinstance(block.mixer, Attention):
            if t.family in ("bloom", "falcon") and block.mixer.position_bias == "alibi":
                t.shared("alibi", ("B", t.dim("A", block.mixer.heads), "1", "S"), dtype)
                if t.family == "falcon":  # makes rotary tables all the same
                    for name in ("cos", "sin"):
                        t.shared(name, ("1", "S", t.dim("D", block.mixer.head_dim)), dtype)
            if t.family != "mpt":
                mask_for(t, block.mixer, "S", "v+S" if t.method.name == "prefix" else "S", dtype)
            else:
                t.shared("alibi", (t.dim("A", block.mixer.heads), "1", t.dim("positions", t.positions)), "fp32")
                t.shared("boolean mask", ("B", "1", "S", "S"), "bool")


def mask_for(t: Operations, spec: Attention, queries: str, keys: str, dtype: str) -> Tensor | None:
    window = spec.window // 2 if spec.window and t.family in _COUNTS_ONE_SIDE else spec.window
    window = window if reaches(t, keys, window) and t.family != "gpt_neo" else None
    if t.family == "falcon":
        return _falcon_mask(t, spec, keys, dtype)
    if t.attention == "flash" or spec.cross or (not spec.causal and window is None):
        return None
    if t.attention != "eager" and window is None and keys == queries:
        return None  # square: the kernel's own causal form will do
    name = (t.attention, f"{window} {queries} {keys}")
    known = t.masks.get(name)
    if known is None:
        square = ("1", "1", queries, keys)
        if t.attention == "eager":
            made = t.apply("mask", [], [(("B", "1", queries, keys), dtype)], scratch=[(square, "bool")] * 2)
        else:
            made = t.apply("mask", [], [(square, "bool")], scratch=[(square, "bool")] * 2)
        known = t.masks[name] = made[0]
    return known


def _falcon_mask(t: Operations, spec: Attention, keys: str, dtype: str) -> Tensor | None:
    """Falcon makes its mask whatever the kernel, boolean, or with position biases (B, A, S, S) in it."""
    if t.attention == "flash":
        return None
    if spec.position_bias == "alibi":
        return t.shared("alibi mask", ("B", t.dim("A", spec.heads), keys, keys), dtype)
    return t.shared("causal mask", ("1", "1", keys, keys), "bool")


def eager_mask(t: Operations, spec: Attention, sequence: str, dtype: str) -> Tensor:
    """The additive mask of eager attention, (B, 1, S, S)."""
    mask = mask_for(t, spec, sequence, sequence, dtype)
    assert mask is not None
    return mask


# ---- the core -------------------------------------------------------------------------------------------------
