"""Predicted against published `max_memory_allocated`, run by run and source by source.

The runs are data (`measured_runs.toml`): each has its source, a plan document, and the bytes that somebody read off a
real GPU. Nothing here adjusts a prediction: a run that the ledger does not cover is listed as refused, with its reason.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from statistics import median
from typing import Any

from planner.errors import PlannerError
from planner.hardware import software_device
from planner.ledger.loss_kernels import cross_entropy_peak, loss_head_peak
from planner.memory.training import TrainingMemory, training_memory
from planner.plan import TrainingPlan
from planner.readers.hardware_profiles import load_hardware
from planner.readers.models import load_model
from planner.readers.plan_document import plan_from_mapping
from planner.sources import Source

__all__ = [
    "Comparison",
    "KernelRun",
    "MeasuredRun",
    "Summary",
    "compare",
    "compare_kernels",
    "kernel_runs",
    "measured_runs",
    "summaries",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRun:
    """One published training run. bytes: its peak; rounding_bytes: half of the last digit printed.

    held_out: it was compared with a prediction only after the programs of its source were finished.
    """

    id: str
    source: str
    where: str
    model: str
    plan: Mapping[str, Any]
    bytes: int
    rounding_bytes: int
    held_out: bool
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRun:
    """One published peak of the projection and loss alone. beside_bytes: what the benchmark holds besides."""

    id: str
    source: str
    where: str
    call: Mapping[str, Any]
    bytes: int
    beside_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A prediction beside a measurement; predicted_bytes is None where the planner refuses, and `refusal` says why."""

    run: MeasuredRun | KernelRun
    predicted_bytes: int | None
    moment: str = ""
    refusal: str = ""

    @property
    def measured_bytes(self) -> int:
        """What was measured."""
        return self.run.bytes

    @property
    def ratio(self) -> float | None:
        """Predicted over measured."""
        return None if self.predicted_bytes is None else self.predicted_bytes / self.run.bytes

    @property
    def error(self) -> float | None:
        """Relative error: ratio minus one."""
        return None if self.ratio is None else self.ratio - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The errors of one source: count, median and 90th percentile of the absolute error, the worst run."""

    source: str
    runs: int
    refused: int
    median_error: float
    p90_error: float
    worst_error: float
    worst_run: str


@cache
def _document() -> Mapping[str, Any]:
    return tomllib.loads(files("planner.evidence").joinpath("measured_runs.toml").read_text(encoding="utf-8"))


@cache
def sources() -> Mapping[str, Source]:
    """Where the runs were read, by the name that runs give."""
    return {
        name: Source(title=f"{entry['title']} ({entry['setting']})", url=entry["url"], date="2026-11", kind="published")
        for name, entry in _document()["sources"].items()
    }


@cache
def measured_runs() -> tuple[MeasuredRun, ...]:
    """Every published training run, in the file's order; `plan` is a complete plan document."""
    document = _document()
    return tuple(
        MeasuredRun(
            id=entry["id"],
            source=entry["source"],
            where=entry["where"],
            model=entry["model"],
            plan={"model": document["models"][entry["model"]], **entry["plan"]},
            bytes=entry["bytes"],
            rounding_bytes=int(entry["rounding"]),
            held_out=entry.get("held_out", False),
            note=entry.get("note", ""),
        )
        for entry in document["run"]
    )


@cache
def kernel_runs() -> tuple[KernelRun, ...]:
    """Every published peak of a loss kernel."""
    return tuple(
        KernelRun(
            id=entry["id"],
            source=entry["source"],
            where=entry["where"],
            call=entry["call"],
            bytes=entry["bytes"],
            beside_bytes=entry["beside"],
        )
        for entry in _document()["kernel"]
    )


def compare(runs: Iterable[MeasuredRun]) -> list[Comparison]:
    """The planner's peak for each run's plan. Refusals become comparisons without a prediction."""
    results = []
    for run in runs:
        try:
            memory = _memory(run.plan)
        except PlannerError as refusal:
            results.append(Comparison(run=run, predicted_bytes=None, refusal=str(refusal)))
        else:
            results.append(Comparison(run=run, predicted_bytes=memory.peak_allocated, moment=memory.peak_moment))
    return results


def _memory(document: Mapping[str, Any]) -> TrainingMemory:
    plan = plan_from_mapping(document)
    assert isinstance(plan, TrainingPlan), "measured runs are training runs"
    return training_memory(plan, load_model(plan.model), software_device(load_hardware(plan.hardware.gpu)))


def compare_kernels(runs: Iterable[KernelRun]) -> list[Comparison]:
    """The ledger's peak of the projection and loss alone, plus what the benchmark holds beside them."""
    results = []
    for run in runs:
        call = dict(run.call)
        kernel = {"loss_head": loss_head_peak, "cross_entropy": cross_entropy_peak}[call.pop("kernel")]
        results.append(Comparison(run=run, predicted_bytes=kernel(**call) + run.beside_bytes))
    return results


def summaries(comparisons: Sequence[Comparison]) -> list[Summary]:
    """One summary for each source, in the order in which sources first occur."""
    names = dict.fromkeys(comparison.run.source for comparison in comparisons)
    return [_summary(name, [c for c in comparisons if c.run.source == name]) for name in names]


def _summary(source: str, comparisons: Sequence[Comparison]) -> Summary:
    errors = sorted((abs(c.error), c.run.id) for c in comparisons if c.error is not None)
    sizes = [size for size, _ in errors]
    return Summary(
        source=source,
        runs=len(comparisons),
        refused=len(comparisons) - len(errors),
        median_error=median(sizes) if sizes else float("nan"),
        p90_error=sizes[-(-9 * len(sizes) // 10) - 1] if sizes else float("nan"),
        worst_error=sizes[-1] if sizes else float("nan"),
        worst_run=errors[-1][1] if errors else "",
    )
