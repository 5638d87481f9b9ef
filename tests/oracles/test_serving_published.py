"""Serving memory against what engines logged on real machines, and what llama.cpp prints for its own files."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest

from planner.hardware import Device
from planner.ledger.weights import parameter_counts
from planner.memory.kv_cache import cache_layers, kv_bytes_per_token, most_sequences
from planner.memory.kv_pages import page_plan
from planner.memory.serving import ServingMemory, serving_memory
from planner.memory.serving_weights import serving_weight_bytes
from planner.plan import Hardware, Requests, ServingParallelism, ServingPlan
from planner.readers.models import load_model

GIB = 2**30
VLLM = "https://github.com/vllm-project/vllm"
LLM_D = "https://github.com/llm-d-incubation/llm-d-planner/blob/main/docs/empirical-vllm-memory-results.md"


@dataclass(frozen=True, kw_only=True)
class LoggedWeights:
    """vLLM's "Model loading took ... GiB" on one GPU. within: relative error that is allowed, and why if not 0.05 %."""

    model: str
    quantization: str
    tensor: int
    gib: float
    source: str
    within: float = 0.0005


LOGGED_WEIGHTS = [
    LoggedWeights(model="Llama-3.1-8B", quantization="none", tensor=1, gib=14.9888, source=f"{VLLM}/issues/10517"),
    LoggedWeights(model="Llama-3.1-8B", quantization="none", tensor=1, gib=14.9889, source=f"{VLLM}/issues/17122"),
    LoggedWeights(model="Llama-3-8B", quantization="none", tensor=1, gib=14.96, source=f"{VLLM}/issues/10511"),
    LoggedWeights(model="Llama-3.1-70B", quantization="int8", tensor=1, gib=67.7229, source=f"{VLLM}/issues/12569"),
    LoggedWeights(model="Llama-3.3-70B-Instruct", quantization="fp8", tensor=1, gib=67.72, source=LLM_D),
    LoggedWeights(model="Llama-3.3-70B-Instruct", quantization="fp8", tensor=2, gib=33.88, source=LLM_D),
    LoggedWeights(model="Qwen3-32B", quantization="none", tensor=1, gib=61.03, source=LLM_D),
    LoggedWeights(model="Qwen3-0.6B", quantization="none", tensor=1, gib=1.12, source=LLM_D),
    LoggedWeights(model="Qwen3-30B-A3B", quantization="none", tensor=4, gib=14.2474, source=f"{VLLM}/issues/17327"),
    # 0.07 GiB more than weights and tables; the log does not say what it is
    LoggedWeights(model="Qwen3-32B", quantization="none", tensor=2, gib=30.59, source=LLM_D, within=0.003),
    # 0.16 GiB more, unexplained
    LoggedWeights(
        model="Qwen2.5-32B", quantization="none", tensor=2, gib=30.7098, source=f"{VLLM}/issues/15815", within=0.007
    ),
    # the padding of mxfp4 experts is inferred from these two
    LoggedWeights(model="gpt-oss-20b", quantization="none", tensor=1, gib=13.47, source=LLM_D, within=0.004),
    LoggedWeights(model="gpt-oss-120b", quantization="none", tensor=1, gib=64.38, source=LLM_D, within=0.001),
    # a fork for Gaudi; the number of devices is inferred
    LoggedWeights(
        model="DeepSeek-R1",
        quantization="none",
        tensor=8,
        gib=79.41,
        source="https://github.com/HabanaAI/vllm-fork/issues/809",
        within=0.002,
    ),
    LoggedWeights(
        model="Llama-3.2-11B-Vision",
        quantization="none",
        tensor=1,
        gib=19.86,
        source=f"{VLLM}/pull/12126",
        within=0.003,
    ),
]


@pytest.mark.parametrize("row", LOGGED_WEIGHTS, ids=lambda row: f"{row.model}-{row.quantization}-tp{row.tensor}")
def test_weights_as_vllm_logs_them(row: LoggedWeights) -> None:
    shape = load_model(row.model)
    found = serving_weight_bytes(shape, row.quantization, engine="vllm", tensor=row.tensor) / GIB
    digits = len(f"{row.gib}".partition(".")[2])
    rounding = 0.5 * 10**-digits
    assert abs(found - row.gib) <= rounding + row.within * row.gib, f"{found:.4f} / {row.gib} = {found / row.gib:.5f}"


