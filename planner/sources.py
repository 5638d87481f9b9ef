"""Where a number comes from: the record that travels with every datum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Source", "SourceKind"]

SourceKind = Literal["datasheet", "measured", "derived", "published", "code", "assumed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One origin of one number or of a group of numbers.

    title: document, paper and equation, file and commit, or the name of the run.
    kind:  `datasheet` (vendor), `measured` (by us), `published` (measured by others), `code` (read in a
           library), `derived` (arithmetic on other sourced values), `assumed` (no first-hand source; says so).
    url:   where to read it; empty when the title is the whole address.
    date:  ISO date of the source or of its reading; empty when neither is known.
    """

    title: str
    kind: SourceKind
    url: str = ""
    date: str = ""
