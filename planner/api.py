"""The public functions: a plan or its document in, a typed answer out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.answer import Estimate, answer_serving, answer_training
from planner.hardware import Device, software_device
from planner.model.shape import ModelShape
from planner.plan import ServingPlan, TrainingPlan
from planner.readers.hardware_profiles import load_hardware, resolve_device
from planner.readers.models import load_model
from planner.readers.plan_document import defaults_used, plan_from_mapping

__all__ = ["estimate", "load_hardware", "load_model", "trace"]


def estimate(plan: Mapping[str, Any] | TrainingPlan | ServingPlan, *, fetch: bool = False) -> Estimate:
    """The answer to a plan: what fits, what every byte is, what was assumed.

    plan: a plan value, or a document of the same fields. fetch: allow one download of a model's config.json.
    Raises PlannerError with one sentence when the plan cannot be answered.
    """
    read = plan_from_mapping(plan) if isinstance(plan, Mapping) else plan
    shape = load_model(read.model, fetch=fetch)
    device, notes = _device(read.hardware.gpu)
    defaults = defaults_used(plan)
    if isinstance(read, ServingPlan):
        return answer_serving(read, shape, device, defaults=defaults, notes=notes)
    return answer_training(read, shape, device, defaults=defaults, notes=notes)


def _device(name: str) -> tuple[Device, tuple[str, ...]]:
    """The device of a plan and what choosing it assumed."""
    resolved = resolve_device(name)
    device = software_device(load_hardware(resolved.name))
    notes = (resolved.choice, device.memory_capacity_assumption)
    return device, tuple(note for note in notes if note)


def trace(model_or_plan: Any, **options: Any) -> Any:
    """Replay the real PyTorch step without a GPU. Needs the `torch` extra; see `planner.measure.dry_run`."""
    from planner.measure.dry_run import trace as dry_run

    return dry_run(model_or_plan, **options)


def shape_of(model: str | Mapping[str, Any]) -> ModelShape:
    """The shape of a model by name, path or config.json content."""
    return load_model(model)
