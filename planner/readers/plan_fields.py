"""Fields of a plan document, checked one by one against the dataclasses of `planner.plan`.

A dataclass is compiled once into converters, from its type hints and from the tables below: ranges of numbers by
dotted name, and accepted values of text fields whose type is an open `str`. Converters take a value of the document
and its dotted name, and return the value of the field or raise PlanError with one sentence.

Own code rather than msgspec or pydantic: either would need the same tables of ranges and choices and the same pass over
short forms before its schema, and would then have its messages replaced, which are the point of this module (nearest
field, the section that a field belongs to, the accepted range).
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from planner import plan as values
from planner.errors import PlanError, PlannerError, UnknownField, nearest
from planner.quantization import QUANTIZATIONS
from planner.readers.plan_short_forms import PRECISION_RECIPES, SHORT_FORMS, canonical
from planner.readers.text_documents import MOST_LEVELS, shown
from planner.units import parse_bytes, parse_count

__all__ = ["OPTIMIZERS", "Section", "fields_given", "plain", "section_of"]

Converter = Callable[[Any, str], Any]

OPTIMIZERS = (
    "sgd",
    "sgd-momentum",
    "adam",
    "adamw",
    "adafactor",
    "lion",
    "adamw-8bit",
    "paged-adamw-8bit",
    "adam-mini",
    "galore",
    "muon",
    "lomo",
)

# vLLM's and llama.cpp's cache types under our names for formats.
KV_CACHE_FORMATS = ("auto", "fp32", "bf16", "fp16", "fp8", "int8", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")

_TEXT_CHOICES: Mapping[str, tuple[str, ...]] = {
    "precision.recipe": (*PRECISION_RECIPES, "custom"),
    "optimizer.name": OPTIMIZERS,
    "quantization": QUANTIZATIONS,
    "kv_cache.dtype": KV_CACHE_FORMATS,
}

_DEGREE = (1, 2**20)
# Smallest and largest value; the upper bounds are far above anything built, and keep arithmetic on grids within int64.
_RANGES: Mapping[str, tuple[float, float]] = {
    "data.sequence_length": (1, 2**31),
    "data.micro_batch_size": (1, 2**24),
    "data.global_batch_size": (1, 2**40),
    "data.gradient_accumulation_steps": (1, 2**24),
    "data.tokens": (1, 10**18),
    "optimizer.rank": (1, 2**20),
    "method.rank": (1, 2**20),
    "method.dropout": (0.0, 1.0),
    "method.virtual_tokens": (1, 2**24),
    "method.bottleneck": (1, 2**20),
    "method.trainable_layers": (0, 2**16),
    "recompute.every": (1, 2**16),
    "parallelism.data": _DEGREE,
    "parallelism.tensor": _DEGREE,
    "parallelism.pipeline": _DEGREE,
    "parallelism.context": _DEGREE,
    "parallelism.expert": _DEGREE,
    "parallelism.replicas": _DEGREE,
    "parallelism.prefetch": (0, 2**10),
    "parallelism.bucket_bytes": (1, 2**40),
    "parallelism.virtual_stages": (1, 2**10),
    "hardware.gpus_per_node": (1, 2**16),
    "hardware.nodes": _DEGREE,
    "hardware.price_per_gpu_hour": (0.0, 1e6),
    "hardware.memory_utilization": (0.01, 1.0),
    "kv_cache.block_size": (1, 2**16),
    "requests.context_length": (2, 2**31),
    "requests.prompt_tokens": (1, 2**31),
    "requests.output_tokens": (1, 2**31),
    "requests.concurrency": (1, 2**24),
}
_ANY_WHOLE = (0, 2**53)
_ANY_REAL = (-1e300, 1e300)

# Large counts that people write with a suffix: "15T", "25 MiB".
_QUANTITIES: Mapping[str, Callable[[str], int]] = {"data.tokens": parse_count, "parallelism.bucket_bytes": parse_bytes}

# What other tools call our fields, where the spelling alone would lead nowhere or to the wrong field.
_FIELDS_ELSEWHERE = {
    "tp": "tensor",
    "pp": "pipeline",
    "dp": "data",
    "cp": "context",
    "ep": "expert",
    "stage": "zero",
    "gpus": "gpus_per_node",
    "num_gpus": "gpus_per_node",
    "batch_size": "micro_batch_size",
    "seq_len": "sequence_length",
    "seqlen": "sequence_length",
    "max_length": "sequence_length",
    "gradient_checkpointing": "recompute",
    "r": "rank",
    "target_modules": "targets",
    "max_model_len": "context_length",
    "max_num_seqs": "concurrency",
    "gpu_memory_utilization": "memory_utilization",
}

_LONGEST_NAME = 4096


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A dataclass of `planner.plan` with one converter a field, and its sub-sections by field name."""

    type: type
    converters: Mapping[str, Converter]
    sections: Mapping[str, Section]

    def read(self, given: Any, path: str = "") -> Any:
        """The dataclass value of a mapping. Raises PlanError, UnknownField."""
        if not isinstance(given, Mapping):
            what = "a name or a mapping" if path in SHORT_FORMS or path == "precision" else "a mapping"
            raise PlanError(f"{path} is {shown(given)}; it takes {what} of fields ({', '.join(self.converters)}).")
        fields = {}
        for name, value in given.items():
            dotted = f"{path}.{name}" if path else name
            converter = self.converters.get(name)
            if converter is None:
                raise UnknownField(unknown_field(name, path, self.converters))
            fields[name] = converter(value, dotted)
        return self.type(**fields)


