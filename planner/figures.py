"""Answers as plotly figures, with one palette for the page, the notebooks and the README.

Every function takes the answer as `Estimate.to_dict()` gives it and returns a figure; nothing is computed here beyond
what a drawing needs. A category has the same colour and the same pattern everywhere. The hues are those of Okabe and
Ito (Color Universal Design, 2008, https://jfly.uni-koeln.de/color/), which stay apart for the three common kinds of
colour blindness; patterns tell categories apart in grey print.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from planner.answer.parts import device_parts
from planner.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["PALETTE", "Paint", "describe", "memory_bar", "moments", "zero_states"]

Answer = Mapping[str, Any]
Unit = Literal["GiB", "GB"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Paint:
    """How a category is drawn: its fill, and the pattern laid over it (one of plotly's pattern shapes)."""

    colour: str
    pattern: str = ""


_BLUE, _SKY, _GREEN, _YELLOW = "#0072B2", "#56B4E9", "#009E73", "#F0E442"
_ORANGE, _VERMILION, _PURPLE, _GREY = "#E69F00", "#D55E00", "#CC79A7", "#9A9A9A"

# States are blue and green, what a pass makes is orange, what sharding and libraries add is purple and yellow, and what
# lies outside the tensors is grey.
PALETTE: Mapping[str, Paint] = {
    "weights": Paint(colour=_BLUE),
    "master_weights": Paint(colour=_BLUE, pattern="/"),
    "gradients": Paint(colour=_SKY),
    "optimizer_states": Paint(colour=_GREEN),
    "kv_cache": Paint(colour=_YELLOW),
    "inputs": Paint(colour=_YELLOW, pattern="."),
    "activations": Paint(colour=_ORANGE),
    "logits_and_loss": Paint(colour=_VERMILION),
    "temporaries": Paint(colour=_YELLOW, pattern="\\"),
    "unsharded_parameters": Paint(colour=_PURPLE),
    "communication_buffers": Paint(colour=_PURPLE, pattern="/"),
    "library_workspaces": Paint(colour=_PURPLE, pattern="x"),
    "allocator_slack": Paint(colour=_GREY),
    "cuda_context": Paint(colour=_GREY, pattern="/"),
    "nccl_buffers": Paint(colour=_GREY, pattern="x"),
    "non_torch": Paint(colour=_GREY, pattern="-"),
    "cuda_graphs": Paint(colour=_PURPLE, pattern="|"),
}
_OTHER = Paint(colour=_GREY, pattern=".")
_FONT = "Source Sans, Source Sans Pro, Helvetica, Arial, sans-serif"
_LINE = "#B0003A"  # on a white line, so that it is seen over every fill and on both themes
_LEGEND_HEIGHT = 90  # the axis' labels, and a legend that takes three rows on a phone
_VISIBLE_SHARE = 0.002  # less than a pixel or two of the bar's width: left to the table


def memory_bar(answer: Answer, unit: Unit = "GiB", *, title: str = "") -> Figure:
    """One stacked bar: every part of the peak and of what lies outside the tensors, against the card's capacity.

    The bar's end is `device_used`. Parts that hold nothing are left out.
    """
    memory = answer["memory"]
    parts = device_parts(memory)
    used, capacity = sum(parts.values()), memory["capacity"]
    scale = max(used, capacity)
    figure = _figure(height=170 + _LEGEND_HEIGHT, title=title)
    for name, size in parts.items():
        figure.add_bar(
            **_bar(name, [size], [""], unit),
            **_INSIDE,
            text=[f"{_words(name)}<br>{format_bytes(size, unit)}"],
            showlegend=size / scale >= _VISIBLE_SHARE,
        )
    _capacity_line(figure, capacity)
    figure.add_annotation(
        x=capacity,
        y=1,
        yref="paper",
        yanchor="bottom",
        xanchor="right" if capacity > scale / 2 else "left",
        text=f"capacity {format_bytes(capacity, unit)}",
        showarrow=False,
    )
    _size_axis(figure, scale * 1.06, unit)
    figure.update_layout(margin={"t": 58 if title else 28, "b": _LEGEND_HEIGHT}, yaxis={"visible": False}, bargap=0.1)
    return figure


def moments(answer: Answer, unit: Unit = "GiB", *, title: str = "") -> Figure:
    """One small stacked bar for each moment of a training step, first moment on top; the highest says so."""
    memory = answer["memory"]
    rows = {
        _row(_words(name), memory["moments"][name], unit, highest=name == memory["peak_moment"]): parts
        for name, parts in memory["breakdowns"].items()
    }
    figure = _stacks(rows, unit, title, at_least=memory["capacity"])
    _capacity_line(figure, memory["capacity"])
    return figure


def zero_states(stages: Mapping[str, Mapping[str, int]], unit: Unit = "GB", *, title: str = "") -> Figure:
    """Training states of one rank, a stacked bar for each way of sharding: {label: {category: bytes}}."""
    rows = {_row(label, sum(states.values()), unit): states for label, states in stages.items()}
    return _stacks(rows, unit, title)


def describe(answer: Answer, unit: Unit = "GiB") -> str:
    """What `memory_bar` shows, in one sentence, for readers who do not see it."""
    parts = sorted(device_parts(answer["memory"]).items(), key=lambda part: -part[1])
    listed = ", ".join(f"{_words(name)} {format_bytes(size, unit)}" for name, size in parts)
    capacity = format_bytes(answer["memory"]["capacity"], unit)
    return f"Stacked bar against a capacity of {capacity}: {listed}."


def _words(name: str) -> str:
    return name.replace("_", " ").replace("cuda", "CUDA").replace("nccl", "NCCL").replace("kv ", "KV ")


_INSIDE: Mapping[str, Any] = {
    "textposition": "inside",
    "insidetextanchor": "middle",
    "textangle": 0,
    "constraintext": "inside",
}


def _bar(name: str, sizes: Sequence[int], labels: Sequence[str], unit: Unit) -> dict[str, Any]:
    """One category of a horizontal stack."""
    paint = PALETTE.get(name, _OTHER)
    light = paint.colour in (_SKY, _YELLOW, _ORANGE, _PURPLE)
    return {
        "x": list(sizes),
        "y": list(labels),
        "name": _words(name),
        "orientation": "h",
        "marker": {
            "color": paint.colour,
            "line": {"width": 1, "color": "rgba(255,255,255,0.7)"},
            "pattern": {
                "shape": paint.pattern,
                "bgcolor": paint.colour,
                "fgcolor": "rgba(0,0,0,0.35)" if light else "rgba(255,255,255,0.75)",
                "size": 7,
                "solidity": 0.25,
            },
        },
        "textfont": {"color": "#101010" if light else "#ffffff", "size": 13},
        "customdata": [format_bytes(size, unit) for size in sizes],
        "hovertemplate": f"{_words(name)}: %{{customdata}}<extra></extra>",
    }


def _row(name: str, size: int, unit: Unit, *, highest: bool = False) -> str:
    """The label of a row: its name, and under it its size, which no narrow screen can cut off there."""
    text = format_bytes(size, unit)
    return f"<b>{name}<br>highest: {text}</b>" if highest else f"{name}<br>{text}"


def _stacks(rows: Mapping[str, Mapping[str, int]], unit: Unit, title: str, *, at_least: int = 0) -> Figure:
    """Stacked bars, a row each, {label: {category: bytes}}, on an axis that reaches `at_least` so far."""
    scale = max(at_least, *(sum(parts.values()) for parts in rows.values()))
    figure = _figure(height=44 * len(rows) + 24 + _LEGEND_HEIGHT, title=title)
    for name in dict.fromkeys(name for parts in rows.values() for name in parts):
        sizes = [parts.get(name, 0) for parts in rows.values()]
        if not any(sizes):
            continue
        figure.add_bar(**_bar(name, sizes, list(rows), unit), showlegend=max(sizes) / scale >= _VISIBLE_SHARE)
    _size_axis(figure, scale * 1.06, unit)
    figure.update_layout(
        margin={"b": _LEGEND_HEIGHT},
        yaxis={"autorange": "reversed", "ticklabelstandoff": 6, "automargin": True},
        bargap=0.35,
    )
    return figure


def _figure(*, height: int, title: str) -> Figure:
    from plotly.graph_objects import Figure

    return Figure(
        layout={
            "template": "none",
            "barmode": "stack",
            "height": height,
            "font": {"family": _FONT, "size": 14},
            "title": {"text": title, "x": 0, "xanchor": "left", "pad": {"l": 8}, "font": {"size": 16}},
            "margin": {"l": 8, "r": 16, "t": 44 if title else 12, "b": 8},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "legend": {
                "orientation": "h",
                "traceorder": "normal",
                "xref": "container",
                "yref": "container",
                "y": 0,
                "yanchor": "bottom",
                "x": 0,
                "font": {"size": 12},
            },
            "hoverlabel": {"font": {"family": _FONT}},
            "dragmode": False,
            # Segments too narrow for their label leave it to the legend.
            "uniformtext": {"mode": "hide", "minsize": 11},
        }
    )


def _size_axis(figure: Figure, largest: float, unit: Unit) -> None:
    """An axis of bytes that is labelled in round numbers of the unit."""
    size = parse_bytes(f"1 {unit}")
    step = next(step for step in _ROUND if largest / (step * size) <= 7)
    ticks = [step * index for index in range(int(largest / (step * size)) + 1)]
    figure.update_xaxes(
        range=[0, largest],
        tickvals=[tick * size for tick in ticks],
        ticktext=[f"{tick:g} {unit}" if tick == ticks[-1] else f"{tick:g}" for tick in ticks],
        gridcolor="rgba(128,128,128,0.25)",
        zeroline=False,
        automargin=True,
        fixedrange=True,
    )
    figure.update_yaxes(fixedrange=True)


_ROUND = [base * 10.0**power for power in range(-3, 9) for base in (1, 2, 5)]


def _capacity_line(figure: Figure, capacity: int) -> None:
    figure.add_vline(x=capacity, line={"color": "rgba(255,255,255,0.85)", "width": 4})
    figure.add_vline(x=capacity, line={"color": _LINE, "width": 2, "dash": "dash"})
