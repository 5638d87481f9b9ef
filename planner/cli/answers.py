"""`planner estimate`, and how every command prints an answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import click

from planner.errors import PlannerError, SourceUnavailable

if TYPE_CHECKING:
    from planner.plan import ServingPlan, TrainingPlan

__all__ = ["as_json_option", "can_draw", "estimate", "fetch_option", "show_answer", "unit_option", "verbose_option"]

as_json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the whole answer as JSON, nothing rounded."
)
fetch_option = click.option("--fetch", is_flag=True, help="Allow the model's configuration to be downloaded.")
verbose_option = click.option("--verbose", is_flag=True, help="List every assumption.")
unit_option = click.option("--gb", "unit", flag_value="GB", help="Print GB (10^9 bytes) instead of GiB (2^30).")


@click.command()
@click.argument("plan")
@as_json_option
@fetch_option
@verbose_option
@unit_option
def estimate(plan: str, as_json: bool, fetch: bool, verbose: bool, unit: str | None) -> None:
    """Answer PLAN: a YAML or JSON file, "-" for standard input, or a .jsonl file with one plan a line.

    A .jsonl file is answered with one JSON object a line, in its order; a bad line is answered {"error": "..."}.
    """
    if plan.endswith(".jsonl"):
        _answer_lines(plan, fetch)
        return
    from planner.readers.plan_document import document_from_path

    show_answer(document_from_path(plan), as_json=as_json, fetch=fetch, verbose=verbose, unit=unit)


def show_answer(document: Mapping[str, Any], *, as_json: bool, fetch: bool, verbose: bool, unit: str | None) -> None:
    """Print the answer to one document, as JSON or as a report."""
    import planner
    from planner.readers.plan_document import plan_from_mapping

    plan = plan_from_mapping(document)
    # The document goes on, not the plan: only it tells which fields were left to their defaults.
    answer = planner.estimate(document, fetch=fetch).to_dict()
    if as_json:
        click.echo(json.dumps(answer, indent=2, allow_nan=False))
        return
    from planner.writers.terminal import console, report, show

    printer = console()
    show(
        printer,
        report(
            answer,
            title=_title(plan),
            unit=cast(Any, unit or "GiB"),
            verbose=verbose,
            width=printer.width,
            ascii=not can_draw(sys.stdout),
        ),
    )


def _title(plan: TrainingPlan | ServingPlan) -> str:
    """Model and accelerators in one line."""
    model = plan.model if isinstance(plan.model, str) else str(plan.model.get("model_type", "inline model"))
    gpus = plan.hardware.gpus_per_node * plan.hardware.nodes
    return f"{model}, {plan.kind} on {gpus} x {plan.hardware.gpu}"


def can_draw(stream: IO[str]) -> bool:
    return (getattr(stream, "encoding", None) or "").lower().startswith("utf")


def _answer_lines(path: str, fetch: bool) -> None:
    """Answer a file of one plan a line; every line gets exactly one line of output."""
    import planner
    from planner.readers.plan_document import document_from_bytes

    for line in _lines(path):
        try:
            answer = planner.estimate(document_from_bytes(line, "json"), fetch=fetch).to_dict()
        except PlannerError as error:
            answer = {"error": str(error)}
        sys.stdout.write(json.dumps(answer, allow_nan=False) + "\n")


def _lines(path: str) -> Iterator[bytes]:
    from planner.readers.text_documents import shown

    try:
        with Path(path).open("rb") as file:
            yield from file
    except OSError as error:
        raise SourceUnavailable(f"{shown(path, 120)} could not be read: {error.strerror}.") from None
