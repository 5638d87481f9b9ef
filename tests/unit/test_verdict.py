"""The three outcomes, and that the sentence says what the numbers say."""

from __future__ import annotations

import pytest

from planner.memory.device import DeviceTerm
from planner.sources import Source
from planner.verdict import KNOWN_ERROR, verdict_of

GIB = 2**30
SOURCE = Source(title="a test", kind="assumed")


def term(name: str, low: float, centre: float, high: float) -> DeviceTerm:
    return DeviceTerm(
        name=name, bytes=int(centre * GIB), low_bytes=int(low * GIB), high_bytes=int(high * GIB), source=SOURCE
    )


TERMS = (term("allocator_slack", 0, 2, 6), term("cuda_context", 0.4, 0.75, 1.8))


@pytest.mark.parametrize(
    ("peak", "outcome", "word"),
    [
        (10, "fits", "Fits"),
        (20.5, "tight", "Tight"),
        (23.5, "does_not_fit", "Does not fit"),
        (99, "does_not_fit", "75.7"),
    ],
)
def test_outcomes_on_a_24_gib_card(peak: float, outcome: str, word: str) -> None:
    verdict = verdict_of(int(peak * GIB), TERMS, 24 * GIB, moment="backward_peak")
    assert verdict.outcome == outcome
    assert word in verdict.sentence
    assert "backward peak" in verdict.sentence


def test_cached_blocks_do_not_count_towards_the_need() -> None:
    """20 GiB and a context of 0.75 leave 3.25 of 24, however much the allocator likes to cache."""
    assert verdict_of(20 * GIB, TERMS, 24 * GIB, moment="x").head_room_bytes == int(3.25 * GIB)


def test_the_band_is_the_known_error_the_usual_slack_and_the_terms_ends() -> None:
    verdict = verdict_of(20 * GIB, TERMS, 24 * GIB, moment="x")
    assert verdict.band_bytes == pytest.approx((20 * KNOWN_ERROR + 2 + 1.8 - 0.75) * GIB, abs=4)
