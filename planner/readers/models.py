"""A model by whatever a person has: a catalogue name, a hub id or address, a path, or the config itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from planner.errors import ModelConfigError, UnknownName
from planner.model.catalogue import find_entry, hub_id, nearest_names
from planner.model.shape import ModelShape
from planner.readers.hf_config import cached_config_path, shape_from_config, shape_from_hub, shape_from_path

__all__ = ["MASKED_CLASSES", "load_model", "load_trained_model"]

# Encoders whose bare class has no loss, and the class of theirs that is pre-trained.
MASKED_CLASSES = {
    "bert": "BertForMaskedLM",
    "distilbert": "DistilBertForMaskedLM",
    "modernbert": "ModernBertForMaskedLM",
    "roberta": "RobertaForMaskedLM",
    "xlm-roberta": "XLMRobertaForMaskedLM",
}

_LONGEST_NAME = 4096


def load_model(model: str | os.PathLike[str] | Mapping[str, Any], *, fetch: bool = False) -> ModelShape:
    """The shape of a model.

    A mapping is the content of a config.json. A string is looked for as a catalogue name (organisation optional,
    renamed hub ids and instruction-tuned versions included), as a path to a config.json or to a folder holding
    one, as a hub id in the local Hugging Face cache, and with `fetch` on the hub. What starts with ".", "/" or
    "~", or ends with ".json", is a path and nothing else.

    Raises UnknownName with the nearest catalogue names, ModelConfigError, or SourceUnavailable.
    """
    if isinstance(model, Mapping):
        return shape_from_config(model)
    if not isinstance(model, (str, os.PathLike)):
        raise ModelConfigError(f"A model is a name, a path or a config mapping, not {type(model).__name__}.")
    if isinstance(model, os.PathLike):
        return shape_from_path(model)
    text = model.strip()
    if not text or len(text) > _LONGEST_NAME or "\0" in text:
        raise UnknownName(
            f"{text[:60]!r} is no model name; give a catalogue name, a hub id or a path to a config.json."
        )
    if text.startswith((".", "/", "~")) or text.casefold().endswith(".json"):
        return shape_from_path(Path(text).expanduser())
    entry = find_entry(text)
    if entry is not None:
        return _from_catalogue(entry.name)
    if Path(text).exists():
        return shape_from_path(text)
    identifier = hub_id(text)
    if fetch or cached_config_path(identifier) is not None:
        return shape_from_hub(identifier, fetch)
    close = nearest_names(text)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise UnknownName(
        f'"{text[:120]}" is not in the catalogue, no path and not in the local Hugging Face cache; {hint}'
        "`planner models` lists the catalogue, --fetch reads a config from the hub."
    )


def load_trained_model(
    model: str | os.PathLike[str] | Mapping[str, Any], *, fetch: bool = False
) -> tuple[ModelShape, tuple[str, ...]]:
    """The shape that a training step runs, and what choosing it assumed.

    It is `load_model`'s, but for an encoder whose config names no class: that trains as the masked language model of
    its family. Raises what `load_model` raises.
    """
    shape = load_model(model, fetch=fetch)
    kind = MASKED_CLASSES.get(shape.model_type)
    entry = find_entry(model.strip()) if isinstance(model, str) else None
    config = model if isinstance(model, Mapping) else entry.config if entry is not None else None
    if kind is None or config is None or config.get("architectures"):
        return shape, ()
    trained = shape_from_config({**config, "architectures": [kind]}, shape.name)
    return replace(trained, source=shape.source), (f"trained as {kind}, as the model names no class of its own",)


@lru_cache(maxsize=256)
def _from_catalogue(name: str) -> ModelShape:
    """The shape of one entry; shapes are frozen, so everybody may have the same one."""
    entry = find_entry(name)
    assert entry is not None, "names in the index have entries"
    shape = shape_from_config(entry.config, entry.name)
    return replace(shape, source=entry.source)
