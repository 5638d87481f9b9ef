"""The command line: `planner estimate PLAN`, and commands for people that build a plan from options.

Answers go to standard output. A request that cannot be answered leaves one sentence on standard error and exit code 2;
an interrupt exits with 130, a closed pipe with 141, both in silence. Everything heavy is imported where it is used, so
that `planner estimate plan.json --json` starts quickly.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any, cast

import click

from planner.cli.answers import estimate
from planner.cli.demo_plans import demo
from planner.cli.extras import app, trace
from planner.cli.lists import gpus, models
from planner.cli.plan_flags import finetune, serve, train
from planner.errors import PlannerError, nearest

__all__ = ["commands", "main"]

_LATER = ("compare", "export", "measure", "search")
_EXIT_REFUSED, _EXIT_INTERRUPTED, _EXIT_PIPE_CLOSED = 2, 130, 141


class _Commands(click.Group):
    """A group whose unknown commands are answered with the nearest one, and planned ones by saying so."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0]
        if name in _LATER:
            raise click.UsageError(f"planner {name} is not in this version; planner --help lists what is.")
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            raise click.UsageError(f'There is no command "{name[:40]}"; {nearest(name, self.list_commands(ctx))}')
        return super().resolve_command(ctx, args)


_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(cls=_Commands, invoke_without_command=True, context_settings=_SETTINGS)
@click.pass_context
def commands(context: click.Context) -> None:
    """Memory, time and money of training, fine-tuning and serving a model, before the accelerators are rented."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for _command in (estimate, train, finetune, serve, models, gpus, trace, app, demo):
    commands.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a replaced stream, as under a test runner
            cast(Any, stream).reconfigure(errors="replace")
    try:
        with commands.make_context("planner", list(sys.argv[1:] if arguments is None else arguments)) as context:
            commands.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        return _refuse(error.format_message())
    except PlannerError as error:
        return _refuse(str(error))
    except (KeyboardInterrupt, click.Abort):
        return _EXIT_INTERRUPTED
    except BrokenPipeError:
        # What is still buffered would fail again, loudly, when the interpreter closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_PIPE_CLOSED
    return 0


def _refuse(sentence: str) -> int:
    print(f"planner: {' '.join(sentence.split())}", file=sys.stderr)
    return _EXIT_REFUSED
