"""What the app remembers: controls in the address, and the last good answer of a session.

The only module that touches session state and query parameters. A control is bound to the query parameter of its key,
so an address is a plan. Streamlit leaves values that equal a default out of the address and drops what it cannot read
in silence; hence `permalink`, which writes every field and the schema's number, and `Requested.ignored`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import streamlit as st

from planner.errors import nearest

__all__ = ["SCHEMA", "Requested", "keep", "kept", "permalink", "requested"]

SCHEMA = "1"  # raise it when a control changes its name or its meaning, and translate older links in `requested`
_SCHEMA_KEY = "v"
_STREAMLIT_KEYS = frozenset({"embed", "embed_options"})


@dataclass(frozen=True, slots=True)
class Requested:
    """What the address asked for when the page began to run, before any control could drop a value."""

    values: Mapping[str, str]

    def ignored(self, effective: Mapping[str, Any]) -> tuple[str, ...]:
        """One sentence for each part of the address that had no effect, given what the controls hold."""
        sentences = []
        schema = self.values.get(_SCHEMA_KEY, SCHEMA)
        if schema != SCHEMA:
            sentences.append(f"The link has schema {schema[:20]}; this version reads schema {SCHEMA}.")
        for name, value in self.values.items():
            if name == _SCHEMA_KEY or name in _STREAMLIT_KEYS:
                continue
            if name not in effective:
                sentences.append(f'The link names "{name[:40]}", which is no control; {nearest(name, effective)}')
            elif _text(effective[name]).casefold() != value.strip().casefold():
                held = _text(effective[name])
                sentences.append(f'The link asks for {name} "{value[:60]}", which is not accepted; {held} is used.')
        return tuple(sentences)


def requested() -> Requested:
    """The address as it is now; call it before the first control is drawn."""
    return Requested({name: st.query_params[name] for name in st.query_params})


def permalink(values: Mapping[str, Any]) -> str:
    """An address that holds every control, the ones at their default too, and the schema's number."""
    base = (st.context.url or "").partition("?")[0]
    return f"{base}?{urlencode({_SCHEMA_KEY: SCHEMA, **{name: _text(value) for name, value in values.items()}})}"


def keep(name: str, value: Any) -> None:
    """Remember a value for the session."""
    st.session_state[f"kept {name}"] = value


def kept(name: str) -> Any:
    """The value remembered under that name in this session, or None."""
    return st.session_state.get(f"kept {name}")


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
