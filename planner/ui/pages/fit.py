"""Fit: does training or fine-tuning a model fit the memory of a GPU, when is the peak, and what is every byte?"""

import streamlit as st

import planner
from planner.errors import PlannerError
from planner.ui import controls, panels, state

asked = state.requested()
panels.look()
with st.container(horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"):
    st.title("Does it fit?", anchor=False, width="content")
    unit = controls.unit_switch()
answer_place = st.container(key="verdict")
input_column, result_column = st.columns([2, 3], gap="large")

with input_column:
    inputs = controls.training_inputs(unit)
values = {**inputs.values, "unit": unit}

refused = None
try:
    estimate = planner.estimate(inputs.document)
    title = f"{inputs.values['model']}, {inputs.values['method']}, on {inputs.values['gpu']}"
    state.keep("fit", (estimate, title))
except PlannerError as error:
    refused = str(error)

last = state.kept("fit")
with answer_place:
    for sentence in asked.ignored(values):
        st.info(sentence, icon=":material/link_off:")
    if refused is not None:
        panels.refusal(refused, last[1] if last else None)
if last:
    estimate, _ = last
    answer = estimate.to_dict()
    with answer_place:
        panels.verdict(answer, unit)
    with result_column:
        panels.memory(answer, unit)
        panels.moments(answer, unit)
        panels.downloads(estimate.plan, answer)
        panels.links(state.permalink(values), answer["next_commands"])
        panels.notes(answer)
