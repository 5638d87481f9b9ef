"""torch's CUDA caching allocator: what a request really takes.

c10/cuda/CUDACachingAllocator.cpp (torch 2.x), constants of the same names:
    kMinBlockSize    512 B    every request is rounded up to it
    kSmallSize       1 MiB    requests up to it come from 2 MiB segments of their own pool
    kMinLargeAlloc  10 MiB    larger requests get a segment of their own, rounded up to kRoundLarge
    kRoundLarge      2 MiB
A large block is split only if more than kSmallSize would be left; otherwise the remainder counts as allocated.
"""

from __future__ import annotations

from planner.ledger.tape import allocated_bytes

__all__ = ["fresh_block_bytes", "segment_bytes"]

MIB = 2**20
SMALL_SIZE = MIB
MIN_LARGE_ALLOC = 10 * MIB
ROUND_LARGE = 2 * MIB


def segment_bytes(size: int) -> int:
    """`size` rounded up to the granularity of large segments.

    >>> segment_bytes(3 * 2**20) // 2**20
    4
    """
    return -(-size // ROUND_LARGE) * ROUND_LARGE


def fresh_block_bytes(size: int) -> int:
    """Bytes counted as allocated for a tensor that outlives the step, and so has a segment of its own.

    47.5 MiB leave 0.5 MiB of a 48 MiB segment, too little to split off; 46.5 MiB leave 1.5 MiB, which are.

    >>> fresh_block_bytes(int(47.5 * 2**20)) / 2**20, fresh_block_bytes(int(46.5 * 2**20)) / 2**20
    (48.0, 46.5)
    """
    rounded = allocated_bytes(size)
    if rounded < MIN_LARGE_ALLOC:
        return rounded
    segment = segment_bytes(rounded)
    return segment if segment - rounded <= SMALL_SIZE else rounded
