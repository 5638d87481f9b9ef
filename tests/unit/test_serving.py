"""`planner.memory.serving` and what it is made of: formats, recipes, weights on a rank, engines, the answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from planner.errors import NotCovered, PlanError, UnknownName
from planner.hardware import Device
from planner.memory.serving import ServingMemory, serving_memory
from planner.memory.serving_activations import forward_bytes, logits_bytes
from planner.memory.serving_engines import vllm_defaults
from planner.memory.serving_weights import rotary_table_bytes, serving_weight_bytes, serving_weights
from planner.plan import Hardware, KvCache, Requests, ServingParallelism, ServingPlan
from planner.quantization import BLOCK_FORMATS, QUANTIZATIONS, canonical_quantization, matrix_bytes, row_bytes
from planner.readers.models import load_model

GIB = 2**30
ENGINES = ("ideal", "vllm", "sglang", "transformers", "llama.cpp", "tensorrt-llm")


def card(gib: float = 79.179, name: str = "h100-sxm") -> Device:
    return Device(
        name=name,
        title=name,
        vendor="Maker",
        form_factor="SXM",
        architecture="One",
        memory_type="HBM",
        torch_total_memory_bytes=int(gib * GIB),
        compute_capability=(9, 0),
    )


def answer(model: str = "Llama-3.1-8B", device: Device | None = None, **fields: Any) -> ServingMemory:
    plan = ServingPlan(model=model, **fields)
    return serving_memory(plan, load_model(model), device or card())


def load(context: int, concurrency: int = 1) -> Requests:
    return Requests(context_length=context, prompt_tokens=context // 2, output_tokens=16, concurrency=concurrency)


def test_bits_of_the_block_formats() -> None:
    bits = {name: BLOCK_FORMATS[name].bits_per_weight for name in ("Q4_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q6_K")}
    assert bits == {"Q4_0": 4.5, "Q5_1": 6.0, "Q8_0": 8.5, "Q2_K": 2.625, "Q3_K": 3.4375, "Q6_K": 6.5625}
    assert row_bytes("Q8_0", 33) == 2 * 34


def test_matrices_with_scales() -> None:
    n = 4096 * 4096
    assert matrix_bytes("fp8", 4096, 4096) == n + 4 * 4096
    assert matrix_bytes("fp8-block", 4096 + 1, 4096) == n + 4096 + 4 * 33 * 32
    assert 8 * matrix_bytes("awq-4bit", 4096, 4096) / n == 4.15625
    assert matrix_bytes("gptq-4bit", 4096, 4096) - matrix_bytes("awq-4bit", 4096, 4096) == 4 * 4096
    assert matrix_bytes("awq-4bit", 8, 130) == 8 * 130 // 2 + 8 * 2 * 2 + 8, "the last group is whole"
    assert 8 * matrix_bytes("mxfp4", 64, 4096) / (64 * 4096) == 4.25
    assert matrix_bytes("nvfp4", 64, 4096) == 64 * (2048 + 256) + 4
    assert matrix_bytes("nf4-double", 14_336, 4096) == 30_293_060, "measured with bitsandbytes"


def test_quantization_names() -> None:
    assert canonical_quantization("q4_k_m") == "Q4_K_M"
    with pytest.raises(UnknownName, match='did you mean "Q4_K_M"'):
        answer(quantization="Q4_KM")


def test_embeddings_and_head_stay_wide_in_four_bits() -> None:
    shape = load_model("Llama-3.1-8B")
    wide = 2 * 128_256 * 4096 * 2 + 65 * 4096 * 2
    per_block = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14_336, 4096)] * 2 + [(4096, 14_336)]
    expected = wide + 32 * sum(matrix_bytes("nf4-double", *size) for size in per_block)
    assert serving_weight_bytes(shape, "nf4") == expected
    assert round(expected / GIB, 2) == 5.31


def test_ranks_divide_matrices_and_repeat_norms() -> None:
    shape = load_model("Llama-3.1-8B")
    norms = 65 * 4096 * 2
    whole = serving_weight_bytes(shape)
    for tensor in (2, 4, 8):
        assert serving_weight_bytes(shape, tensor=tensor) == (whole - norms) // tensor + norms
    heads = 32 * 2 * 2 * 128 * 4096  # 8 key and value heads on 16 ranks: each is held twice
    assert serving_weight_bytes(shape, tensor=16) == (whole - norms) // 16 + norms + heads // 2


def test_whole_experts_or_their_width() -> None:
    shape = load_model("Mixtral-8x7B-v0.1")
    by_width = serving_weight_bytes(shape, tensor=4)
    assert serving_weight_bytes(shape, tensor=4, expert=4) == by_width
    assert serving_weight_bytes(shape, tensor=4, expert=2) == by_width
    assert serving_weight_bytes(shape, tensor=1, expert=8) < serving_weight_bytes(shape) / 4


def test_an_encoder_is_divided_and_an_image_tower_is_not() -> None:
    t5 = load_model("t5-11b")
    assert 1 < 8 * serving_weight_bytes(t5, tensor=8) / serving_weight_bytes(t5) < 1.02
    gemma = load_model("gemma-3-27b-it")
    tower = 8 * serving_weight_bytes(gemma, tensor=8) - serving_weight_bytes(gemma)
    assert tower > 7 * 2 * 400_000_000


def test_stages_hold_their_ends_and_add_up() -> None:
    untied = serving_weights(load_model("Llama-3.1-8B"))
    assert untied.stage(0, 16) + untied.stage(16, 32) == untied.total
    tied = serving_weights(load_model("Llama-3.2-1B"))
    assert tied.stage(0, 8) + tied.stage(8, 16) == tied.total + 128_256 * 2048 * 2, "the last stage has its own table"


def test_the_rotary_table_is_vllms() -> None:
    shape = load_model("Llama-3.1-8B")
    assert rotary_table_bytes(shape) == 131_072 * 128 * 2
    assert serving_weight_bytes(shape, engine="vllm") - serving_weight_bytes(shape) == 2**25


def test_published_formats_are_kept_by_none() -> None:
    deep = load_model("DeepSeek-V3")
    assert serving_weight_bytes(deep) == serving_weight_bytes(deep, "fp8")
    assert serving_weight_bytes(deep, "BF16") > 1.9 * serving_weight_bytes(deep)
    with pytest.raises(NotCovered, match="compressed-tensors"):
        serving_weight_bytes(load_model("Kimi-K2.5"))
    full = replace(load_model("Llama-3.2-1B"), dtype="float32")
    assert serving_weight_bytes(full, engine="transformers") == 2 * serving_weight_bytes(full, engine="vllm") - 2 * (
        rotary_table_bytes(full)
    )


def test_transients() -> None:
    shape = load_model("Llama-3.1-8B")
    # residual and its normalised copy 2 x 4096; gate, up and product 3 x 14336; two bytes each
    assert forward_bytes(shape, 10) == 10 * 2 * (2 * 4096 + 3 * 14_336)
    assert forward_bytes(shape, 10, 8) == 10 * 2 * (2 * 4096 + 3 * 14_336 // 8)
    assert logits_bytes(shape, 3) == 3 * 128_256 * 6


@pytest.mark.parametrize("engine", ENGINES)
def test_the_breakdown_adds_up(engine: str) -> None:
    found = answer(engine=engine, requests=load(8192, 4))
    assert sum(found.breakdown.values()) == found.device_used
    assert found.breakdown["kv_cache"] == found.kv_cache == 4 * GIB
    assert found.fits and found.kv_cache <= found.kv_cache_pool
    assert found.peak_activations == found.breakdown["activations"] > 0
    listed = found.to_dict()
    for name in ("weights", "kv_cache_bytes_per_token", "kv_cache", "kv_token_capacity", "max_concurrent_sequences"):
        assert listed[name] == getattr(found, name)
    assert {"peak_activations", "capacity", "fits"} <= set(listed)
    assert any("latency" in line for line in found.assumptions)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_limits_are_edges(engine: str) -> None:
    """At the most sequences, and at the longest context, the plan fits; one more does not."""
    found = answer(engine=engine, requests=load(8192, 4))
    most = found.max_concurrent_sequences
    assert most is not None
    assert answer(engine=engine, requests=load(8192, most)).fits
    assert not answer(engine=engine, requests=load(8192, most + 1)).fits
    longest = found.longest_context_by_memory
    assert longest is not None

    def at(context: int) -> bool:
        requests = Requests(context_length=context, prompt_tokens=4096, output_tokens=16, concurrency=4)
        return answer(engine=engine, requests=requests).fits

    assert at(longest) and not at(longest + 1)


def test_vllm_defaults_by_device() -> None:
    assert vllm_defaults(card(79.18)) == (8192, 1024)
    assert vllm_defaults(card(79.18, "a100-sxm-80gb")) == (2048, 256)
    assert vllm_defaults(card(23.58, "rtx-3090")) == (2048, 256)
    assert vllm_defaults(card(178, "b200")) == (16384, 1024)


def test_fewer_sequences_leave_vllm_more_room() -> None:
    """The sampler's warm-up: 38.9 B x 1024 sequences x 128256, as measured; 256 sequences on a smaller card."""
    assert round(answer().peak_activations / GIB, 2) == 4.76
    assert answer(device=card(23.58, "rtx-3090")).peak_activations < 1.3 * GIB


