"""Serve: do a model and the caches of its requests fit, and how many tokens and sequences do?"""

from typing import Any

from planner.ui import controls, frame, panels


def results(answer: dict[str, Any], unit: Any) -> None:
    panels.memory(answer, unit)
    panels.capacity(answer, unit)


frame.page("serve", "Does it serve?", controls.serving_inputs, results)
