"""The ledger of dense decoders against the dry run: every moment of a training step, family by family.

The dry run replays the real modules of `transformers`; the ledger has to come out at the same bytes from the shapes
alone. A small vocabulary puts the peaks into the blocks, so that what passes by inside them is held to account, too.
"""

from __future__ import annotations

from typing import Any

import pytest

from planner.ledger.profile import profile_named
from planner.ledger.setting import Setting
from planner.ledger.step import record_step
from planner.memory.moments import pass_levels
from planner.plan import Method, Precision, Recompute
from planner.readers.hf_config import shape_from_config

pytest.importorskip("torch")
pytest.importorskip("transformers")

TOLERANCE = 0.002
BATCH, SEQUENCE = 8, 512

H: dict[str, Any] = {
    "hidden_size": 512, "num_hidden_layers": 3, "vocab_size": 1000, "max_position_embeddings": 2048,
    "num_attention_heads": 8,
}  # fmt: skip
GATED: dict[str, Any] = {**H, "num_key_value_heads": 2, "intermediate_size": 1408}
PLAIN: dict[str, Any] = {**H, "intermediate_size": 2048}
GPT: dict[str, Any] = {"n_embd": 512, "n_layer": 3, "n_head": 8, "vocab_size": 1000, "n_positions": 1024}
FALCON: dict[str, Any] = {**H, "model_type": "falcon", "parallel_attn": True, "bias": False}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**GATED, "model_type": "llama"},
    "gpt2": {**GPT, "model_type": "gpt2"},
    "gpt_bigcode": {**GPT, "model_type": "gpt_bigcode"},
    "gptj": {**GPT, "model_type": "gptj", "n_head": 4, "rotary_dim": 64},
    "gpt_neo": {
        "model_type": "gpt_neo", "hidden_size": 512, "num_layers": 4, "attention_types": [[["global", "local"], 2]],
        "num_heads": 8, "vocab_size": 1000, "max_position_embeddings": 1024,
    },
    "gpt_neox": {**PLAIN, "model_type": "gpt_neox", "rotary_pct": 0.25},
    "gpt_neox sequential": {**PLAIN, "model_type": "gpt_neox", "rotary_pct": 0.25, "use_parallel_residual": False},
    "opt": {**H, "model_type": "opt", "ffn_dim": 2048, "word_embed_proj_dim": 512},
    "opt post-norm": {
        **H, "model_type": "opt", "ffn_dim": 2048, "word_embed_proj_dim": 256, "do_layer_norm_before": False,
    },
    "bloom": {"model_type": "bloom", "hidden_size": 512, "n_layer": 3, "n_head": 8, "vocab_size": 1000},
    "mpt": {"model_type": "mpt", "d_model": 512, "n_layers": 3, "n_heads": 8, "vocab_size": 1000, "max_seq_len": 1024},
    "falcon 7b": {**FALCON, "multi_query": True, "new_decoder_architecture": False},
    "falcon 40b": {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True},
    "falcon rw": {
        **FALCON, "multi_query": False, "new_decoder_architecture": False, "parallel_attn": False, "bias": True,
        "alibi": True,
    },
    "mistral": {**GATED, "model_type": "mistral", "sliding_window": 256},
    "ministral": {**GATED, "model_type": "ministral", "sliding_window": 256, "head_dim": 64},
    "qwen2": {**GATED, "model_type": "qwen2"},
    "qwen2 sliding": {
        **GATED, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 256, "max_window_layers": 1,
    },
    "qwen3": {**GATED, "model_type": "qwen3", "head_dim": 128},
    "gemma": {**GATED, "model_type": "gemma", "head_dim": 128},
    "gemma2": {**GATED, "model_type": "gemma2", "head_dim": 128, "num_hidden_layers": 4, "sliding_window": 256},
    "gemma3": {
        **GATED, "model_type": "gemma3_text", "head_dim": 128, "num_hidden_layers": 6, "sliding_window": 256,
        "sliding_window_pattern": 3,
    },
    "phi": {**PLAIN, "model_type": "phi"},
    "phi3": {**GATED, "model_type": "phi3", "sliding_window": None, "pad_token_id": 0},
    "stablelm": {**GATED, "model_type": "stablelm"},
    "olmo": {**GATED, "model_type": "olmo"},
    "olmo2": {**GATED, "model_type": "olmo2"},
    "olmo3": {**GATED, "model_type": "olmo3", "num_hidden_layers": 4, "sliding_window": 256},
    "smollm3": {**GATED, "model_type": "smollm3", "num_hidden_layers": 4, "pad_token_id": 0},
    "cohere": {**GATED, "model_type": "cohere"},
    "cohere2": {**GATED, "model_type": "cohere2", "num_hidden_layers": 4, "sliding_window": 256},
    "starcoder2": {**GATED, "model_type": "starcoder2"},
    "granite": {**GATED, "model_type": "granite"},
    "glm": {**GATED, "model_type": "glm", "head_dim": 64, "pad_token_id": 0},
    "glm4": {**GATED, "model_type": "glm4", "head_dim": 64, "pad_token_id": 0},
    "nemotron": {**GATED, "model_type": "nemotron"},
    "exaone4": {**GATED, "model_type": "exaone4", "num_hidden_layers": 4, "sliding_window": 256},
}  # fmt: skip

