"""How long an estimate takes, against two floors measured in the same run: importing numpy, and the dry run.

python benchmarks/estimate.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import planner

PLAN: dict[str, Any] = {
    "model": "Llama-3.2-1B",
    "data": {"sequence_length": 2048, "micro_batch_size": 1},
    "recompute": "full",
    "hardware": {"gpu": "h100-sxm"},
}


def milliseconds(action: Callable[[], object], times: int) -> float:
    """The median time of one call."""
    spans = []
    for _ in range(times):
        start = time.perf_counter()
        action()
        spans.append(1e3 * (time.perf_counter() - start))
    return median(spans)


def process(*arguments: str) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


def new_plans() -> Callable[[], object]:
    lengths = iter(range(1024, 10**6, 8))
    return lambda: planner.estimate({**PLAN, "data": {"sequence_length": next(lengths)}})


def main() -> None:
    planner.estimate(PLAN)
    same = milliseconds(lambda: planner.estimate(PLAN), 200)
    new = milliseconds(new_plans(), 100)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        path.write_text(json.dumps(PLAN), encoding="utf-8")
        whole = milliseconds(process("-m", "planner.cli", "estimate", str(path), "--json"), 9)
    numpy = milliseconds(process("-c", "import numpy"), 9)
    replay = milliseconds(lambda: planner.trace(PLAN), 1)
    print(f"estimate, same plan again    {same:9.2f} ms")
    print(f"estimate, a new plan         {new:9.2f} ms   1/{replay / new:.0f} of the dry run ({replay:.0f} ms)")
    print(f"planner estimate, a process  {whole:9.0f} ms   {whole / numpy:.1f} x `import numpy` ({numpy:.0f} ms)")


if __name__ == "__main__":
    main()
