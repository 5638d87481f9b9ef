"""The command line: answers, errors and exit codes. The engine is replaced where only the edges are tested."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import planner
from planner import cli
from planner.cli.plan_flags import HARDWARE_FLAGS, SERVING_FLAGS, TRAINING_FLAGS, document_of
from planner.errors import NotCovered, UnknownName
from planner.readers.plan_document import defaults_used, plan_from_mapping, plan_from_text

REPOSITORY = Path(__file__).parents[2]
GIB = 2**30


class FakeEstimate:
    """An answer in the shape of the design's, with round numbers."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.document = document
        self.plan = plan_from_mapping(document)

    def to_dict(self) -> dict[str, Any]:
        common = {
            "kind": self.plan.kind,
            "parameters": {"total": 8_030_261_248, "trainable": 41_943_040, "active": 8_030_261_248},
            "cost": None,
            "assumptions": [f"assumption {line}" for line in defaults_used(self.document)],
            "warnings": ["a warning"],
            "next_commands": ["planner finetune x --method qlora", "planner gpus", "planner models", "planner app"],
            "verdict": {
                "outcome": "tight",
                "sentence": "Tight: 22.5 of 24 GiB.",
                "rank": 0,
                "moment": "backward_peak",
                "head_room_bytes": GIB,
                "band_bytes": GIB,
            },
        }
        terms = {"cuda_context": {"bytes": GIB // 2, "low_bytes": GIB // 4, "high_bytes": GIB, "source": "measured"}}
        if self.plan.kind == "serving":
            memory: dict[str, Any] = {
                "weights": 15 * GIB,
                "kv_cache_bytes_per_token": 131_072,
                "kv_cache": 5 * GIB,
                "kv_token_capacity": 40_960,
                "max_concurrent_sequences": 5,
                "longest_context": 40_960,
                "peak_activations": GIB,
                "capacity": 24 * GIB,
                "fits": True,
                "device_terms": terms,
            }
            return common | {"memory": memory, "latency": None, "throughput": None}
        memory = {
            "peak_allocated": 20 * GIB,
            "peak_moment": "backward_peak",
            "moments": {"forward_end": 18 * GIB, "backward_peak": 20 * GIB, "steady": 16 * GIB},
            "peak_reserved": 21 * GIB,
            "device_used": 22 * GIB,
            "capacity": 24 * GIB,
            "fits": True,
            "breakdown": {"weights": 15 * GIB, "gradients": GIB, "activations": 4 * GIB, "temporaries": 0},
            "device_terms": terms,
            "host_memory": 2 * GIB,
        }
        return common | {"memory": memory, "time": {"step_seconds": 1.5, "mfu": 0.4}}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """`planner.estimate` replaced; the list collects the documents it was asked."""
    asked: list[Any] = []

    def estimate(document: Mapping[str, Any], *, fetch: bool = False) -> FakeEstimate:
        asked.append(document)
        if document.get("model") == "nowhere":
            raise UnknownName('"nowhere" is no model; did you mean "gpt2"?')
        if document.get("method") == "frozen":
            raise NotCovered("Frozen training is not covered.")
        return FakeEstimate(document)

    monkeypatch.setitem(vars(planner), "estimate", estimate)
    return asked


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_estimate_prints_the_answer_unrounded(
    engine: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("model: gpt2\nattention: eager\n")
    code, out, err = run(capsys, "estimate", str(plan), "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["memory"]["peak_allocated"] == 20 * GIB
    assert engine == [{"model": "gpt2", "attention": "eager"}]


def test_lines_are_answered_one_by_one(engine: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lines = [
        b'{"model": "gpt2"}',
        b"not a plan",
        b"",
        b'{"model": "nowhere"}',
        b"\xff\xfe",
        b'{"model": "gpt2", "data": {"sequence_length": -1}}',
        b'{"kind": "serving", "model": "gpt2"}',
    ]
    plans = tmp_path / "plans.jsonl"
    plans.write_bytes(b"\n".join(lines) + b"\n")
    code, out, err = run(capsys, "estimate", str(plans), "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert (code, err, len(answers)) == (0, "", len(lines))
    assert ["error" in answer for answer in answers] == [False, True, True, True, True, True, False]
    assert all(list(answer) == ["error"] and "\n" not in answer["error"] for answer in answers[1:-1])


def test_report_says_the_verdict_first_and_folds_the_assumptions(
    engine: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text('{"model": "gpt2"}')
    code, out, _ = run(capsys, "estimate", str(plan))
    lines = out.splitlines()
    assert code == 0
    assert lines[:2] == ["gpt2, training on 1 x h100-sxm", "Tight: 22.5 of 24 GiB."]
    for part in (
        "weights",
        "15.00 GiB",
        "62.5 %",
        "<- peak",
        "cuda context",
        "1.50 s",
        "40.0 %",
        "a warning",
        "--verbose",
    ):
        assert part in out
    assert "temporaries" not in out
    assert "\x1b" not in out
    assert out.count("$ planner") == 3
    _, unfolded, _ = run(capsys, "estimate", str(plan), "--verbose", "--gb")
    assert unfolded.count("assumption ") == len(defaults_used({"model": "gpt2"}))
    assert "16.11 GB" in unfolded
    assert "GiB" not in unfolded.replace("22.5 of 24 GiB", "")


def test_serving_report(engine: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "serve", "gpt2", "--context", "8192", "--quantization", "fp8", "--utilization", "0.9")
    assert code == 0
    for part in ("128.00 KiB", "40,960", "most sequences", "kv cache", "serving on 1 x h100-sxm"):
        assert part in out
    asked = {"quantization": "fp8", "requests": {"context_length": 8192}, "hardware": {"memory_utilization": 0.9}}
    assert engine == [{"kind": "serving", "model": "gpt2", **asked}]


def test_flags_become_fields(engine: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--gpu", "rtx-4090", "--seq", "1024", "--rank", "16", "--recompute", "2", "--offload", "optimizer"]
    code, out, _ = run(capsys, "finetune", "gpt2", *flags, "--tokens", "1B", "--print-plan")
    assert (code, engine) == (0, [])
    plan = plan_from_text(out)
    assert plan == plan_from_mapping(
        {
            "model": "gpt2",
            "data": {"sequence_length": 1024, "tokens": 10**9},
            "method": {"name": "lora", "rank": 16},
            "recompute": {"every": 2},
            "offload": ["optimizer"],
            "hardware": {"gpu": "rtx-4090"},
        }
    )
    run(capsys, "train", "gpt2", "--gpus", "8", "--zero", "3", "--json")
    assert engine[0]["parallelism"] == {"zero": 3}
    assert "method" not in engine[0]


def test_every_flag_reaches_a_field_that_exists(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, kind in ((TRAINING_FLAGS, "training"), (SERVING_FLAGS, "serving")):
        for flag, path, type_, text in (*flags, *HARDWARE_FLAGS):
            assert flag.startswith("--")
            assert text.endswith(".")
            wrong = {int: -1, float: -1.0, str: "no such value\n"}[type_]
            document = document_of(kind, "gpt2", {path: wrong})
            with pytest.raises(ValueError, match=path.split(".")[-1].split("_")[0]) as caught:
                plan_from_mapping(document)
            assert "There is no field" not in str(caught.value)


def test_demo_shows_three_methods_side_by_side(
    engine: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    code, out, err = run(capsys, "demo")
    assert (code, err) == (0, "")
    assert len(engine) == 5
    header = next(line for line in out.splitlines() if "QLoRA" in line)
    assert header.split() == ["full", "LoRA", "QLoRA"]
    for part in ("trainable parameters", "peak_allocated", "verdict", "make app", "planner estimate"):
        assert part in out


def test_demo_leaves_out_what_is_not_covered(
    engine: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "planner.cli.demo_plans._DEMO_TUNING", (("frozen", {"method": "frozen"}), ("full", {"method": "full"}))
    )
    code, out, _ = run(capsys, "demo")
    assert code == 0
    assert "not covered: Frozen training is not covered." in out


def test_lists_of_accelerators(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "gpus", "H100", "--json")
    rows = json.loads(out)
    assert code == 0
    assert {"h100-sxm", "h100-pcie"} <= {row["name"] for row in rows}
    assert all(row["memory_bytes"] > 70 * 10**9 for row in rows)
    _, table, _ = run(capsys, "gpus", "h100 sxm")
    assert "h100-sxm" in table
    assert "TFLOP/s" in table


def test_lists_of_models(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "models", "llama-3.1-8b", "--json")
    row = next(row for row in json.loads(out) if row["name"].endswith("Llama-3.1-8B"))
    assert code == 0
    assert row["parameters"] == row["active"] == 8_030_261_248
    _, table, _ = run(capsys, "models", "llama-3.1-8b")
    assert "8.03B" in table


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["estimat"], "estimate"),
        (["search"], "not in this version"),
        (["compare", "a", "--b"], "not in this version"),
        (["estimate", "x", "--jsno"], "--json"),
        (["estimate"], "PLAN"),
        (["--nope"], "--nope"),
        (["finetune", "gpt2", "--seq", "long"], "--seq"),
        (["finetune", "gpt2", "--seq", "-4"], "sequence_length"),
        (["finetune", "gpt2", "--method", "lorra"], '"lora"'),
        (["finetune", "gpt2", "--method", "full", "--rank", "8"], "rank"),
        (["gpus", "qqqq"], "qqqq"),
        (["estimate", "a\nb.yaml"], "There is no file"),
        (["estimate", "missing.jsonl"], "missing.jsonl"),
        (["trace", "missing.yaml"], "missing.yaml"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], arguments: list[str], named: str) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert named in err
    assert len(err.splitlines()) == 1


def test_missing_extras_name_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    plan = tmp_path / "plan.yaml"
    plan.write_text("model: gpt2\n")
    for arguments, extra in ((["trace", str(plan)], "planner[torch]"), (["app"], "planner[app]")):
        code, _, err = run(capsys, *arguments)
        assert code == 2
        assert extra in err


def test_help_and_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["estimate", "--help"]):
        code, out, err = run(capsys, *arguments)
        assert (code, err) == (0, "")
        assert "Usage: planner" in out


def test_interrupt_is_quiet(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(vars(planner), "estimate", interrupted)
    assert run(capsys, "serve", "gpt2") == (130, "", "")


# --- the real process -------------------------------------------------------------------------------------------------


def start_planner(*arguments: str, encoding: str = "utf-8") -> subprocess.Popen[bytes]:
    settings = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": encoding}
    return subprocess.Popen(
        [sys.executable, "-m", "planner.cli", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | settings,
        preexec_fn=hears_interrupts,
    )


def hears_interrupts() -> None:
    """A background job of a shell is started deaf to SIGINT, and would hand that down."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_closed_pipe_is_quiet() -> None:
    process = start_planner("gpus", "--json")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 141


def test_interrupted_process_is_quiet() -> None:
    process = start_planner("estimate", "-")
    time.sleep(3.0)  # until it waits for its standard input
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (out, err, process.returncode) == (b"", b"", 130)


def test_ascii_terminals_are_not_sent_other_characters() -> None:
    process = start_planner("gpus", "h100", encoding="ascii")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert out.isascii()