# tools/quantize/README.md of llama.cpp: bits per weight of Llama-3.1-8B, the whole file
LLAMA_CPP_BITS = {
    "IQ1_S": 2.0042, "IQ1_M": 2.1460, "IQ2_XXS": 2.3824, "IQ2_XS": 2.5882, "IQ2_S": 2.7403, "IQ2_M": 2.9294,
    "IQ3_XXS": 3.2548, "IQ3_XS": 3.4977, "IQ3_S": 3.6606, "IQ3_M": 3.7628, "IQ4_XS": 4.4597, "IQ4_NL": 4.6818,
    "Q2_K_S": 2.9697, "Q2_K": 3.1593, "Q3_K_S": 3.6429, "Q3_K_M": 3.9960, "Q3_K_L": 4.2979, "Q4_K_S": 4.6672,
    "Q4_K_M": 4.8944, "Q5_K_S": 5.5704, "Q5_K_M": 5.7036, "Q6_K": 6.5633, "Q8_0": 8.5008, "F16": 16.0005,
}  # fmt: skip


@pytest.mark.parametrize(("file_type", "bits"), LLAMA_CPP_BITS.items())
def test_gguf_recipes_to_four_digits(file_type: str, bits: float) -> None:
    shape = load_model("Llama-3.1-8B")
    found = 8 * serving_weight_bytes(shape, file_type) / parameter_counts(shape)["total"]
    assert found == pytest.approx(bits, abs=6e-5), f"{found:.4f} / {bits}"


def test_gguf_q4_k_m_in_gib() -> None:
    assert round(serving_weight_bytes(load_model("Llama-3.1-8B"), "Q4_K_M") / GIB, 4) == 4.5755


# llama.cpp's own layout of header-only files, nothing allocated (tree of llama-cpp-python 0.3.36), MiB; the last row
# is what llama.cpp logs for a real file: https://github.com/ollama/ollama/pull/6279, 37.22 GiB
LLAMA_CPP_LAYOUT = [
    ("Llama-3-8B", "Q8_0", 8137.0, 1e-4),
    ("gemma-3-27b-it", "Q8_0", 27_371.0, 2e-4),
    ("DeepSeek-V3", "Q8_0", 680_237.0, 1e-5),
    ("Qwen3-30B-A3B", "Q8_0", 30_973.0, 2e-5),
    ("Llama-3.1-70B", "Q4_0", 37.22 * 1024, 2e-4),
]


@pytest.mark.parametrize(("model", "file_type", "mib", "within"), LLAMA_CPP_LAYOUT)
def test_files_as_llama_cpp_lays_them_out(model: str, file_type: str, mib: float, within: float) -> None:
    text_only = replace(load_model(model), towers=(), extra=())  # the image tower is a file of its own
    found = serving_weight_bytes(text_only, file_type) / 2**20
    assert found == pytest.approx(mib, rel=within), f"{found:.1f} / {mib} = {found / mib:.6f}"


# (model, format, tensor, tokens, logged GiB of keys and values together on one GPU, digits, source)
LOGGED_POOLS = [
    ("Llama-3.1-8B", "bf16", 1, 1952 * 16, 3.81, 2, f"{VLLM}/issues/10517"),
    ("Llama-3.1-8B", "bf16", 1, 1478 * 16, 2.89, 2, f"{VLLM}/issues/10517"),
    (
        "Llama-2-7b-hf",
        "fp16",
        1,
        132_608,
        69_524_783_104 / GIB,
        9,
        "https://github.com/NVIDIA/TensorRT-LLM/issues/1400",
    ),
    ("Qwen3-235B-A22B", "bf16", 4, 367_404, 2 * 8.23, 1, f"{VLLM}/issues/21348"),
]


@pytest.mark.parametrize(("model", "dtype", "tensor", "tokens", "gib", "digits", "source"), LOGGED_POOLS)
def test_tokens_of_a_logged_pool(
    model: str, dtype: str, tensor: int, tokens: int, gib: float, digits: int, source: str
) -> None:
    found = tokens * kv_bytes_per_token(load_model(model), dtype, tensor) / GIB
    assert abs(found - gib) <= 10**-digits, f"{found:.4f} / {gib} ({source})"


