"""`planner models` and `planner gpus`: what is known by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import click

from planner.cli.answers import as_json_option
from planner.errors import NotCovered, UnknownName, nearest

__all__ = ["gpus", "models"]


@click.command()
@click.argument("pattern", default="")
@as_json_option
def models(pattern: str, as_json: bool) -> None:
    """List the models of the catalogue whose name holds PATTERN."""
    from planner.ledger.weights import active_parameters, parameter_counts
    from planner.model.catalogue import model_names
    from planner.readers.models import load_model

    rows = []
    for name in _matching(pattern, model_names(), "model"):
        shape = load_model(name)
        total = parameter_counts(shape)["total"]
        rows.append({"name": name, "family": shape.model_type, "parameters": total, "active": active_parameters(shape)})
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    from planner.units import format_count
    from planner.writers.terminal import console, facts_table

    cells = ([row["name"], row["family"], format_count(row["parameters"]), format_count(row["active"])] for row in rows)
    console().print(facts_table(("model", "family", "parameters", "active"), cells, text_columns=2))


@click.command()
@click.argument("pattern", default="")
@as_json_option
def gpus(pattern: str, as_json: bool) -> None:
    """List the accelerators whose name holds PATTERN."""
    from planner.readers.hardware_profiles import device_names, load_hardware

    rows = []
    for name in _matching(pattern, device_names(), "accelerator"):
        device = load_hardware(name)
        rows.append(
            {
                "name": device.name,
                "title": device.title,
                "memory_bytes": _memory_bytes(device),
                "memory_bandwidth_bytes_per_second": device.memory_bandwidth_bytes_per_second,
                "dense_bf16_flops_per_second": dict(device.dense_rates).get("bf16"),
                "tdp_watts": device.tdp_watts,
            }
        )
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    from planner.units import format_bytes, format_flops
    from planner.writers.terminal import console, facts_table

    def cell(value: int | None, printed: Callable[[int], str]) -> str:
        return "-" if value is None else printed(value)

    cells = (
        [
            row["name"],
            cell(row["memory_bytes"], format_bytes),
            cell(row["memory_bandwidth_bytes_per_second"], lambda rate: format_bytes(rate, "GB", 0) + "/s"),
            cell(row["dense_bf16_flops_per_second"], lambda rate: format_flops(rate, per_second=True)),
            cell(row["tdp_watts"], lambda watts: f"{watts} W"),
        ]
        for row in rows
    )
    console().print(facts_table(("accelerator", "memory", "bandwidth", "dense bf16", "power"), cells))


def _memory_bytes(device: Any) -> int | None:
    """The capacity a plan may count on; None where no source states one."""
    try:
        return device.memory_capacity_bytes
    except NotCovered:
        return None


def _matching(pattern: str, names: Iterable[str], what: str) -> list[str]:
    """The names that hold `pattern`, case and separators aside. Raises UnknownName when there are none."""

    def folded(text: str) -> str:
        return "".join(character for character in text.casefold() if character.isalnum() or character == ".")

    known = list(names)
    found = [name for name in known if folded(pattern) in folded(name)]
    if not found:
        raise UnknownName(f'No {what} has "{pattern[:40]}" in its name; {nearest(pattern, known)}')
    return found