def unknown_field(name: str, path: str, accepted: Mapping[str, Any]) -> str:
    """The sentence for a field that does not exist in the section `path`."""
    place = f"in {path}" if path else "in a plan"
    meant = _FIELDS_ELSEWHERE.get(name.casefold())
    tail = f'did you mean "{meant}"?' if meant in accepted else nearest(name, accepted, shown=len(accepted))
    return f"There is no field {shown(name)} {place}; {tail}"


@cache
def section_of(dataclass: type, path: str = "") -> Section:
    """The compiled form of one dataclass of `planner.plan`."""
    hints = typing.get_type_hints(dataclass)
    converters: dict[str, Converter] = {}
    sections: dict[str, Section] = {}
    for field in dataclasses.fields(dataclass):
        dotted = f"{path}.{field.name}" if path else field.name
        hint = hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            sections[field.name] = section_of(hint, dotted)
            converters[field.name] = _short_form(field.name, sections[field.name].read)
        else:
            convert = _converter(hint, dotted)
            converters[field.name] = convert if path else _short_form(field.name, convert)
    return Section(type=dataclass, converters=converters, sections=sections)


def _short_form(name: str, convert: Converter) -> Converter:
    expand = SHORT_FORMS.get(name)
    if expand is None:
        return convert
    return lambda value, path: convert(expand(value), path)


def _converter(hint: Any, path: str) -> Converter:
    origin, arguments = get_origin(hint), get_args(hint)
    if path == "model":
        return _model
    if origin in (Union, types.UnionType):
        inner = _converter(next(argument for argument in arguments if argument is not type(None)), path)
        return lambda value, path: None if value is None else inner(value, path)
    if origin is Literal:
        return _whole_choice(arguments) if isinstance(arguments[0], int) else _choice(arguments)
    if origin is tuple:
        return _several(_converter(arguments[0], path + "[]"))
    if hint is str:
        return _choice(_TEXT_CHOICES[path]) if path in _TEXT_CHOICES else _text
    if hint is bool:
        return _boolean
    if hint is int:
        whole = _whole(*_RANGES.get(path, _ANY_WHOLE))
        return _quantity(_QUANTITIES[path], whole) if path in _QUANTITIES else whole
    if hint is float:
        return _real(*_RANGES.get(path, _ANY_REAL))
    raise AssertionError(f"planner.plan gives {path} a type that documents cannot hold: {hint}")


def _whole(low: float, high: float) -> Converter:
    bounds = f"it takes a whole number from {low:.0f} to {high:.0f}"

    def convert(value: Any, path: str) -> int:
        if type(value) is not int:
            if isinstance(value, str) and value.strip().isdecimal():
                raise PlanError(f"{path} is the text {shown(value)}; {bounds}, without quotes.")
            raise PlanError(f"{path} is {shown(value)}; {bounds}.")
        if not low <= value <= high:
            raise PlanError(f"{path} is {shown(value)}; {bounds}.")
        return value

    return convert


def _quantity(parse: Callable[[str], int], whole: Converter) -> Converter:
    def convert(value: Any, path: str) -> int:
        if isinstance(value, str) and not value.strip().isdecimal():
            try:
                value = parse(value)
            except PlannerError as error:
                raise PlanError(f"{path}: {error}") from None
        # 1.5e13 is how JSON writers print a large count.
        elif isinstance(value, float) and value >= 1e6 and value.is_integer():
            value = int(value)
        return whole(value, path)

    return convert


