"""The ledger against the dry run: routed experts, latent attention, linear attention, encoder-decoder models.

The dry run replays the modules of the installed transformers on fake tensors and reports what is allocated when; the
ledger answers from the model's shape alone. Each case compares the highest level of the forward pass, the level at its
end, and the highest level of the backward pass, over the steady state.
"""

from __future__ import annotations

from typing import Any

import pytest

from planner.errors import NotCovered
from planner.ledger.profile import profile_named
from planner.ledger.setting import Setting
from planner.ledger.step import record_step
from planner.memory.moments import pass_levels
from planner.plan import Method, Precision, Recompute
from planner.readers.hf_config import shape_from_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

TOLERANCE = 0.002
MOMENTS = ("forward_peak", "forward_end", "backward_peak")

_SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LATENT: dict[str, Any] = {
    **_SIZES,
    "num_key_value_heads": 8,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "q_lora_rank": 192,
    "intermediate_size": 1024,
    "moe_intermediate_size": 384,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {**_SIZES, "intermediate_size": 768, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **_SIZES,
        "intermediate_size": 1024,
        "moe_intermediate_size": 384,
        "shared_expert_intermediate_size": 1024,
        "num_experts": 16,
        "num_experts_per_tok": 4,
    },
    "qwen3_moe": {
        **_SIZES,
        "intermediate_size": 1024,
        "moe_intermediate_size": 384,
        "num_experts": 32,
        "num_experts_per_tok": 8,
        "head_dim": 64,
        "norm_topk_prob": True,
    },
    "olmoe": {**_SIZES, "intermediate_size": 384, "num_experts": 16, "num_experts_per_tok": 4},
    "granitemoe": {**_SIZES, "intermediate_size": 512, "num_local_experts": 16, "num_experts_per_tok": 4},
    "deepseek_v2": {**_LATENT, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**_LATENT, "n_group": 4, "topk_group": 2},
}
_DELTA: dict[str, Any] = {
    **_SIZES,
    "num_hidden_layers": 5,
    "head_dim": 64,
    "intermediate_size": 1024,
    "linear_num_value_heads": 8,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
}
CONFIGS |= {
    "minimax_m2": {
        **_SIZES,
        "intermediate_size": 512,
        "num_local_experts": 16,
        "num_experts_per_tok": 4,
        "head_dim": 64,
    },
    "ernie4_5_moe": {
        **_SIZES,
        "intermediate_size": 1024,
        "moe_intermediate_size": 384,
        "moe_num_experts": 16,
        "moe_k": 4,
        "moe_num_shared_experts": 2,
        "tie_word_embeddings": False,
    },
    "glm4_moe": {
        **_SIZES,
        "intermediate_size": 1024,
        "moe_intermediate_size": 384,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "head_dim": 64,
        "use_qk_norm": True,
    },
    "gpt_oss": {
        **_SIZES,
        "num_hidden_layers": 4,
        "intermediate_size": 512,
        "num_local_experts": 16,
        "num_experts_per_tok": 4,
        "head_dim": 64,
        "sliding_window": 128,
    },
    "qwen3_next": {
        **_DELTA,
        "moe_intermediate_size": 384,
        "shared_expert_intermediate_size": 384,
        "num_experts": 16,
        "num_experts_per_tok": 4,
    },
    "qwen3_5_text": _DELTA,
}
LATENT_TARGETS = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {"vocabulary": 32_000},
    "blocks_peak": {"vocabulary": 1000, "batch": 4},
    "recompute": {"vocabulary": 1000, "batch": 4, "recompute": True},
    "lora": {"vocabulary": 1000, "lora": True},
    "lora_recompute": {"vocabulary": 1000, "lora": True, "recompute": True},
    "eager": {"vocabulary": 1000, "attention": "eager"},
    "flash": {"vocabulary": 1000, "attention": "flash_attention_2"},
}
# models with attention sinks have no sdpa form in transformers, only the eager one
EAGER = ("gpt_oss",)
CASES = [
    *((family, "eager" if family in EAGER else "blocks_peak") for family in CONFIGS),
    *((family, "recompute") for family in ("mixtral", "qwen3_moe", "deepseek_v3", "glm4_moe", "minimax_m2")),
    *((family, variant) for family in ("mixtral", "deepseek_v3") for variant in VARIANTS),
]


def ledger_levels(
    config: dict[str, Any],
    batch: int,
    sequence: int,
    *,
    dtype: str,
    lora: tuple[str, ...],
    recompute: bool,
    attention: str,
) -> dict[str, int]:
    """What the ledger says of one step."""
    method = Method(name="lora", rank=16, targets=lora) if lora else Method()
    precision = Precision()
    if dtype == "fp32":
        precision = Precision(recipe="fp32", weights="fp32", gradients="fp32", optimizer_states="fp32", compute="fp32")
    setting = Setting(
        micro_batch_size=batch,
        sequence_length=sequence,
        precision=precision,
        method=method,
        recompute=Recompute(mode="full" if recompute else "none"),
        attention={"flash_attention_2": "flash"}.get(attention, attention),
        loss="default",
        profile=profile_named("transformers"),
    )
    levels = pass_levels(record_step(shape_from_config(config), setting))
    return {name: int(getattr(levels, name)) for name in MOMENTS}