def test_a_hybrid_pool_to_the_token() -> None:
    """vLLM 0.24, Qwen3.6-35B-A3B (the shape of Qwen3.5-35B-A3B), fp8 cache, 131072 tokens, RTX 5090: a pool of
    5.98 GiB is logged as 567,978 tokens and 4.33 x: 299 pages of 69 for a sequence.
    https://github.com/noonghunna/club-3090/issues/612
    """
    plan = page_plan(cache_layers(load_model("Qwen3.5-35B-A3B"), "fp8"), 16, 8192)
    blocks = int(5.98 * GIB) // plan.page_bytes
    concurrency = blocks / plan.sequence_pages(131_072)
    assert round(concurrency, 2) == 4.33
    assert int(concurrency * 131_072) == 567_978


def test_gpt_oss_in_llama_cpp() -> None:
    """ollama issue 16480: two sequences of 131072 tokens take 9216.00 MiB in full and 90.00 MiB in windowed layers,
    whose 1280 cells are 128 + a micro-batch of 1024 padded to 256."""
    layers = {group.kind: group for group in cache_layers(load_model("gpt-oss-120b"), "fp16")}
    assert 2 * layers["full"].bytes(131_072) == 9216 * 2**20
    window = layers["window"]
    cells = math.ceil(((window.limit or 0) + 1024) / 256) * 256
    assert 2 * len(window.layers) * window.cell_bytes * cells == 90 * 2**20


def h100() -> Device:
    return Device(
        name="h100-sxm", title="H100", vendor="NVIDIA", form_factor="SXM", architecture="Hopper", memory_type="HBM3",
        torch_total_memory_bytes=int(79.18 * GIB), compute_capability=(9, 0),
    )  # fmt: skip


# llm-d-planner: vLLM 0.11 on H100s of 79.18 GiB, utilization 0.9 unless said, context 16000:
# (model, quantization, tensor, utilization, activation peak GiB, cache GiB)
LLM_D_RUNS = [
    ("Llama-3.1-8B", "none", 1, 0.90, 4.76, 51.38),
    ("Llama-3.3-70B-Instruct", "fp8", 2, 0.90, 4.84, 32.00),
    ("Qwen3-0.6B", "none", 1, 0.90, 5.56, 64.45),
]


def vllm_run(model: str, quantization: str, tensor: int, share: float) -> ServingMemory:
    plan = ServingPlan(
        model=model,
        quantization=quantization,
        requests=Requests(context_length=16_000),
        parallelism=ServingParallelism(tensor=tensor),
        hardware=Hardware(gpus_per_node=tensor, memory_utilization=share),
    )
    return serving_memory(plan, load_model(model), h100())


@pytest.mark.parametrize(("model", "quantization", "tensor", "share", "peak", "cache"), LLM_D_RUNS)
def test_vllm_pools_on_h100(
    model: str, quantization: str, tensor: int, share: float, peak: float, cache: float
) -> None:
    found = vllm_run(model, quantization, tensor, share)
    assert found.peak_activations / GIB == pytest.approx(peak, rel=0.02)
    graphs = found.breakdown["cuda_graphs"]  # 0.11 did not deduct them yet
    pool = (found.kv_cache_pool + graphs) / GIB
    assert pool == pytest.approx(cache, rel=0.005), f"{pool:.3f} / {cache} = {pool / cache:.4f}"
    bounds = [(found.kv_cache_pool + graphs + sum(t.bytes - edge(t) for t in found.terms)) / GIB for edge in _EDGES]
    assert bounds[0] - 0.2 <= cache <= bounds[1] + 0.2


_EDGES = (lambda term: term.high_bytes, lambda term: term.low_bytes)


def test_sequences_of_8k_on_an_h100() -> None:
    """The logged pools of Llama-3.1-8B, 51.38 and 53.29 GiB, hold 51 and 53 sequences of 8192 tokens."""
    shape = load_model("Llama-3.1-8B")
    assert [most_sequences(shape, int(gib * GIB), 8192) for gib in (51.38, 53.29)] == [51, 53]
