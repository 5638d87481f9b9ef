"""The catalogue of published models: names to configs, as data files of one family each.

`catalogue/index.json` maps every folded name to its file, so that finding one model reads the index and one small
file. This module knows nothing of shapes; `planner.readers.models` turns an entry into one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

__all__ = [
    "CatalogueEntry",
    "build_index",
    "catalogue_entries",
    "find_entry",
    "fold_name",
    "hub_id",
    "model_names",
    "nearest_names",
    "write_index",
]

_FOLDER: Final = Path(__file__).with_suffix("")
_URL: Final = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?:models/)?([^/?#]+(?:/[^/?#@]+)?)")
_VIEWS: Final = ("/tree", "/blob", "/resolve", "/raw", "/discussions", "/commits")


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """One published model.

    name: the catalogue's name. hub: its id on huggingface.co, empty for models that were never published there.
    aliases: further names of the same shape: renamed ids, instruction-tuned versions, common short forms.
    config: what decides the shape, as in a config.json. source: where those values were read.
    parameters, active_parameters: exact counts and how they were obtained (`parameters_source`); None where no
    count was found. published, published_source: the figure its makers give, as text.
    """

    name: str
    org: str
    family: str
    hub: str
    aliases: tuple[str, ...]
    config: Mapping[str, Any]
    source: str
    parameters: int | None
    active_parameters: int | None
    parameters_source: str
    published: str
    published_source: str


def fold_name(name: str) -> str:
    """A model name without case and separators; between digits the separator stays, as it tells 1.3b from 13b.

    >>> fold_name("Llama-3.1-8B") == fold_name("llama3.1 8b")
    True
    >>> fold_name("opt-1.3b"), fold_name("opt-13b"), fold_name("phi-1_5")
    ('opt1.3b', 'opt13b', 'phi1.5')
    """
    point = "[.]" if "." in name else "_"  # phi-1_5 is phi-1.5, but llama_3.1_8b is llama-3.1-8b
    folded = re.sub(rf"(?<=\d){point}+(?=\d)", "\0", name.strip().casefold())
    folded = re.sub(r"(?<=\d)[\s_-]+(?=\d)", "\1", folded)
    folded = re.sub(r"[\s._-]+", "", folded)
    return folded.replace("\0", ".").replace("\1", "-")


def hub_id(name: str) -> str:
    """`org/name` out of an address on huggingface.co; any other text is returned as it is, without spaces around.

    >>> hub_id("https://huggingface.co/meta-llama/Llama-3.1-8B/tree/main")
    'meta-llama/Llama-3.1-8B'
    """
    text = name.strip()
    found = _URL.match(text)
    if not found:
        return text
    identifier = found.group(1)
    for view in _VIEWS:
        identifier = identifier.removesuffix(view)
    return identifier


@lru_cache(maxsize=1)
def _index() -> Mapping[str, tuple[str, str, str]]:
    """Folded name to (file, name, organisations that publish it under this name, separated by spaces)."""
    return json.loads((_FOLDER / "index.json").read_text(encoding="utf-8"))


@cache
def _family(file: str) -> Mapping[str, CatalogueEntry]:
    """Every entry of one file by name."""
    import tomllib  # five milliseconds that `import planner` need not spend

    with (_FOLDER / f"{file}.toml").open("rb") as stream:
        document = tomllib.load(stream)
    return {table["name"]: _entry(table) for table in document["model"]}


def _entry(table: Mapping[str, Any]) -> CatalogueEntry:
    config: dict[str, Any] = dict(table["config"])
    for key in table.get("null", ()):  # TOML has no null, and for some keys null and absent differ
        *above, last = key.split(".")
        place = config
        for step in above:
            place = place[step]
        place[last] = None
    return CatalogueEntry(
        name=table["name"],
        org=table["org"],
        family=config["model_type"],
        hub=table.get("hub", ""),
        aliases=tuple(table.get("aliases", ())),
        config=MappingProxyType(config),
        source=table["source"],
        parameters=table.get("parameters"),
        active_parameters=table.get("active_parameters", table.get("parameters")),
        parameters_source=table.get("parameters_source", ""),
        published=table.get("published", ""),
        published_source=table.get("published_source", ""),
    )


def find_entry(name: str) -> CatalogueEntry | None:
    """The entry of that name, or None. Case, separators and the organisation may be left out.

    A name with an organisation only matches what that organisation publishes: a copy elsewhere may differ.
    """
    identifier = hub_id(name)
    org, _, bare = identifier.rpartition("/")
    whole = _index().get(fold_name(identifier))  # some names have a slash of their own: DiT-XL/2
    found = whole or _index().get(fold_name(bare))
    if found is None:
        return None
    file, canonical, organisations = found
    if org and not whole and org.casefold() not in organisations.split():
        return None
    return _family(file)[canonical]


def model_names() -> tuple[str, ...]:
    """Every name in the catalogue, once, without aliases; sorted."""
    return tuple(sorted({canonical for _, canonical, _ in _index().values()}, key=str.casefold))


def catalogue_entries() -> tuple[CatalogueEntry, ...]:
    """Every entry, sorted by name. Reads all files."""
    files = sorted({file for file, _, _ in _index().values()})
    entries = [entry for file in files for entry in _family(file).values()]
    return tuple(sorted(entries, key=lambda entry: entry.name.casefold()))


def nearest_names(name: str, count: int = 3) -> tuple[str, ...]:
    """Catalogue names that look like the given one, nearest first."""
    import difflib

    bare = fold_name(hub_id(name)[:200].rpartition("/")[2])
    close = difflib.get_close_matches(bare, _index(), n=4 * count, cutoff=0.6)
    names = dict.fromkeys(_index()[folded][1] for folded in close)
    return tuple(names)[:count]


def build_index() -> dict[str, tuple[str, str, str]]:
    """The index that the data files call for: folded name to (file, name, organisations).

    Raises ValueError when two models claim one name.
    """
    index: dict[str, tuple[str, str, str]] = {}
    for path in sorted(_FOLDER.glob("*.toml")):
        for entry in _family(path.stem).values():
            for name in (entry.name, f"{entry.org}/{entry.name}", entry.hub, *entry.aliases):
                if not name:
                    continue
                org, _, bare = name.rpartition("/")
                if entry.org == "facebook" and bare.isdigit():  # DiT-XL/2: the slash is part of the name
                    org, bare = "", name
                folded, publisher = fold_name(bare), (org or entry.org).casefold()
                file, canonical, known = index.get(folded, (path.stem, entry.name, ""))
                if canonical != entry.name:
                    raise ValueError(f'"{name}" is claimed by {canonical} and {entry.name}')
                index[folded] = (file, canonical, " ".join(dict.fromkeys([*known.split(), publisher])))
    return dict(sorted(index.items()))


def write_index() -> None:
    """Write `catalogue/index.json` anew, after an entry was added or renamed."""
    text = json.dumps(build_index(), indent=0, ensure_ascii=False)
    (_FOLDER / "index.json").write_text(text + "\n", encoding="utf-8")
    _index.cache_clear()
