"""Pictures for the README: the same text each time, and every part of the answer in it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("plotly")

from planner.errors import SourceUnavailable
from planner.figures import zero_states
from planner.ui import pictures

try:
    pictures.browser()
    MISSING = ""
except SourceUnavailable as error:
    MISSING = str(error)

STATES = {"whole": {"weights": 8 * 10**9, "master_weights": 10**9}, "cut": {"weights": 10**9}}


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_a_figure_is_drawn_the_same_each_time() -> None:
    figure = zero_states(STATES, title="States")
    first, second = pictures.svg_of(figure), pictures.svg_of(figure)
    assert first == second
    assert first.startswith("<svg ") and "<script" not in first
    for text in ("States", "whole", "9.00 GB", "master weights"):
        assert text in first


def test_a_missing_browser_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CHROMIUM", raising=False)
    assert pictures.main([str(tmp_path / "images")]) == 2
    complaint = capsys.readouterr().err
    assert "CHROMIUM" in complaint and complaint.count("\n") == 1
    assert pictures.main([]) == 2
