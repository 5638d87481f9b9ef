"""Answers as reports for a person at a terminal: the verdict first, then where the bytes are, then what was assumed.

Every function takes the answer as `Estimate.to_dict()` gives it and returns something `rich` can print; `console`
makes the printer. Piped output is plain text, and an ASCII terminal gets `#` for bars.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from planner.units import (
    ByteUnit,
    format_bytes,
    format_count,
    format_money,
    format_seconds,
    format_share,
)

__all__ = ["console", "facts_table", "report", "show", "side_by_side"]

Answer = Mapping[str, Any]

_STYLE_OF_OUTCOME = {"fits": "bold green", "tight": "bold yellow", "does_not_fit": "bold red"}
_WORD_OF_OUTCOME = {"fits": "fits", "tight": "tight", "does_not_fit": "does not fit"}
_FIRST_ASSUMPTIONS = 6
_COLUMNS_BESIDE_BARS = 56


def console(file: IO[str] | None = None) -> Console:
    """A printer for `file` (standard output): colours on a terminal unless NO_COLOR is set, plain text elsewhere."""
    return Console(file=file or sys.stdout, highlight=False, markup=False, emoji=False)


def show(printer: Console, *renderables: RenderableType) -> None:
    """Print; lines that may not be broken (commands to copy) run past the edge instead of being cut."""
    for renderable in renderables:
        printer.print(renderable, crop=False)


def report(
    answer: Answer,
    *,
    title: str,
    unit: ByteUnit = "GiB",
    verbose: bool = False,
    width: int = 100,
    ascii: bool = False,
) -> Group:
    """The report of a training or serving answer, for `width` columns. `verbose` unfolds the assumptions."""
    memory = answer["memory"]
    bars = _Bars(width=min(max(width - _COLUMNS_BESIDE_BARS, 4), 48), ascii=ascii)
    parts: list[RenderableType] = [Text(title, style="bold"), _verdict(answer), Text()]
    if answer["kind"] == "serving":
        parts += [_serving_memory(memory, unit, bars), Text(), _pairs(_serving_facts(memory, unit))]
    else:
        parts += [_waterfall(memory, unit, bars), Text(), _moments(memory, unit)]
    parts += _device_terms(memory, unit)
    parts += _time_and_cost(answer)
    parts += _notes("Warnings", answer.get("warnings", ()), style="yellow")
    assumptions = list(answer.get("assumptions", ()))
    folded = assumptions if verbose else assumptions[:_FIRST_ASSUMPTIONS]
    parts += _notes("Assumptions", folded)
    if len(folded) < len(assumptions):
        parts.append(Text(f"  and {len(assumptions) - len(folded)} more; --verbose lists them.", style="dim"))
    parts += _commands(answer.get("next_commands", ())[:3])
    return Group(*parts)


def side_by_side(columns: Sequence[tuple[str, Answer | None]], *, unit: ByteUnit = "GiB") -> Table:
    """Training answers in one table, a column each, a row for every part of the peak; None leaves a column empty.

    Parts that hold nothing anywhere are left out; "-" stands for a part that an answer does not have.
    """
    table = _table("", *(title for title, _ in columns))
    answers = [answer for _, answer in columns]
    breakdowns = [answer["memory"]["breakdown"] for answer in answers if answer]
    parts = list(dict.fromkeys(name for breakdown in breakdowns for name, size in breakdown.items() if size))

    def row(label: str, cell: Callable[[Answer], str], style: str = "") -> None:
        table.add_row(label, *(cell(answer) if answer else "-" for answer in answers), style=style)

    def size_of(name: str) -> Callable[[Answer], str]:
        return lambda answer: _size(answer["memory"]["breakdown"].get(name), unit)

    row("trainable parameters", lambda answer: format_count(answer["parameters"]["trainable"]))
    for name in parts:
        row(_words(name), size_of(name))
    table.add_section()
    for name in ("peak_allocated", "peak_reserved", "device_used", "capacity"):
        if any(answer and answer["memory"].get(name) is not None for answer in answers):
            row(name, lambda answer, name=name: _size(answer["memory"].get(name), unit), "bold")
    row("peak at", lambda answer: _words(answer["memory"]["peak_moment"]))
    row("verdict", lambda answer: _WORD_OF_OUTCOME[_outcome(answer)], "bold")
    return table


def facts_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1) -> Table:
    """A plain table; the first `text_columns` are text, the others are aligned to the right."""
    table = _table(*header)
    for column in table.columns[:text_columns]:
        column.justify = "left"
    for row in rows:
        table.add_row(*row)
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _outcome(answer: Answer) -> str:
    verdict = answer.get("verdict")
    if verdict:
        return verdict["outcome"]
    return "fits" if answer["memory"]["fits"] else "does_not_fit"


def _verdict(answer: Answer) -> Text:
    outcome = _outcome(answer)
    verdict = answer.get("verdict") or {}
    sentence = verdict.get("sentence") or f"The plan {_WORD_OF_OUTCOME[outcome]}."
    return Text(sentence, style=_STYLE_OF_OUTCOME[outcome])


def _words(name: str) -> str:
    return name.replace("_", " ")


def _size(size_bytes: float | None, unit: ByteUnit) -> str:
    return "-" if size_bytes is None else format_bytes(size_bytes, unit)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bars:
    """Bars of a waterfall in `width` cells, drawn with # on terminals that have ASCII alone."""

    width: int
    ascii: bool

    def bar(self, start: float, size: float, scale: float, mark: float | None) -> str:
        """One bar from `start` on, where `scale` is the right edge; `mark` is where the capacity lies."""
        block, line = ("#", "|") if self.ascii else ("█", "│")
        first, last = (round(edge / scale * self.width) for edge in (start, start + size))
        last = max(last, first + 1)
        cells = [block if first <= cell < last else " " for cell in range(self.width + 1)]
        if mark is not None:
            cell = min(round(mark / scale * self.width), self.width)
            cells[cell] = cells[cell] if cells[cell] == block else line
        return "".join(cells).rstrip()


