"""Short forms, defaults and values that are worked out, as the plan document defines them."""

from __future__ import annotations

import dataclasses
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planner.errors import PlanError
from planner.plan import Data, Method, Parallelism, Precision, Recompute, ServingPlan, TrainingPlan
from planner.readers.plan_document import defaults_used, plan, plan_from_mapping, plan_from_path, plan_from_text
from planner.readers.plan_fields import OPTIMIZERS
from planner.writers.plan_document import plan_to_json, plan_to_mapping, plan_to_yaml


def training(**fields: Any) -> TrainingPlan:
    read = plan(model="gpt2", **fields)
    assert isinstance(read, TrainingPlan)
    return read


def serving(**fields: Any) -> ServingPlan:
    read = plan(kind="serving", model="gpt2", **fields)
    assert isinstance(read, ServingPlan)
    return read


def test_a_model_is_enough_and_the_rest_are_the_dataclasses_defaults() -> None:
    assert training() == TrainingPlan(model="gpt2")
    assert serving() == ServingPlan(model="gpt2")


def test_inline_model_is_a_copy() -> None:
    config: dict[str, Any] = {"model_type": "gpt2", "nested": {"list": [1, 2]}, "limit": [0.0, float("inf")]}
    read = plan(model=config)
    config["nested"]["list"].append(3)
    assert isinstance(read.model, dict)
    assert read.model["nested"] == {"list": [1, 2]}


@pytest.mark.parametrize(
    ("recipe", "weights", "gradients", "master", "states", "compute", "autocast"),
    [
        ("fp32", "fp32", "fp32", None, "fp32", "fp32", False),
        ("bf16", "bf16", "bf16", None, "bf16", "bf16", False),
        ("fp16", "fp16", "fp16", None, "fp16", "fp16", False),
        ("bf16-amp", "fp32", "fp32", None, "fp32", "bf16", True),
        ("fp16-amp", "fp32", "fp32", None, "fp32", "fp16", True),
        ("bf16-mixed", "bf16", "bf16", "fp32", "fp32", "bf16", False),
        ("fp16-mixed", "fp16", "fp16", "fp32", "fp32", "fp16", False),
        ("fp8-mixed", "bf16", "bf16", "fp32", "fp32", "fp8", False),
    ],
)
def test_precision_recipes(
    recipe: str, weights: str, gradients: str, master: str | None, states: str, compute: str, autocast: bool
) -> None:
    read = training(precision=recipe).precision
    assert dataclasses.astuple(read) == (recipe, weights, gradients, master, states, compute, autocast)


@pytest.mark.parametrize(
    "megatron",
    [
        {"implementation": "megatron"},
        {"implementation": {"name": "Megatron-LM"}},
        {"parallelism": {"engine": "megatron"}},
    ],
)
def test_megatron_reduces_bf16_gradients_in_fp32(megatron: dict[str, Any]) -> None:
    assert training(precision="bf16-mixed", **megatron).precision.gradients == "fp32"
    assert training(precision="fp16-mixed", **megatron).precision.gradients == "fp16"
    stated = training(precision={"recipe": "bf16-mixed", "gradients": "bf16"}, **megatron).precision
    assert (stated.gradients, stated.recipe) == ("bf16", "custom")


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ({"weights": "fp32"}, {"recipe": "fp32", "optimizer_states": "fp32", "compute": "fp32"}),
        ({"weights": "fp32", "compute": "bf16"}, {"recipe": "bf16-amp", "autocast": True}),
        ({"weights": "bfloat16", "master_weights": "float32"}, {"recipe": "bf16-mixed", "optimizer_states": "fp32"}),
        ({"gradients": "fp32"}, {"recipe": "custom", "weights": "bf16", "gradients": "fp32"}),
        ({"recipe": "bf16-mixed", "master_weights": "none"}, {"recipe": "custom", "master_weights": None}),
        ({"recipe": "bf16_amp"}, {"recipe": "bf16-amp", "weights": "fp32"}),
        ({}, {"recipe": "bf16"}),
    ],
)
def test_precision_mappings(mapping: dict[str, Any], expected: dict[str, Any]) -> None:
    read = training(precision=mapping).precision
    assert {name: getattr(read, name) for name in expected} == expected


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_has_a_short_form(name: str) -> None:
    assert training(optimizer=name).optimizer == training(optimizer={"name": name}).optimizer
    assert training(optimizer=name.upper().replace("-", "_")).optimizer.name == name


