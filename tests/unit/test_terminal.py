"""Reports for a terminal: bars that add up, columns that line up, plain text where there is no terminal."""

from __future__ import annotations

import io
from itertools import pairwise
from typing import Any

import pytest

from planner.writers.terminal import console, report, show, side_by_side

GIB = 2**30


def training_answer(peak_gib: int, capacity_gib: int = 24) -> dict[str, Any]:
    breakdown = {"weights": (peak_gib - 3) * GIB, "gradients": GIB, "activations": 2 * GIB, "master_weights": 0}
    return {
        "kind": "training",
        "parameters": {"total": 10**9, "trainable": 10**6, "active": 10**9},
        "memory": {
            "peak_allocated": sum(breakdown.values()),
            "peak_moment": "backward_peak",
            "moments": {"forward_end": GIB, "backward_peak": sum(breakdown.values())},
            "capacity": capacity_gib * GIB,
            "fits": peak_gib <= capacity_gib,
            "breakdown": breakdown,
        },
    }


def printed(renderable: Any, width: int = 90) -> str:
    file = io.StringIO()
    printer = console(file)
    printer.width = width
    show(printer, renderable)
    return file.getvalue()


@pytest.mark.parametrize("peak", [10, 23, 24, 30])
def test_bars_of_the_parts_tile_the_bar_of_the_peak(peak: int) -> None:
    lines = printed(report(training_answer(peak), title="a plan", width=90, ascii=True), width=90).splitlines()
    cells = {line.split()[0]: line for line in lines if "#" in line}
    parts = [cells[name] for name in ("weights", "gradients", "activations")]
    whole = {column for column, cell in enumerate(cells["peak_allocated"]) if cell == "#"}
    covered = [{column for column, cell in enumerate(line) if cell == "#"} for line in parts]
    assert set.union(*covered) == whole
    assert all(max(left) + 1 == min(right) for left, right in pairwise(covered))


def test_capacity_is_marked_where_the_plan_overflows() -> None:
    over = printed(report(training_answer(48), title="a plan", width=100, ascii=True), width=100)
    assert "of capacity" in over
    assert "200.0 %" in over
    assert "does not fit" in over


@pytest.mark.parametrize("width", [60, 80, 200])
def test_reports_are_plain_text_that_keeps_figures_whole(width: int) -> None:
    text = printed(report(training_answer(20), title="a plan", width=width, ascii=True), width=width)
    assert text.isascii()
    assert "\x1b" not in text
    for figure in ("17.00 GiB", "1.00 GiB", "2.00 GiB", "20.00 GiB", "24.00 GiB"):
        assert figure in text
    assert max(map(len, text.splitlines())) <= width


def test_empty_parts_are_left_out() -> None:
    assert "master weights" not in printed(report(training_answer(20), title="a plan"))
    small, large = training_answer(20), training_answer(30)
    assert "master weights" not in printed(side_by_side([("a", small), ("b", large)]))
    large["memory"]["breakdown"]["master_weights"] = GIB
    assert "master weights" in printed(side_by_side([("a", small), ("b", large)]))


def test_commands_are_never_broken() -> None:
    command = "planner finetune " + "x" * 100
    answer = training_answer(20) | {"next_commands": [command], "warnings": ["word " * 40]}
    lines = printed(report(answer, title="a plan", width=60), width=60).splitlines()
    assert f"  $ {command}" in [line.rstrip() for line in lines]
    assert all(line.startswith("    word") or line.startswith("  - word") for line in lines if "word" in line)


def test_comparison_has_a_column_for_every_plan() -> None:
    text = printed(side_by_side([("small", training_answer(10)), ("none", None), ("large", training_answer(30))]))
    rows = {line[:20].strip(): line.split() for line in text.splitlines()}
    assert rows["weights"][1:] == ["7.00", "GiB", "-", "27.00", "GiB"]
    assert rows["verdict"][1:] == ["fits", "-", "does", "not", "fit"]
    assert "peak_reserved" not in rows
