"""The moments of a training step: a fold over the ledger's record that finds what is live when.

Forward runs the segments in order (embedding, blocks, head); backward runs them in reverse. Level is what the pass
itself holds, over the states that outlive it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.ledger.record import CATEGORIES, StepRecord, Stretch

__all__ = ["PassLevels", "pass_levels"]


@dataclass(frozen=True, slots=True)
class PassLevels:
    """Levels in bytes over the states. `forward_breakdown` and `backward_breakdown` are by category, at the peaks."""

    forward_peak: Any
    forward_end: Any
    backward_peak: Any
    end: Any
    end_breakdown: dict[str, Any]
    forward_breakdown: dict[str, Any]
    backward_breakdown: dict[str, Any]
    forward_where: int
    backward_where: int
    host_bytes: int


def pass_levels(record: StepRecord) -> PassLevels:
    """Peaks and ends of one forward and backward pass."""
    order = (0, *record.layers, record.head)
    forward = [record.forward[segment] for segment in order]
    release = [record.release[segment] for segment in order if segment in record.release]
    backward = [record.backward[segment] for segment in reversed(order) if segment in record.backward]
    forward_end = _total(release, _total(forward, 0))  # autocast's cached weights go when its region ends
    forward_peak, forward_where = _highest(forward, 0)
    backward_peak, backward_where = _highest(backward, forward_end)
    return PassLevels(
        forward_peak,
        forward_end,
        backward_peak,
        _total(backward, forward_end),
        _breakdown(record, [*forward, *release], None),
        _breakdown(record, forward[:forward_where], forward[forward_where]),
        _breakdown(record, [*forward, *release, *backward[:backward_where]], backward[backward_where]),
        forward_where,
        len(order) - 1 - backward_where,
        sum(_stashed(record, segment) for segment in record.layers),
    )


def _stashed(record: StepRecord, segment: int) -> int:
    """Bytes that offloading activations keeps on the host for one block."""
    return sum(int(record.tape.rows[index - 1].size) for index in record.stashed.get(segment, ()))


def _total(stretches: Sequence[Stretch], start: Any) -> Any:
    for stretch in stretches:
        start = start + stretch.total
    return start


def _highest(stretches: Sequence[Stretch], start: Any) -> tuple[Any, int]:
    """The highest level over the stretches, and the position of the stretch where it is (of a grid: its largest)."""
    levels = []
    for stretch in stretches:
        levels.append(start + stretch.peak)
        start = start + stretch.total
    if all(type(level) is int for level in levels):
        best = max(levels)
        return best, levels.index(best)
    grid = np.stack(np.broadcast_arrays(*levels))
    return grid.max(axis=0), int(np.argmax(grid.reshape(len(grid), -1).max(axis=1)))


def _breakdown(record: StepRecord, before: Sequence[Stretch], at: Stretch | None) -> dict[str, Any]:
    counts: NDArray[np.int64] = np.zeros(len(CATEGORIES), dtype=np.int64)
    times = Counter(id(stretch) for stretch in before)
    for stretch in {id(stretch): stretch for stretch in before}.values():
        counts = counts + times[id(stretch)] * _by_category(record, stretch, len(stretch.deltas))
    if at is not None and at.deltas.ndim == 1 and len(at.deltas):
        running = np.cumsum(at.deltas)
        stop = int(np.argmax(running)) + 1 if running.max() > 0 else 0
        counts = counts + _by_category(record, at, stop)
    return dict(zip(CATEGORIES, (int(count) for count in counts), strict=True))


def _by_category(record: StepRecord, stretch: Stretch, stop: int) -> NDArray[np.int64]:
    counts = np.zeros(len(CATEGORIES), dtype=np.int64)
    if stretch.deltas.ndim == 1:
        np.add.at(counts, record.categories[stretch.rows[:stop]], stretch.deltas[:stop])
    return counts
