"""Segments of the caching allocator."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from planner.memory.allocator import ROUND_LARGE, segment_bytes


@given(st.integers(0, 2**50))
def test_a_segment_holds_its_request_with_less_than_one_granule_to_spare(size: int) -> None:
    assert size <= segment_bytes(size) < size + ROUND_LARGE
    assert segment_bytes(size) % ROUND_LARGE == 0