EAGER_ONLY = {"gptj", "gpt_neo", "bloom", "mpt", "gemma2"}  # no sdpa form: the library runs the eager one
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS = {
    "gpt2": ("c_attn",), "gpt_neox": ("query_key_value",), "phi3": ("qkv_proj",), "falcon": ("query_key_value",),
}  # fmt: skip

# Every family in full and with recomputation; a few that between them run every kernel, in all other ways.
EVERYWHERE: list[dict[str, Any]] = [{}, {"recompute": True}]
FURTHER: list[dict[str, Any]] = [
    {"lora": True},
    {"lora": True, "recompute": True},
    {"attention": "eager"},
    {"attention": "flash_attention_2"},
    {"dtype": "fp32"},
    {"dtype": "fp32", "attention": "eager"},
]
WIDELY = ("llama", "gpt2", "mistral", "gemma3", "phi3")
CASES = [(name, variant) for name in FAMILIES for variant in EVERYWHERE]
CASES += [(name, variant) for name in WIDELY for variant in FURTHER]
# Recomputed blocks of two kinds each hold a mask: the dry run lets one go when the last block of its kind has run
# backward, the ledger lets both go at the end.
LOOSER = {("gemma2", True): 0.01}


def _name(case: tuple[str, dict[str, Any]]) -> str:
    return " ".join([case[0], *(f"{key}={value}" for key, value in case[1].items())])


def _ledger(config: dict[str, Any], attention: str, dtype: str, method: Method, recompute: bool) -> dict[str, int]:
    precision = Precision()
    if dtype == "fp32":
        precision = Precision(recipe="fp32", weights="fp32", gradients="fp32", optimizer_states="fp32", compute="fp32")
    setting = Setting(
        micro_batch_size=BATCH,
        sequence_length=SEQUENCE,
        precision=precision,
        method=method,
        recompute=Recompute(mode="full" if recompute else "none"),
        attention="flash" if attention == "flash_attention_2" else attention,
        loss="default",
        profile=profile_named("transformers", "5.23"),
    )
    levels = pass_levels(record_step(shape_from_config(config), setting))
    return {name: int(getattr(levels, name)) for name in ("forward_peak", "forward_end", "backward_peak")}


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_every_moment_agrees_with_the_dry_run(case: tuple[str, dict[str, Any]]) -> None:
    from planner.measure.dry_run import replay_config

    name, variant = case
    config = FAMILIES[name]
    family = config["model_type"]
    attention = variant.get("attention", "eager" if family in EAGER_ONLY else "sdpa")
    dtype = variant.get("dtype", "bf16")
    recompute = variant.get("recompute", False)
    method, lora = Method(), None
    if variant.get("lora"):
        targets = TARGETS.get(family, PROJECTIONS)
        method = Method(name="lora", rank=16, targets=targets)
        lora = {"r": 16, "target_modules": list(targets)}
        pytest.importorskip("peft")
    run = replay_config(
        config,
        micro_batch_size=BATCH,
        sequence_length=SEQUENCE,
        dtype=dtype,
        attention=attention,
        gradient_checkpointing="non-reentrant" if recompute else False,
        lora=lora,
    )
    ids_bytes = -(-BATCH * SEQUENCE * 8 // 512) * 512
    states_bytes = run.moments["steady"] - ids_bytes
    for moment, level in _ledger(config, attention, dtype, method, recompute).items():
        real = run.moments[moment] - states_bytes
        ratio = level / real
        print(f"{name} {moment}: ledger {level:,} dry run {real:,} ratio {ratio:.5f}")
        assert abs(ratio - 1) < LOOSER.get((name, recompute), TOLERANCE), moment
