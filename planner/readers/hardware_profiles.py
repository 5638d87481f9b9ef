"""Hardware profiles and price lists: TOML files in, values of `planner.hardware` out.

Three folders are looked at, the first that has a profile wins: the one named by the environment variable `PLANNER_PROFILES`,
`~/.config/planner/hardware_profiles`, and the one that ships with the planner. All have the same layout, described in
`hardware_profiles/README.md`: `gpus/<name>.toml`, `nodes/<name>.toml`, `prices/<provider>.toml`, and for the shipped one
`aliases.toml`, an index that spares opening every file to find a short name. One profile is read at a time, when asked for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Literal

from planner.errors import ProfileError, UnknownName, nearest
from planner.hardware import Device, Node, Price
from planner.readers.price_list_format import parse_prices
from planner.readers.profile_format import parse_device, parse_node, read_document

__all__ = [
    "Resolution",
    "device_names",
    "devices",
    "load_hardware",
    "load_node",
    "node_names",
    "nodes",
    "price_providers",
    "prices",
    "profile_root",
    "profile_roots",
    "resolve_device",
    "resolve_node",
]

# Words that sellers and drivers put around a model name and that never tell two models apart.
_NOISE = (
    "nvidia", "geforce", "tesla", "quadro", "amd", "instinct", "radeon", "intel", "habana", "google", "cloud", "aws", "amazon",
    "apple", "edition", "generation", "gpu",
)  # fmt: skip


@lru_cache(maxsize=1)
def profile_root() -> Path:
    """The folder of the shipped profiles: inside the installed package, or at the top of a source checkout."""
    packaged = Path(str(resources.files("planner"))) / "_data" / "hardware_profiles"
    if packaged.is_dir():
        return packaged
    return Path(__file__).resolve().parents[2] / "hardware_profiles"


def profile_roots() -> tuple[Path, ...]:
    """Every profile folder that exists, the user's own first; ProfileError when `PLANNER_PROFILES` names no folder."""
    named = os.path.expanduser(os.environ.get("PLANNER_PROFILES", ""))
    if named and not os.path.isdir(named):
        raise ProfileError(f'PLANNER_PROFILES names "{named}", which is not a folder.')
    default = os.path.expanduser("~/.config/planner/hardware_profiles")
    own = [named] if named else []
    if os.path.isdir(default):
        own.append(default)
    return (*(Path(folder) for folder in own), profile_root())


# --- names ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """What a name was taken to mean. `choice` says why, when the name fits several profiles; otherwise it is empty."""

    given: str
    name: str
    choice: str = ""


def _fold(name: str) -> str:
    """A name without case, separators and vendor words: "NVIDIA GeForce RTX_4090" and "rtx4090" fold to one."""
    words = [word for word in re.split(r"[^a-z0-9]+", name.casefold()) if word and word not in _NOISE]
    folded = "".join(words)
    while vendor := next((word for word in _NOISE if folded.startswith(word) and folded != word), None):
        folded = folded.removeprefix(vendor)
    return folded


