"""Every wrong plan leaves as one readable sentence, in process and through the real command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from planner.errors import PlanError, PlannerError, SourceUnavailable, UnknownField
from planner.readers.plan_document import plan_from_mapping, plan_from_path, plan_from_text

REPOSITORY = Path(__file__).parents[2]
NAN, INFINITY = float("nan"), float("inf")

WHOLE = ["2048", 8.5, 8.0, True, -1, 2**70, [8], {"value": 8}, NAN]
REAL = ["2.5", True, -1, NAN, INFINITY, [1.0], 1e12]
BOOLEAN = ["true", 1, None, []]
CHOICE = ["zzzzzzz", 3, None, ["none"], "", True]
DEGREE = [*WHOLE, 0]

TRAINING_FIELDS: dict[str, list[Any]] = {
    "data.sequence_length": [*WHOLE, 0, None, 2**31 + 1],
    "data.micro_batch_size": [*WHOLE, 0, None, 2**24 + 1],
    "data.global_batch_size": [*WHOLE, 0],
    "data.gradient_accumulation_steps": [*WHOLE, 0],
    "data.tokens": ["2048", "many", "15X", 8.5, True, -1, 0, 10**30, [], "1e99999999"],
    "precision": ["bf17", 16, None, True, [], "bf16 mixed!"],
    "precision.weights": CHOICE,
    "precision.compute": CHOICE,
    "precision.master_weights": ["fp12", 3, []],
    "precision.optimizer_states": CHOICE,
    "precision.autocast": BOOLEAN,
    "optimizer": ["adamv", 3, None, []],
    "optimizer.name": CHOICE,
    "optimizer.implementation": CHOICE,
    "optimizer.set_to_none": BOOLEAN,
    "method": ["lorra", 3, None, []],
    "method.name": CHOICE,
    "recompute": ["partial", 3, None, True, []],
    "recompute.every": DEGREE,
    "recompute.mode": CHOICE,
    "attention": CHOICE,
    "loss": CHOICE,
    "implementation": ["tranformers", 3, None, []],
    "implementation.version": [4.48, 5, True, "", "4\n8"],
    "implementation.compiled": BOOLEAN,
    "parallelism": ["zero3", 3, None, [3]],
    "parallelism.data": DEGREE,
    "parallelism.tensor": DEGREE,
    "parallelism.pipeline": DEGREE,
    "parallelism.zero": ["3", 4, -1, 3.0, None, True],
    "parallelism.engine": CHOICE,
    "parallelism.schedule": CHOICE,
    "parallelism.sequence_parallel": BOOLEAN,
    "parallelism.bucket_bytes": ["25", "25 G", "25 parsecs", -1, 0, True, 1.5],
    "offload": ["disk", 3, None, ["optimizer", "optimizer"], [3], {"optimizer": True}, ["none", "optimizer"]],
    "hardware": [3, None, [], ""],
    "hardware.gpu": [3, 3.5, True, None, "", "  ", "a\nb", "x" * 5000, []],
    "hardware.gpus_per_node": DEGREE,
    "hardware.nodes": DEGREE,
    "hardware.price_per_gpu_hour": REAL,
    "model": [3, None, True, [], {}, "", " ", "a\x00b", "\ud800"],
    "kind": ["trainig", 3, None, []],
}
SERVING_FIELDS: dict[str, list[Any]] = {
    "quantization": ["Q4_K_X", 4, None, [], ""],
    "kv_cache.dtype": CHOICE,
    "kv_cache.block_size": DEGREE,
    "requests": ["many", 3, None],
    "requests.context_length": [*DEGREE, 1],
    "requests.prompt_tokens": DEGREE,
    "requests.output_tokens": DEGREE,
    "requests.concurrency": DEGREE,
    "engine": ["vlm", 3, None, []],
    "parallelism.tensor": DEGREE,
    "parallelism.zero": [3],
    "hardware.memory_utilization": [*REAL, 0, 1.01, 90],
}

CONTRADICTIONS: list[dict[Any, Any]] = [
    {},
    {"modle": "gpt2"},
    {"model": "gpt2", "sequence_length": 4096},
    {"model": "gpt2", "data": {"sequence_lenght": 4096}},
    {"model": "gpt2", "precision": {"weight": "bf16"}},
    {"model": "gpt2", "precision": {"recipe": "bf17"}},
    {"model": "gpt2", "precision": {"weights": "fp32", "compute": "bf16", "autocast": False}},
    {"model": "gpt2", "precision": {"weights": "bf16", "compute": "fp32"}},
    {"model": "gpt2", "hardware": {"gpus": 8}},
    {"model": "gpt2", "hardware": {"memory_utilization": 0.9}},
    {"model": "gpt2", "requests": {"concurrency": 8}},
    {"model": "gpt2", "quantization": "fp8"},
    {"model": "gpt2", "kind": "training", "engine": "vllm"},
    {"model": "gpt2", "kind": "serving", "optimizer": "adamw"},
    {"model": "gpt2", "kind": "serving", "data": {}},
    {"model": "gpt2", "data": {"global_batch_size": 8, "gradient_accumulation_steps": 8}},
    {"model": "gpt2", "data": {"global_batch_size": 7, "micro_batch_size": 2}},
    {"model": "gpt2", "data": {"global_batch_size": 12}, "hardware": {"gpus_per_node": 8}},
    {"model": "gpt2", "data": {"global_batch_size": 4, "micro_batch_size": 8}},
    {"model": "gpt2", "parallelism": {"data": 4}, "hardware": {"gpus_per_node": 8, "nodes": 1}},
    {"model": "gpt2", "parallelism": {"data": 4, "tensor": 4}, "hardware": {"gpus_per_node": 8, "nodes": 1}},
    {"model": "gpt2", "parallelism": {"data": 12}},
    {"model": "gpt2", "parallelism": {"data": 2**20, "tensor": 2**20, "pipeline": 2**20}},
    {"model": "gpt2", "kind": "serving", "parallelism": {"data": 2**20, "tensor": 2**20}},
    {"model": "gpt2", "parallelism": {"data": 4}, "hardware": {"gpus_per_node": 8}},
    {"model": "gpt2", "parallelism": {"tensor": 3}, "hardware": {"gpus_per_node": 8, "nodes": 1}},
    {"model": "gpt2", "parallelism": {"tensor": 16}, "hardware": {"gpus_per_node": 8, "nodes": 1}},
    {"model": "gpt2", "parallelism": {"expert": 3}, "hardware": {"gpus_per_node": 8, "nodes": 1}},
    {"model": "gpt2", "parallelism": {"replicas": 3, "zero": 3}, "hardware": {"gpus_per_node": 8}},
    {"model": "gpt2", "parallelism": {"replicas": 2}, "hardware": {"gpus_per_node": 8}},
    {"model": "gpt2", "parallelism": {"engine": "ddp", "zero": 1}, "hardware": {"gpus_per_node": 8}},
    {"model": "gpt2", "parallelism": {"engine": "fsdp2"}, "hardware": {"gpus_per_node": 8}},
    {"model": "gpt2", "parallelism": {"engine": "deepspeed", "zero": 3, "pipeline": 2}},
    {"model": "gpt2", "parallelism": {"zero": 2, "pipeline": 2}},
    {"model": "gpt2", "parallelism": {"virtual_stages": 2}},
    {"model": "gpt2", "parallelism": {"pipeline": 2, "virtual_stages": 2, "schedule": "1f1b"}},
    {"model": "gpt2", "parallelism": {"pipeline": 2, "schedule": "interleaved"}},
    {"model": "gpt2", "parallelism": {"context": 3}},
    {"model": "gpt2", "data": {"sequence_length": 1001}, "parallelism": {"tensor": 2, "sequence_parallel": True}},
    {"model": "gpt2", "method": {"name": "full", "rank": 8}},
    {"model": "gpt2", "method": {"rank": 8}},
    {"model": "gpt2", "method": {"name": "lora", "virtual_tokens": 8}},
    {"model": "gpt2", "method": {"name": "lora", "quantization": "nf4"}},
    {"model": "gpt2", "method": {"name": "lora", "rank": 0}},
    {"model": "gpt2", "method": {"name": "lora", "rank": "8"}},
    {"model": "gpt2", "method": {"name": "lora", "dropout": 1}},
    {"model": "gpt2", "method": {"name": "lora", "dropout": -0.1}},
    {"model": "gpt2", "method": {"name": "lora", "targets": [1]}},
    {"model": "gpt2", "method": {"name": "lora", "targets": ["q_proj", "q_proj"]}},
    {"model": "gpt2", "method": {"name": "lora", "targets": {"q_proj": True}}},
    {"model": "gpt2", "method": {"name": "lora", "targets": [f"m{number}" for number in range(1001)]}},
    {"model": "gpt2", "method": {"name": "lora", "lora_rank": 8}},
    {"model": "gpt2", "method": "qlora", "precision": "fp8-mixed"},
    {"model": "gpt2", "optimizer": {"name": "adamw", "rank": 64}},
    {"model": "gpt2", "optimizer": {"name": "sgd", "amsgrad": True}},
    {"model": "gpt2", "optimizer": {"name": "lion", "implementation": "fused"}},
    {"model": "gpt2", "optimizer": {"name": "lomo", "in_backward": False}},
    {"model": "gpt2", "optimizer": "lomo", "data": {"gradient_accumulation_steps": 4}},
    {"model": "gpt2", "optimizer": "lomo", "data": {"global_batch_size": 4}},
    {"model": "gpt2", "recompute": {"mode": "full", "every": 2}},
    {"model": "gpt2", "recompute": {"evry": 2}},
    {"model": "gpt2", "kind": "serving", "parallelism": {"tensor": 3}, "hardware": {"gpus_per_node": 8}},
    {"model": "gpt2", "kind": "serving", "parallelism": {"tensor": 4, "data": 1}, "hardware": {"gpus_per_node": 8}},
    {"model": "gpt2", "kind": "serving", "parallelism": {"expert": 3}, "hardware": {"gpus_per_node": 8, "nodes": 1}},
    {"model": "gpt2", "kind": "serving", "requests": {"context_length": 512, "prompt_tokens": 512}},
    {"model": "gpt2", "kind": "serving", "requests": {"context_length": 512, "output_tokens": 600}},
    {"model": "gpt2", "kind": "serving", "requests": {"context_length": 9, "prompt_tokens": 5, "output_tokens": 5}},
    {"model": "gpt2", "kind": "serving", "engine": "tensorrt-llm", "quantization": "Q4_K_M"},
    {"model": {"hidden_size": NAN}},
    {"model": {"layers": {1, 2}}},
    {"model": {"layers": b"bytes"}},
    {"model": "gpt2", 3: "a field"},
    {"model": "gpt2", "data": {None: 3}},
    {"model": "gpt2", "x" * 10_000: 3},
    {"model": "gpt2", "a\nb\u2028c": 3},
]

TEXTS: list[str] = [
    "",
    "   \n\t\n",
    "# only a comment\n",
    "[]",
    "- model: gpt2\n- model: gpt2\n",
    "gpt2",
    "3",
    "null",
    '"gpt2"',
    "model: gpt2\n---\nmodel: gpt2\n",
    "model: gpt2\nmodel: gpt2-medium\n",
    '{"model": "gpt2", "model": "gpt2"}',
    '{"model": "gpt2", "data": {"tokens": 1, "tokens": 2}}',
    '{"model": "gpt2",}',
    '{"model": "gpt2"',
    '{"model": "gpt2"} {"model": "gpt2"}',
    '{"model": "gpt2", "hardware": {"price_per_gpu_hour": NaN}}',
    '{"model": "gpt2", "hardware": {"price_per_gpu_hour": Infinity}}',
    '{"model": "gpt2", "data": {"tokens": ' + "9" * 5000 + "}}",
    '{"model": "gpt2", "data": {"sequence_length": 1e400}}',
    "model: gpt2\ndata: {sequence_length: " + "9" * 5000 + "}\n",
    "model: gpt2\ndata:\n\tsequence_length: 1\n",
    "model: [gpt2\n",
    "model: gpt2: x\n",
    "model: &a gpt2\nattention: *a\n",
    "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nmodel: *c\n",
    "base: &base {model: gpt2}\n<<: *base\n",
    "<<: {model: gpt2}\n",
    "model: *missing\n",
    "model: !!python/object/apply:os.system [ls]\n",
    "model: !!python/name:os.system\n",
    "model: !mine gpt2\n",
    "model: !!binary aGVsbG8=\n",
    "model: !!set {a, b}\n",
    "model: gpt2\nimplementation: {version: 2024-01-01}\n",
    "model: gpt2\nimplementation: {version: 2024-13-45}\n",
    "? [a, b]\n: c\n",
    "? {a: b}\n: c\n",
    "1: 2\n",
    "model: gpt2\x00",
    "model: gpt2\x07",
    "model: gpt2\nkind: \ud800\n",
    "%YAML 9.9\n---\nmodel: gpt2\n",
    "model: gpt2\ndata: " + "[" * 50_000,
    "[" * 100_000,
    '{"a":' * 100_000,
    '{"model": ' + '{"a":' * 30 + "1" + "}" * 30 + "}",
    "model: " + "{a: " * 30 + "1" + "}" * 30,
    "- " * 20_000,
    "model: " + "x" * 5_000_001,
]


def _with(kind: str, path: str, value: Any) -> dict[str, Any]:
    document: dict[str, Any] = {"kind": kind, "model": "gpt2"}
    section, _, name = path.partition(".")
    document[section] = {name: value} if name else value
    return document


FIELD_CASES = [
    _with(kind, path, value)
    for kind, fields in (("training", TRAINING_FIELDS), ("serving", SERVING_FIELDS))
    for path, wrong in fields.items()
    for value in wrong
]


def is_one_sentence(text: str) -> bool:
    """One line, short, ending like a sentence, with nothing a terminal would act on."""
    return text == text.strip() and 10 < len(text) < 300 and text.isprintable() and text[-1] in ".?!"


def _label(value: object) -> str:
    return ascii(value)[:60]


def test_there_are_hundreds_of_cases() -> None:
    assert len(FIELD_CASES) + len(CONTRADICTIONS) + len(TEXTS) >= 400


@pytest.mark.parametrize("document", FIELD_CASES + CONTRADICTIONS, ids=_label)
def test_wrong_mapping(document: dict[str, Any]) -> None:
    with pytest.raises(PlanError) as caught:
        plan_from_mapping(document)
    assert is_one_sentence(str(caught.value)), str(caught.value)


@pytest.mark.parametrize("text", TEXTS, ids=_label)
def test_wrong_text(text: str) -> None:
    with pytest.raises(PlanError) as caught:
        plan_from_text(text)
    assert is_one_sentence(str(caught.value)), str(caught.value)


@pytest.mark.parametrize("document", [None, [], "gpt2", 3, True, object(), b"model: gpt2"], ids=_label)
def test_what_is_not_a_mapping(document: Any) -> None:
    with pytest.raises(PlanError) as caught:
        plan_from_mapping(document)
    assert is_one_sentence(str(caught.value)), str(caught.value)


@pytest.mark.parametrize("levels", [21, 200, 100_000])
def test_deep_mappings(levels: int) -> None:
    deep: dict[str, Any] = {}
    for _ in range(levels):
        deep = {"a": deep}
    with pytest.raises(PlanError, match="nested") as caught:
        plan_from_mapping({"model": deep})
    assert is_one_sentence(str(caught.value))


def test_mapping_that_holds_itself() -> None:
    loop: dict[str, Any] = {}
    loop["again"] = loop
    with pytest.raises(PlanError, match="nested"):
        plan_from_mapping({"model": loop})


@pytest.mark.parametrize(
    ("document", "named"),
    [
        ({"model": "gpt2", "optimzer": "adamw"}, "optimizer"),
        ({"model": "gpt2", "optimizer": "adamww"}, '"adamw"'),
        ({"model": "gpt2", "data": {"sequence_lenght": 1}}, "sequence_length"),
        ({"model": "gpt2", "sequence_length": 1}, "data: {sequence_length"),
        ({"model": "gpt2", "parallelism": {"zero_stage": 3}}, "zero"),
        ({"model": "gpt2", "kind": "serving", "quantization": "Q4_K_MM"}, "Q4_K_M"),
        ({"model": "gpt2", "requests": {}}, "kind: serving"),
        ({"model": "gpt2", "data": {"sequence_length": "2048"}}, "without quotes"),
        ({"model": "gpt2", "implementation": {"version": 4.5}}, "quotes"),
        ({"model": "gpt2", "parallelism": {"data": 4}, "hardware": {"gpus_per_node": 8, "nodes": 1}}, "= 4 accel"),
    ],
    ids=_label,
)
def test_sentence_names_the_way_out(document: dict[str, Any], named: str) -> None:
    with pytest.raises(PlanError) as caught:
        plan_from_mapping(document)
    assert named in str(caught.value)


def test_unknown_names_have_their_own_class() -> None:
    for document in ({"model": "gpt2", "modul": 1}, {"model": "gpt2", "attention": "flsh"}):
        with pytest.raises(UnknownField):
            plan_from_mapping(document)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def wrong_files(tmp_path: Path) -> dict[str, Path]:
    """A folder of files that are no plans, by what is wrong with them."""
    contents = {
        "invalid_utf8.yaml": b"model: \xff\xfe\n",
        "utf16.yaml": "model: gpt2".encode("utf-16"),
        "binary.json": bytes(range(256)),
        "empty.yaml": b"",
        "elf": b"\x7fELF\x02\x01\x01" + b"\x00" * 100,
        "plan.jsonl": b'{"model": "gpt2"}\n',
        "list.json": b"[1, 2]",
        "bomb.yaml": b"a: &a [1]\nb: &b [*a, *a]\nmodel: *b\n",
        "deep.json": b'{"model":' * 50_000,
        "unknown.json": b'{"model": "gpt2", "modle": 1}',
    }
    files = {name: tmp_path / name for name in contents}
    for name, content in contents.items():
        files[name].write_bytes(content)
    files["huge.yaml"] = tmp_path / "huge.yaml"
    with files["huge.yaml"].open("wb") as sparse:
        sparse.truncate(50_000_000)
    files["folder"] = tmp_path / "folder"
    files["folder"].mkdir()
    files["missing"] = tmp_path / "no" / "such.yaml"
    files["through_a_file"] = files["empty.yaml"] / "plan.yaml"
    files["long_name"] = tmp_path / ("x" * 5000)
    return files


def test_wrong_files(wrong_files: dict[str, Path]) -> None:
    for name, path in wrong_files.items():
        with pytest.raises(PlannerError) as caught:
            plan_from_path(path)
        assert is_one_sentence(str(caught.value)), f"{name}: {caught.value}"


@pytest.mark.parametrize("path", ["", "a\x00b", "/dev/zero", "."])
def test_wrong_paths(path: str) -> None:
    with pytest.raises(SourceUnavailable) as caught:
        plan_from_path(path)
    assert is_one_sentence(str(caught.value))


# --- the real process -------------------------------------------------------------------------------------------------


def run_planner(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "planner.cli", *arguments],
        input=stdin, capture_output=True, env=environment, timeout=60, check=False,
    )  # fmt: skip


def assert_refused(done: subprocess.CompletedProcess[bytes]) -> None:
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 2
    assert done.stdout == b""
    assert 1 <= len(lines) <= 2
    assert "Traceback" not in done.stderr.decode()


@pytest.mark.parametrize(
    "name",
    [
        "invalid_utf8.yaml",
        "binary.json",
        "empty.yaml",
        "bomb.yaml",
        "deep.json",
        "unknown.json",
        "huge.yaml",
        "folder",
        "missing",
    ],
)
def test_wrong_file_through_the_process(wrong_files: dict[str, Path], name: str) -> None:
    assert_refused(run_planner("estimate", str(wrong_files[name]), "--json"))


@pytest.mark.parametrize(
    "document",
    [
        {"model": "gpt2", "data": {"sequence_length": -1}},
        {"model": "gpt2", "optimizer": "adamv"},
        {"model": "gpt2", "requests": {"concurrency": 1}},
        {"model": "gpt2", "parallelism": {"data": 3}, "hardware": {"gpus_per_node": 8, "nodes": 1}},
        {"model": "gpt2\n\x1b[31m", "data": {}},
    ],
    ids=_label,
)
def test_wrong_plan_through_standard_input(document: dict[str, Any]) -> None:
    assert_refused(run_planner("estimate", "-", "--json", stdin=json.dumps(document).encode()))


@pytest.mark.parametrize(
    "arguments", [["estimat"], ["search"], ["estimate"], ["estimate", "--jsn", "x"], ["gpus", "qqqq"]]
)
def test_wrong_command(arguments: list[str]) -> None:
    assert_refused(run_planner(*arguments))
