"""Tables hold the answer's own bytes; the text for people adds nothing but units."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("pandas")

import planner
from planner import tables
from planner.units import format_bytes


@pytest.fixture(scope="module")
def answer() -> dict[str, Any]:
    return planner.estimate(
        {"model": "gpt2", "hardware": {"gpu": "rtx-4090"}, "data": {"sequence_length": 256}}
    ).to_dict()


def test_parts_add_up_to_what_the_device_shows(answer: dict[str, Any]) -> None:
    frame = tables.breakdown_frame(answer)
    assert frame["bytes"].sum() == answer["memory"]["device_used"]
    assert frame["share_of_capacity"].sum() * answer["memory"]["capacity"] == pytest.approx(frame["bytes"].sum())
    assert (frame["bytes"] > 0).all()


def test_sums_stand_below_their_parts(answer: dict[str, Any]) -> None:
    text = tables.breakdown_text(answer)
    parts = list(text["part"])
    assert parts.index("= peak_allocated") < parts.index("allocator slack") < parts.index("= peak_reserved")
    assert parts[-1] == "= device_used"
    held = answer["memory"]
    for name in ("peak_allocated", "peak_reserved", "device_used"):
        assert text.set_index("part").loc[f"= {name}", "size"] == format_bytes(held[name])


def test_sums_stand_there_when_the_capacity_leaves_no_slack() -> None:
    full = planner.estimate({"model": "Llama-3.1-8B", "hardware": {"gpu": "rtx-4090"}}).to_dict()
    text = tables.breakdown_text(full)
    assert "allocator slack" not in list(text["part"])
    assert [part for part in text["part"] if part.startswith("=")] == [
        "= peak_allocated",
        "= peak_reserved",
        "= device_used",
    ]
    assert tables.breakdown_frame(full)["bytes"].sum() == full["memory"]["device_used"]


def test_gb_is_printed_where_it_is_asked_for(answer: dict[str, Any]) -> None:
    sizes = tables.breakdown_text(answer, "GB")["size"]
    assert not sizes.str.contains("iB").any()


def test_moments_have_their_sums(answer: dict[str, Any]) -> None:
    frame = tables.moments_frame(answer)
    assert dict(frame["total"]) == answer["memory"]["moments"]


def test_states_have_their_sums() -> None:
    frame = tables.states_frame({"whole": {"weights": 2, "gradients": 3}})
    assert frame.loc["whole", "total"] == 5


def test_limits_that_memory_does_not_set_say_so() -> None:
    plan = {"kind": "serving", "model": "gpt2", "hardware": {"gpu": "rtx-4090"}, "requests": {"context_length": 512}}
    serving = planner.estimate(plan).to_dict()
    text = tables.serving_text(serving).set_index("figure")["value"]
    assert text["most sequences of 512 tokens"] == f"{serving['memory']['max_concurrent_sequences']:,}"
    serving["memory"]["longest_context"] = None
    assert "not limited by memory" in set(tables.serving_text(serving)["value"])
    assert tables.serving_text(serving, "GB")["value"].str.contains("GiB|KiB").sum() == 0