def test_replicas_share_the_load() -> None:
    one = answer(requests=load(8192, 4))
    four = answer(requests=load(8192, 16), parallelism=ServingParallelism(data=4))
    assert four.kv_cache == one.kv_cache
    assert four.max_concurrent_sequences == 4 * (one.max_concurrent_sequences or 0)
    assert four.kv_token_capacity == 4 * one.kv_token_capacity


def test_pipeline_stages() -> None:
    found = answer(requests=load(8192), parallelism=ServingParallelism(pipeline=2), engine="ideal")
    assert found.kv_cache_bytes_per_token == 131_072 // 2
    assert found.weights < 0.55 * answer(engine="ideal").weights
    with pytest.raises(PlanError, match="32 blocks"):
        answer(parallelism=ServingParallelism(pipeline=33))


def test_what_does_not_fit_says_so() -> None:
    small = answer("Llama-3.1-70B", requests=load(8192))
    assert not small.fits and small.max_concurrent_sequences == 0 and small.kv_token_capacity == 0
    assert any("no room" in line for line in small.warnings)
    crowded = answer(requests=load(8192, 500))
    assert not crowded.fits
    assert any("wait" in line for line in crowded.warnings)
    beyond = answer(requests=load(200_000), engine="ideal")
    assert any("131072 positions" in line for line in beyond.warnings)


