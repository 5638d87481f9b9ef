"""The verdict: fits, tight (inside the known error), or does not fit; by how much, on which rank, at which moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from planner.memory.device import DeviceTerm
from planner.units import format_bytes

if TYPE_CHECKING:
    from planner.memory.serving import ServingMemory

__all__ = ["KNOWN_ERROR", "Verdict", "serving_verdict", "verdict_of"]

# Half-width of the band around `peak_allocated`: nine in ten of the measured runs that the project compares itself with
# lie inside it (planner/evidence; tests/oracles/test_known_error.py holds it to that).
KNOWN_ERROR = 0.03

Outcome = Literal["fits", "tight", "does_not_fit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The answer to "does it fit?". head_room_bytes is negative when it does not; band_bytes is the known error."""

    outcome: Outcome
    sentence: str
    rank: str
    moment: str
    head_room_bytes: int
    band_bytes: int


def verdict_of(
    peak_allocated: int, terms: Sequence[DeviceTerm], capacity: int, *, moment: str, rank: str = "every rank"
) -> Verdict:
    """Compare what the step cannot do without with what the device has.

    Needed: the tensors, the least slack, and the centre of every other term. The allocator's usual slack is cached
    memory, which it gives back before it fails, so it counts towards the band and not towards the need.
    Outcome: `does_not_fit` when the need exceeds the capacity; `tight` when its upper end does; `fits` otherwise.
    Upper end: KNOWN_ERROR of the peak, the usual slack, and the high ends of the other terms.
    """
    slack, others = terms[0], terms[1:]
    needed = peak_allocated + slack.low_bytes + sum(term.bytes for term in others)
    high = int(peak_allocated * (1 + KNOWN_ERROR)) + slack.bytes + sum(term.high_bytes for term in others)
    room, band = capacity - needed, high - needed
    where = moment.replace("_", " ")
    if room < 0:
        outcome: Outcome = "does_not_fit"
        sentence = f"Does not fit: short by {format_bytes(-room)} on {rank}, at the {where}."
    elif high > capacity:
        outcome = "tight"
        sentence = (
            f"Tight: {format_bytes(room)} spare ({room / capacity:.0%}), inside the known error of "
            f"{format_bytes(band)}; the highest moment is the {where}."
        )
    else:
        outcome = "fits"
        sentence = f"Fits: {format_bytes(room)} spare ({room / capacity:.0%}); the highest moment is the {where}."
    return Verdict(outcome=outcome, sentence=sentence, rank=rank, moment=moment, head_room_bytes=room, band_bytes=band)


def serving_verdict(memory: ServingMemory) -> Verdict:
    """Whether the requested load's cache fits into what the engine can give to caches.

    `tight` when the terms beside weights and cache, at the upper ends of their bands, would take the room that is left.
    """
    room = memory.kv_cache_pool - memory.kv_cache
    band = sum(term.high_bytes - term.bytes for term in memory.terms)
    load = f"{memory.concurrency} x {memory.context_length:,} tokens"
    if not memory.fits:
        outcome: Outcome = "does_not_fit"
        sentence = f"Does not fit: {load} are short by {format_bytes(max(-room, 1))} of cache."
        if memory.kv_cache_pool <= 0:
            sentence = f"Does not fit: the weights alone leave no room for a cache ({format_bytes(-room)} short)."
    elif room < band:
        outcome = "tight"
        sentence = f"Tight: {load} leave {format_bytes(room)} of cache, inside the known error of {format_bytes(band)}."
    else:
        outcome = "fits"
        sentence = f"Fits: {load} leave {format_bytes(room)} of cache for more."
    return Verdict(
        outcome=outcome,
        sentence=sentence,
        rank=f"pipeline stage {memory.stage}",
        moment="serving",
        head_room_bytes=room,
        band_bytes=band,
    )
