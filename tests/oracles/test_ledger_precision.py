"""The ledger under autocast, and with gradients that persist, against the dry run of the real modules."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from planner.ledger.profile import profile_named
from planner.ledger.setting import Setting
from planner.ledger.step import record_step
from planner.measure.dry_run import replay_config
from planner.memory.moments import pass_levels
from planner.plan import Method, Precision, Recompute
from planner.readers.hf_config import shape_from_config

TOLERANCE = 0.002
SEQUENCE = 512

LLAMA = {
    "model_type": "llama", "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4,
    "intermediate_size": 1408, "vocab_size": 1000, "num_hidden_layers": 3, "tie_word_embeddings": False,
}  # fmt: skip
QWEN2 = {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True}
GPT2 = {"model_type": "gpt2", "n_embd": 512, "n_layer": 3, "n_head": 8, "vocab_size": 1000, "n_positions": 1024}

AMP = Precision(
    recipe="bf16-amp", weights="fp32", gradients="fp32", optimizer_states="fp32", compute="bf16", autocast=True
)
TARGETS = {"llama": ["q_proj", "k_proj", "v_proj", "o_proj"], "qwen2": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}

VARIANTS: list[dict[str, Any]] = [
    {},
    {"checkpointed": True},
    {"checkpointed": True, "batch": 8},
    {"lora": True},
    {"lora": True, "checkpointed": True},
    {"attention": "eager"},
    {"attention": "flash_attention_2"},
]


def levels(
    config: dict[str, Any], *, checkpointed: bool = False, lora: bool = False, attention: str = "sdpa", batch: int = 2
) -> dict[str, tuple[int, int]]:
    """For each moment of the pass: bytes of the dry run and of the ledger, over the states."""
    targets = TARGETS[config["model_type"]]
    run = replay_config(
        config, micro_batch_size=batch, sequence_length=SEQUENCE, dtype="fp32", autocast="bf16", attention=attention,
        gradient_checkpointing="non-reentrant" if checkpointed else False,
        lora={"r": 16, "target_modules": targets} if lora else None,
    )  # fmt: skip
    steady = run.moments["steady"] - batch * SEQUENCE * 8
    setting = Setting(
        micro_batch_size=batch, sequence_length=SEQUENCE, precision=AMP,
        method=Method(name="lora", rank=16, targets=tuple(targets)) if lora else Method(),
        recompute=Recompute(mode="full" if checkpointed else "none"),
        attention="flash" if attention == "flash_attention_2" else attention, loss="default",
        profile=profile_named("transformers"),
    )  # fmt: skip
    ledger = pass_levels(record_step(shape_from_config(config), setting))
    return {
        name: (run.moments[name] - steady, int(getattr(ledger, name)))
        for name in ("forward_peak", "forward_end", "backward_peak")
    }


@pytest.mark.parametrize("config", [LLAMA, QWEN2, GPT2], ids=lambda config: config["model_type"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_autocast_keeps_what_the_modules_keep(config: dict[str, Any], variant: dict[str, Any]) -> None:
    for name, (replayed, predicted) in levels(config, **variant).items():
        print(f"{name} predicted/replayed {predicted / replayed:.5f}")
        assert predicted == pytest.approx(replayed, rel=TOLERANCE), name


def test_autocast_logits_of_a_large_vocabulary() -> None:
    for name, (replayed, predicted) in levels({**LLAMA, "vocab_size": 32000}).items():
        assert predicted == pytest.approx(replayed, rel=TOLERANCE), name