def _fold_instance(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", name.casefold())


_Kind = Literal["gpus", "nodes", "prices"]
_Stamps = tuple[tuple[Path, int, int], ...]


def _stamps(kind: _Kind) -> _Stamps:
    """The folders of one kind with their times of change: the key under which what they hold may be kept."""
    return tuple((root, _changed(root / kind), _changed(root / "aliases.toml")) for root in profile_roots())


def _changed(path: Path) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


@lru_cache(maxsize=16)
def _names(kind: _Kind, stamps: _Stamps) -> tuple[str, ...]:
    return tuple(sorted({path.stem for root, _, _ in stamps for path in (root / kind).glob("*.toml")}))


def device_names() -> tuple[str, ...]:
    """The names of all accelerator profiles, sorted; no profile is opened."""
    return _names("gpus", _stamps("gpus"))


def node_names() -> tuple[str, ...]:
    """The names of all node profiles, sorted; no profile is opened."""
    return _names("nodes", _stamps("nodes"))


def price_providers() -> tuple[str, ...]:
    """The providers that have a price list, sorted."""
    return _names("prices", _stamps("prices"))


@lru_cache(maxsize=16)
def _aliases(kind: _Kind, stamps: _Stamps) -> tuple[dict[str, str], dict[str, str], tuple[str, ...]]:
    """Folded alias to profile, folded short name to the reason of its choice, and the aliases as written.

    A folder without an index, as a user's own, has its profiles opened. The folders are taken in their order, first wins.
    """
    fold = _FOLDS[kind]
    meaning: dict[str, str] = {}
    reasons: dict[str, str] = {}
    written: list[str] = []
    for root, _, _ in stamps:
        index = root / "aliases.toml"
        if index.is_file():
            document = read_document(index)
            table = document.get(kind, {})
            choices = document.get("choices", {}) if kind == "gpus" else {}
        else:
            table = {path.stem: read_document(path).get("aliases", []) for path in (root / kind).glob("*.toml")}
            choices = {}
        for name, others in table.items():
            if not isinstance(others, list):
                raise ProfileError(f"{root / kind / name}.toml: aliases must be a list of texts.")
            for other in others:
                meaning.setdefault(fold(str(other)), name)
                written.append(str(other))
        for short, choice in choices.items():
            if meaning.get(fold(short)) == choice["gpu"]:
                reasons.setdefault(fold(short), choice["why"])
    return meaning, reasons, tuple(written)


_FOLDS: dict[str, Callable[[str], str]] = {"gpus": _fold, "nodes": _fold_instance, "prices": _fold_instance}


@lru_cache(maxsize=1024)
def _resolve(given: str, kind: _Kind, what: str, stamps: _Stamps) -> Resolution:
    names = _names(kind, stamps)
    if given in names:
        return Resolution(given=given, name=given)
    fold = _FOLDS[kind]
    wanted = fold(given)
    for name in names:
        if fold(name) == wanted:
            return Resolution(given=given, name=name)
    meaning, reasons, written = _aliases(kind, stamps)
    if wanted in meaning:
        return Resolution(given=given, name=meaning[wanted], choice=reasons.get(wanted, ""))
    tail = nearest(given, (*names, *written))
    if tail.startswith("accepted"):
        tail = nearest(given, names)
    raise UnknownName(f'no {what} is called "{given[:80]}"; {tail}')


def resolve_device(name: str) -> Resolution:
    """The profile that a name, an alias or a driver's own device string means; UnknownName with the nearest name.

    Case, separators and vendor words do not count. A short name that fits several profiles ("a100") has a documented
    choice in the index, and the answer carries its reason, so that an estimate can state it.
    """
    return _resolve(_text(name), "gpus", "accelerator", _stamps("gpus"))


def resolve_node(name: str) -> Resolution:
    """The node profile that a name or a provider's instance type means; UnknownName with the nearest name."""
    return _resolve(_text(name), "nodes", "node", _stamps("nodes"))


def _text(name: object) -> str:
    if not isinstance(name, str):
        raise UnknownName(f"hardware is named by a text, not by {name!r}.")
    return name


# --- reading one profile -------------------------------------------------------------------------------------------


def load_hardware(name: str) -> Device:
    """The accelerator of that name or alias; UnknownName, or ProfileError when its file breaks the format."""
    path = _find("gpus", resolve_device(name).name)
    return _device(path, _changed(path))


def load_node(name: str) -> Node:
    """The node of that name, alias or instance type; UnknownName, or ProfileError when its file breaks the format."""
    path = _find("nodes", resolve_node(name).name)
    return _node(path, _changed(path))


def devices() -> Iterator[Device]:
    """Every accelerator, in the order of `device_names()`; reads all files."""
    return (load_hardware(name) for name in device_names())


def nodes() -> Iterator[Node]:
    """Every node type, in the order of `node_names()`; reads all files."""
    return (load_node(name) for name in node_names())


def prices(gpu: str | None = None, provider: str | None = None) -> tuple[Price, ...]:
    """The price list lines of one accelerator (a name or an alias), of one provider, or all of them.

    Reads the provider's file alone when one is named. A list in the user's folder replaces the shipped one of that provider.
    """
    wanted = resolve_device(gpu).name if gpu is not None else None
    known = price_providers()
    if provider is not None and provider not in known:
        raise UnknownName(f'no price list of a provider "{provider}"; {nearest(provider, known)}')
    found: list[Price] = []
    for one in known if provider is None else (provider,):
        path = _find("prices", one)
        found.extend(_price_list(path, _changed(path)))
    return tuple(price for price in found if wanted is None or price.gpu == wanted)


def _find(kind: _Kind, name: str) -> Path:
    for root in profile_roots():
        path = root / kind / f"{name}.toml"
        if path.is_file():
            return path
    raise UnknownName(f'no file "{name}.toml" under {kind}/ in any profile folder.')


@lru_cache(maxsize=512)
def _device(path: Path, stamp: int) -> Device:
    return parse_device(read_document(path), str(path))


@lru_cache(maxsize=512)
def _node(path: Path, stamp: int) -> Node:
    return parse_node(read_document(path), str(path))


@lru_cache(maxsize=64)
def _price_list(path: Path, stamp: int) -> tuple[Price, ...]:
    return parse_prices(read_document(path), str(path))
