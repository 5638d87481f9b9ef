"""`planner demo`: what one model needs, in one screen."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import click

from planner.cli.answers import can_draw
from planner.errors import NotCovered

__all__ = ["demo"]

_DEMO_MODEL = "meta-llama/Llama-3.1-8B"
_ONE_CARD = {"hardware": {"gpu": "rtx-4090"}, "data": {"sequence_length": 2048, "micro_batch_size": 1}}
_DEMO_TUNING: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("full", {**_ONE_CARD, "method": "full", "recompute": "full"}),
    ("LoRA", {**_ONE_CARD, "method": {"name": "lora", "rank": 16, "targets": "all-linear"}, "recompute": "full"}),
    ("QLoRA", {**_ONE_CARD, "method": {"name": "qlora", "rank": 16, "targets": "all-linear"}, "recompute": "full"}),
)
_DEMO_TRAINING = {
    "hardware": {"gpu": "h100-sxm", "gpus_per_node": 8},
    "data": {"sequence_length": 8192, "micro_batch_size": 1},
    "precision": "bf16-amp",
    "recompute": "full",
    "parallelism": {"zero": 3},
}
_DEMO_SERVING = {
    "kind": "serving",
    "hardware": {"gpu": "rtx-4090"},
    "requests": {"context_length": 8192, "concurrency": 8},
}


@click.command()
def demo() -> None:
    """Show what one model needs: fine-tuned on one 24 GB card, pre-trained on eight H100, served on one card."""
    import planner
    from planner.writers.terminal import console, report, show, side_by_side

    printer = console()
    ascii = not can_draw(sys.stdout)

    def answer(document: Mapping[str, Any]) -> Mapping[str, Any] | None:
        try:
            return planner.estimate({"model": _DEMO_MODEL, **document}).to_dict()
        except NotCovered as error:
            printer.print(f"not covered: {error}")
            return None

    printer.print(f"{_DEMO_MODEL} fine-tuned on one RTX 4090 (24 GB): one sequence of 2048 tokens, full recompute\n")
    show(printer, side_by_side([(title, answer(document)) for title, document in _DEMO_TUNING]))
    for title, document in (
        (f"\n{_DEMO_MODEL} pre-trained on 8 x H100 SXM: FSDP (zero 3), sequences of 8192 tokens", _DEMO_TRAINING),
        (f"\n{_DEMO_MODEL} served on one RTX 4090: eight requests of up to 8192 tokens", _DEMO_SERVING),
    ):
        found = answer(document)
        if found is not None:
            # A first screen: the small print is one `planner estimate` away, and the commands stand once, at the end.
            shown = {**found, "next_commands": (), "assumptions": (), "warnings": ()}
            shown["memory"] = {name: value for name, value in found["memory"].items() if name != "device_terms"}
            show(printer, report(shown, title=title, width=printer.width, ascii=ascii))
    show(
        printer,
        "\nNext\n"
        "  planner finetune meta-llama/Llama-3.1-8B --gpu rtx-4090 --method qlora   your own question\n"
        "  planner estimate plan.yaml --json                                        a plan file, every figure\n"
        "  planner models, planner gpus                                             what is known\n"
        "  make app                                                                 the same in a browser",
    )
