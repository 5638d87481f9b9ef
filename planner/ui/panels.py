"""The outputs of a page: the verdict, the bar of memory, the moments, the table, and what was assumed.

Each panel takes an answer as `Estimate.to_dict()` gives it and draws it on the current container. No arithmetic:
figures, tables and units come from the package.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import streamlit as st

from planner import figures, tables
from planner.plan import ServingPlan, TrainingPlan
from planner.units import format_bytes
from planner.writers.plan_document import plan_to_yaml

__all__ = [
    "capacity",
    "downloads",
    "links",
    "look",
    "memory",
    "moments",
    "notes",
    "plain",
    "refusal",
    "verdict",
    "verdict_sentence",
]

Answer = Mapping[str, Any]

_CHART: Mapping[str, Any] = {"displayModeBar": False, "responsive": True}
_DEFAULT = "default: "


def look() -> None:
    """Less empty space above the page than streamlit leaves."""
    st.html(Path(__file__).with_name("page.css"))


def verdict_sentence(answer: Answer, unit: Any) -> str:
    """The verdict in one sentence, its sizes in `unit`."""
    found, held = answer["verdict"], answer["memory"]
    room, band = (format_bytes(abs(found[name]), unit) for name in ("head_room_bytes", "band_bytes"))
    if answer["kind"] == "serving":
        load = f"{held['concurrency']:,} x {held['context_length']:,} tokens"
        match found["outcome"]:
            case "fits":
                return f"**Fits: {load}, and {room} of cache for more.**"
            case "tight":
                return f"**Tight: {load} leave {room} of cache, inside the known error of {band}.**"
            case _:
                return f"**Does not fit: {load} are short by {room} of cache.**"
    where = found["moment"].replace("_", " ")
    match found["outcome"]:
        case "fits":
            return f"**Fits: {room} spare.** The highest moment is the {where}."
        case "tight":
            return f"**Tight: {room} spare, inside the known error of {band}.** The highest moment is the {where}."
        case _:
            return f"**Does not fit: short by {room}** on {found['rank']}, at the {where}."


_BOXES: Mapping[str, tuple[Callable[..., Any], str]] = {
    "fits": (st.success, ":material/check_circle:"),
    "tight": (st.warning, ":material/warning:"),
    "does_not_fit": (st.error, ":material/cancel:"),
}


def verdict(answer: Answer, unit: Any) -> None:
    """The verdict as sentence, icon and colour, and the figures that other tools read."""
    draw, icon = _BOXES[answer["verdict"]["outcome"]]
    draw(verdict_sentence(answer, unit), icon=icon)
    held = answer["memory"]
    peak = f"peak_allocated {format_bytes(held['peak_allocated'], unit)}, " if "peak_allocated" in held else ""
    used, capacity = (format_bytes(held[name], unit) for name in ("device_used", "capacity"))
    cached = " with what the allocator keeps cached, which the verdict does not count as needed" if peak else ""
    st.caption(f"On each GPU of {capacity}: {peak}device_used {used}{cached}.")


def refusal(sentence: str, previous: str | None) -> None:
    """Why the controls as they stand have no answer, and what the answer below belongs to."""
    tail = f" Below is the last answer, for {previous}." if previous else ""
    st.info(f"**Not answered:** {plain(sentence)}{tail}", icon=":material/edit:")


def memory(answer: Answer, unit: Any) -> None:
    """The bar of memory with its table, and what the parts are."""
    st.subheader("Where the memory goes", anchor=False)
    st.plotly_chart(
        figures.memory_bar(answer, unit), key="memory_bar", config=dict(_CHART), alt=figures.describe(answer, unit)
    )
    text = tables.breakdown_text(answer, unit)
    text["part"] = [f"**{part}**" if part.startswith("=") else part for part in text["part"]]
    st.table(text, border="horizontal", hide_index=True)
    with st.expander("What the parts are"):
        sums = [part.removeprefix("= ") for part in tables.breakdown_text(answer)["part"] if part.startswith("=")]
        shown = [*tables.breakdown_frame(answer).index, *sums]
        st.markdown("\n".join(f"- **{name.replace('_', ' ')}**: {tables.MEANINGS[name]}" for name in shown))


def capacity(answer: Answer, unit: Any) -> None:
    """What a serving deployment can hold: tokens, context, sequences."""
    st.subheader("What it can hold", anchor=False)
    st.table(tables.serving_text(answer, unit), border="horizontal", hide_index=True, hide_header=True)
    st.caption("Tokens and sequences are those of all replicas together; sizes are those of one GPU.")


def moments(answer: Answer, unit: Any) -> None:
    """The moments of a training step as bars with the same colours."""
    st.subheader("The moments of a step", anchor=False)
    held = answer["memory"]["moments"]
    listed = ", ".join(f"{name.replace('_', ' ')} {format_bytes(size, unit)}" for name, size in held.items())
    st.plotly_chart(figures.moments(answer, unit), key="moments", config=dict(_CHART), alt=f"Bars: {listed}.")
    st.caption("Allocated by tensors, in the second step and later. The dashed line is the card's capacity.")


def notes(answer: Answer) -> None:
    """Warnings in full; assumptions folded, the fields left at their default last."""
    for warning in answer["warnings"]:
        st.caption(f":material/info: {plain(warning)}")
    stated = [line for line in answer["assumptions"] if not line.startswith(_DEFAULT)]
    defaults = [line.removeprefix(_DEFAULT) for line in answer["assumptions"] if line.startswith(_DEFAULT)]
    with st.expander(f"Assumptions ({len(stated)}) and defaults ({len(defaults)})"):
        st.markdown("\n".join(f"- {plain(line)}" for line in stated))
        st.code("\n".join(defaults), language=None)
    with st.expander("Outside the tensors: sources"):
        terms = answer["memory"].get("device_terms") or {}
        st.markdown(
            "\n".join(f"- **{name.replace('_', ' ')}**: {plain(term['source'])}" for name, term in terms.items())
        )


def downloads(plan: TrainingPlan | ServingPlan, answer: Answer) -> None:
    """The plan as YAML and the answer as JSON, to keep or to give to `planner estimate`."""
    with st.container(horizontal=True):
        st.download_button(
            "Plan (YAML)", plan_to_yaml(plan), "plan.yaml", "application/yaml", on_click="ignore", key="plan_yaml"
        )
        st.download_button(
            "Answer (JSON)",
            json.dumps(dict(answer), indent=2) + "\n",
            "answer.json",
            "application/json",
            on_click="ignore",
            key="answer_json",
        )


def links(address: str, commands: Sequence[str]) -> None:
    """The address of this plan, every control in it, and the commands that go on from here."""
    with st.expander("Link to this plan, and commands to go on"):
        st.code(address, language=None, wrap_lines=True)
        st.code("\n".join(commands), language="bash", wrap_lines=True)


def plain(sentence: str) -> str:
    """A sentence that markdown prints as it is."""
    return "".join(f"\\{character}" if character in "\\`*_{}[]<>#$~|:" else character for character in sentence)
