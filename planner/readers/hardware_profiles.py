"""Hardware profiles and price lists: TOML files in, values of `planner.hardware` out.

Three folders are looked at, the first that has a profile wins: the one named by the environment variable `PLANNER_PROFILES`,
`~/.config/planner/hardware_profiles`, and the one that ships with the planner. All have the same layout, described in
`hardware_profiles/README.md`: `gpus/<name>.toml`, `nodes/<name>.toml`, `prices/<provider>.toml`, and for the shipped one
`aliases.toml`, an index that spares opening every file to find a short name. One profile is read at a time, when asked for.
"""

from __future__ import annotations

import csv
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, cast

from planner.errors import ProfileError, UnknownName, nearest
from planner.hardware import Device, Link, LinkRole, Node, Price, Provenance
from planner.sources import Source, SourceKind

__all__ = [
    "Resolution",
    "device_names",
    "devices",
    "load_hardware",
    "load_node",
    "node_names",
    "nodes",
    "parse_device",
    "parse_node",
    "parse_prices",
    "price_providers",
    "prices",
    "profile_root",
    "profile_roots",
    "resolve_device",
    "resolve_node",
]

_KINDS = ("datasheet", "measured", "derived", "published", "code", "assumed")
_NAME = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
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
    """Every profile folder that exists, the user's own first."""
    named = os.environ.get("PLANNER_PROFILES", "")
    candidates = (named, "~/.config/planner/hardware_profiles")
    own = [os.path.expanduser(folder) for folder in candidates if folder]
    return (*(Path(folder) for folder in own if os.path.isdir(folder)), profile_root())


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
            document = _document(index)
            table = document.get(kind, {})
            choices = document.get("choices", {}) if kind == "gpus" else {}
        else:
            table = {path.stem: _document(path).get("aliases", []) for path in (root / kind).glob("*.toml")}
            choices = {}
        for name, others in table.items():
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
    return parse_device(_document(path), str(path))


@lru_cache(maxsize=512)
def _node(path: Path, stamp: int) -> Node:
    return parse_node(_document(path), str(path))


@lru_cache(maxsize=64)
def _price_list(path: Path, stamp: int) -> tuple[Price, ...]:
    return parse_prices(_document(path), str(path))


