"""The band that a verdict is given with is the error that measured runs show."""

from __future__ import annotations

from planner.evidence.measured import compare, measured_runs
from planner.verdict import KNOWN_ERROR


def test_nine_in_ten_published_runs_lie_inside_the_known_error() -> None:
    errors = sorted(abs(comparison.ratio - 1) for comparison in compare(measured_runs()) if comparison.ratio)
    ninth = errors[int(0.9 * len(errors))]
    print(f"n {len(errors)}, nine in ten within {ninth:.4f}")
    assert ninth <= KNOWN_ERROR
    assert ninth >= KNOWN_ERROR / 3, "the band is wider than the evidence asks for"
