"""A Hugging Face config.json, from a mapping, a file, a folder, the local cache or the hub, as a ModelShape."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from planner.errors import ModelConfigError, SourceUnavailable, nearest
from planner.model.shape import ModelShape
from planner.readers.config_view import ConfigView
from planner.readers.families.registry import known_types, reader_of

__all__ = ["cached_config_path", "config_from_path", "shape_from_config", "shape_from_hub", "shape_from_path"]

LARGEST_CONFIG_BYTES: Final = 5_000_000
_REPO_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


def shape_from_config(config: Mapping[str, Any], name: str | None = None) -> ModelShape:
    """The shape that a config describes, called `name` or else by what the config says of itself.

    Raises ModelConfigError for a model_type that no reader knows (never read as some other architecture), for
    values out of range, and for keys that add tensors the type does not have.
    """
    if not isinstance(config, Mapping):
        raise ModelConfigError(f"A model config must be a mapping of keys to values, not {type(config).__name__}.")
    model_type = config.get("model_type", config.get("_class_name"))  # diffusers names the class instead
    if not isinstance(model_type, str) or not model_type:
        given = "missing" if model_type is None else repr(model_type)[:60]
        raise ModelConfigError(f'A model config needs "model_type", a string such as "llama"; it is {given}.')
    reader = reader_of(model_type)
    if reader is None:
        keys = ", ".join(sorted(str(key) for key in config if key not in ("model_type", "architectures"))[:12])
        raise ModelConfigError(
            f'model_type "{model_type[:80]}" is not known, so its keys ({keys or "none"}) cannot be understood; '
            f"{nearest(model_type, known_types())}"
        )
    view = ConfigView(config, model_type)
    shape = reader(view)
    stated = config.get("_name_or_path")
    return replace(
        shape,
        name=name or (stated if isinstance(stated, str) and stated else model_type),
        uncovered=shape.uncovered + view.not_understood(),
        assumed=shape.assumed + view.assumed(),
    )


def config_from_path(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a config.json, given the file or the folder that holds it.

    Raises SourceUnavailable when it cannot be read and ModelConfigError when it is not a JSON object.
    """
    place = _config_file(Path(path))
    try:
        content = place.read_bytes()
    except OSError as error:
        raise SourceUnavailable(f"{place} could not be read: {error.strerror or error}.") from error
    try:
        config = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ModelConfigError(f"{place} is not UTF-8 text (byte {error.start}); it needs to be JSON.") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ModelConfigError(f"{place} is not valid JSON: {error.msg} at {where}.") from error
    except RecursionError as error:
        raise ModelConfigError(f"{place} is nested too deeply to be a model config.") from error
    except ValueError as error:  # Python's own limit on the digits of a number
        raise ModelConfigError(f"{place} holds a number with too many digits to be a size.") from error
    if not isinstance(config, dict):
        raise ModelConfigError(f"{place} holds a JSON {type(config).__name__}; a model config is an object.")
    return config


def _config_file(place: Path) -> Path:
    """The file itself, given it or its folder; raises when there is none, or when it is too large to be a config."""
    try:
        if place.is_dir():
            if not (place / "config.json").is_file():
                raise SourceUnavailable(f"The folder {place} holds no config.json.")
            place = place / "config.json"
        if not place.is_file():
            raise SourceUnavailable(f"There is no model config at {str(place)[:200]}.")
        size = place.stat().st_size
    except OSError as error:
        raise SourceUnavailable(f"{str(place)[:200]} could not be read: {error.strerror or error}.") from error
    if size > LARGEST_CONFIG_BYTES:
        raise ModelConfigError(
            f"{place} has {size} bytes; a model config has at most {LARGEST_CONFIG_BYTES}. Is it a weights file?"
        )
    return place


def shape_from_path(path: str | os.PathLike[str]) -> ModelShape:
    """The shape of the config.json at `path` (a file, or a folder holding one), called by the folder's name."""
    place = Path(path)
    config = config_from_path(place)
    folder = place if place.is_dir() else place.parent
    name = folder.resolve().name if place.is_dir() or place.name == "config.json" else place.stem
    return replace(shape_from_config(config, name or None), source=str(place))


def _cache_root() -> Path:
    """Where huggingface_hub keeps its cache, by its own environment variables."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "huggingface" / "hub"


def cached_config_path(repo_id: str) -> Path | None:
    """The config.json of a repository in the local Hugging Face cache, its main revision first; None when absent."""
    if not _REPO_ID.fullmatch(repo_id):
        return None
    folder = _cache_root() / f"models--{repo_id.replace('/', '--')}"
    reference = folder / "refs" / "main"
    if reference.is_file():
        current = folder / "snapshots" / reference.read_text(encoding="utf-8").strip() / "config.json"
        if current.is_file():
            return current
    snapshots = sorted(
        (found for found in folder.glob("snapshots/*/config.json") if found.is_file()),
        key=lambda found: found.stat().st_mtime,
    )
    return snapshots[-1] if snapshots else None


def shape_from_hub(repo_id: str, fetch: bool = False) -> ModelShape:
    """The shape of a hub repository: from the local cache, or with `fetch` from the network as well.

    Raises SourceUnavailable in one sentence when the repository is not cached, gated, missing, or out of reach.
    """
    if not _REPO_ID.fullmatch(repo_id):
        raise SourceUnavailable(f"{repo_id[:80]!r} is not a Hugging Face repository id such as org/name.")
    cached = cached_config_path(repo_id)
    if cached is None and not fetch:
        raise SourceUnavailable(
            f"{repo_id} is not in the local Hugging Face cache ({_cache_root()}); pass --fetch to download its config."
        )
    place = cached or _downloaded_config(repo_id)
    shape = shape_from_config(config_from_path(place), repo_id)
    return replace(shape, source=f"https://huggingface.co/{repo_id} (config.json)")


def _downloaded_config(repo_id: str) -> Path:
    """Download config.json of a repository into the Hugging Face cache."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ImportError as error:
        raise SourceUnavailable(
            f"Fetching {repo_id} needs the package huggingface_hub: pip install huggingface_hub."
        ) from error
    try:
        return Path(hf_hub_download(repo_id, "config.json"))
    except GatedRepoError as error:
        raise SourceUnavailable(
            f"{repo_id} is gated: accept its terms on https://huggingface.co/{repo_id} and log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceUnavailable(f"There is no public repository {repo_id} on huggingface.co.") from error
    except LocalEntryNotFoundError as error:
        raise SourceUnavailable(f"{repo_id} is not cached and huggingface.co cannot be reached from here.") from error
    except EntryNotFoundError as error:
        raise SourceUnavailable(f"The repository {repo_id} has no config.json.") from error
    except (HfHubHTTPError, OSError) as error:
        raise SourceUnavailable(f"{repo_id} could not be fetched: {str(error).splitlines()[0][:200]}") from error
