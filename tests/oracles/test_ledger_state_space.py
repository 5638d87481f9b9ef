"""The ledger against the dry run: Mamba 1, Mamba 2 and the hybrids that have them beside attention and experts.

Both describe the modules of transformers 5 in PyTorch alone, as they run where mamba_ssm and causal_conv1d are not
installed. Each case compares the highest level of the forward pass, the level at its end, and the highest level of the
backward pass, over the steady state.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from planner.errors import NotCovered
from planner.ledger.profile import profile_named
from planner.ledger.setting import Setting
from planner.ledger.step import record_step
from planner.memory.moments import pass_levels
from planner.plan import Method, Precision, Recompute
from planner.readers.hf_config import shape_from_config

TOLERANCE = 0.002
MOMENTS = ("forward_peak", "forward_end", "backward_peak")

_MAMBA: dict[str, Any] = {"model_type": "mamba", "hidden_size": 256, "num_hidden_layers": 3, "state_size": 16}
_ATTENTION: dict[str, Any] = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
_NEMOTRON: dict[str, Any] = {
    **_ATTENTION,
    "model_type": "nemotron_h",
    "layers_block_type": ["mamba", "mlp", "mamba", "attention", "mamba"],
    "intermediate_size": 512,
    "head_dim": 64,
    "mamba_num_heads": 8,
    "mamba_head_dim": 64,
    "ssm_state_size": 64,
    "n_groups": 2,
    "chunk_size": 64,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mamba": _MAMBA,
    "mamba_bf16_stream": {**_MAMBA, "residual_in_fp32": False, "use_bias": True},
    "falcon_mamba": {**_MAMBA, "model_type": "falcon_mamba", "tie_word_embeddings": False},
    "mamba2": {
        **_MAMBA,
        "model_type": "mamba2",
        "state_size": 64,
        "num_heads": 8,
        "head_dim": 64,
        "n_groups": 2,
        "chunk_size": 64,
    },
    "jamba": {
        **_ATTENTION,
        "model_type": "jamba",
        "num_hidden_layers": 4,
        "intermediate_size": 512,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "num_experts": 4,
        "mamba_dt_rank": 16,
        "pad_token_id": 0,
    },
    "nemotron_h": _NEMOTRON,
    "nemotron_h_experts": {
        **_NEMOTRON,
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "moe_shared_expert_intermediate_size": 512,
        "n_shared_experts": 1,
        "moe_latent_size": 128,
    },
    "granitemoehybrid": {
        **_ATTENTION,
        "model_type": "granitemoehybrid",
        "num_hidden_layers": 3,
        "intermediate_size": 512,
        "shared_intermediate_size": 512,
        "layer_types": ["mamba", "attention", "mamba"],
        "mamba_n_heads": 8,
        "mamba_d_state": 64,
        "mamba_chunk_size": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "one_example": {"batch": 1},
    "large_vocabulary": {"vocabulary": 32_000},
    "recompute": {"batch": 4, "recompute": True},
    "lora": {"lora": True},
    "lora_recompute": {"batch": 4, "lora": True, "recompute": True},
    "fp32": {"dtype": "fp32"},
}
CASES = [
    *((family, variant) for family in CONFIGS for variant in ("full", "recompute", "lora")),
    *((family, variant) for family in ("mamba", "mamba2") for variant in VARIANTS),
]
TARGETS = {  # what adapters go to; Mamba 1 alone has x_proj, and models without attention no q_proj
    **dict.fromkeys(("mamba", "mamba_bf16_stream", "falcon_mamba"), ("in_proj", "x_proj")),
    "mamba2": ("in_proj",),
    "jamba": ("in_proj", "x_proj", "q_proj", "v_proj"),
}
FP32 = Precision(recipe="fp32", weights="fp32", gradients="fp32", optimizer_states="fp32", compute="fp32")


def ledger_levels(
    config: dict[str, Any],
    batch: Any,
    sequence: Any,
    *,
    dtype: str = "bf16",
    lora: tuple[str, ...] = (),
    recompute: bool = False,
    version: str | None = None,
) -> dict[str, Any]:
    """What the ledger says of one step."""
    setting = Setting(
        micro_batch_size=batch,
        sequence_length=sequence,
        precision=FP32 if dtype == "fp32" else Precision(),
        method=Method(name="lora", rank=16, targets=lora) if lora else Method(),
        recompute=Recompute(mode="full" if recompute else "none"),
        attention="sdpa",
        loss="default",
        profile=profile_named("transformers", version),
    )
    levels = pass_levels(record_step(shape_from_config(config), setting))
    return {name: getattr(levels, name) for name in MOMENTS}


@pytest.mark.parametrize(("family", "variant"), sorted(set(CASES)))
def test_against_the_dry_run(family: str, variant: str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers", minversion="5.0")
    from planner.measure.dry_run import replay_config

    chosen = VARIANTS[variant]
    config = {**CONFIGS[family], "vocab_size": chosen.get("vocabulary", 1000)}
    batch, sequence = chosen.get("batch", 2), 100
    dtype, recompute = chosen.get("dtype", "bf16"), chosen.get("recompute", False)
    lora = TARGETS.get(family, ("in_proj", "q_proj", "v_proj")) if chosen.get("lora") else ()
    run = replay_config(
        config,
        micro_batch_size=batch,
        sequence_length=sequence,
        dtype=dtype,
        lora={"r": 16, "target_modules": list(lora)} if lora else None,
        gradient_checkpointing="non-reentrant" if recompute else False,
    )
    said = ledger_levels(config, batch, sequence, dtype=dtype, lora=lora, recompute=recompute)
    steady = run.moments["steady"] - (batch * sequence * 8 + 511) // 512 * 512  # the ledger counts the ids
    ratios = {name: int(said[name]) / (run.moments[name] - steady) for name in MOMENTS}
    assert all(abs(ratio - 1) <= TOLERANCE for ratio in ratios.values()), ratios


@pytest.mark.parametrize("family", CONFIGS)
def test_a_grid_is_answered_as_its_points_are(family: str) -> None:
    """Batches of one, and sequences that fill their last chunk and that do not, in one record."""
    config = {**CONFIGS[family], "vocab_size": 1000}
    batches, sequences = np.array([1, 1, 2, 3]), np.array([128, 333, 100, 256])
    whole = ledger_levels(config, batches, sequences, recompute=False)
    for position, (batch, sequence) in enumerate(zip(batches.tolist(), sequences.tolist(), strict=True)):
        point = ledger_levels(config, batch, sequence)
        assert {name: int(whole[name][position]) for name in MOMENTS} == {name: int(point[name]) for name in MOMENTS}


def test_states_are_kept_for_each_position() -> None:
    """A Mamba 1 block keeps 14 bytes for each of the I x N states of a position, by hand: the decay 4, step * B 4, the
    state before 4 and after 2; a longer sequence costs that much more, and what is linear in I beside it.
    """
    config = {**CONFIGS["mamba"], "vocab_size": 1000}
    shorter, longer = (ledger_levels(config, 1, sequence)["forward_end"] for sequence in (512, 1024))
    states = 3 * 512 * (512 * 16) * 14
    assert states < longer - shorter < 1.25 * states


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_other_versions_are_refused(family: str) -> None:
    """transformers 4 has other modules for these mixers."""
    config = {**CONFIGS[family], "vocab_size": 1000}
    with pytest.raises(NotCovered):
        ledger_levels(config, 2, 128, version="4.48")
