"""Plans written as documents: the canonical mapping, and its JSON and YAML text.

Reading what is written here gives the same plan back (`planner.readers.plan_document`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from planner.plan import Implementation, Method, Optimizer, Precision, Recompute, ServingPlan, TrainingPlan
from planner.readers.plan_fields import fields_given, plain
from planner.readers.plan_rules import METHOD_FIELDS
from planner.readers.plan_short_forms import PRECISION_RECIPES, precision_fields

__all__ = ["plan_to_json", "plan_to_mapping", "plan_to_yaml"]


def plan_to_mapping(plan: TrainingPlan | ServingPlan, *, defaults: bool = False) -> dict[str, Any]:
    """The document of a plan in dicts, lists and scalars; with `defaults`, fields that have their default value too.

    A section with one telling field is written in its short form (`optimizer: adamw`). Fields that the plan's method,
    optimizer or recompute mode does not read are never written, because a document may not give them.
    """
    document: dict[str, Any] = {"kind": plan.kind, "model": plain(plan.model, "model")}
    for field in dataclasses.fields(plan):
        value = getattr(plan, field.name)
        if field.name in document:
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if value != default or defaults:
            document[field.name] = _written(value, plan, defaults)
    return document


def plan_to_json(plan: TrainingPlan | ServingPlan, *, defaults: bool = False) -> str:
    """The document of a plan as indented JSON, ending with a newline."""
    return json.dumps(plan_to_mapping(plan, defaults=defaults), indent=2, ensure_ascii=False) + "\n"


def plan_to_yaml(plan: TrainingPlan | ServingPlan, *, defaults: bool = False) -> str:
    """The document of a plan as YAML in block style, ending with a newline."""
    import yaml

    # Not allow_unicode: PyYAML then writes line breaks such as U+0085 bare, and reads them back as blanks.
    return yaml.safe_dump(plan_to_mapping(plan, defaults=defaults), sort_keys=False, width=110)


def _written(value: Any, plan: TrainingPlan | ServingPlan, defaults: bool) -> Any:
    if isinstance(value, Precision):
        return _precision(value, _is_megatron(plan))
    if isinstance(value, Recompute):
        return {"every": value.every} if value.mode == "every" else value.mode
    if isinstance(value, tuple):
        return list(value) or "none"
    if not dataclasses.is_dataclass(value):
        return value
    fields: Mapping[str, Any] = _all_fields(value) if defaults else fields_given(value)
    written = {name: list(item) if isinstance(item, tuple) else item for name, item in fields.items()}
    if isinstance(value, Method):
        written = {name: item for name, item in written.items() if value.name in METHOD_FIELDS.get(name, {value.name})}
    if isinstance(value, Optimizer) and value.name != "galore":
        written.pop("rank", None)
    if isinstance(value, (Implementation, Method, Optimizer)):
        written = {"name": value.name, **written}
        if len(written) == 1:
            return written["name"]
    return written


def _all_fields(value: Any) -> dict[str, Any]:
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {name: item for name, item in fields.items() if item is not None}


def _precision(value: Precision, megatron: bool) -> Any:
    """The recipe's name where it says all, else every format."""
    formats = dataclasses.asdict(value)
    recipe = formats.pop("recipe")
    if recipe in PRECISION_RECIPES and precision_fields(recipe, megatron) == formats:
        return recipe
    return {"recipe": recipe, **formats}


def _is_megatron(plan: TrainingPlan | ServingPlan) -> bool:
    if not isinstance(plan, TrainingPlan):
        return False
    return plan.implementation.name == "megatron" or plan.parallelism.engine == "megatron"
