"""Plan documents (YAML, JSON, keyword arguments) read into `TrainingPlan` and `ServingPlan`.

A document goes through five steps, each in its own module: text to plain values (`text_documents`), short forms to
full mappings (`plan_short_forms`), fields to values (`plan_fields`), what one field decides about another
(`plan_completion`), and rules between fields (`plan_rules`). Whatever is wrong leaves as one sentence in a PlanError,
UnknownField or SourceUnavailable; no other exception is meant to escape.

Defaults are those of the dataclasses in `planner.plan`. Model and accelerator names are not resolved here.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any, Literal

from planner.errors import PlanError, SourceUnavailable, UnknownField, nearest
from planner.plan import ServingPlan, TrainingPlan
from planner.readers.plan_completion import completed
from planner.readers.plan_fields import Section, plain, section_of, unknown_field
from planner.readers.plan_rules import METHOD_FIELDS, contradiction_in
from planner.readers.plan_short_forms import SHORT_FORMS, canonical, expand_precision
from planner.readers.text_documents import decode, parse_text, read_bytes, shown

__all__ = [
    "defaults_used",
    "document_from_bytes",
    "document_from_path",
    "document_from_text",
    "plan",
    "plan_from_mapping",
    "plan_from_path",
    "plan_from_text",
]

Plan = TrainingPlan | ServingPlan


def _method_is(readers: AbstractSet[str], read: TrainingPlan) -> bool:
    return read.method.name in readers


_KINDS = {"training": TrainingPlan, "serving": ServingPlan}


# Fields that only some plans read; the defaults of the others' are no part of what was assumed.
_READ_WHEN: Mapping[str, Callable[[Any], bool]] = {
    **{f"method.{name}": partial(_method_is, readers) for name, readers in METHOD_FIELDS.items()},
    "method.targets": lambda read: bool(read.method.targets),  # empty: the method's own, which depend on the model
    "optimizer.rank": lambda read: read.optimizer.name == "galore",
    "optimizer.amsgrad": lambda read: read.optimizer.name in ("adam", "adamw"),
    "recompute.every": lambda read: read.recompute.mode == "every",
    "parallelism.replicas": lambda read: read.parallelism.zero > 0,
    "parallelism.prefetch": lambda read: read.parallelism.zero == 3,
    "parallelism.reshard_after_forward": lambda read: read.parallelism.zero == 3,
    "parallelism.schedule": lambda read: read.parallelism.pipeline > 1,
    "parallelism.virtual_stages": lambda read: read.parallelism.pipeline > 1,
    "parallelism.sequence_parallel": lambda read: read.parallelism.tensor > 1,
}


def plan_from_mapping(document: Mapping[str, Any] | Plan) -> Plan:
    """The plan of a document, or of plan values built in code, which are read like the document they stand for.

    Raises PlanError, UnknownField.

    >>> plan_from_mapping({"model": "gpt2", "precision": "bf16-amp"}).precision.weights
    'fp32'
    """
    return _read(document)[0]


def plan(**fields: Any) -> Plan:
    """The plan of keyword arguments, the same names as in a document: `plan(model="gpt2", data={...})`."""
    return plan_from_mapping(fields)


def plan_from_text(text: str, format: Literal["json", "yaml"] | None = None) -> Plan:
    """The plan of YAML or JSON text; the format is told from the text when it is None. Raises PlanError."""
    return plan_from_mapping(document_from_text(text, format))


def plan_from_path(path: str | os.PathLike[str]) -> Plan:
    """The plan in a YAML or JSON file, or on standard input for "-". Raises PlanError, SourceUnavailable."""
    return plan_from_mapping(document_from_path(path))


def document_from_path(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML or JSON file, or on standard input for "-"; its fields are not checked."""
    name = os.fspath(path)
    if name.endswith(".jsonl"):
        raise SourceUnavailable(
            f"{shown(name, 120)} holds one plan a line; read it line by line, as planner estimate does."
        )
    return document_from_bytes(read_bytes(name))


def document_from_bytes(content: bytes, format: Literal["json", "yaml"] | None = None) -> dict[str, Any]:
    """The mapping in the bytes of a YAML or JSON document; its fields are not checked. Raises PlanError."""
    return document_from_text(decode(content), format)


def document_from_text(text: str, format: Literal["json", "yaml"] | None = None) -> dict[str, Any]:
    """The mapping in YAML or JSON text; its fields are not checked. Raises PlanError."""
    return _mapping(parse_text(text, format))


