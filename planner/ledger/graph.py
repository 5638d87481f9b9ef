"""What a tape is made of: rows, storages, tensors, parameters, and autograd's nodes and edges.

A `Storage` lives as long as Python refers to it, as a tensor's memory does; its birth and death enter the record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = [
    "ALLOCATION_BYTES",
    "Dims",
    "Edge",
    "Node",
    "Parameter",
    "Row",
    "Storage",
    "Tensor",
    "allocated_bytes",
    "edge_to",
    "trains",
]

ALLOCATION_BYTES = 512  # c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize: every request is rounded up to it

Dims = tuple[str, ...]


def allocated_bytes(size: Any) -> Any:
    """Bytes that torch's CUDA allocator counts for a request of `size` bytes (a number or an array).

    >>> allocated_bytes(1), allocated_bytes(512), allocated_bytes(513)
    (512, 512, 1024)
    """
    return (size + (ALLOCATION_BYTES - 1)) // ALLOCATION_BYTES * ALLOCATION_BYTES


@dataclass(slots=True)
class Row:
    """One allocation: who made it, its symbolic shape, its format, its bytes and what it was for."""

    operator: str
    module: str
    dims: Dims
    dtype: str
    size: Any
    segment: int
    role: str = "temporary"  # temporary | saved | gradient | cast


class Storage:
    """A block of memory that lives as long as something refers to it."""

    __slots__ = ("_events", "index")

    def __init__(self, events: list[int], index: int) -> None:
        self._events = events
        self.index = index
        events.append(index)

    def __del__(self) -> None:
        self._events.append(-self.index)


class Tensor:
    """A shape, a format and a reference to the storage behind it."""

    __slots__ = ("dims", "dtype", "node", "output", "requires_grad", "storage")

    def __init__(
        self, storage: Storage, dims: Dims, dtype: str, *, requires_grad: bool, node: Node | None, output: int
    ) -> None:
        self.storage = storage
        self.dims = dims
        self.dtype = dtype
        self.requires_grad = requires_grad
        self.node = node
        self.output = output


@dataclass(frozen=True, slots=True)
class Parameter:
    """A weight as the tape sees it: dims and format, whether it trains, and the format it is stored in."""

    name: str
    dims: Dims
    dtype: str
    trainable: bool


class Node:
    """The backward function of one operation."""

    __slots__ = (
        "edges",
        "first",
        "grads",
        "module",
        "operator",
        "recompute",
        "saved",
        "saves",
        "scratch",
        "segment",
        "viewed",
        "wanted",
    )

    def __init__(self, operator: str, module: str, segment: int, outputs: int) -> None:
        self.operator = operator
        self.module = module
        self.segment = segment
        self.saved: list[Storage] = []
        self.saves = False  # whether torch saves anything for it, weights included
        self.edges: list[Edge] = []
        self.scratch: tuple[tuple[Dims, str], ...] = ()
        self.first: tuple[tuple[Dims, str], ...] = ()
        self.grads: list[Storage | None] = [None] * outputs
        self.recompute: Callable[..., Tensor] | None = None
        self.wanted: list[bool] = []
        self.viewed: set[int] = set()  # outputs whose gradient so far is a view


@dataclass(slots=True)
class Edge:
    """Where the gradient of one input goes, and whether it needs memory of its own."""

    target: Node | None
    output: int
    parameter: Parameter | None
    alias: bool
    dims: Dims
    dtype: str
    viewed: bool = False  # the gradient is a view of another tensor, so nothing is added into it
    raw: tuple[Dims, str] | None = None  # what the formula yields before it is summed and cast to dims and dtype
    memory: Storage | None = None  # an existing storage that the gradient is written into


def trains(value: Tensor | Parameter) -> bool:
    """Whether a gradient flows to this value."""
    return value.trainable if isinstance(value, Parameter) else value.requires_grad


def edge_to(value: Tensor | Parameter, size: tuple[Dims, str], alias: bool) -> Edge:
    if isinstance(value, Parameter):
        return Edge(None, 0, value, False, size[0], size[1])
    return Edge(value.node, value.output, None, alias, size[0], size[1])
