"""The format of one provider's price list: dated, sourced tables in, lines of `planner.hardware.Price` out."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from typing import Any, Literal, cast

from planner.hardware import Price
from planner.readers.profile_format import ProfileReader
from planner.sources import Source

__all__ = ["parse_prices"]

_COLUMNS = (
    "instance", "region", "scope", "regions", "listed_as", "gpu", "basis", "count", "vcpus", "host_gib", "on_demand", "spot",
    "host", "note",
)  # fmt: skip
_SCOPES = ("exact", "min", "median", "min_spot")
_BASES = ("named", "instance", "assumed", "unprofiled")


def parse_prices(document: Mapping[str, Any], where: str = "price list") -> tuple[Price, ...]:
    """All lines of one provider's list; ProfileError naming `where`, the snapshot and the line that breaks the format."""
    reader = ProfileReader(document, where, {"provider", "currency", "notes", "snapshots", "sources"})
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


def _price(reader: ProfileReader, at: str, cells: list[str], provider: str, date: str, source: Source) -> Price:
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
