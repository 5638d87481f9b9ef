"""torch's CUDA caching allocator: the granularity of what it takes from the device.

c10/cuda/CUDACachingAllocator.cpp (torch 2.x), constants of the same names: every request is rounded up to
kMinBlockSize, 512 B (`planner.ledger.tape.allocated_bytes`); requests above kMinLargeAlloc, 10 MiB, get a segment
rounded up to kRoundLarge, 2 MiB. A block is not split when at most kSmallSize, 1 MiB, would be left over, and then
counts whole: measured allocations lie up to 1 % above the sum of requests for models whose matrices just miss a
multiple of 2 MiB.
"""

from __future__ import annotations

__all__ = ["segment_bytes"]

ROUND_LARGE = 2 * 2**20


def segment_bytes(size: int) -> int:
    """`size` rounded up to the granularity of large segments.

    >>> segment_bytes(3 * 2**20) // 2**20
    4
    """
    return -(-size // ROUND_LARGE) * ROUND_LARGE