def replayed_levels(run: Any, batch: int, sequence: int) -> dict[str, int]:
    """What the dry run says, over the steady state but for the ids, which the ledger counts."""
    steady = run.moments["steady"] - (batch * sequence * 8 + 511) // 512 * 512
    return {name: run.moments[name] - steady for name in MOMENTS}


def assert_close(said: dict[str, int], replayed: dict[str, int]) -> None:
    """Every moment within the tolerance; the message gives predicted over replayed."""
    ratios = {name: said[name] / replayed[name] for name in MOMENTS}
    assert all(abs(ratio - 1) <= TOLERANCE for ratio in ratios.values()), ratios


@pytest.mark.parametrize(("family", "variant"), sorted(set(CASES)))
def test_decoders(family: str, variant: str) -> None:
    from planner.measure.dry_run import replay_config

    chosen = VARIANTS[variant]
    config = {**CONFIGS[family], "model_type": family, "vocab_size": chosen["vocabulary"]}
    batch, sequence = chosen.get("batch", 2), 512
    targets = LATENT_TARGETS if family.startswith("deepseek") else TARGETS
    lora = targets if chosen.get("lora") else ()
    recompute, attention = chosen.get("recompute", False), chosen.get("attention", "sdpa")
    run = replay_config(
        config,
        micro_batch_size=batch,
        sequence_length=sequence,
        attention=attention,
        lora={"r": 16, "target_modules": list(lora)} if lora else None,
        gradient_checkpointing="non-reentrant" if recompute else False,
    )
    said = ledger_levels(config, batch, sequence, dtype="bf16", lora=lora, recompute=recompute, attention=attention)
    assert_close(said, replayed_levels(run, batch, sequence))


T5: dict[str, Any] = {
    "model_type": "t5",
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 1024,
    "num_layers": 3,
    "num_decoder_layers": 4,
    "num_heads": 8,
    "vocab_size": 1000,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("changes", "batch", "dtype", "lora", "recompute"),
    [
        ({}, 2, "bf16", (), False),
        ({"tie_word_embeddings": True, "feed_forward_proj": "relu"}, 2, "bf16", (), False),
        ({"vocab_size": 32_128}, 4, "bf16", (), False),
        ({}, 4, "fp32", (), False),
        ({}, 2, "bf16", ("q", "v"), False),
        ({}, 8, "bf16", (), True),
    ],
)
def test_t5(changes: dict[str, Any], batch: int, dtype: str, lora: tuple[str, ...], recompute: bool) -> None:
    from planner.measure.dry_run import replay_training_step

    config, sequence = {**T5, **changes}, 512

    def build() -> Any:
        settings = {key: value for key, value in config.items() if key != "model_type"}
        made = transformers.AutoConfig.for_model("t5", decoder_start_token_id=0, **settings)
        return transformers.AutoModelForSeq2SeqLM.from_config(made, dtype=torch.get_default_dtype())

    run = replay_training_step(
        build,
        micro_batch_size=batch,
        sequence_length=sequence,
        dtype=dtype,
        lora={"r": 16, "target_modules": list(lora), "task_type": "SEQ_2_SEQ_LM"} if lora else None,
        gradient_checkpointing="non-reentrant" if recompute else False,
    )
    said = ledger_levels(config, batch, sequence, dtype=dtype, lora=lora, recompute=recompute, attention="sdpa")
    assert_close(said, replayed_levels(run, batch, sequence))


def test_unknown_router_is_refused() -> None:
    """A family whose router is not described raises, it does not borrow another one's arithmetic."""
    config = {
        "model_type": "dbrx",
        "d_model": 512,
        "n_heads": 8,
        "n_layers": 2,
        "vocab_size": 1000,
        "max_seq_len": 2048,
        "attn_config": {"kv_n_heads": 2},
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 512},
    }
    with pytest.raises(NotCovered):
        ledger_levels(config, 2, 512, dtype="bf16", lora=(), recompute=False, attention="sdpa")


def test_vision_tower_is_refused() -> None:
    """A model with a further tower has no silent answer for its text part alone."""
    text = {"model_type": "llama", "hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 2}
    with pytest.raises(NotCovered):
        ledger_levels(
            {"model_type": "llava", "text_config": text},
            1,
            512,
            dtype="bf16",
            lora=(),
            recompute=False,
            attention="sdpa",
        )
