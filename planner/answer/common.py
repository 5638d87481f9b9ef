"""What every answer has: exact parameter counts, warnings about the model, and the model's name for a command."""

from __future__ import annotations

from dataclasses import dataclass

from planner.model.shape import ModelShape
from planner.plan import ServingPlan, TrainingPlan

__all__ = ["Parameters", "model_warnings", "name_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Exact counts: all parameters with the adapters, those that train, those that one token meets."""

    total: int
    trainable: int
    active: int


def model_warnings(shape: ModelShape) -> tuple[str, ...]:
    """Parts of the model that no row describes, and sizes that its config leaves open."""
    warnings = [f"not modelled: {part}" for part in shape.uncovered]
    if shape.assumed:
        warnings.append("the config leaves these to the reference class's defaults: " + ", ".join(shape.assumed))
    return tuple(warnings)


def name_of(plan: TrainingPlan | ServingPlan) -> str:
    """What to call the plan's model on a command line."""
    return plan.model if isinstance(plan.model, str) else "config.json"
