"""JSON and YAML text from an untrusted place, read into plain dicts, lists and scalars, or refused in one sentence.

Refused: text that is not UTF-8, files over 5 MB, nesting deeper than 20 levels, repeated keys (which both formats'
usual parsers let the last one win), YAML aliases (the "billion laughs" need them), tags that name Python objects, and
streams of several documents. YAML is built from libyaml's event stream on an explicit stack, because composing nodes
recursively in C exhausts the stack before any limit of Python's is met.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from planner.errors import PlanError, SourceUnavailable

if TYPE_CHECKING:
    import yaml

__all__ = ["MOST_BYTES", "MOST_LEVELS", "decode", "parse_text", "read_bytes", "shown"]

MOST_BYTES = 5_000_000
MOST_LEVELS = 20

Format = Literal["json", "yaml"]


def shown(value: object, longest: int = 48) -> str:
    """A given value as it may stand in an error sentence: on one line, quoted when it is text, and short.

    >>> shown("a\\nb"), shown(8.0), shown(None), shown(True)
    ('"a\\\\nb"', '8.0', 'null', 'true')
    """
    if isinstance(value, str):
        head = value[:longest]
        safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in head)
        return f'"{safe[:longest]}{"..." if len(value) > longest or len(safe) > longest else ""}"'
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and abs(value) >= 10**18:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, (list, tuple)):
        return "a list"
    return "a mapping" if isinstance(value, dict) else f"a value of type {type(value).__name__}"


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The content of a file, or of standard input for "-". Raises SourceUnavailable, also above 5 MB."""
    name = os.fspath(path)
    where = "Standard input" if name == "-" else shown(name, 120)
    try:
        content = _standard_input() if name == "-" else _file_content(name, where)
    except FileNotFoundError:
        raise SourceUnavailable(f"There is no file {where}.") from None
    except OSError as error:
        raise SourceUnavailable(f"{where} could not be read: {error.strerror or type(error).__name__}.") from None
    if len(content) > MOST_BYTES:
        raise SourceUnavailable(f"The plan is longer than {MOST_BYTES} bytes, the most that is read.")
    return content


def _standard_input() -> bytes:
    if sys.stdin is None:
        raise SourceUnavailable("Standard input is closed; give a file.")
    return sys.stdin.buffer.read(MOST_BYTES + 1)


def _file_content(name: str, where: str) -> bytes:
    if not name or "\x00" in name:
        raise SourceUnavailable(f"{where} is not a path a file can have.")
    # A pipe such as <(command) is welcome; a device that never ends is cut off.
    status = os.stat(name)
    if stat.S_ISDIR(status.st_mode):
        raise SourceUnavailable(f"{where} is a folder; give the plan file inside it.")
    if status.st_size > MOST_BYTES:
        raise SourceUnavailable(f"{where} has {status.st_size} bytes; a plan may have at most {MOST_BYTES}.")
    with Path(name).open("rb") as file:
        return file.read(MOST_BYTES + 1)


def decode(content: bytes) -> str:
    """UTF-8 text, a byte order mark removed. Raises PlanError for anything else, binary files included."""
    if b"\x00" in content:
        raise PlanError("The plan contains NUL bytes, so it is a binary or UTF-16 file; write it as UTF-8 text.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PlanError(f"The plan is not UTF-8 text: byte {error.start} cannot be decoded.") from None


def parse_text(text: str, format: Format | None = None) -> Any:
    """The one document in `text`. Without a format, text that opens like a JSON object is JSON. Raises PlanError."""
    if len(text) > MOST_BYTES:
        raise PlanError(f"The plan is longer than {MOST_BYTES} characters, the most that is read.")
    if not text.strip():
        raise PlanError('The plan is empty; it needs at least a model, for example "model: gpt2".')
    if "\x00" in text:
        raise PlanError("The plan contains NUL characters; write it as plain text.")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise PlanError("The plan contains half a UTF-16 surrogate pair, which is not text.")
    if format not in (None, "json", "yaml"):
        raise PlanError(f"{shown(format)} is not a format of plans; accepted: json, yaml.")
    if format == "json" or (format is None and _opens_like_json(text)):
        return _json(text)
    return _yaml(text)


def _opens_like_json(text: str) -> bool:
    head = text.lstrip()
    if head[0] not in "{[":
        return False
    # YAML's flow style also opens with a brace, but seldom quotes its first key.
    return head[0] == "[" or head[1:].lstrip()[:1] in ('"', "}", "")


def _json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_mapping_without_repeats)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise PlanError(f"The plan is not valid JSON: {error.msg} at {where}.") from None
    except RecursionError:
        raise PlanError(f"The plan is nested more than {MOST_LEVELS} levels deep.") from None
    except ValueError as error:  # an integer with more digits than Python converts
        if isinstance(error, PlanError):
            raise
        raise PlanError("The plan holds a number with thousands of digits.") from None