def defaults_used(document: Mapping[str, Any] | Plan) -> list[str]:
    """What the plan does not say and the planner filled in, as "data.micro_batch_size = 1", in the plan's order.

    Fields that the plan's method does not read, and fields whose default is "not set", are left out. Values that were
    worked out from other fields say so. Raises PlanError for a document that is not a plan.
    """
    read, given = _read(document)
    stated_precision = any(path.startswith("precision.") for path in given)
    lines = []
    for path, value, default in _leaves(read):
        is_read = _READ_WHEN.get(path)
        if path in given or value is None or path in ("kind", "model") or (is_read and not is_read(read)):
            continue
        if path.startswith("precision.") and not stated_precision and path != "precision.recipe":
            continue
        tail = "" if value == default else " (worked out from the other fields)"
        name = path.removesuffix(".recipe").removesuffix(".name").removesuffix(".mode")
        lines.append(f"{name} = {_printed(value)}{tail}")
    return lines


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted name, value and default of every field, in the dataclasses' order."""
    for field in dataclasses.fields(value):
        current = getattr(value, field.name)
        dotted = f"{path}.{field.name}" if path else field.name
        if dataclasses.is_dataclass(current):
            yield from _leaves(current, dotted)
        else:
            yield dotted, current, field.default


def _printed(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(value) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _mapping(document: Any) -> dict[str, Any]:
    if isinstance(document, Mapping):
        return dict(document)
    what = "empty" if document is None else shown(document)
    raise PlanError(f'The plan is {what}; it takes a mapping of fields such as "model" and "data".')


def _read(document: Any) -> tuple[Plan, AbstractSet[str]]:
    """The plan and the dotted names of what the document gave."""
    if isinstance(document, (TrainingPlan, ServingPlan)):
        document = {**plain(document), "kind": document.kind}
    fields = plain(_mapping(document))
    kind = _kind(fields)
    section = section_of(_KINDS[kind])
    for name in fields:
        if name not in section.converters:
            raise UnknownField(_misplaced(name, kind, section))
    if "model" not in fields:
        raise PlanError('The plan names no model; add for example "model: meta-llama/Llama-3.1-8B".')
    fields["kind"] = kind
    if kind == "training" and "precision" in fields:
        fields["precision"] = expand_precision(fields["precision"], _is_megatron(fields))
    given = _given(fields, section)
    read = completed(section.read(fields), given)
    contradiction = contradiction_in(read, given)
    if contradiction is not None:
        raise PlanError(contradiction)
    return read, given


def _kind(fields: Mapping[str, Any]) -> str:
    """The kind that a document states; training when it states none and no field contradicts that."""
    training, serving = (section_of(type).converters for type in (TrainingPlan, ServingPlan))
    if "kind" in fields:
        if not isinstance(fields["kind"], str):
            raise PlanError(f"kind is {shown(fields['kind'])}; accepted: training, serving.")
        kind = canonical(fields["kind"], {name: name for name in _KINDS})
        if kind is None:
            raise UnknownField(f"kind is {shown(fields['kind'])}; {nearest(fields['kind'], _KINDS)}")
        return kind
    for name in fields:
        if name in serving and name not in training:
            raise PlanError(f"The plan has no kind, and {name} is a field of serving plans; add kind: serving.")
    return "training"


def _misplaced(name: str, kind: str, section: Section) -> str:
    """The sentence for an unknown top-level field, which may belong to the other kind or into a section."""
    other = "serving" if kind == "training" else "training"
    if name in section_of(_KINDS[other]).converters:
        return f"{name} is a field of {other} plans; this plan is of kind {kind}."
    for inner, subsection in section.sections.items():
        if name in subsection.converters and name != "name":
            return f'There is no field "{name}" at the top of a plan; write {inner}: {{{name}: ...}}.'
    return unknown_field(name, "", section.converters)


def _is_megatron(fields: Mapping[str, Any]) -> bool:
    """Whether the document names Megatron as the code that runs, or as the engine that shards."""
    implementation = SHORT_FORMS["implementation"](fields.get("implementation"))
    parallelism = fields.get("parallelism")
    names = [
        section.get(key)
        for section, key in ((implementation, "name"), (parallelism, "engine"))
        if isinstance(section, Mapping)
    ]
    return any(isinstance(name, str) and canonical(name, {"megatron": "megatron"}) for name in names)


def _given(fields: Mapping[str, Any], section: Section) -> AbstractSet[str]:
    """Dotted names of the fields that a document gives, short forms expanded."""
    given = set()
    for name, value in fields.items():
        expanded = SHORT_FORMS[name](value) if name in SHORT_FORMS else value
        if name in section.sections and isinstance(expanded, Mapping):
            given.update(f"{name}.{field}" for field in expanded)
        else:
            given.add(name)
    return given