def _document(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ProfileError(f"{path}: not a readable TOML file: {error}.") from error


# --- the format ----------------------------------------------------------------------------------------------------

_DEVICE_NUMBERS = (
    "nameplate_memory_bytes",
    "visible_memory_bytes",
    "torch_total_memory_bytes",
    "memory_bandwidth_bytes_per_second",
    "tdp_watts",
    "multiprocessors",
    "l2_cache_bytes",
    "software_devices",
)
_DEVICE_TEXTS = ("vendor", "form_factor", "architecture", "memory_type", "released")
_FORMATS = ("fp64", "fp64_tensor", "fp32", "tf32", "fp16", "bf16", "fp8", "fp6", "fp4", "int8", "int4")
_LINK_RATES = ("bytes_per_second_per_direction", "bytes_per_second_per_peer_per_direction")
_NODE_NUMBERS = (
    "gpus_per_node",
    "scale_up_domain_devices",
    "peer_bytes_per_second_per_direction",
    "network_bytes_per_second",
    "host_memory_bytes",
    "vcpus",
    "local_storage_bytes",
)
_DEVICE_KEYS = {
    *_DEVICE_NUMBERS, "name", "title", "aliases", "announced_only", "reference_node", "notes", "identity", "compute_capability",
    "dense_flops_per_second", "links", "sources",
}  # fmt: skip
_NODE_KEYS = {
    *_NODE_NUMBERS, "name", "provider", "instance", "device", "peer_fabric", "network", "aliases", "notes", "sources",
}  # fmt: skip


class _Reader:
    """One document being checked: collects the provenance of each value and names file and key in every error."""

    def __init__(self, document: Mapping[str, Any], where: str, keys: set[str]) -> None:
        self.document = document
        self.where = where
        self.provenance: list[Provenance] = []
        self.refuse_unknown(document, keys, "")
        table = document.get("sources")
        if not isinstance(table, dict) or not table:
            raise self.wrong("sources", "must be a table of at least one source")
        self.sources = {key: self._source(key, entry) for key, entry in table.items()}

    def wrong(self, key: str, problem: str) -> ProfileError:
        return ProfileError(f"{self.where}: {key} {problem}.")

    def refuse_unknown(self, table: Mapping[str, Any], keys: set[str], prefix: str) -> None:
        for key in table:
            if key not in keys:
                raise self.wrong(f"{prefix}{key}", f"is not a key of this format; {nearest(key, keys).rstrip('.')}")

    def _source(self, key: str, entry: object) -> Source:
        path = f"sources.{key}"
        if not isinstance(entry, dict):
            raise self.wrong(path, "must be a table with title and kind")
        self.refuse_unknown(entry, {"title", "kind", "url", "date"}, f"{path}.")
        texts = {name: entry.get(name, "") for name in ("title", "kind", "url", "date")}
        for name, text in texts.items():
            if not isinstance(text, str) or (not text and name in ("title", "kind")):
                raise self.wrong(f"{path}.{name}", f"must be a text, not {text!r}")
        if texts["kind"] not in _KINDS:
            raise self.wrong(f"{path}.kind", f'is "{texts["kind"]}"; accepted: {", ".join(_KINDS)}')
        return Source(title=texts["title"], kind=cast(SourceKind, texts["kind"]), url=texts["url"], date=texts["date"])

    def text(self, key: str) -> str:
        value = self.document.get(key)
        if not isinstance(value, str) or not value:
            raise self.wrong(key, f"must be a text, not {value!r}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.document.get(key, [])
        if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
            raise self.wrong(key, "must be a list of texts")
        return tuple(value)

    def sourced(self, entry: object, path: str) -> Any:
        """The value of `{value, source, note}`; records its provenance."""
        if not isinstance(entry, dict):
            raise self.wrong(path, "must be a table {value = ..., source = [...]}: every value names its source")
        self.refuse_unknown(entry, {"value", "source", "note"}, f"{path}.")
        named = entry.get("source")
        if not isinstance(named, list) or not named:
            raise self.wrong(path, "has no source; list at least one key of [sources]")
        for key in named:
            if key not in self.sources:
                raise self.wrong(
                    path, f'names a source "{key}" that [sources] lacks; {nearest(str(key), self.sources).rstrip(".")}'
                )
        if "value" not in entry:
            raise self.wrong(path, "has no value; leave the whole key out when it is unknown")
        note = entry.get("note", "")
        if not isinstance(note, str):
            raise self.wrong(f"{path}.note", "must be a text")
        self.provenance.append(Provenance(key=path, sources=tuple(self.sources[key] for key in named), note=note))
        return entry["value"]

    def number(self, table: Mapping[str, Any], key: str, prefix: str = "") -> int | None:
        if key not in table:
            return None
        value = self.sourced(table[key], prefix + key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(prefix + key, f"must be a whole number, not {value!r}")
        if value <= 0:
            raise self.wrong(prefix + key, f"is {value}; it must be positive, and left out when unknown")
        return value

    def required(self, key: str) -> int:
        value = self.number(self.document, key)
        if value is None:
            raise self.wrong(key, "is missing")
        return value

    def flag(self, table: Mapping[str, Any], key: str, prefix: str = "") -> bool:
        value = table.get(key, False)
        if not isinstance(value, bool):
            raise self.wrong(prefix + key, f"must be true or false, not {value!r}")
        return value

    def name(self) -> str:
        value = self.text("name")
        if not _NAME.fullmatch(value):
            raise self.wrong("name", f'"{value}" must be lower-case words joined by hyphens')
        if self.where.endswith(".toml") and Path(self.where).stem != value:
            raise self.wrong("name", f'"{value}" must equal the file\'s name')
        return value


def parse_device(document: Mapping[str, Any], where: str = "profile") -> Device:
    """A device from a parsed profile; ProfileError naming `where` and the key that breaks the format."""
    reader = _Reader(document, where, _DEVICE_KEYS)
    numbers = {key: reader.number(document, key) for key in _DEVICE_NUMBERS}
    identity = document.get("identity")
    if not isinstance(identity, dict):
        raise reader.wrong("identity", "must be a table of vendor, form_factor, architecture and memory_type")
    reader.refuse_unknown(identity, {*_DEVICE_TEXTS, "source"}, "identity.")
    described = {key: identity[key] for key in _DEVICE_TEXTS if key in identity}
    if not all(isinstance(value, str) and value for value in described.values()):
        raise reader.wrong("identity", "must hold texts")
    for key in ("vendor", "form_factor", "architecture", "memory_type"):
        if key not in described:
            raise reader.wrong(f"identity.{key}", "is missing")
    reader.sourced({"value": described, "source": identity.get("source")}, "identity")

    rates_table = document.get("dense_flops_per_second", {})
    if not isinstance(rates_table, dict):
        raise reader.wrong("dense_flops_per_second", "must be a table of number formats")
    reader.refuse_unknown(rates_table, set(_FORMATS), "dense_flops_per_second.")
    rates: list[tuple[str, int]] = []
    for key in _FORMATS:
        rate = reader.number(rates_table, key, "dense_flops_per_second.")
        if rate is not None:
            rates.append((key, rate))

    links = document.get("links", [])
    if not isinstance(links, list):
        raise reader.wrong("links", "must be an array of tables")
    title = reader.text("title")
    software_devices = numbers.pop("software_devices") or 1
    device = Device(
        name=reader.name(),
        title=title,
        **described,
        **numbers,
        dense_rates=tuple(rates),
        software_devices=software_devices,
        compute_capability=_capability(reader),
        links=tuple(_link(reader, link, f"links[{position}].") for position, link in enumerate(links)),
        announced_only=reader.flag(document, "announced_only"),
        reference_node=reader.text("reference_node") if "reference_node" in document else None,
        aliases=reader.texts("aliases"),
        notes=reader.texts("notes"),
        provenance=tuple(reader.provenance),
    )
    _check_sizes(reader, device)
    return device


def _capability(reader: _Reader) -> tuple[int, int] | None:
    if "compute_capability" not in reader.document:
        return None
    value = reader.sourced(reader.document["compute_capability"], "compute_capability")
    if not isinstance(value, str) or not re.fullmatch(r"\d+\.\d", value):
        raise reader.wrong("compute_capability", f'must be a text such as "9.0", not {value!r}')
    major, minor = value.split(".")
    return int(major), int(minor)


def _link(reader: _Reader, table: object, prefix: str) -> Link:
    if not isinstance(table, dict):
        raise reader.wrong(prefix.rstrip("."), "must be a table")
    reader.refuse_unknown(
        table, {*_LINK_RATES, "name", "role", "reach_devices", "spans_nodes", "optional", "topology"}, prefix
    )
    role, name, topology = table.get("role"), table.get("name"), table.get("topology", "")
    if role not in ("peer", "host", "network"):
        raise reader.wrong(f"{prefix}role", f'must be "peer", "host" or "network", not {role!r}')
    if not isinstance(name, str) or not name or not isinstance(topology, str):
        raise reader.wrong(f"{prefix}name", "and topology must be texts")
    reach = table.get("reach_devices")
    if reach is not None and (isinstance(reach, bool) or not isinstance(reach, int) or reach < 2):
        raise reader.wrong(f"{prefix}reach_devices", f"must be a whole number of at least 2, not {reach!r}")
    return Link(
        name=name,
        role=cast(LinkRole, role),
        bytes_per_second_per_direction=reader.number(table, "bytes_per_second_per_direction", prefix),
        bytes_per_second_per_peer_per_direction=reader.number(table, "bytes_per_second_per_peer_per_direction", prefix),
        reach_devices=reach,
        spans_nodes=reader.flag(table, "spans_nodes", prefix),
        optional=reader.flag(table, "optional", prefix),
        topology=topology,
    )


def _check_sizes(reader: _Reader, device: Device) -> None:
    """Memory sizes go downwards: printed (read as GiB, the larger reading), then the driver's total, then torch's."""
    upper = None
    if device.nameplate_memory_bytes is not None:
        printed = device.nameplate_memory_bytes
        upper = printed if printed % 2**30 == 0 else printed * 2**30 // 10**9
    for key, value in (
        ("visible_memory_bytes", device.visible_memory_bytes),
        ("torch_total_memory_bytes", device.torch_total_memory_bytes),
    ):
        if value is not None and upper is not None and value > upper:
            raise reader.wrong(key, f"is {value}, more than the {upper} bytes of the size above it")
        upper = value if value is not None else upper


def parse_node(document: Mapping[str, Any], where: str = "profile") -> Node:
    """A node from a parsed profile; ProfileError naming `where` and the key that breaks the format."""
    reader = _Reader(document, where, _NODE_KEYS)
    optional = {key: reader.number(document, key) for key in _NODE_NUMBERS[2:]}
    gpus = reader.required("gpus_per_node")
    domain = reader.required("scale_up_domain_devices")
    if domain < gpus:
        raise reader.wrong("scale_up_domain_devices", f"is {domain}, fewer than the {gpus} devices of the node")
    return Node(
        name=reader.name(),
        provider=reader.text("provider"),
        instance=reader.text("instance"),
        device=reader.text("device"),
        gpus_per_node=gpus,
        scale_up_domain_devices=domain,
        peer_fabric=reader.text("peer_fabric"),
        network=reader.text("network") if "network" in document else "",
        **optional,
        aliases=reader.texts("aliases"),
        notes=reader.texts("notes"),
        provenance=tuple(reader.provenance),
    )


_COLUMNS = (
    "instance", "region", "scope", "regions", "listed_as", "gpu", "basis", "count", "vcpus", "host_gib", "on_demand", "spot",
    "host", "note",
)  # fmt: skip
_SCOPES = ("exact", "min", "median", "min_spot")
_BASES = ("named", "instance", "assumed", "unprofiled")


def parse_prices(document: Mapping[str, Any], where: str = "price list") -> tuple[Price, ...]:
    """All lines of one provider's list; ProfileError naming `where`, the snapshot and the line that breaks the format."""
    reader = _Reader(document, where, {"provider", "currency", "notes", "snapshots", "sources"})
    provider = reader.text("provider")
    if reader.text("currency") != "USD":
        raise reader.wrong("currency", 'must be "USD"')
    snapshots = document.get("snapshots")
    if not isinstance(snapshots, list) or not snapshots:
        raise reader.wrong("snapshots", "must be an array of tables with date, source and rows")
    found: list[Price] = []
    for position, snapshot in enumerate(snapshots):
        path = f"snapshots[{position}]"
        if not isinstance(snapshot, dict) or not isinstance(snapshot.get("rows"), str):
            raise reader.wrong(path, "must hold date, source and rows")
        reader.refuse_unknown(snapshot, {"date", "source", "rows"}, f"{path}.")
        date = snapshot.get("date")
        if not isinstance(date, str) or not re.fullmatch(r"unknown|\d{4}-\d\d-\d\d", date):
            raise reader.wrong(f"{path}.date", f'must be an ISO date or "unknown", not {date!r}')
        reader.sourced({"value": date, "source": [snapshot.get("source")]}, path)
        source = reader.provenance[-1].sources[0]
        lines = csv.reader(snapshot["rows"].strip().splitlines())
        header = tuple(next(lines, ()))
        if header != _COLUMNS:
            raise reader.wrong(f"{path}.rows", f"must start with the columns {','.join(_COLUMNS)}")
        for number, cells in enumerate(lines, start=2):
            at = f"{path}.rows line {number}"
            if len(cells) != len(_COLUMNS):
                raise reader.wrong(at, f"has {len(cells)} cells, not {len(_COLUMNS)}")
            found.append(_price(reader, at, cells, provider, date, source))
    return tuple(found)


def _price(reader: _Reader, at: str, cells: list[str], provider: str, date: str, source: Source) -> Price:
    instance, region, scope, regions, listed, gpu, basis, count, vcpus, host_gib, on_demand, spot, host, note = cells

    def positive(column: str, text: str) -> float | None:
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            raise reader.wrong(f"{at}, {column}", f'"{text}" is not a number') from None
        if not 0 < value < float("inf"):
            raise reader.wrong(f"{at}, {column}", f"is {text}; it must be positive, and left empty when unknown")
        return value

    price = positive("on_demand", on_demand)
    counted = positive("regions", regions)
    if price is None or counted is None:
        raise reader.wrong(at, "needs regions and an on_demand price")
    if scope not in _SCOPES or basis not in _BASES or host not in ("", "extra"):
        raise reader.wrong(at, f'has scope "{scope}", basis "{basis}", host "{host}", of which one is not accepted')
    if (basis == "unprofiled") != (gpu == ""):
        raise reader.wrong(at, "must name a gpu, or be unprofiled")
    memory = positive("host_gib", host_gib)
    return Price(
        provider=provider,
        instance=instance,
        region=region,
        region_scope=scope,
        regions_counted=int(counted),
        gpu=gpu or None,
        gpu_as_listed=listed,
        gpu_basis=cast(Literal["named", "instance", "assumed", "unprofiled"], basis),
        gpu_count=positive("count", count),
        on_demand_usd_per_hour=price,
        spot_usd_per_hour=positive("spot", spot),
        vcpus=positive("vcpus", vcpus),
        host_memory_bytes=None if memory is None else int(memory * 2**30),
        host_included=host != "extra",
        date=date,
        source=source,
        note=note,
    )
