"""The pictures of the README and the docs, as SVG: `python -m planner.ui.pictures FOLDER`.

Plotly draws in a browser, so a headless Chromium draws here too, from a page that holds plotly.js itself: no network,
no further package. The browser is the one named by the environment variable CHROMIUM, or one on the path.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import planner
from planner.errors import PlannerError, SourceUnavailable

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["browser", "draw", "main", "svg_of"]

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_SVG = re.compile(r"<pre id=\"svg\">(<svg .*?</svg>)</pre>", re.DOTALL)
_WIDTH = 820
_SECONDS = 60

_PLAN = {
    "model": "meta-llama/Llama-3.1-8B",
    "method": {"name": "qlora", "rank": 16, "targets": "all-linear"},
    "recompute": "full",
    "data": {"sequence_length": 2048, "micro_batch_size": 1},
    "hardware": {"gpu": "rtx-4090"},
}
_TITLE = "Llama-3.1-8B fine-tuned with QLoRA on one RTX 4090: one sequence of 2048 tokens, full recompute"


def browser() -> str:
    """The path of a Chromium. Raises SourceUnavailable when there is none."""
    for name in (os.environ.get("CHROMIUM", ""), *_BROWSERS):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise SourceUnavailable("Pictures are drawn by Chromium, and none is on the path; install it or set CHROMIUM.")


def svg_of(figure: Figure, *, width: int = _WIDTH) -> str:
    """The figure as SVG text, the same text each time. Raises SourceUnavailable when the browser draws nothing."""
    from plotly.offline import get_plotlyjs

    height = figure.to_dict()["layout"]["height"]
    page = (
        "<!doctype html><meta charset='utf-8'><pre id='svg'></pre>"
        f"<script>{get_plotlyjs()}</script><script>"
        f"Plotly.toImage({figure.to_json()}, {{format: 'svg', width: {width}, height: {height}, imageDataOnly: true}})"
        ".then(text => { document.getElementById('svg').innerHTML = text; });</script>"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "figure.html")
        path.write_text(page, encoding="utf-8")
        command = [browser(), *_FLAGS, f"--user-data-dir={folder}/profile", "--virtual-time-budget=10000"]
        drawn = subprocess.run([*command, "--dump-dom", path.as_uri()], capture_output=True, timeout=_SECONDS)
    match = _SVG.search(drawn.stdout.decode("utf-8", "replace"))
    if match is None:
        raise SourceUnavailable("Chromium drew no figure; run it by hand to see why.")
    return _settled(match[1]) + "\n"


def draw(folder: Path) -> list[Path]:
    """Write every picture into `folder`, and return what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in _pictures().items():
        path = Path(folder, f"{name}.svg")
        figure.update_layout(paper_bgcolor="#ffffff")  # readable on a dark page too
        path.write_text(svg_of(figure), encoding="utf-8")
        written.append(path)
    return written


def _pictures() -> Mapping[str, Figure]:
    from planner import figures

    answer = planner.estimate(_PLAN).to_dict()
    return {
        "memory_bar": figures.memory_bar(answer, title=_TITLE),
        "moments": figures.moments(answer, title="The same step, moment by moment"),
    }


def _settled(svg: str) -> str:
    """The picture with ids that count up, where plotly makes random ones, and without its random class names."""
    svg = re.sub(r"(?<=trace scatter )trace[0-9a-f]{6}", "trace", svg)
    for index, identifier in enumerate(dict.fromkeys(re.findall(r"id=\"([^\"]+)\"", svg))):
        svg = re.sub(rf"([\"#]){re.escape(identifier)}(?=[\"')&])", rf"\1i{index}", svg)
    return svg


def main(arguments: list[str]) -> int:
    """Draw into the folder named by the one argument."""
    if len(arguments) != 1:
        print("usage: python -m planner.ui.pictures FOLDER", file=sys.stderr)
        return 2
    try:
        for path in draw(Path(arguments[0])):
            print(path)
    except PlannerError as error:
        print(f"planner: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
