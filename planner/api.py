"""The public functions: a plan or its document in, a typed answer out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from planner.hardware import Device, software_device
from planner.ledger.targets import check_targets
from planner.model.adapter_targets import chosen_by, default_targets
from planner.model.shape import ModelShape
from planner.plan import ServingPlan, TrainingPlan
from planner.readers.hardware_profiles import load_hardware, resolve_device
from planner.readers.models import load_model, load_trained_model
from planner.readers.plan_document import defaults_used, plan_from_mapping

if TYPE_CHECKING:
    from planner.answer.serving import ServingEstimate
    from planner.answer.training import TrainingEstimate

    Estimate = TrainingEstimate | ServingEstimate

__all__ = ["estimate", "load_hardware", "load_model"]


def estimate(plan: Mapping[str, Any] | TrainingPlan | ServingPlan, *, fetch: bool = False) -> Estimate:
    """The answer to a plan: what fits, what every byte is, what was assumed.

    plan: a plan value, or a document of the same fields. fetch: allow one download of a model's config.json.
    Raises PlannerError with one sentence when the plan cannot be answered.
    """
    read = plan_from_mapping(plan)
    device, notes = _device(read.hardware.gpu)
    defaults = defaults_used(plan)
    if isinstance(read, ServingPlan):
        from planner.answer.serving import answer_serving

        shape = load_model(read.model, fetch=fetch)
        return answer_serving(read, shape, device, defaults=defaults, notes=notes)
    from planner.answer.training import answer_training

    shape, trained = load_trained_model(read.model, fetch=fetch)
    read, chosen = _with_targets(read, shape)
    notes += trained + chosen
    return answer_training(read, shape, device, defaults=defaults, notes=notes)


def _device(name: str) -> tuple[Device, tuple[str, ...]]:
    """The device of a plan and what choosing it assumed."""
    resolved = resolve_device(name)
    device = software_device(load_hardware(resolved.name))
    notes = (resolved.choice, device.memory_capacity_assumption)
    return device, tuple(note for note in notes if note)


def _with_targets(plan: TrainingPlan, shape: ModelShape) -> tuple[TrainingPlan, tuple[str, ...]]:
    """The plan with its adapter's targets named, and the note that says so."""
    if plan.method.name not in ("lora", "qlora", "ia3") or plan.implementation.name == "litgpt":
        return plan, ()  # litgpt has names and a choice of its own (planner/ledger/arrangement.py)
    if plan.method.targets:
        check_targets(shape, plan.method)
        return plan, ()
    targets = default_targets(shape, plan.method)
    method = replace(plan.method, targets=targets)
    return replace(plan, method=method), (f"{plan.method.name} on {', '.join(targets)}, {chosen_by(shape, method)}",)