def _waterfall(memory: Mapping[str, Any], unit: ByteUnit, bars: _Bars) -> Table:
    """The parts of the peak end to end, against the capacity, and the figures that outside tools read."""
    capacity, peak = memory.get("capacity"), memory["peak_allocated"]
    scale = max(capacity or 0, peak, memory.get("device_used") or 0, 1)
    table = _table(f"At the peak ({_words(memory['peak_moment'])})", "", "of capacity")
    table.add_column("", no_wrap=True)
    start = 0
    for name, size in memory["breakdown"].items():
        if size:
            share = format_share(size / capacity) if capacity else "-"
            table.add_row(f"  {_words(name)}", _size(size, unit), share, bars.bar(start, size, scale, capacity))
            start += size
    for name in ("peak_allocated", "peak_reserved", "device_used"):
        size = memory.get(name)
        if size is not None:
            share = format_share(size / capacity) if capacity else "-"
            table.add_row(name, _size(size, unit), share, bars.bar(0, size, scale, capacity), style="bold")
    table.add_row("capacity", _size(capacity, unit), "", "")
    if memory.get("host_memory"):
        table.add_row("host memory", _size(memory["host_memory"], unit), "", "")
    return table


def _moments(memory: Mapping[str, Any], unit: ByteUnit) -> Table:
    table = _table("Moments of a step", "allocated", "")
    for name, size in memory.get("moments", {}).items():
        table.add_row(f"  {_words(name)}", _size(size, unit), "<- peak" if name == memory["peak_moment"] else "")
    return table


