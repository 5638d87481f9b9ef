"""Sentences that everybody repeats, checked against the answers: BLOOM's "almost 3 TB", QLoRA's "780 GB to 48 GB"."""

from __future__ import annotations

from typing import Any

import planner
from planner.ledger.parameters import state_tensors
from planner.memory.zero import zero_state_bytes
from planner.plan import Method, Precision
from planner.readers.models import load_model

GB = 10**9
TB = 10**12

BF16_WITH_MASTERS = Precision(recipe="bf16-mixed", master_weights="fp32", optimizer_states="fp32")
# 16-bit weights and gradients with fp32 moments and no master copy: 12 bytes a parameter.
BF16_WITH_FP32_MOMENTS = Precision(recipe="custom", optimizer_states="fp32")


def states_bytes(model: str, precision: Precision) -> int:
    tensors = state_tensors(load_model(model), Method(), precision)
    return sum(zero_state_bytes(tensors, ranks=1, stage=0, precision=precision).values())


def test_bloom_needs_almost_3_tb_of_states_and_36_gpus_of_80_gb() -> None:
    """Notes on fine-tuning BLOOM-176B say "almost 3 TB" and 72 A100: 16 bytes a parameter are 2.82 TB, which 36 cards
    of 80 GB hold and 35 do not. The 72 are a chosen layout (70 blocks and two embedding slots in a pipeline)."""
    states = states_bytes("bloom", BF16_WITH_MASTERS)
    assert 2.80 * TB < states < 2.85 * TB
    assert 35 * 80 * GB < states < 36 * 80 * GB


def test_a_65b_model_needs_more_than_780_gb_without_qlora() -> None:
    """QLoRA (arXiv:2305.14314), abstract and section 1: "more than 780 GB of GPU memory" for LLaMA 65B in 16 bits."""
    states = states_bytes("llama-65b", BF16_WITH_FP32_MOMENTS)
    assert 780 * GB < states < 790 * GB


def qlora_65b(**changes: Any) -> dict[str, Any]:
    plan = {
        "model": "llama-65b",
        "method": {"name": "qlora", "rank": 64, "targets": "all-linear"},
        "optimizer": "paged-adamw-8bit",
        "recompute": "full",
        "data": {"sequence_length": 512, "micro_batch_size": 1},
        "hardware": {"gpu": "rtx-a6000"},
    }
    return planner.estimate({**plan, **changes}).to_dict()


def test_a_65b_model_needs_less_than_48_gb_with_qlora() -> None:
    """The same abstract: fine-tuning a 65B model "on a single 48GB GPU"; paged optimizer, sequences of 512 tokens."""
    answer = qlora_65b()
    assert answer["memory"]["device_used"] < 48 * GB
    assert answer["verdict"]["outcome"] != "does_not_fit"


def test_double_quantization_saves_3_gb_at_65b() -> None:
    """Section 3: 0.373 bit a parameter, "approximately 3 GB for a 65B model"."""
    method = {"name": "qlora", "rank": 64, "targets": "all-linear"}
    single = qlora_65b(method={**method, "double_quantization": False})
    saved = single["memory"]["breakdown"]["weights"] - qlora_65b()["memory"]["breakdown"]["weights"]
    assert 2.9 * GB < saved < 3.1 * GB