def _mapping_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise PlanError(f"The field {shown(repeated)} is given twice.")
    return mapping


def _yaml(text: str) -> Any:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        return _document(loader)
    except yaml.reader.ReaderError as error:
        raise PlanError(
            f"The plan contains a character that YAML does not allow, at position {error.position}."
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = " ".join(str(error.problem or error.context).split())[:120]
        raise PlanError(f"The plan is not valid YAML: {problem}{where}.") from None
    except (ValueError, OverflowError) as error:  # a date such as 2024-13-45, an integer of thousands of digits
        if isinstance(error, PlanError):
            raise
        raise PlanError("The plan holds a date or a number that does not exist; put text in quotes.") from None
    finally:
        loader.dispose()


def _document(loader: yaml.SafeLoader) -> Any:
    """The value of the stream's only document, from its events. Raises PlanError and yaml.YAMLError."""
    from yaml import events

    root: list[Any] = []
    open_collections: list[list[Any] | _PendingMapping] = [root]
    documents = 0
    while loader.check_event():
        event = loader.get_event()
        if isinstance(event, events.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise PlanError('The file holds several YAML documents ("---"); give one plan a file.')
        elif isinstance(event, events.AliasEvent):
            raise PlanError(f"The plan uses the YAML alias {shown('*' + event.anchor)}; write the value out instead.")
        elif isinstance(event, events.ScalarEvent):
            _add(open_collections[-1], _scalar(loader, event))
        elif isinstance(event, (events.MappingStartEvent, events.SequenceStartEvent)):
            if event.tag is not None and not event.implicit:
                raise PlanError(f"The plan uses the YAML tag {shown(event.tag)}; plans are plain mappings and lists.")
            if len(open_collections) > MOST_LEVELS:
                raise PlanError(f"The plan is nested more than {MOST_LEVELS} levels deep.")
            open_collections.append(_PendingMapping() if isinstance(event, events.MappingStartEvent) else [])
        elif isinstance(event, (events.MappingEndEvent, events.SequenceEndEvent)):
            closed = open_collections.pop()
            _add(open_collections[-1], closed.fields if isinstance(closed, _PendingMapping) else closed)
    return root[0] if root else None


class _PendingMapping:
    """A YAML mapping whose end has not been read: its fields so far, and a key that waits for its value."""

    __slots__ = ("fields", "key")

    def __init__(self) -> None:
        self.fields: dict[Any, Any] = {}
        self.key: tuple[Any, ...] = ()


def _add(collection: list[Any] | _PendingMapping, value: Any) -> None:
    if isinstance(collection, list):
        collection.append(value)
    elif collection.key:
        collection.fields[collection.key[0]] = value
        collection.key = ()
    else:
        if not isinstance(value, Hashable):
            raise PlanError(f"The plan uses {shown(value)} as a field name; field names are text.")
        if value in collection.fields:
            raise PlanError(f"The field {shown(value)} is given twice.")
        if value == "<<":
            raise PlanError('The plan uses the YAML merge key "<<"; write the fields out instead.')
        collection.key = (value,)


def _scalar(loader: yaml.SafeLoader, event: yaml.ScalarEvent) -> Any:
    from yaml import nodes

    tag = event.tag
    if tag is None or tag == "!":
        tag = loader.resolve(nodes.ScalarNode, event.value, event.implicit)
    if tag.endswith((":merge", ":value")):
        return event.value
    if tag == "tag:yaml.org,2002:str":
        return event.value
    return loader.construct_object(nodes.ScalarNode(tag, event.value, event.start_mark, event.end_mark))