def test_lomo_updates_in_backward() -> None:
    assert training(optimizer="lomo").optimizer.in_backward


def test_targets_are_a_name_a_list_or_separated_by_commas() -> None:
    for given in ("q_proj, v_proj", ["q_proj", "v_proj"], ("q_proj", "v_proj")):
        assert training(method={"name": "lora", "targets": given}).method.targets == ("q_proj", "v_proj")
    assert training(method={"name": "lora", "targets": "all-linear"}).method.targets == ("all-linear",)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("full", Recompute(mode="full")),
        ({"every": 2}, Recompute(mode="every", every=2)),
        ({"mode": "sqrt"}, Recompute(mode="sqrt")),
        ({"mode": "every", "every": 3}, Recompute(mode="every", every=3)),
    ],
)
def test_recompute(given: Any, expected: Recompute) -> None:
    assert training(recompute=given).recompute == expected


def test_other_short_forms_and_spellings() -> None:
    assert training(implementation="compiled").implementation.compiled
    assert training(implementation="compiled").implementation.name == "transformers"
    assert training(implementation={"name": "transformers", "version": "4.50"}).implementation.version == "4.50"
    assert training(attention="flash_attention_2").attention == training(attention="flash-attn").attention == "flash"
    assert training(offload="optimizer").offload == ("optimizer",)
    assert training(offload="none").offload == training(offload=["none"]).offload == ()
    assert training(hardware="h200-sxm").hardware.gpu == "h200-sxm"
    assert serving(quantization="q4_k_m").quantization == "Q4_K_M"
    assert serving(quantization="awq").quantization == "awq-4bit"
    assert plan(kind="inference", model="gpt2").kind == "serving"
    assert plan(model=Path("folder/config.json")).model == "folder/config.json"


@pytest.mark.parametrize("tokens", ["15T", "15e12", 15e12, 15 * 10**12, np.int64(15 * 10**12)])
def test_tokens_may_be_written_as_a_quantity(tokens: Any) -> None:
    read = training(data={"tokens": tokens}).data.tokens
    assert read == 15 * 10**12
    assert type(read) is int


def test_values_of_planner_plan_are_accepted_as_sections() -> None:
    read = training(data=Data(micro_batch_size=4), method=Method(name="lora", rank=16), precision=Precision())
    assert (read.data.micro_batch_size, read.method.rank) == (4, 16)
    assert plan_from_mapping(plan_to_mapping(read)) == read


@pytest.mark.parametrize(
    ("parallelism", "hardware", "accelerators"),
    [
        ({"data": 8}, {}, (8, 1)),
        ({"data": 64}, {}, (8, 8)),
        ({"tensor": 4, "pipeline": 4}, {}, (8, 2)),
        ({"data": 64}, {"gpus_per_node": 4}, (4, 16)),
        ({"data": 64}, {"nodes": 4}, (16, 4)),
        ({"tensor": 2}, {"gpus_per_node": 8}, (8, 1)),
        ({"tensor": 16}, {"gpus_per_node": 8}, (8, 2)),
        ({}, {"gpus_per_node": 8, "nodes": 2}, (8, 2)),
        ({"expert": 8}, {}, (8, 1)),
        ({"expert": 8, "tensor": 4}, {}, (8, 1)),
        ({"expert": 4, "tensor": 4, "pipeline": 2}, {}, (8, 1)),
    ],
)
def test_accelerators_follow_from_the_degrees(
    parallelism: dict[str, int], hardware: dict[str, int], accelerators: tuple[int, int]
) -> None:
    read = training(parallelism=parallelism, hardware=hardware).hardware
    assert (read.gpus_per_node, read.nodes) == accelerators


def test_virtual_stages_mean_the_interleaved_schedule() -> None:
    assert training(parallelism={"pipeline": 4, "virtual_stages": 2}).parallelism.schedule == "interleaved"


def test_serving_fills_the_accelerators_with_replicas() -> None:
    assert serving(parallelism={"tensor": 2}, hardware={"gpus_per_node": 8}).parallelism.data == 4
    assert serving(parallelism={"tensor": 2}).hardware.gpus_per_node == 2
    assert serving(parallelism={"expert": 4}).parallelism.data == 4


