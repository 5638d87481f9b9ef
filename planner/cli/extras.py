"""`planner trace` and `planner app`: commands that need an optional extra of the package."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from planner.cli.answers import as_json_option, fetch_option
from planner.errors import SourceUnavailable

__all__ = ["app", "trace"]


@click.command()
@click.argument("plan")
@as_json_option
@fetch_option
def trace(plan: str, as_json: bool, fetch: bool) -> None:
    """Replay the real training step of PLAN in PyTorch, with neither memory nor arithmetic nor a GPU."""
    from planner.readers.plan_document import document_from_path, plan_from_mapping

    document = document_from_path(plan)
    plan_from_mapping(document)
    _need("torch", "a dry run", "torch")
    import planner

    run = planner.trace(document)
    moments = dict(run.moments)
    answer = {"peak_allocated": run.peak_allocated, "peak_moment": run.peak_moment, "moments": moments}
    if as_json:
        click.echo(json.dumps(answer | {"breakdown": dict(run.breakdown)}, indent=2))
        return
    from planner.units import format_bytes
    from planner.writers.terminal import console, facts_table

    printer = console()
    printer.print(f"peak_allocated {format_bytes(run.peak_allocated)}, at {run.peak_moment}")
    printer.print(facts_table(("moment", "allocated"), [(name, format_bytes(size)) for name, size in moments.items()]))
    parts = [(name, format_bytes(size)) for name, size in run.breakdown.items() if size]
    printer.print(facts_table(("at the peak", ""), parts))


@click.command()
def app() -> None:
    """Open the planner in a browser."""
    import subprocess

    _need("streamlit", "the app", "app")
    script = Path(__file__).resolve().parents[2] / "app.py"
    if not script.is_file():
        raise SourceUnavailable("The app's app.py is not beside the package; run it from a checkout of the project.")
    raise click.exceptions.Exit(subprocess.call([sys.executable, "-m", "streamlit", "run", str(script)]))


def _need(module: str, what: str, extra: str) -> None:
    """Raise SourceUnavailable unless an optional package is installed."""
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise SourceUnavailable(
            f"{what.capitalize()} needs {module}; install the extra: pip install 'planner[{extra}]'."
        )
