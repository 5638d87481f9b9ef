"""Bytes, seconds, counts, FLOPs and money: parsed from what a person writes, printed for a person to read.

This is the only module that prints a unit. Inside the package bytes are `int`, time is seconds, money is US dollars.
GiB is 2**30 bytes and GB is 10**9; both are printed with their own name, so that neither is mistaken for the other.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Literal

from planner.errors import PlannerError, nearest

__all__ = [
    "format_bytes",
    "format_count",
    "format_flops",
    "format_money",
    "format_seconds",
    "format_share",
    "parse_bytes",
    "parse_count",
    "parse_flops",
    "parse_money",
    "parse_seconds",
]

ByteUnit = Literal["B", "KiB", "MiB", "GiB", "TiB", "kB", "MB", "GB", "TB"]

_BINARY = {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1}
_DECIMAL = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "kB": 10**3, "B": 1}
_BYTES = {**_BINARY, **_DECIMAL}
_PREFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12, "p": 10**15, "e": 10**18}
_SECONDS = {
    "us": Decimal("1e-6"),
    "µs": Decimal("1e-6"),
    "ms": Decimal("1e-3"),
    "s": Decimal(1),
    "min": Decimal(60),
    "h": Decimal(3600),
    "d": Decimal(86400),
    "days": Decimal(86400),
    "weeks": Decimal(604800),
}
_LARGEST = Decimal("1e30")  # beyond any quantity of the field; keeps "1e999999999" from becoming an integer
_QUANTITY = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]*)?(?:[eE][+-]?[0-9]{1,9})?)\s*([^\s0-9.]*(?:\s*[^\s0-9.]+)?)\s*\Z")


def _number_and_unit(text: str, what: str, example: str) -> tuple[Decimal, str]:
    match = _QUANTITY.match(text) if len(text) <= 64 else None
    if match is None:
        raise PlannerError(f'{_shown(text)} is not {what}; write for example "{example}".')
    number = Decimal(match[1].replace("_", ""))
    if number > _LARGEST:
        raise PlannerError(f"{_shown(text)} is larger than any {what.split()[-1]} in use; the limit is 1e30.")
    return number, match[2]


def _shown(text: str) -> str:
    kept = "".join(character if character.isprintable() else "?" for character in text[:40])
    return f'"{kept}{"..." if len(text) > 40 else ""}"'


def format_bytes(size_bytes: float, unit: ByteUnit = "GiB", digits: int = 2) -> str:
    """A size with its unit; what would print as 0.00 falls back to a smaller unit of the same family.

    >>> format_bytes(80 * 2**30), format_bytes(80 * 10**9, "GB"), format_bytes(131072)
    ('80.00 GiB', '80.00 GB', '128.00 KiB')
    """
    if unit not in _BYTES:
        raise PlannerError(f'There is no byte unit "{unit}"; {nearest(unit, _BYTES)}')
    family = _DECIMAL if unit in _DECIMAL and unit != "B" else _BINARY
    name: str = unit
    if round(abs(size_bytes) / _BYTES[unit], digits) == 0:
        name = next((smaller for smaller, size in family.items() if size <= abs(size_bytes)), "B")
    return f"{size_bytes:,.0f} B" if name == "B" else f"{size_bytes / _BYTES[name]:,.{digits}f} {name}"


def parse_bytes(text: str) -> int:
    """Bytes from "24 GiB", "80GB", "512 MiB" or a bare number of bytes such as "2e9"; a fraction is rounded.

    A bare prefix ("80G") is refused, because it means GiB to some tools and GB to others.

    >>> parse_bytes("1.5 GiB"), parse_bytes("80GB"), parse_bytes("2e9")
    (1610612736, 80000000000, 2000000000)
    """
    number, unit = _number_and_unit(text, "a size", "24 GiB")
    by_fold = {name.casefold(): size for name, size in _BYTES.items()} | {"": 1, "bytes": 1, "byte": 1}
    if unit.casefold() in {"k", "m", "g", "t"}:
        raise PlannerError(f"{_shown(text)} does not say which unit; write {unit.upper()}iB (2**n) or {unit.upper()}B.")
    if unit.casefold() not in by_fold:
        raise PlannerError(f"{_shown(text)} has no known byte unit; {nearest(unit, _BYTES)}")
    return round(number * by_fold[unit.casefold()])


def format_count(count: float, digits: int = 2) -> str:
    """A count of parameters or tokens with K, M, B or T (10**3 to 10**12).

    >>> format_count(8_030_261_248), format_count(512), format_count(15e12, 1)
    ('8.03B', '512', '15.0T')
    """
    for suffix, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if round(abs(count) / size, digits) >= 1:
            return f"{count / size:.{digits}f}{suffix}"
    return f"{count:g}"


def parse_count(text: str) -> int:
    """A whole count from "15T", "1.5T tokens", "300B" or "2e9".

    >>> parse_count("1.5T tokens"), parse_count("300B"), parse_count("2e9")
    (1500000000000, 300000000000, 2000000000)
    """
    number, unit = _number_and_unit(text, "a count", "1.5T tokens")
    prefix = re.sub(r"(?i)\s*(tokens?|parameters?|params?|sequences?)\Z", "", unit).casefold()
    if prefix not in {"", "k", "m", "b", "g", "t"}:
        raise PlannerError(f"{_shown(text)} has no known suffix; accepted: K, M, B, T.")
    count = number * _PREFIXES[prefix]
    if count != int(count):
        raise PlannerError(f"{_shown(text)} is not a whole number.")
    return int(count)


def format_seconds(seconds: float) -> str:
    """A duration in the unit that keeps it readable.

    >>> format_seconds(0.00042), format_seconds(1.5), format_seconds(5400), format_seconds(3 * 86400)
    ('420.00 µs', '1.50 s', '1.50 h', '3.00 days')
    """
    for name, size in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1), ("ms", 1e-3)):
        if abs(seconds) >= (2 * size if name == "days" else size):
            return f"{seconds / size:,.2f} {name}"
    return f"{seconds * 1e6:,.2f} µs" if seconds else "0 s"


def parse_seconds(text: str) -> float:
    """Seconds from "250ms", "90 min", "12h", "3 days" or a bare number of seconds.

    >>> parse_seconds("250ms"), parse_seconds("1.5h"), parse_seconds("3 days")
    (0.25, 5400.0, 259200.0)
    """
    number, unit = _number_and_unit(text, "a duration", "90 min")
    words = {"": Decimal(1), "sec": Decimal(1), "seconds": Decimal(1), "minutes": Decimal(60), "hours": Decimal(3600)}
    known = _SECONDS | words | {"day": Decimal(86400), "hour": Decimal(3600), "w": Decimal(604800)}
    if unit.casefold() not in known:
        raise PlannerError(f"{_shown(text)} has no known unit of time; {nearest(unit, _SECONDS)}")
    return float(number * known[unit.casefold()])


def format_flops(flops: float, per_second: bool = False) -> str:
    """Floating-point operations, or operations per second, with an SI prefix.

    >>> format_flops(989.4e12, per_second=True), format_flops(3.2e18)
    ('989.40 TFLOP/s', '3.20 EFLOP')
    """
    tail = "FLOP/s" if per_second else "FLOP"
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if abs(flops) >= size:
            return f"{flops / size:,.2f} {prefix}{tail}"
    return f"{flops:,.0f} {tail}"


def parse_flops(text: str) -> float:
    """Operations (or operations per second) from "989 TFLOPS", "312 TFLOP/s", "3.2 EFLOP" or "1e15".

    >>> parse_flops("989 TFLOPS"), parse_flops("312 TFLOP/s"), parse_flops("1e15")
    (989000000000000.0, 312000000000000.0, 1000000000000000.0)
    """
    number, unit = _number_and_unit(text, "a count of operations", "989 TFLOP/s")
    match = re.fullmatch(r"([kmgtpe]?)(?:flops?(?:/s)?)?", unit.casefold())
    if match is None:
        raise PlannerError(f"{_shown(text)} has no known unit; write for example TFLOP or TFLOP/s.")
    return float(number * _PREFIXES[match[1]])


def format_money(usd: float) -> str:
    """US dollars; cents for everyday sums, three significant digits below ten cents.

    >>> format_money(1234.5), format_money(0.00341), format_money(0)
    ('$1,234.50', '$0.00341', '$0.00')
    """
    sign = "-" if usd < 0 else ""
    size = abs(usd)
    return f"{sign}${size:.3g}" if 1e-4 <= size < 0.1 else f"{sign}${size:,.2f}"


def parse_money(text: str) -> float:
    """US dollars from "$2.49", "2.49 USD" or "2.49".

    >>> parse_money("$2.49"), parse_money("2.49 USD")
    (2.49, 2.49)
    """
    number, unit = _number_and_unit(text.strip().removeprefix("$"), "a price", "$2.49")
    if unit.casefold() not in {"", "usd", "usd/h", "/h"}:
        raise PlannerError(f"{_shown(text)} is not in US dollars; only USD is understood.")
    return float(number)


def format_share(share: float, digits: int = 1) -> str:
    """A fraction as a percentage.

    >>> format_share(0.4712)
    '47.1 %'
    """
    return f"{share * 100:.{digits}f} %"
