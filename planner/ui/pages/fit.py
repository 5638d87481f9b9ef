"""Fit: does training or fine-tuning a model fit the memory of a GPU, when is the peak, and what is every byte?"""

from typing import Any

from planner.ui import controls, frame, panels


def results(answer: dict[str, Any], unit: Any) -> None:
    panels.memory(answer, unit)
    panels.moments(answer, unit)


frame.page("fit", "Does it fit?", controls.training_inputs, results)
