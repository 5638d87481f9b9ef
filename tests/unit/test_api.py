"""The public functions: what they take, what they return, what they refuse."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

import planner
from planner.errors import NotCovered, PlanError, UnknownName
from planner.plan import Hardware, TrainingPlan

DOCUMENT: dict[str, Any] = {"model": "gpt2", "hardware": {"gpu": "rtx-4090"}, "data": {"sequence_length": 512}}


def test_public_names() -> None:
    assert sorted(planner.__all__) == ["PlannerError", "estimate", "load_hardware", "load_model", "trace"]
    assert set(planner.__all__) <= set(dir(planner))


def test_importing_imports_nothing_heavy() -> None:
    code = "import planner, sys; print([m for m in ('numpy', 'torch', 'pandas', 'rich', 'click') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_estimate_needs_numpy_at_most() -> None:
    code = (
        f"import planner, sys; planner.estimate({DOCUMENT!r}); "
        "print([m for m in ('torch', 'pandas', 'rich', 'click', 'yaml', 'plotly', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_document_and_its_value_get_the_same_answer() -> None:
    value = TrainingPlan(model="gpt2", hardware=Hardware(gpu="rtx-4090"))
    value = replace(value, data=replace(value.data, sequence_length=512))
    assert planner.estimate(value).to_dict()["memory"] == planner.estimate(DOCUMENT).to_dict()["memory"]


def test_the_answer_is_immutable_and_states_its_defaults() -> None:
    answer = planner.estimate(DOCUMENT)
    with pytest.raises(FrozenInstanceError):
        answer.capacity = 0  # type: ignore[misc, union-attr]
    assert "default: data.micro_batch_size = 1" in answer.assumptions
    assert not any("sequence_length" in line for line in answer.assumptions if line.startswith("default"))


def test_answer_fields() -> None:
    answer = planner.estimate(DOCUMENT).to_dict()
    assert set(answer) >= {"kind", "parameters", "memory", "time", "cost", "assumptions", "warnings"}
    assert set(answer["parameters"]) == {"total", "trainable", "active"}
    assert answer["parameters"]["total"] == 124_439_808
    memory = answer["memory"]
    assert set(memory["moments"]) == {"forward_end", "forward_peak", "backward_peak", "optimizer_peak", "steady"}
    assert sum(memory["breakdown"].values()) == memory["peak_allocated"] == memory["moments"][memory["peak_moment"]]
    assert memory["peak_allocated"] <= memory["peak_reserved"] <= memory["device_used"]


def test_a_frame() -> None:
    pytest.importorskip("pandas")
    frame = planner.estimate(DOCUMENT).to_frame()
    assert frame.loc["steady", "weights"] > 0


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": "gtp2"}, UnknownName, "gpt2"),
        ({"hardware": {"gpu": "rtx-4091"}}, UnknownName, "rtx-4090"),
        ({"offload": "parameters"}, PlanError, "zero 3"),
        ({"parallelism": {"tensor": 2}, "hardware": {"gpu": "h100", "gpus_per_node": 2}}, NotCovered, "tensor"),
        ({"data": {"sequence_length": 2**31, "micro_batch_size": 2**24}}, PlanError, "sequence_length"),
    ],
)
def test_refusals(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        planner.estimate({**DOCUMENT, **change})


def test_lora_without_targets_takes_the_libraries_choice_and_says_so() -> None:
    answer = planner.estimate({**DOCUMENT, "method": "lora"})
    assert answer.parameters.trainable == 12 * 8 * (768 + 3 * 768)
    assert any("c_attn" in line for line in answer.assumptions)
