"""What every page does: ask, answer, and keep the last good answer while the question is broken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import streamlit as st

import planner
from planner.errors import PlannerError, UnknownName
from planner.ui import controls, panels, state

__all__ = ["page"]


def page(
    name: str,
    title: str,
    ask: Callable[[Any], controls.Inputs],
    draw: Callable[[dict[str, Any], Any], None],
) -> None:
    """A page of controls on one side and results on the other, the verdict above both.

    ask: draws the controls, given the unit. draw: draws the results of an answer. On a narrow screen the order is
    verdict, controls, results.
    """
    asked = state.requested()
    panels.look()
    with st.container(horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"):
        st.title(title, anchor=False, width="content")
        unit = controls.unit_switch()
    verdict_place = st.container()
    input_place, result_place = st.columns([2, 3], gap="large")
    with input_place:
        inputs = ask(unit)
    values = {**inputs.values, "unit": unit}
    refused = None
    try:
        estimate = planner.estimate(inputs.document)
        state.keep(name, (estimate, f"{values['model']} on {values['gpu']}"))
    except PlannerError as error:
        refused = str(error)
    last = state.kept(name)
    with verdict_place:
        if refused is not None:
            panels.refusal(refused, last[1] if last else None)
            _offer_to_fetch(str(values["model"]))
        verdict_box = st.container(key="last_verdict" if refused else "verdict")
        for sentence in asked.ignored(values):
            st.info(panels.plain(sentence), icon=":material/link_off:")
    if last is None:
        return
    estimate, _ = last
    answer = estimate.to_dict()
    with verdict_box:
        panels.verdict(answer, unit)
    with result_place, st.container(key="last_results" if refused else "results"):
        draw(answer, unit)
        panels.downloads(estimate.plan, answer)
        panels.links(state.permalink(values), answer["next_commands"])
        panels.notes(answer)


def _offer_to_fetch(model: str) -> None:
    """A button that reads an unknown model's config.json from Hugging Face: the only thing here that uses the network.

    It is offered when the name is what is missing, and once it is read the page answers from the local cache.
    """
    try:
        planner.load_model(model)
        return
    except PlannerError as error:
        if not isinstance(error, UnknownName):
            return
    if st.button("Read its config.json from Hugging Face", icon=":material/download:", key="fetch"):
        try:
            planner.load_model(model, fetch=True)
        except PlannerError as error:
            panels.refusal(str(error), None)
        else:
            st.rerun()
