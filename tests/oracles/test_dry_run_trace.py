"""`planner.trace`: plans, modules and step functions of one's own; and what it will not replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import planner
from planner.errors import NotCovered, PlanError
from planner.measure.cuda_autocast import CudaAutocast
from planner.measure.dry_run import replay_config

LLAMA = {
    "model_type": "llama", "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 256, "vocab_size": 512, "tie_word_embeddings": False,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 512, "n_layer": 4, "n_head": 8, "vocab_size": 8000, "n_positions": 1024}
DOCUMENT = {"model": LLAMA, "data": {"micro_batch_size": 2, "sequence_length": 128}, "precision": "bf16"}


def test_a_document_and_its_estimate_agree() -> None:
    run, estimate = planner.trace(DOCUMENT), planner.estimate(DOCUMENT).to_dict()
    assert run.peak_allocated == pytest.approx(estimate["memory"]["peak_allocated"], rel=0.001)


def test_options_replace_the_plan_s_own() -> None:
    assert planner.trace(DOCUMENT, layers=1).parameters < planner.trace(DOCUMENT).parameters


def test_a_module_is_copied_and_not_changed() -> None:
    model = torch.nn.Linear(64, 64)
    before = model.weight.clone()
    run = planner.trace(
        model, micro_batch_size=1, sequence_length=8, optimizer="sgd",
        loss=lambda m, ids: m(torch.empty(*ids.shape, 64)).sum(),
    )  # fmt: skip
    assert run.parameters == 64 * 64 + 64
    assert torch.equal(model.weight, before)


def test_a_step_function_says_itself_when_phases_begin() -> None:
    def step(model: torch.nn.Module, mark: Callable[[str], Any]) -> None:
        mark("forward")
        loss = model(torch.empty(32, 64)).sum()
        mark("backward")
        loss.backward()
        mark("optimizer")
        mark("steady")

    run = planner.trace(step, model=torch.nn.Linear(64, 64, bias=False))
    assert run.moments["steady"] == 2 * 64 * 64 * 4 + 512  # weight, gradient, loss
    assert run.peaks["backward_peak"].by_category()["gradients"] == 64 * 64 * 4


@pytest.mark.parametrize(
    "change",
    [
        {"method": "qlora"},
        {"recompute": "selective"},
        {"implementation": {"name": "litgpt"}},
        {"implementation": {"name": "transformers", "version": "4.45"}},
        {"loss": "liger"},
        {"optimizer": "adamw-8bit"},
        {"parallelism": {"zero": 2}, "hardware": {"gpu": "h100-sxm", "gpus_per_node": 2}},
        {"parallelism": {"tensor": 2}, "hardware": {"gpu": "h100-sxm", "gpus_per_node": 2}},
    ],
    ids=str,
)
def test_what_plain_modules_do_not_do_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(NotCovered, match="the dry run does not replay"):
        planner.trace({**DOCUMENT, **change})


def test_serving_has_no_training_step() -> None:
    with pytest.raises(NotCovered):
        planner.trace({"kind": "serving", "model": LLAMA})


def test_other_values_are_refused() -> None:
    with pytest.raises(PlanError):
        planner.trace(7)


# torch.autocast("cuda", bfloat16) of fp32 weights on one H200, torch 2.11.0, transformers 5.17.0, 4 x 1024 tokens,
# 2026-11-23: the highest `requested_bytes` of a steady step, less the workspaces of cuBLAS.
MEASURED_AUTOCAST = [
    ("sdpa", False, 1439510604 - 69206020),
    ("sdpa", "non-reentrant", 725692428 - 69206020),
    ("eager", False, 2378510348 - 69206020),
    ("eager", "non-reentrant", 930592780 - 69206020),
]


@pytest.mark.parametrize(("attention", "checkpointing", "measured"), MEASURED_AUTOCAST)
def test_autocast_asks_for_the_bytes_that_an_h200_was_asked_for(
    attention: str, checkpointing: bool | str, measured: int
) -> None:
    run = replay_config(
        GPT2, micro_batch_size=4, sequence_length=1024, dtype="fp32", autocast="bf16", attention=attention,
        gradient_checkpointing=checkpointing, kernel="auto-cudnn", granularity=1, steps=3,
    )  # fmt: skip
    print(f"predicted/measured {run.peak_allocated / measured:.6f}")
    assert run.peak_allocated == measured


def test_autocast_has_cuda_s_lists_and_the_cpu_gets_its_own_back() -> None:
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        x = torch.empty(4, 8, dtype=torch.bfloat16)
        assert x.pow(2).dtype == F.softmax(x, -1).dtype == torch.bfloat16
        with CudaAutocast():
            in_fp32 = (x.pow(2), x.rsqrt(), F.softmax(x, -1), F.layer_norm(x, (8,)), x.sum(), x.cumsum(0))
            assert {result.dtype for result in in_fp32} == {torch.float32}
            assert F.linear(x.float(), torch.empty(8, 8)).dtype == torch.bfloat16
            assert torch.cat([x, x]).dtype == F.silu(x).dtype == torch.bfloat16
        assert x.pow(2).dtype == torch.bfloat16
