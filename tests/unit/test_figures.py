"""Figures draw what the answer says: parts that add up, one palette, patterns besides colours, labels with units."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("plotly")

import planner
from planner import figures, tables
from planner.ledger.record import CATEGORIES
from planner.units import format_bytes

PLAN = {
    "model": "gpt2",
    "method": "lora",
    "hardware": {"gpu": "rtx-4090", "gpus_per_node": 2},
    "data": {"sequence_length": 512},
}


@pytest.fixture(scope="module")
def answer() -> dict[str, Any]:
    return planner.estimate(PLAN).to_dict()


def bars(figure: Any) -> list[Any]:
    return [trace for trace in figure.data if trace.type == "bar"]


def test_the_bar_ends_at_device_used_and_the_line_is_the_capacity(answer: dict[str, Any]) -> None:
    figure = figures.memory_bar(answer)
    assert sum(bar.x[0] for bar in bars(figure)) == answer["memory"]["device_used"]
    assert figure.layout.shapes[0].x0 == answer["memory"]["capacity"]
    assert format_bytes(answer["memory"]["capacity"]) in figure.layout.annotations[0].text


def test_each_moment_s_row_adds_up_to_its_level(answer: dict[str, Any]) -> None:
    figure = figures.moments(answer)
    for index, level in enumerate(answer["memory"]["moments"].values()):
        assert sum(bar.x[index] for bar in bars(figure)) == level
        assert figure.data[0].y[index].removesuffix("</b>").endswith(format_bytes(level))
    highest = [label for label in figure.data[0].y if "highest" in label]
    assert highest == [f"<b>backward peak<br>highest: {format_bytes(answer['memory']['peak_allocated'])}</b>"]


@pytest.mark.parametrize("unit", ["GiB", "GB"])
def test_every_size_says_its_unit(answer: dict[str, Any], unit: Any) -> None:
    for figure in (figures.memory_bar(answer, unit), figures.moments(answer, unit)):
        assert figure.layout.xaxis.ticktext[-1].endswith(f" {unit}")
        other = "GB" if unit == "GiB" else "GiB"
        assert f" {other}" not in figure.to_json()


def test_a_category_looks_the_same_in_every_figure_and_like_no_other(answer: dict[str, Any]) -> None:
    drawn = {
        bar.name: (bar.marker.color, bar.marker.pattern.shape)
        for figure in (figures.memory_bar(answer), figures.moments(answer))
        for bar in bars(figure)
    }
    for figure in (figures.memory_bar(answer), figures.moments(answer)):
        assert all(drawn[bar.name] == (bar.marker.color, bar.marker.pattern.shape) for bar in bars(figure))
    assert len(set(drawn.values())) == len(drawn)


def test_the_palette_and_the_glossary_know_every_category_of_the_ledger() -> None:
    assert set(CATEGORIES) <= set(figures.PALETTE)
    assert set(figures.PALETTE) <= set(tables.MEANINGS)
    looks = {(paint.colour, paint.pattern) for paint in figures.PALETTE.values()}
    assert len(looks) == len(figures.PALETTE)


def test_the_description_holds_every_part(answer: dict[str, Any]) -> None:
    text = figures.describe(answer)
    for name, size in tables.breakdown_frame(answer)["bytes"].items():
        assert str(name).split("_")[-1] in text and format_bytes(size) in text


def test_zero_states_draws_a_row_for_each_way_of_sharding() -> None:
    figure = figures.zero_states({"whole": {"weights": 8, "gradients": 8}, "cut": {"weights": 2, "gradients": 8}}, "GB")
    assert [sum(bar.x[row] for bar in bars(figure)) for row in (0, 1)] == [16, 10]
    assert list(figure.data[0].y) == ["whole<br>16 B", "cut<br>10 B"]