def _device_terms(memory: Mapping[str, Any], unit: ByteUnit) -> list[RenderableType]:
    terms = memory.get("device_terms")
    if not terms:
        return []
    table = _table("Outside the tensors", "", "range")
    table.add_column("source", overflow="fold")
    for name, term in terms.items():
        low, high = term.get("low_bytes"), term.get("high_bytes")
        spread = f"{_size(low, unit)} to {_size(high, unit)}" if low is not None and high is not None else ""
        table.add_row(f"  {_words(name)}", _size(term["bytes"], unit), spread, str(term.get("source", "")))
    return [Text(), table]


def _serving_memory(memory: Mapping[str, Any], unit: ByteUnit, bars: _Bars) -> Table:
    """What a serving process holds on one device, end to end against the capacity."""
    capacity = memory.get("capacity")
    parts = {name: memory.get(name) for name in ("weights", "kv_cache", "peak_activations")}
    parts |= {name: term["bytes"] for name, term in (memory.get("device_terms") or {}).items()}
    scale = max(capacity or 0, sum(size or 0 for size in parts.values()), 1)
    table = _table("On each device", "", "of capacity")
    table.add_column("", no_wrap=True)
    start = 0
    for name, size in parts.items():
        if size:
            share = format_share(size / capacity) if capacity else "-"
            table.add_row(f"  {_words(name)}", _size(size, unit), share, bars.bar(start, size, scale, capacity))
            start += size
    table.add_row("capacity", _size(capacity, unit), "", "")
    return table


def _serving_facts(memory: Mapping[str, Any], unit: ByteUnit) -> list[tuple[str, str]]:
    def whole(count: int) -> str:
        return f"{count:,}"

    facts: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
        ("KV cache of one token", "kv_cache_bytes_per_token", lambda size: format_bytes(size, "KiB")),
        ("tokens that fit the cache", "kv_token_capacity", whole),
        ("longest context of one sequence", "longest_context", whole),
        ("most sequences at a time", "max_concurrent_sequences", whole),
    )
    return [(label, printed(memory[key])) for label, key, printed in facts if memory.get(key) is not None]


def _time_and_cost(answer: Answer) -> list[RenderableType]:
    def rate(tokens: float) -> str:
        return f"{tokens:,.0f} tokens/s"

    facts: tuple[tuple[str, str, str, Callable[[Any], str]], ...] = (
        ("one step", "time", "step_seconds", format_seconds),
        ("throughput", "time", "tokens_per_second", rate),
        ("model FLOPs utilisation (MFU)", "time", "mfu", format_share),
        ("whole run", "time", "total_seconds", format_seconds),
        ("first token after", "latency", "ttft_seconds", format_seconds),
        ("each further token", "latency", "tpot_seconds", format_seconds),
        ("output", "throughput", "output_tokens_per_second", rate),
        ("accelerator hours", "cost", "gpu_hours", lambda hours: f"{hours:,.1f} h"),
        ("cost", "cost", "usd", format_money),
        ("cost of a million output tokens", "cost", "usd_per_million_output_tokens", format_money),
        ("energy", "cost", "energy_kwh", lambda energy: f"{energy:,.1f} kWh"),
    )
    rows = []
    for label, section, key, printed in facts:
        value = (answer.get(section) or {}).get(key)
        if value is not None:
            rows.append((label, printed(value)))
    return [Text(), _pairs(rows)] if rows else []


def _pairs(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    for label, value in rows:
        table.add_row(label, value)
    return table


def _notes(heading: str, lines: Iterable[str], *, style: str = "") -> list[RenderableType]:
    """A heading and a list whose long items are continued under themselves."""
    listed = list(lines)
    if not listed:
        return []
    grid = Table.grid()
    for line in listed:
        grid.add_row("  - ", Text(line, style=style))
    return [Text(), Text(heading, style="bold"), grid]


def _commands(lines: Iterable[str]) -> list[RenderableType]:
    """Commands to copy: never broken, however narrow the terminal."""
    listed = [Text(f"  $ {line}", no_wrap=True, overflow="ignore") for line in lines]
    return [Text(), Text("Next", style="bold"), *listed] if listed else []
