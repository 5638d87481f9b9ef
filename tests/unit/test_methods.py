"""Fine-tuning methods without torch: counts by hand, targets that must exist, and what is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from planner.errors import NotCovered, PlanError
from planner.ledger.parameters import state_tensors
from planner.ledger.profile import profile_named
from planner.ledger.record import StepRecord
from planner.ledger.setting import Setting
from planner.ledger.step import record_step
from planner.ledger.targets import check_method, check_targets
from planner.memory.moments import pass_levels
from planner.model.adapter_targets import chosen_by, default_targets
from planner.model.shape import ModelShape
from planner.plan import Method, Precision, Recompute
from planner.readers.hf_config import shape_from_config

H, F, V, L, KV = 64, 96, 128, 4, 32
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": H, "intermediate_size": F, "vocab_size": V, "num_hidden_layers": L,
    "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": False,
}  # fmt: skip
BLOCK = 2 * H * H + 2 * H * KV + 3 * H * F + 2 * H


def model(**changes: Any) -> ModelShape:
    return shape_from_config({**LLAMA, **changes})


def trainable(shape: ModelShape, method: Method) -> int:
    return sum(t.repeat * t.elements for t in state_tensors(shape, method, Precision()) if t.trainable)


def record(shape: ModelShape, method: Method, *, recompute: str = "none", batch: Any = 2) -> StepRecord:
    mode: Any = recompute
    return record_step(
        shape,
        Setting(
            micro_batch_size=batch,
            sequence_length=64,
            precision=Precision(),
            method=method,
            recompute=Recompute(mode=mode),
            attention="sdpa",
            loss="default",
            profile=profile_named("transformers"),
        ),
    )


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (Method(name="lora", rank=4, targets=("q_proj", "k_proj")), L * 4 * (H + H + H + KV)),
        (Method(name="lora", rank=4, targets=("q_proj",), dora=True), L * (4 * 2 * H + H)),
        (Method(name="lora", rank=4, targets=("self_attn.q_proj",)), L * 4 * 2 * H),
        (Method(name="lora", rank=4, targets=("q_proj",), train_embeddings=True), L * 4 * 2 * H + 2 * V * H),
        (Method(name="ia3", targets=("k_proj", "v_proj", "down_proj")), L * (2 * KV + F)),
        (Method(name="prompt", virtual_tokens=7), 7 * H),
        (Method(name="prefix", virtual_tokens=7), 7 * 2 * L * KV),
        (Method(name="adapter", bottleneck=16), L * 2 * (2 * 16 * H + 16 + H)),
        (Method(name="frozen"), V * H),
        (Method(name="frozen", trainable_layers=3), V * H + 3 * BLOCK),
        (Method(name="frozen", trainable_layers=1, train_embeddings=True), 2 * V * H + BLOCK),
    ],
    ids=str,
)
def test_counts_by_hand(method: Method, expected: int) -> None:
    assert trainable(model(), method) == expected


def test_a_tied_head_trains_the_embedding_table() -> None:
    tied = model(tie_word_embeddings=True)
    assert trainable(tied, Method(name="frozen")) == V * H
    names = [t.name for t in state_tensors(tied, Method(name="frozen"), Precision()) if t.trainable]
    assert names == ["model.embed_tokens.weight"]


def test_adapters_stand_beside_the_frozen_original_of_a_trained_table() -> None:
    method = Method(name="lora", targets=("q_proj",), train_embeddings=True)
    tables = [t for t in state_tensors(model(), method, Precision()) if t.shape == (V, H)]
    assert sorted(t.trainable for t in tables) == [False, False, True, True]


@pytest.mark.parametrize("targets", [("q_prj",), ("q_proj", "v_pro"), ("model.layers.0.self_attn.q_proj",)])
def test_a_target_that_names_nothing_is_an_error(targets: tuple[str, ...]) -> None:
    with pytest.raises(PlanError, match="no linear module") as error:
        check_targets(model(), Method(name="lora", targets=targets))
    assert "_proj" in str(error.value)


@pytest.mark.parametrize("target", ["embed_tokens", "model.embed_tokens"])
def test_adapters_on_a_table_are_refused(target: str) -> None:
    with pytest.raises(NotCovered, match="no linear module"):
        check_targets(model(), Method(name="lora", targets=(target,)))


def test_adapters_on_a_tied_head_are_refused() -> None:
    check_targets(model(), Method(name="lora", targets=("lm_head",)))
    with pytest.raises(NotCovered, match="tied"):
        check_targets(model(tie_word_embeddings=True), Method(name="lora", targets=("lm_head",)))


@pytest.mark.parametrize("target", ["all-linear", "w1", "gate"])
def test_adapters_on_stacked_experts_are_refused(target: str) -> None:
    experts = shape_from_config({**LLAMA, "model_type": "mixtral", "num_local_experts": 4})
    check_targets(experts, Method(name="lora", targets=("q_proj", "v_proj")))
    with pytest.raises(NotCovered, match="stacked experts"):
        check_targets(experts, Method(name="lora", targets=(target,)))


def test_all_linear_leaves_out_head_and_router() -> None:
    moe = shape_from_config({**LLAMA, "model_type": "qwen2_moe", "num_experts": 4})
    names = [t.name for t in state_tensors(moe, Method(name="lora", targets=("all-linear",)), Precision())]
    adapted = {name.removesuffix(".lora_A.weight") for name in names if name.endswith(".lora_A.weight")}
    assert "self_attn.q_proj" in adapted and "mlp.shared_expert_gate" in adapted
    assert not adapted & {"lm_head", "mlp.gate"}
    neox = shape_from_config({**LLAMA, "model_type": "gpt_neox", "num_key_value_heads": None})
    tensors = state_tensors(neox, Method(name="lora", targets=("all-linear",)), Precision())
    assert not any("embed_out.lora" in t.name for t in tensors)


def test_routers_are_not_packed() -> None:
    moe = shape_from_config({**LLAMA, "model_type": "qwen2_moe", "num_experts": 4})
    packed = {t.name: t.packed for t in state_tensors(moe, Method(name="qlora", targets=("q_proj",)), Precision())}
    assert packed["self_attn.q_proj.weight"] and not packed["mlp.gate.weight"] and not packed["lm_head.weight"]


@pytest.mark.parametrize(
    ("kind", "method", "expected"),
    [
        ("qwen2", "ia3", ("q_proj", "v_proj", "down_proj")),
        ("llama", "ia3", ("k_proj", "v_proj", "down_proj")),
        ("llama", "lora", ("q_proj", "v_proj")),
    ],
)
def test_default_targets(kind: str, method: str, expected: tuple[str, ...]) -> None:
    name: Any = method
    shape = model(model_type=kind)
    assert default_targets(shape, Method(name=name)) == expected
    assert chosen_by(shape, Method(name=name)) == "as peft chooses by default"


def test_a_rule_is_not_called_peft_default() -> None:
    assert "peft has no default for granite" in chosen_by(model(model_type="granite"), Method(name="lora"))


@pytest.mark.parametrize(
    ("changes", "method", "profile"),
    [
        ({}, Method(name="ia3", targets=("k_proj",)), "litgpt"),
        ({}, Method(name="prefix"), "torchtune"),
        ({}, Method(name="lora", targets=("q_proj",), dora=True), "litgpt"),
        ({"model_type": "falcon"}, Method(name="prefix"), "transformers"),
        ({"model_type": "falcon"}, Method(name="adapter"), "transformers"),
        ({"model_type": "bert"}, Method(name="prompt"), "transformers"),
    ],
    ids=str,
)
def test_what_is_not_described_is_refused(changes: dict[str, Any], method: Method, profile: str) -> None:
    with pytest.raises(NotCovered):
        check_method(model(**changes), method, profile_named(profile), sharded=False)


def test_more_trained_blocks_than_there_are() -> None:
    with pytest.raises(PlanError, match="has 4 blocks"):
        record(model(), Method(name="frozen", trainable_layers=5))


def test_a_prefix_refuses_recomputation() -> None:
    with pytest.raises(PlanError, match="recompute"):
        record(model(), Method(name="prefix"), recompute="full")


def test_frozen_blocks_below_the_first_trained_one_keep_nothing() -> None:
    levels = [pass_levels(record(model(), Method(name="frozen", trainable_layers=k))).forward_end for k in range(L + 1)]
    steps = np.diff(levels)
    assert (steps > 0).all()
    assert steps[1:].max() - steps[1:].min() <= 0.2 * steps[1:].max(), "each further block keeps about the same"


def test_checkpointing_in_transformers_sends_gradients_through_frozen_blocks() -> None:
    """gradient_checkpointing_enable makes the embedding's output need a gradient: each block keeps its input."""
    few, many = (record(model(), Method(name="frozen", trainable_layers=k), recompute="full") for k in (1, 3))
    assert pass_levels(few).forward_end == pass_levels(many).forward_end


def test_virtual_tokens_cost_what_as_many_positions_cost() -> None:
    with_prompt = pass_levels(record(model(), Method(name="prompt", virtual_tokens=64)))
    without = pass_levels(record(model(), Method(name="prompt", virtual_tokens=1)))
    assert 1.8 < with_prompt.forward_end / without.forward_end < 2.1


@pytest.mark.parametrize("name", ["ia3", "prompt", "prefix", "adapter", "frozen", "lora"])
def test_a_grid_of_batches_agrees_with_single_answers(name: Any) -> None:
    method = Method(name=name, trainable_layers=1 if name == "frozen" else 0, dora=name == "lora")
    if name in ("ia3", "lora"):
        method = replace(method, targets=default_targets(model(), method))
    batches = np.array([1, 3, 8])
    grid = pass_levels(record(model(), method, batch=batches))
    single = [pass_levels(record(model(), method, batch=int(batch))) for batch in batches]
    assert list(grid.backward_peak) == [levels.backward_peak for levels in single]
    assert list(grid.forward_peak) == [levels.forward_peak for levels in single]
