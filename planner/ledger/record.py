"""The record of a pass, cut into stretches: what was allocated and freed, in order, and what it was for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.errors import PlanError
from planner.ledger.gathering import ShardedOperations
from planner.ledger.operations import Operations

__all__ = ["CATEGORIES", "StepRecord", "Stretch", "cut"]

CATEGORIES = (
    "inputs",
    "activations",
    "logits_and_loss",
    "gradients",
    "unsharded_parameters",
    "communication_buffers",
    "temporaries",
)
_INPUTS = ("input_ids", "pixel_values", "input_features", "labels")
LARGEST_TENSOR_BYTES = 2**50
_OF_SHARDING = {
    "gathered weights": "unsharded_parameters",
    "prefetched weights": "communication_buffers",
    "all-gather result": "communication_buffers",
    "reduce-scatter input": "communication_buffers",
    "sharded gradient": "gradients",
}


@dataclass(frozen=True, slots=True)
class Stretch:
    """A stretch of the record: allocated (+) and freed (-) bytes in order, and each one's category.

    deltas: (n,) or (n, grid). total: their sum. peak: the highest running sum, at least 0.
    """

    deltas: NDArray[np.int64]
    rows: NDArray[np.int64]
    total: Any
    peak: Any


@dataclass(frozen=True, slots=True)
class StepRecord:
    """The record, cut into stretches. `layers[i]` is the segment of block i; segment 0 is the embedding."""

    tape: ShardedOperations
    layers: tuple[int, ...]
    head: int
    forward: dict[int, Stretch]
    backward: dict[int, Stretch]
    release: dict[int, Stretch]
    categories: NDArray[np.int64]
    stashed: dict[int, list[int]]


def cut(t: ShardedOperations, layers: tuple[int, ...], head: int, stashed: dict[int, list[int]]) -> StepRecord:
    """The stretches of a finished tape, by phase and segment."""
    sizes = _sizes(t)
    events = np.array(t.events, dtype=np.int64)
    rows = np.abs(events) - 1
    signs = np.sign(events).reshape((-1,) + (1,) * (sizes.ndim - 1))
    deltas = sizes[rows] * signs
    stretches: dict[str, dict[int, Stretch]] = {"forward": {}, "backward": {}, "release": {}, "end": {}}
    starts = [start for _, _, start in t.marks]
    outlive: set[int] = set()
    for (phase, segment, start), stop in zip(t.marks, [*starts[1:], len(events)], strict=True):
        part = deltas[start:stop]
        if stop == start and segment in stretches[phase]:
            continue
        running = np.cumsum(part, axis=0)
        if not len(part):
            total = peak = 0
        elif part.ndim == 1:
            total, peak = int(running[-1]), max(int(running.max()), 0)
        else:
            total, peak = running[-1], np.maximum(running.max(axis=0), 0)
        stretches[phase][segment] = Stretch(part, rows[start:stop], total, peak)
        if phase == "forward":
            made = set(t.events[start:stop])
            outlive.update(event - 1 for event in made if event > 0 and -event not in made)
    return StepRecord(
        t,
        layers,
        head,
        stretches["forward"],
        stretches["backward"],
        stretches["release"],
        _categories(t, head, outlive),
        stashed,
    )


def _sizes(t: Operations) -> NDArray[np.int64]:
    """Bytes of each row, (rows,) or (rows, grid). Raises PlanError beyond what 64 bits can add up."""
    try:
        if all(type(row.size) is int for row in t.rows):
            sizes = np.array([row.size for row in t.rows], dtype=np.int64)
        else:
            sizes = np.stack(np.broadcast_arrays(*[np.asarray(row.size, dtype=np.int64) for row in t.rows]))
    except OverflowError:
        sizes = np.array([2**62])
    if sizes.max(initial=0) > LARGEST_TENSOR_BYTES:
        raise PlanError(
            "this plan makes a single tensor of more than 1 PiB; check micro_batch_size and sequence_length."
        )
    return sizes


def _categories(t: Operations, head: int, outlive: set[int]) -> NDArray[np.int64]:
    """The category of each row; `outlive` are those still alive when the forward stretch that made them ends."""
    kept = {storage.index for storage in t.gradients.values()}
    result = np.full(len(t.rows), CATEGORIES.index("temporaries"), dtype=np.int64)
    for position, row in enumerate(t.rows):
        if row.operator in _OF_SHARDING:
            name = _OF_SHARDING[row.operator]
        elif row.role == "gradient" or position + 1 in kept:
            name = "gradients"
        elif row.operator in _INPUTS:
            name = "inputs"
        elif row.module in ("loss", "lm_head"):
            name = "logits_and_loss"
        elif position + 1 in t.saved or position in outlive:
            name = "activations"
        else:
            continue
        result[position] = CATEGORIES.index(name)
    return result