@pytest.mark.parametrize(
    ("requests", "lengths"),
    [
        ({"context_length": 4096}, (1024, 256)),
        ({"context_length": 512}, (256, 256)),
        ({"context_length": 100}, (50, 50)),
        ({"context_length": 512, "prompt_tokens": 500}, (500, 12)),
        ({"context_length": 512, "output_tokens": 500}, (12, 500)),
        ({"context_length": 2}, (1, 1)),
    ],
)
def test_requests_fit_a_given_context(requests: dict[str, int], lengths: tuple[int, int]) -> None:
    read = serving(requests=requests).requests
    assert (read.prompt_tokens, read.output_tokens) == lengths


def test_plan_values_are_checked_like_documents() -> None:
    assert plan_from_mapping(TrainingPlan(model="gpt2", parallelism=Parallelism(data=16))).hardware.nodes == 2
    assert plan_from_mapping(ServingPlan(model="gpt2")) == serving()
    with pytest.raises(PlanError, match="rank"):
        plan_from_mapping(TrainingPlan(model="gpt2", method=Method(rank=16)))


# --- defaults ---------------------------------------------------------------------------------------------------------


def test_defaults_are_listed_and_what_is_given_is_not() -> None:
    lines = defaults_used({"model": "gpt2", "data": {"sequence_length": 512}, "optimizer": "sgd"})
    assert "data.micro_batch_size = 1" in lines
    assert "precision = bf16" in lines
    assert "attention = sdpa" in lines
    assert "hardware.gpu = h100-sxm" in lines
    assert not [line for line in lines if line.startswith(("data.sequence_length", "optimizer =", "model", "kind"))]


def test_defaults_of_other_methods_are_not_listed() -> None:
    assert not [line for line in defaults_used({"model": "gpt2"}) if line.startswith("method.")]
    lora = defaults_used({"model": "gpt2", "method": "lora"})
    assert "method.rank = 8" in lora
    assert not [line for line in lora if "virtual_tokens" in line or "quantization" in line]


def test_values_that_were_worked_out_say_so() -> None:
    lines = defaults_used({"model": "gpt2", "parallelism": {"data": 64}})
    assert "hardware.nodes = 8 (worked out from the other fields)" in lines


def test_a_plan_value_has_defaults_too() -> None:
    assert defaults_used(TrainingPlan(model="gpt2")) == defaults_used({"model": "gpt2"})
    assert "requests.concurrency = 1" in defaults_used(ServingPlan(model="gpt2"))


# --- text, files, speed -----------------------------------------------------------------------------------------------

YAML = """
# a comment
model: meta-llama/Llama-3.1-8B
data: {sequence_length: 4096, micro_batch_size: 2}
method:
  name: lora
  targets: [q_proj, v_proj]
hardware:
  gpu: a100-sxm-80gb
"""


def test_yaml_and_json_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from_yaml = plan_from_text(YAML)
    assert from_yaml.hardware.gpu == "a100-sxm-80gb"
    assert plan_from_text(plan_to_json(from_yaml)) == from_yaml
    assert plan_from_text("{model: gpt2, attention: eager}") == training(attention="eager")
    assert plan_from_text('{"model": "gpt2"}', "yaml") == training()
    assert plan_from_text("\ufeffmodel: gpt2".lstrip("\ufeff")) == training()
    path = tmp_path / "plan.txt"
    path.write_bytes(b"\xef\xbb\xbf" + plan_to_yaml(from_yaml).encode())
    assert plan_from_path(path) == from_yaml
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(YAML.encode())))
    assert plan_from_path("-") == from_yaml


def test_canonical_document_is_minimal() -> None:
    read = training(
        precision="bf16-mixed", optimizer="lomo", recompute={"every": 2}, method={"name": "lora", "rank": 8}
    )
    assert plan_to_mapping(read) == {
        "kind": "training",
        "model": "gpt2",
        "precision": "bf16-mixed",
        "optimizer": {"name": "lomo", "in_backward": True},
        "method": "lora",
        "recompute": {"every": 2},
    }


def test_reading_a_mapping_is_fast() -> None:
    document = plan_to_mapping(plan_from_text(YAML))
    plan_from_mapping(document)
    rounds = []
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(100):
            plan_from_mapping(document)
        rounds.append((time.perf_counter() - start) / 100)
    # 0.06 ms on a 2020s laptop core; the bound leaves room for a busy machine.
    assert min(rounds) < 0.6e-3
