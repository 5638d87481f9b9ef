"""Published peaks of real GPU runs against the planner, source by source, at the level reached.

The misses are listed one by one with their cause. A run that leaves the list, or joins it, fails a test: both are news.
"""

from __future__ import annotations

import pytest

from planner.evidence import Comparison, MeasuredRun, compare, measured_runs, summaries

# Largest median and 90th percentile of the absolute error that each source may have, and its number of runs.
USED_WHILE_DEVELOPING = {
    "fms-acceleration": (0.0005, 0.005, 82),
    "litgpt config_hub": (0.01, 0.03, 24),
    "litgpt resource tables": (0.005, 0.01, 10),
    "litgpt thunder extension": (0.02, 0.02, 2),
    "torchtune README ladder": (0.005, 0.005, 1),
    "Answer.AI fsdp_qlora": (0.035, 0.035, 1),
}
# Rows of the same files that were first compared when the programs were finished. Twelve of the 106 are santacoder's.
HELD_OUT = {
    "fms-acceleration": (0.005, 0.13, 106),
    "litgpt config_hub": (0.01, 0.03, 3),
    "Answer.AI fsdp_qlora": (0.015, 0.015, 1),
}

# Beyond 3 %, and why.
SANTACODER = "one copy of the logits more is alive in backward than gpt_bigcode's module explains"
FAST_LORA = "gpt_bigcode's own fast kernels (fused LoRA, a loss on 16-bit logits) are not modelled"
LENGTHS = (
    "unequal lengths: no batch is known to have had all its samples at the cap of 512 tokens when gradients existed"
)
MISSES = {
    "fms-003": SANTACODER,
    "fms-base-5": SANTACODER,
    "fms-base-8": SANTACODER,
    "fms-base-9": SANTACODER,
    "fms-base-70": SANTACODER,
    "fms-base-71": SANTACODER,
    "fms-base-72": SANTACODER,
    "fms-base-73": SANTACODER,
    "fms-base-74": FAST_LORA,
    "fms-base-75": FAST_LORA,
    "fms-base-76": FAST_LORA,
    "fms-base-77": FAST_LORA,
    "lith-007": LENGTHS,
    "lith-035": LENGTHS,
    "fsdpq-006": "FSDP1 with its own wrapping of adapters and the libraries of early 2024; cause not found",
}


@pytest.fixture(scope="module")
def comparisons() -> list[Comparison]:
    return compare(measured_runs())


def run_of(comparison: Comparison) -> MeasuredRun:
    assert isinstance(comparison.run, MeasuredRun)
    return comparison.run


def test_every_run_is_answered(comparisons: list[Comparison]) -> None:
    assert {c.run.id: c.refusal for c in comparisons if c.error is None} == {}


@pytest.mark.parametrize(("held_out", "levels"), [(False, USED_WHILE_DEVELOPING), (True, HELD_OUT)])
def test_error_of_each_source(
    comparisons: list[Comparison], held_out: bool, levels: dict[str, tuple[float, float, int]]
) -> None:
    reached = {s.source: s for s in summaries([c for c in comparisons if run_of(c).held_out == held_out])}
    assert set(reached) == set(levels)
    for source, (median, p90, runs) in levels.items():
        summary = reached[source]
        assert summary.runs == runs
        assert summary.median_error <= median, summary
        assert summary.p90_error <= p90, summary


def test_misses_are_the_listed_ones(comparisons: list[Comparison]) -> None:
    beyond = {c.run.id for c in comparisons if c.error is not None and abs(c.error) > 0.03}
    assert beyond == set(MISSES)


def test_unfused_runs_of_whole_precision_are_within_one_percent(comparisons: list[Comparison]) -> None:
    """Full fine-tuning and LoRA with the library's own modules: nothing in them is unknown but santacoder's data."""
    for c in comparisons:
        plain = c.run.source == "fms-acceleration" and run_of(c).note == "none" and c.run.id not in MISSES
        if plain and c.run.id != "fms-base-3":  # santacoder again, whose optimizer step hides the rest of it
            assert c.error is not None and abs(c.error) < 0.01, (c.run.id, c.error)


def test_single_gpu_runs_agree_to_the_workspace(comparisons: list[Comparison]) -> None:
    """Mistral and Llama on one GPU with 16-bit base weights: what is left is below 3 MiB."""
    chosen = [
        c
        for c in comparisons
        if c.run.source == "fms-acceleration"
        and run_of(c).model in ("mistral-7b", "llama-3-8b")
        and "parallelism" not in run_of(c).plan
        and run_of(c).plan.get("method", {"name": "full"})["name"] != "qlora"
    ]
    assert len(chosen) > 20
    for c in chosen:
        assert c.predicted_bytes is not None
        assert abs(c.predicted_bytes - c.measured_bytes) < 3 * 2**20, (c.run.id, c.predicted_bytes - c.measured_bytes)
