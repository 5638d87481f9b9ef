"""Blocks of the caching allocator."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from planner.memory.allocator import MIB, SMALL_SIZE, fresh_block_bytes, segment_bytes


@given(st.integers(0, 2**40))
def test_a_block_holds_its_request_and_at_most_one_mib_more(size: int) -> None:
    block = fresh_block_bytes(size)
    assert size <= block <= size + SMALL_SIZE + 512
    assert block % 512 == 0


def test_a_measured_tensor() -> None:
    """Qwen3-4B's 9728 x 2560 bf16 matrices: 47.5 MiB take 48, which is what an H200 reported."""
    assert fresh_block_bytes(9728 * 2560 * 2) == 48 * MIB


def test_segments() -> None:
    assert segment_bytes(1) == 2 * MIB
    assert segment_bytes(2 * MIB) == 2 * MIB
