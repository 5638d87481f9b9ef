"""Our own torch.cuda runs on one H200, moment by moment, against the ledger.

The records of the `seen` split were looked at while the ledger was being mended; the `held-out` ones were predicted
before they were looked at.
"""

from __future__ import annotations

import json
import statistics
from importlib import resources
from typing import Any

import pytest

import planner
from planner.answer.training import TrainingEstimate

LINES = resources.files("planner").joinpath("evidence", "h200.jsonl").read_text(encoding="utf-8").splitlines()
RUNS: list[dict[str, Any]] = [json.loads(line) for line in LINES[1:]]
# Misses and what they come from; see LOG.md.
MISSES = {
    "h200-phi-3-mini": 0.018,  # cuDNN's attention lays its output out like the fused projection's query: one more copy
    "h200-gemma2-2b": 0.071,  # transformers 5.17 drops the score cap under sdpa; 5.23, described here, runs it eager
}
BOUND = 0.011  # of the peak; blocks that the allocator leaves unsplit come to as much


def predicted(run: dict[str, Any]) -> TrainingEstimate:
    answer = planner.estimate(run["plan"])
    assert isinstance(answer, TrainingEstimate)
    return answer


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["id"])
def test_every_moment(run: dict[str, Any]) -> None:
    answer = predicted(run)
    peak = max(run["moments"].values())
    for moment, measured in run["moments"].items():
        error = (answer.memory.moments[moment] - measured) / peak
        print(f"{run['id']} {moment}: {answer.memory.moments[moment] / measured:.4f}")
        assert abs(error) < MISSES.get(run["id"], BOUND), (moment, error)


@pytest.mark.parametrize("split", ["seen", "held-out"])
def test_peaks_by_split(split: str) -> None:
    errors = sorted(
        abs(predicted(run).memory.peak_allocated / max(run["moments"].values()) - 1)
        for run in RUNS
        if run["split"] == split
    )
    print(f"{split}: n {len(errors)}, median {statistics.median(errors):.5f}, worst {errors[-1]:.5f}")
    assert statistics.median(errors) < 0.0005
    assert errors[int(0.9 * len(errors))] < 0.006


def test_the_reserved_band_holds_them_all() -> None:
    """Of unsharded runs: on one rank of a group whose collectives do nothing, gathered blocks are not reused in time."""
    for run in (run for run in RUNS if "parallelism" not in run["plan"]):
        answer = predicted(run)
        slack = answer.terms[0]
        measured = run["max_memory_reserved"] - max(run["moments"].values())
        assert slack.low_bytes * 0.98 - 2**24 <= measured <= slack.high_bytes * 1.05, run["id"]