def test_vllms_scheduler_has_a_limit_of_its_own() -> None:
    crowd = answer("Qwen3-0.6B", requests=load(100, 2000))
    assert any("1024 sequences" in line for line in crowd.warnings)


def test_four_bits_and_stacked_experts() -> None:
    shape = load_model("Qwen3-30B-A3B")
    assert serving_weight_bytes(shape, "nf4", engine="transformers") > 3 * serving_weight_bytes(shape, "nf4")
    found = answer("Qwen3-30B-A3B", engine="transformers", quantization="nf4")
    assert any("stacked experts" in line for line in found.assumptions)


def test_block_formats_are_chosen_before_the_ranks_divide() -> None:
    shape = load_model("Llama-3.1-8B")
    whole, eighth = serving_weight_bytes(shape, "Q4_K_M"), serving_weight_bytes(shape, "Q4_K_M", tensor=8)
    assert whole <= 8 * eighth <= whole + 8 * 65 * 4096 * 4 + 8 * 300


def test_parts_without_rows_are_named() -> None:
    vision = answer("gemma-3-27b-it")
    assert any("patch embedding" in line for line in vision.warnings)
    encoder = answer("bert-base-uncased", engine="ideal", requests=Requests(prompt_tokens=300, output_tokens=1))
    assert encoder.kv_cache == 0 and encoder.max_concurrent_sequences is None
    assert any("no cache" in line for line in encoder.warnings)


def test_plans_an_engine_cannot_run() -> None:
    with pytest.raises(PlanError, match="whole heads"):
        answer(parallelism=ServingParallelism(tensor=3))
    with pytest.raises(PlanError, match=r"llama\.cpp"):
        answer(kv_cache=KvCache(dtype="q8_0"))
    with pytest.raises(PlanError, match="q8_0"):
        answer(engine="llama.cpp", kv_cache=KvCache(dtype="fp8"))


def test_the_users_share_of_memory() -> None:
    half = answer(hardware=Hardware(memory_utilization=0.5))
    assert half.budget == -(-card().memory_capacity_bytes // 2)
    assert half.kv_cache_pool < answer().kv_cache_pool
    shared = Hardware(memory_utilization=0.5)
    assert answer(engine="ideal", hardware=shared).budget == card().memory_capacity_bytes // 2
    assert any("not used" in line for line in answer(engine="transformers", hardware=shared).warnings)


def test_sglang_reserves_by_its_heuristic() -> None:
    """512 + 1.5 x 8192 + 128 + 2 x 256 MiB of 79.179 GiB, to three digits as sglang rounds it."""
    found = answer(engine="sglang")
    assert any("mem_fraction_static 0.834" in line for line in found.assumptions)


def test_llama_cpp_pads_contexts_and_widens_windows() -> None:
    gemma = answer("gemma-3-27b-it", engine="llama.cpp", requests=load(131_072), quantization="Q8_0")
    assert gemma.kv_cache == 10_864 * 2**20, "10 x 1 GiB, and 52 layers of 1536 cells"
    assert answer(engine="llama.cpp", requests=load(1000)).kv_cache == 1024 * 131_072
    ignored = answer("Mistral-7B-v0.1", engine="llama.cpp", requests=load(32_768))
    assert ignored.kv_cache == 4 * GIB


def test_all_names_are_answered() -> None:
    shape = load_model("Llama-3.2-1B")
    sizes = {name: serving_weight_bytes(shape, name) for name in QUANTIZATIONS}
    assert sizes["F32"] == 2 * sizes["none"]
    assert sizes["none"] > sizes["fp8"] > sizes["nf4"]
    assert sizes["Q8_0"] > sizes["Q6_K"] > sizes["Q5_K_M"] > sizes["Q5_K_S"] > sizes["Q4_K_M"] > sizes["Q4_K_S"]
    assert sizes["Q4_K_S"] > sizes["Q3_K_L"] > sizes["Q3_K_M"] > sizes["Q3_K_S"] > sizes["Q2_K"] > sizes["IQ1_S"]