def _real(low: float, high: float) -> Converter:
    def convert(value: Any, path: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise PlanError(f"{path} is {shown(value)}; it takes a number from {low:g} to {high:g}.")
        return float(value)

    return convert


def _boolean(value: Any, path: str) -> bool:
    if not isinstance(value, bool):
        raise PlanError(f"{path} is {shown(value)}; it takes true or false.")
    return value


def _text(value: Any, path: str) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        raise PlanError(f"{path} is the number {shown(value)}; it takes text, so put it in quotes.")
    if not isinstance(value, str):
        raise PlanError(f"{path} is {shown(value)}; it takes text.")
    if not value.strip() or len(value) > _LONGEST_NAME or not value.isprintable():
        raise PlanError(f"{path} is {shown(value)}; it takes a printable name of 1 to {_LONGEST_NAME} characters.")
    return value.strip()


def _choice(accepted: tuple[str, ...]) -> Converter:
    by_fold = {name.casefold().replace("_", "-"): name for name in accepted}
    exact = frozenset(accepted)

    def convert(value: Any, path: str) -> str:
        if not isinstance(value, str):
            raise PlanError(f"{path} is {shown(value)}; {_accepted(accepted)}")
        if value in exact:
            return value
        found = canonical(value, by_fold)
        if found is None:
            raise UnknownField(f"{path} is {shown(value)}; {nearest(value, accepted)}")
        return found

    return convert


def _whole_choice(accepted: tuple[int, ...]) -> Converter:
    def convert(value: Any, path: str) -> int:
        if type(value) is not int or value not in accepted:
            raise PlanError(f"{path} is {shown(value)}; {_accepted(accepted)}")
        return value

    return convert


def _several(convert_one: Converter) -> Converter:
    def convert(value: Any, path: str) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)):
            raise PlanError(f"{path} is {shown(value)}; it takes a name or a list of names.")
        if len(value) > 1000:
            raise PlanError(f"{path} lists {len(value)} names; it takes at most 1000.")
        items = tuple(convert_one(item, path) for item in value)
        if len(set(items)) != len(items):
            repeated = next(item for item in items if items.count(item) > 1)
            raise PlanError(f"{path} names {shown(repeated)} twice.")
        return items

    return convert


def _model(value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        if not value:
            raise PlanError("model is an empty mapping; give a name, a path, or the content of a config.json.")
        return value
    if not isinstance(value, str):
        raise PlanError(f"model is {shown(value)}; it takes a name, a path, or the content of a config.json.")
    return _text(value, path)


def _accepted(names: tuple[Any, ...]) -> str:
    listed = [str(name) for name in names[:8]]
    return f"accepted: {', '.join(listed)}{', ...' if len(names) > 8 else '.'}"


def plain(value: Any, path: str = "", level: int = 0) -> Any:
    """A copy made of dicts, lists, text, numbers, booleans and None alone. Raises PlanError for anything else.

    Dataclass values of `planner.plan` become mappings of their fields that differ from the default; NumPy integers
    become `int`. Infinity is let through inside an inline model only, where published configurations have it.
    """
    kind = type(value)
    if kind is str or kind is int or kind is bool or value is None:
        return value
    if kind is float:
        if math.isfinite(value) or (path.startswith("model.") and not math.isnan(value)):
            return value
        raise PlanError(f"{_place(path)} is {value}, which is not a finite number.")
    if level >= MOST_LEVELS:
        raise PlanError(f"The plan is nested more than {MOST_LEVELS} levels deep.")
    if isinstance(value, Mapping):
        copy: dict[str, Any] = {}
        for name, item in value.items():
            if not isinstance(name, str):
                raise PlanError(f"{_place(path)} has a field named {shown(name)}; field names are text.")
            copy[name] = plain(item, f"{path}.{name}" if path else name, level + 1)
        return copy
    if isinstance(value, (list, tuple)):
        return [plain(item, path, level + 1) for item in value]
    if dataclasses.is_dataclass(value) and type(value).__module__ == values.__name__:
        return plain(fields_given(value), path, level)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return plain(float(value), path, level)
    if isinstance(value, os.PathLike):
        return plain(os.fspath(value), path, level)
    raise PlanError(f"{_place(path)} holds {shown(value)}, which is neither text, number, list nor mapping.")


def _place(path: str) -> str:
    return shown(path, 80).strip('"') if path else "The plan"


def fields_given(value: Any) -> dict[str, Any]:
    """The fields of a plan dataclass that differ from their default; all of a precision, whose default is a recipe."""
    given = {}
    for field in dataclasses.fields(value):
        current = getattr(value, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if isinstance(value, values.Precision) or default is dataclasses.MISSING or current != default:
            given[field.name] = current
    return given
