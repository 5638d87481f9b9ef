"""Laws that every answer obeys, whatever the model and the plan."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import planner
from planner.answer.training import TrainingEstimate

CONFIG = {
    "model_type": "llama",
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "vocab_size": 8000,
}
METHODS = st.sampled_from(["full", "lora", "qlora", "frozen"])
RECOMPUTE = st.sampled_from(["none", "full"])
PRECISION = st.sampled_from(["fp32", "bf16", "bf16-amp", "bf16-mixed"])


def estimate(config: dict[str, Any] | None = None, **document: Any) -> TrainingEstimate:
    answer = planner.estimate({"model": {**CONFIG, **(config or {})}, "hardware": {"gpu": "h100-sxm"}, **document})
    assert isinstance(answer, TrainingEstimate)
    return answer


@settings(max_examples=25, deadline=None)
@given(method=METHODS, recompute=RECOMPUTE, precision=PRECISION, batch=st.integers(1, 6), length=st.integers(16, 700))
def test_breakdown_adds_up_and_memory_grows(
    method: str, recompute: str, precision: str, batch: int, length: int
) -> None:
    if method == "qlora" and precision == "fp32":
        precision = "bf16"

    def peak(batch: int, length: int, layers: int) -> int:
        answer = estimate(
            {"num_hidden_layers": layers},
            method={"name": "lora", "targets": "all-linear"} if method == "lora" else method,
            recompute=recompute,
            precision=precision,
            data={"micro_batch_size": batch, "sequence_length": length},
        )
        memory = answer.memory
        for moment, parts in memory.breakdowns.items():
            assert sum(parts.values()) == memory.moments[moment]
            assert min(parts.values()) >= 0, (moment, parts)
        assert memory.peak_allocated == max(memory.moments.values())
        return memory.peak_allocated

    here = peak(batch, length, 4)
    assert peak(batch + 1, length, 4) >= here
    assert peak(batch, length + 64, 4) >= here
    assert peak(batch, length, 5) >= here


@settings(max_examples=15, deadline=None)
@given(ranks=st.sampled_from([2, 4, 8, 64]), zero=st.sampled_from([1, 2, 3]), precision=PRECISION)
def test_sharding_conserves_states(ranks: int, zero: int, precision: str) -> None:
    """What all ranks hold together is what one rank held alone, but for padding and blocks that are not split."""
    engine = "fsdp2" if zero == 3 else "deepspeed"

    def states(gpus: int, zero: int) -> dict[str, int]:
        answer = estimate(
            precision=precision,
            data={"sequence_length": 64},
            parallelism={"zero": zero, "engine": engine} if gpus > 1 else {},
            hardware={"gpu": "h100-sxm", "gpus_per_node": gpus},
        )
        return dict(answer.memory.breakdowns["optimizer_peak"])

    alone, shard = states(1, 0), states(ranks, zero)
    divided = ["optimizer_states", "master_weights"]
    divided += ["weights"] if zero == 3 else []
    for name in divided:
        slack = alone[name] * 0.10 + ranks * 64 * 1024
        assert abs(alone[name] - ranks * shard[name]) <= slack, name


def test_more_zero_never_needs_more_states() -> None:
    levels = []
    for zero in (0, 1, 2, 3):
        answer = estimate(
            {"num_hidden_layers": 8, "hidden_size": 2048, "intermediate_size": 5632},
            precision="bf16-mixed",
            data={"sequence_length": 64},
            parallelism={"zero": zero, "bucket_bytes": 2**20},
            hardware={"gpu": "h100-sxm", "gpus_per_node": 8},
        )
        levels.append(answer.memory.moments["optimizer_peak"])
    assert levels == sorted(levels, reverse=True)


def test_frozen_layers_save_nothing_below_the_first_trained_one() -> None:
    ends = [
        estimate(method={"name": "frozen", "trainable_layers": k}).memory.breakdowns["forward_end"]["activations"]
        for k in range(5)
    ]
    assert ends == sorted(ends)
    assert ends[0] < ends[4] / 3


@pytest.mark.parametrize("loss", ["default"])
def test_one_estimate_does_not_disturb_the_next(loss: str) -> None:
    first = estimate(loss=loss).to_dict()
    estimate(loss=loss, data={"sequence_length": 333})
    assert estimate(loss=loss).to_dict() == first
