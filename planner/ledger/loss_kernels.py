"""The output projection and the loss by themselves, as kernel benchmarks measure them.

The same programs that run at the end of a model, on a tape of their own: T tokens, hidden size H, vocabulary V.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from planner.errors import UnknownField, nearest
from planner.ledger.fused_loss import fused_cross_entropy, fused_linear_cross_entropy
from planner.ledger.loss_head import cross_entropy, head_weight, loss_of
from planner.ledger.operations import Operations
from planner.ledger.profile import Profile
from planner.ledger.tape import Tensor
from planner.model.shape import Head

__all__ = ["cross_entropy_peak", "loss_head_peak"]

Phase = Literal["forward", "backward", "both"]

# Which loss of which implementation a variant's name stands for: (the profile's loss, its fused form, the plan's loss).
_VARIANTS: dict[str, tuple[str, bool, str, str]] = {
    "plain": ("plain", False, "default", "liger-0.6"),
    "upcast": ("float_then_flat", False, "default", "liger-0.6"),
    "fused": ("flat_at_once", True, "default", "liger-0.6"),
    "chunked": ("flat_at_once", False, "chunked", "liger-0.6"),
    "liger-0.4": ("flat_at_once", False, "liger", "liger-0.4"),
    "liger": ("flat_at_once", False, "liger", "liger-0.6"),
    "cce": ("flat_at_once", False, "cce", "liger-0.6"),
}


def loss_head_peak(
    tokens: int,
    hidden: int,
    vocabulary: int,
    variant: str,
    dtype: str = "bf16",
    phase: Phase = "both",
    *,
    softcap: bool = False,
) -> int:
    """Bytes above its inputs (hidden states, weight, labels) at the highest point of projection and loss.

    variant: plain (cross-entropy in the logits' format), upcast (in fp32), fused (in fp32, gradient in place), chunked,
    liger-0.4, liger, cce. phase: `backward` counts from where forward has ended; `both` from the start; gradients of
    the inputs count, as they are made. Raises UnknownField for another variant.
    """
    known = _VARIANTS.get(variant)
    if known is None:
        raise UnknownField(f'loss variant "{variant}" is not known; {nearest(variant, _VARIANTS)}')
    loss, fused, asked, version = known
    profile = Profile(name="kernel", version="0", loss=loss, fused_loss=fused, fused_linear_loss=version)
    t = _tape(tokens, dtype, profile)
    t.dim("H", hidden)
    x = t.constant("hidden states", ("B", "S", "H"), dtype)
    x.requires_grad = True
    head = Head(rows=vocabulary, tied=False, softcap=softcap, norm=None)
    if asked == "liger":  # the kernel itself: what shifts hidden states or labels is the model's
        weight = head_weight(t, head, x)
        return _peak(t, lambda: fused_linear_cross_entropy(t, x, weight, old=version == "liger-0.4"), phase)
    return _peak(t, lambda: loss_of(t, head, x, asked), phase)


def cross_entropy_peak(tokens: int, vocabulary: int, *, fused: bool, dtype: str = "fp32") -> int:
    """Bytes at the highest point of a cross-entropy on logits that are there already, those included."""
    profile = Profile(name="kernel", version="0")
    t = _tape(tokens, dtype, profile)
    logits = t.constant("logits", ("B", "S", t.dim("V", vocabulary)), dtype)
    logits.requires_grad = True
    labels = t.constant("labels", ("B", "S"), "int64")
    program = fused_cross_entropy if fused else cross_entropy
    size = t.bytes_of(logits.dims, dtype)
    return size + _peak(t, lambda: program(t, logits, labels), "both")


def _tape(tokens: int, dtype: str, profile: Profile) -> Operations:
    return Operations(
        sizes={"1": 1, "2": 2, "B": 1, "S": tokens},
        weight_dtype=lambda _: dtype,
        trainable=lambda _: True,
        profile=profile,
    )


def _peak(t: Operations, program: Callable[[], Tensor], phase: Phase) -> int:
    start = len(t.events)
    t.begin("forward", 1)
    loss = program()
    middle = len(t.events)
    t.backward(loss)
    levels = np.cumsum([t.rows[abs(event) - 1].size * (1 if event > 0 else -1) for event in t.events])
    begin = int(levels[start - 1]) if start else 0
    forward = int(levels[start:middle].max(initial=begin))
    if phase == "forward":
        return forward - begin
    after = int(levels[middle - 1])
    backward = int(levels[middle:].max(initial=after))
    return backward - after if phase == "backward" else max(forward, backward) - begin
