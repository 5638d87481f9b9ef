"""The format of one hardware profile: a parsed TOML document in, a checked Device or Node out.

Every number is `{value, source, note}`. Unknown keys, missing sources, values of 0 or below and sizes in the wrong order raise a
ProfileError of one sentence that names the file and the key. The format is described in `hardware_profiles/README.md`.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from planner.errors import ProfileError, nearest
from planner.hardware import Device, Link, LinkRole, Node, Provenance
from planner.sources import Source, SourceKind

__all__ = ["ProfileReader", "parse_device", "parse_node", "read_document"]

_KINDS = ("datasheet", "measured", "derived", "published", "code", "assumed")
_NAME = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
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


def read_document(path: Path) -> dict[str, Any]:
    """The parsed TOML file; ProfileError when it cannot be read or is not TOML."""
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ProfileError(f"{path}: not a readable TOML file: {error}.") from error


class ProfileReader:
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
    reader = ProfileReader(document, where, _DEVICE_KEYS)
    numbers: dict[str, Any] = {key: reader.number(document, key) for key in _DEVICE_NUMBERS}
    identity = document.get("identity")
    if not isinstance(identity, dict):
        raise reader.wrong("identity", "must be a table of vendor, form_factor, architecture and memory_type")
    reader.refuse_unknown(identity, {*_DEVICE_TEXTS, "source"}, "identity.")
    described: dict[str, Any] = {key: identity[key] for key in _DEVICE_TEXTS if key in identity}
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


def _capability(reader: ProfileReader) -> tuple[int, int] | None:
    if "compute_capability" not in reader.document:
        return None
    value = reader.sourced(reader.document["compute_capability"], "compute_capability")
    if not isinstance(value, str) or not re.fullmatch(r"\d+\.\d", value):
        raise reader.wrong("compute_capability", f'must be a text such as "9.0", not {value!r}')
    major, minor = value.split(".")
    return int(major), int(minor)


def _link(reader: ProfileReader, table: object, prefix: str) -> Link:
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


def _check_sizes(reader: ProfileReader, device: Device) -> None:
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
    reader = ProfileReader(document, where, _NODE_KEYS)
    optional: dict[str, Any] = {key: reader.number(document, key) for key in _NODE_NUMBERS[2:]}
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
