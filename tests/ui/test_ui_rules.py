"""Rules of the app's own code: it computes nothing, and one module alone touches what a session remembers."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

UI = Path(__file__).parents[2] / "planner" / "ui"
FILES = sorted(UI.rglob("*.py"))
ARITHMETIC = (ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(UI)))
def test_the_app_computes_nothing(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # The bounds of a control may be written as powers: _MOST = 2**16.
    bounds = {id(node.value) for node in tree.body if isinstance(node, ast.Assign)}
    found = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ARITHMETIC) and id(node) not in bounds
    ]
    assert found == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(UI)))
def test_only_state_touches_the_session_and_the_address(path: Path) -> None:
    names = {
        node.attr for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Attribute)
    }
    touched = names & {"session_state", "query_params"}
    assert touched == ({"session_state", "query_params"} if path.name == "state.py" else set())
