"""Whole steps of one rank: the ledger against DDP's, FSDP1's and FSDP2's own code, replayed on shapes."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from planner.hardware import software_device
from planner.ledger.parameters import state_tensors
from planner.measure.dry_run import DryRun, trace
from planner.memory.device import workspace_bytes
from planner.memory.optimizers import optimizer_bytes
from planner.memory.training import TrainingMemory, training_memory
from planner.plan import (
    Data,
    Hardware,
    Method,
    Optimizer,
    Parallelism,
    Precision,
    Recompute,
    TrainingPlan,
)  # fmt: skip
from planner.readers.hardware_profiles import load_hardware
from planner.readers.hf_config import shape_from_config

TOLERANCE = 0.0005
MOMENTS = ("forward_end", "forward_peak", "backward_peak", "optimizer_peak", "steady")

WIDE = {
    "model_type": "llama", "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4,
    "intermediate_size": 1408, "vocab_size": 4000, "num_hidden_layers": 4, "tie_word_embeddings": False,
}  # fmt: skip
NARROW = {**WIDE, "vocab_size": 1000}
TIED = {**NARROW, "tie_word_embeddings": True}
BF16 = Precision()
FP32 = Precision(recipe="fp32", weights="fp32", gradients="fp32", optimizer_states="fp32", compute="fp32")
MIXED = Precision(
    recipe="bf16-amp", weights="fp32", gradients="fp32", optimizer_states="fp32", compute="bf16", autocast=True
)
LORA = Method(name="lora", rank=16, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
DROPPED = Method(name="lora", rank=16, targets=("q_proj", "k_proj", "v_proj", "o_proj"), dropout=0.1)
ALL = Recompute(mode="full")
TINY = Data(micro_batch_size=1, sequence_length=128)
SMALL = Data(micro_batch_size=2, sequence_length=512)
LARGE = Data(micro_batch_size=8, sequence_length=512)
TWICE = Data(micro_batch_size=1, sequence_length=256, gradient_accumulation_steps=2)
FOR_LOOP = Optimizer(implementation="for-loop")

CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("fsdp2", 8, {"model": WIDE, "precision": MIXED, "data": SMALL}),
    ("fsdp2", 8, {"model": NARROW, "precision": MIXED, "data": TINY, "optimizer": FOR_LOOP}),
    ("fsdp2", 2, {"model": NARROW, "precision": BF16, "data": TINY, "recompute": ALL, "optimizer": FOR_LOOP}),
    ("fsdp2", 8, {"model": TIED, "precision": MIXED, "data": LARGE, "recompute": ALL}),
    ("fsdp2", 8, {"model": WIDE, "precision": MIXED, "data": TWICE}),
    ("fsdp2", 8, {"model": WIDE, "precision": BF16, "data": SMALL, "method": LORA}),
    ("fsdp2", 8, {"model": WIDE, "precision": BF16, "data": LARGE, "method": LORA, "recompute": ALL}),
    ("fsdp1", 8, {"model": WIDE, "precision": MIXED, "data": SMALL}),
    ("fsdp1", 8, {"model": NARROW, "precision": MIXED, "data": TINY}),
    ("fsdp1", 2, {"model": WIDE, "precision": BF16, "data": LARGE, "recompute": ALL}),
    ("fsdp1", 8, {"model": WIDE, "precision": MIXED, "data": TWICE}),
    ("fsdp1", 2, {"model": NARROW, "precision": BF16, "data": LARGE, "recompute": ALL, "method": LORA}),
    ("fsdp1", 2, {"model": NARROW, "precision": BF16, "data": SMALL, "method": DROPPED}),
    ("ddp", 2, {"model": WIDE, "precision": BF16, "data": SMALL}),
    ("ddp", 2, {"model": WIDE, "precision": MIXED, "data": TWICE}),
    ("ddp", 2, {"model": NARROW, "precision": BF16, "data": TINY, "optimizer": FOR_LOOP}),
]


def both(plan: TrainingPlan) -> tuple[DryRun, TrainingMemory]:
    device = software_device(load_hardware(plan.hardware.gpu))
    return trace(plan), training_memory(plan, shape_from_config(dict(plan.model)), device)  # pyright: ignore


def assert_alike(run: DryRun, ledger: TrainingMemory, inputs: int) -> None:
    # The dry run's loop owns its token ids throughout; to the ledger they belong to the pass that reads them.
    for name in MOMENTS:
        replayed = run.moments[name] - (inputs if name in ("optimizer_peak", "steady") else 0)
        print(f"{name} predicted/replayed {ledger.moments[name] / replayed:.6f}")
        assert ledger.moments[name] == pytest.approx(replayed, rel=TOLERANCE), name


@pytest.mark.parametrize(("engine", "ranks", "settings"), CASES)
def test_each_moment_of_a_sharded_step(engine: str, ranks: int, settings: dict[str, Any]) -> None:
    plan = TrainingPlan(
        attention="flash",
        parallelism=Parallelism(zero=0 if engine == "ddp" else 3, engine=engine),  # pyright: ignore[reportArgumentType]
        hardware=Hardware(gpus_per_node=ranks),
        **settings,
    )
    run, ledger = both(plan)
    assert_alike(run, ledger, plan.data.micro_batch_size * plan.data.sequence_length * 8)


def test_blocks_that_stay_whole_after_forward() -> None:
    plan = TrainingPlan(
        model=NARROW, precision=MIXED, data=TINY, attention="flash", hardware=Hardware(gpus_per_node=8),
        parallelism=Parallelism(zero=3, engine="fsdp2", reshard_after_forward=False),
    )  # fmt: skip
    assert_alike(*both(plan), TINY.micro_batch_size * TINY.sequence_length * 8)


def test_what_sharding_holds_at_the_backward_peak() -> None:
    """Four units' worth in flight in a block's backward: itself, the one before, and in fp32 the one after."""
    plan = TrainingPlan(
        model=NARROW, precision=MIXED, data=TINY, attention="flash", hardware=Hardware(gpus_per_node=8),
        parallelism=Parallelism(zero=3, engine="fsdp2"), optimizer=Optimizer(name="sgd"),
    )  # fmt: skip
    run, ledger = both(plan)
    for name in ("unsharded_parameters", "communication_buffers"):
        replayed = run.peaks["backward_peak"].by_category()[name]
        assert ledger.breakdowns["backward_peak"][name] == pytest.approx(replayed, rel=TOLERANCE), name


OPTIMIZERS = [
    Optimizer(),
    Optimizer(implementation="for-loop"),
    Optimizer(implementation="fused"),
    Optimizer(amsgrad=True),
    Optimizer(name="sgd"),
    Optimizer(name="sgd-momentum"),
    Optimizer(name="adafactor"),
    Optimizer(name="muon"),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: f"{o.name}-{o.implementation}-{o.amsgrad}")
@pytest.mark.parametrize("precision", [BF16, FP32], ids=lambda p: p.recipe)
@pytest.mark.parametrize("model", [WIDE, {**WIDE, "vocab_size": 200}], ids=["large embedding", "large blocks"])
def test_states_and_temporaries_of_optimizers(
    optimizer: Optimizer, precision: Precision, model: dict[str, Any]
) -> None:
    plan = TrainingPlan(model=model, data=TINY, precision=precision, optimizer=optimizer)
    run = trace(plan)
    predicted = optimizer_bytes(
        optimizer, state_tensors(shape_from_config(model), Method(), precision), precision.optimizer_states
    )
    at_peak = run.peaks["optimizer_peak"].by_category()
    print(f"states {predicted.states} of {at_peak.get('optimizer_states', 0)}")
    assert predicted.states == pytest.approx(at_peak.get("optimizer_states", 0), rel=0.005)
    temporary = at_peak.get("temporaries", 0) + at_peak.get("activations", 0)
    assert predicted.step == pytest.approx(temporary, rel=0.003, abs=2048)


def test_gradients_that_are_kept_and_zeroed() -> None:
    plan = TrainingPlan(
        model=NARROW, data=SMALL, attention="flash", optimizer=Optimizer(name="sgd", set_to_none=False)
    )  # fmt: skip
    run, ledger = both(plan)
    assert_alike(run, ledger, SMALL.micro_batch_size * SMALL.sequence_length * 8)


def test_a_plan_counts_the_workspaces_of_its_accelerator() -> None:
    run, _ = both(TrainingPlan(model=NARROW, data=TINY, hardware=Hardware(gpu="h100-sxm")))
    assert run.breakdown["library_workspaces"] == workspace_bytes(software_device(load_hardware("h100-sxm")))
