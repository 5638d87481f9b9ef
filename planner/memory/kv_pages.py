"""How vLLM lays a cache out in pages: one pool, one page size, layers in groups of equal number.

vLLM 0.33, v1/core/kv_cache_planning.py and v1/kv_cache_interface.py (behaviour read there, not code):

- Layers of one kind form a bucket. The group size is the smallest bucket, or the largest where that is less than 1.5
  times as large; each bucket is padded with idle layers to a multiple of it. A page holds one block of each layer of
  a group, and a sequence takes its blocks from every group.
- Kinds of unequal bytes are brought to one page size: the smaller gets more tokens in a block. Where recurrent
  states are cached, attention blocks grow until they are as large as a state, which is then padded to them.
- A sequence holds        full attention     ceil(S / block)
                          window W           ceil(min(W - 1 + in flight, S) / block) + 1
                          chunk c            ceil(min(c + in flight, S) / block)
                          cross-attention    ceil(encoder / block)
                          recurrent state    2 beside attention (`align` mode of prefix caching), 1 without any
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from planner.memory.kv_cache import CacheLayers

__all__ = ["PagePlan", "PagedGroup", "page_plan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedGroup:
    """`count` groups of layers of one kind, each with `block_tokens` positions in a page."""

    layers: CacheLayers
    count: int
    block_tokens: int

    def pages(self, context: int, in_flight: int, state_pages: int) -> int:
        """Pages that one sequence holds in all of these groups."""
        kind, limit, block = self.layers.kind, self.layers.limit or 0, self.block_tokens
        match kind:
            case "full":
                held = -(-context // block)
            case "window":
                held = -(-min(limit - 1 + in_flight, context) // block) + 1
            case "chunk":
                held = -(-min(limit + in_flight, context) // block)
            case "cross":
                held = -(-limit // block)
            case "state":
                held = state_pages
        return self.count * held


@dataclass(frozen=True, slots=True, kw_only=True)
class PagePlan:
    """The pool's page and its groups. page_bytes: one block of every layer of one group."""

    page_bytes: int
    groups: tuple[PagedGroup, ...]
    in_flight: int
    state_pages: int

    def sequence_pages(self, context: int) -> int:
        """Pages of one sequence of `context` tokens."""
        return sum(group.pages(context, self.in_flight, self.state_pages) for group in self.groups)

    def sequence_bytes(self, context: int) -> int:
        """Bytes of the pool that one sequence of `context` tokens takes."""
        return self.page_bytes * self.sequence_pages(context)


def page_plan(layers: Iterable[CacheLayers], block_size: int, in_flight: int) -> PagePlan:
    """The page layout of a cache on one rank. in_flight: tokens scheduled and not yet settled."""
    buckets = tuple(layers)
    if not buckets:
        return PagePlan(page_bytes=0, groups=(), in_flight=in_flight, state_pages=1)
    attention = [bucket for bucket in buckets if bucket.cell_bytes]
    states = [bucket.state_bytes for bucket in buckets if bucket.state_bytes]
    sizes = [len(bucket.layers) for bucket in buckets]
    group_size = max(sizes) if max(sizes) < 1.5 * min(sizes) else min(sizes)
    page = max(states, default=0)
    if attention:
        step = block_size * max(bucket.cell_bytes for bucket in attention)
        page = max(1, -(-page // step)) * step
    groups = tuple(
        PagedGroup(
            layers=bucket,
            count=-(-len(bucket.layers) // group_size),
            block_tokens=page // (bucket.cell_bytes * block_size) * block_size if bucket.cell_bytes else 1,
        )
        for bucket in buckets
    )
    return PagePlan(
        page_bytes=page * group_size,
        groups=groups,
        in_flight=in_flight,
        state_pages=2 if attention and states else 1,
    )
