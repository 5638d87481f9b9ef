"""How much of a device a serving engine gives to the cache: each engine's own rule, with its version.

vllm 0.33          pool = ceil(total x utilization) - weights - peak of its profile run - what is not torch's - graphs
sglang 0.5.23      pool = free before load x fraction - weights; the rest is for activations and graphs
tensorrt-llm       pool = fraction of what is free after weights and activations
llama.cpp          everything is allocated at start: cache for all sequences and one compute buffer
transformers       nothing is reserved; the cache grows as tokens come
ideal              the device holds nothing but weights, cache and one prefill chunk
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from planner.hardware import Device
from planner.memory.device import DeviceTerm
from planner.memory.kv_cache import UNBOUNDED, CacheLayers, sequence_bytes
from planner.memory.kv_pages import page_plan
from planner.model.shape import LatentAttention, ModelShape
from planner.plan import ServingPlan
from planner.sources import Source

__all__ = ["EngineRule", "engine_rule", "vllm_defaults"]

GIB = 2**30
MIB = 2**20
_WINDOWED = ("window", "chunk")

VLLM_UTILIZATION = 0.92  # vllm/config/cache.py, gpu_memory_utilization; 0.90 before 2026
TENSORRT_FRACTION = 0.90  # KvCacheConfig.free_gpu_memory_fraction; of the memory that is free, not of the total
IDEAL_CHUNK = 2048  # tokens: the smallest chunk that the engines here prefill by default
LLAMA_CPP_UBATCH = 512  # --ubatch-size
LLAMA_CPP_MARGIN = 1024 * MIB  # common/fit: what the fit tool leaves free on each device

# The eight H100 runs of llm-d-planner (vLLM 0.11, 1024 sequences): their activation peaks divided by 1024 x vocabulary
# are 38.4 to 39.6 B for a 0.6B, an 8B, a 32B and a 70B model alike: it is the sampler's warm-up, not the model.
SAMPLER_BYTES = (38.4, 38.9, 39.6)
_LLM_D = Source(
    title="llm-d-planner, empirical vLLM memory results: vLLM 0.11, H100 80GB, 79.18 GiB",
    kind="published",
    url="https://github.com/llm-d-incubation/llm-d-planner/blob/main/docs/empirical-vllm-memory-results.md",
)
_GRAPHS = Source(
    title="CUDA graphs logged by vLLM: estimates of 0.17 and 0.36 GiB; 1.03 GiB captured for gpt-oss-120b",
    kind="published",
    url="https://github.com/vllm-project/vllm/issues/45178",
)
_CONTEXT = Source(
    title="CUDA context: 0.47 GiB with lazy loading to 1.78 GiB with eager loading",
    kind="published",
    url="https://github.com/stas00/ml-engineering",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRule:
    """One engine on one device with one plan.

    budget: bytes that weights, cache, activations and `terms` may take together.
    prefill_tokens: most tokens in one forward pass. prompt_tokens: None where the engine plans for that many, whatever
        comes; else a pass holds the prompts of its sequences. activation_floor: what the peak is at least.
    static: activations and terms lie outside the budget (sglang's fraction).
    pool_fraction: share of what is left of the budget that becomes the cache. reserves: the pool is taken at start.
    pages: the cache is a pool of vLLM's pages. in_flight: tokens that windowed layers hold beyond their window.
    context_step: contexts are padded to it. windows: windowed layers forget.
    most_sequences: what the scheduler runs at once by default; None where it has no such limit.
    convolution: format of convolution states.
    """

    version: str
    budget: int
    prefill_tokens: int
    assumptions: tuple[str, ...]
    prompt_tokens: int | None = None
    activation_floor: int = 0
    terms: tuple[DeviceTerm, ...] = ()
    static: bool = False
    pool_fraction: float = 1.0
    reserves: bool = False
    pages: bool = False
    in_flight: int = 0
    block_size: int = 1
    context_step: int = 1
    windows: bool = True
    most_sequences: int | None = None
    convolution: str = "bf16"

    def sequence_needs(self, layers: tuple[CacheLayers, ...]) -> Callable[[int], int]:
        """Bytes of the cache that one sequence takes on this engine, as a function of its context that never falls.

        vllm takes whole pages (`planner.memory.kv_pages`). llama.cpp pads contexts to 256 and gives windowed layers
        pad256(min(context, W + micro-batch)) cells. The others hold positions, in blocks of `block_size`.
        """
        if self.pages:
            return page_plan(layers, self.block_size, self.in_flight).sequence_bytes
        if self.context_step > 1:
            widened = tuple(
                replace(group, limit=group.limit + self.in_flight) if group.kind in _WINDOWED and group.limit else group
                for group in layers
            )
            return lambda context: sequence_bytes(widened, context, self.context_step)
        return lambda context: sequence_bytes(layers, context, self.block_size)

    def activations(self, for_token: int, for_row: int, sequences: int) -> int:
        """Largest transient of a step that serves `sequences` sequences.

        for_token, for_row: bytes of a forward pass for each token, and of the logits for each sequence.
        """
        tokens = self.prefill_tokens
        if self.prompt_tokens is not None:
            tokens = min(tokens, self.prompt_tokens * sequences)
        return max(tokens * for_token, sequences * for_row, self.activation_floor)


def vllm_defaults(device: Device) -> tuple[int, int]:
    """(max_num_batched_tokens, max_num_seqs) of `vllm serve` on this device: engine/arg_utils.py, 0.33."""
    total = device.memory_capacity_bytes
    if total >= 160 * GIB:
        return 16384, 1024
    if total >= 70 * GIB and "a100" not in device.name:
        return 8192, 1024
    return 2048, 256


def engine_rule(plan: ServingPlan, shape: ModelShape, device: Device) -> EngineRule:
    """The rule of the plan's engine."""
    match plan.engine:
        case "vllm":
            return _vllm(plan, shape, device)
        case "sglang":
            return _sglang(plan, shape, device)
        case "tensorrt-llm":
            return _tensorrt(plan, device)
        case "llama.cpp":
            return _llama_cpp(plan, shape, device)
        case "transformers":
            return _transformers(plan, device)
        case "ideal":
            return _ideal(plan, device)


def _share(plan: ServingPlan, default: float) -> tuple[float, str]:
    given = plan.hardware.memory_utilization
    return (default, "its default") if given is None else (given, "the plan's")


def _context_term() -> DeviceTerm:
    return DeviceTerm(
        name="cuda_context",
        bytes=int(0.52 * GIB),
        low_bytes=int(0.42 * GIB),
        high_bytes=int(1.78 * GIB),
        source=_CONTEXT,
    )


def _sampler_floor(shape: ModelShape, sequences: int) -> int:
    return 0 if shape.head is None else int(SAMPLER_BYTES[1] * sequences * shape.head.rows)


def _vllm(plan: ServingPlan, shape: ModelShape, device: Device) -> EngineRule:
    share, whose = _share(plan, VLLM_UTILIZATION)
    tokens, sequences = vllm_defaults(device)
    degrees = plan.parallelism
    several = degrees.tensor > 1 or degrees.pipeline > 1
    not_torch = DeviceTerm(
        name="non_torch",
        bytes=int((0.55 if several else 0.13) * GIB),
        low_bytes=int((0.16 if several else 0.03) * GIB),
        high_bytes=int((0.80 if several else 0.20) * GIB),
        source=_LLM_D,
    )
    graphs = DeviceTerm(name="cuda_graphs", bytes=GIB // 4, low_bytes=0, high_bytes=int(1.03 * GIB), source=_GRAPHS)
    low, high = (edge * sequences * (shape.head.rows if shape.head else 0) / GIB for edge in SAMPLER_BYTES[::2])
    return EngineRule(
        version="0.33",
        pages=True,
        budget=math.ceil(device.memory_capacity_bytes * share),
        prefill_tokens=tokens,
        in_flight=tokens * (degrees.pipeline + 1),
        activation_floor=_sampler_floor(shape, sequences),
        terms=(not_torch, graphs),
        block_size=plan.kv_cache.block_size,
        reserves=True,
        most_sequences=sequences,
        assumptions=(
            f"vllm 0.33 with {whose} gpu_memory_utilization {share:g} of what CUDA reports as total",
            f"vllm's defaults on this device: max_num_batched_tokens {tokens}, max_num_seqs {sequences}",
            f"vllm's profile run peaks in the sampler's warm-up: 38.9 B (38.4 to 39.6 measured on H100, vLLM 0.11) x "
            f"{sequences} sequences x vocabulary = {low:.2f} to {high:.2f} GiB, where that exceeds the forward pass; "
            "fewer --max-num-seqs leave more for the cache",
            "two batches in flight (asynchronous scheduling), which windowed layers hold tokens for",
        ),
    )


# GiB of the device below which the row holds; chunk of prefill tokens; largest graph batch; the same with tensor >= 4
_SGLANG_DEFAULTS = (
    (20, 2048, 8, 8),
    (35, 4096, 48, 160),
    (60, 4096, 32, 160),
    (160, 8192, 256, 512),
    (math.inf, 16384, 512, 512),
)


def _sglang(plan: ServingPlan, shape: ModelShape, device: Device) -> EngineRule:
    """srt/arg_groups/memory_hook.py, sizes in MiB as there: 512 + 1.5 a chunk token + 128 a rank + graphs."""
    total = device.memory_capacity_bytes / MIB
    wide = plan.parallelism.tensor >= 4
    chunk, batch, wide_batch = next(row[1:] for row in _SGLANG_DEFAULTS if total < row[0] * 1024)
    latent = any(isinstance(block.mixer, LatentAttention) for block in shape.blocks)
    graphs = 2 * (wide_batch if wide else batch) + (1536 if latent else 0)
    reserved = 512 + 1.5 * max(chunk, 2048) + 128 * plan.parallelism.tensor * plan.parallelism.pipeline + graphs
    if total > 60 * 1024:
        reserved = max(reserved, 10 * 1024)
    share, whose = _share(plan, round((total - reserved) / total, 3))
    before = device.memory_capacity_bytes - _context_term().bytes
    return EngineRule(
        version="0.5.23",
        budget=int(before * share),
        static=True,
        prefill_tokens=chunk,
        terms=(_context_term(),),
        reserves=True,
        assumptions=(
            f"sglang 0.5.23 with {whose} mem_fraction_static {share:g} of the memory free before loading",
            f"sglang's chunked prefill of {chunk} tokens on this device; graphs of prefill batches are not counted",
            "sglang divides its pool between full and windowed layers by a ratio; here both get what they need",
        ),
    )


def _tensorrt(plan: ServingPlan, device: Device) -> EngineRule:
    share, whose = _share(plan, TENSORRT_FRACTION)
    return EngineRule(
        version="1.x",
        budget=device.memory_capacity_bytes,
        pool_fraction=share,
        prefill_tokens=8192,
        terms=(_context_term(),),
        block_size=plan.kv_cache.block_size,
        reserves=True,
        assumptions=(
            f"tensorrt-llm with {whose} free_gpu_memory_fraction {share:g} of what is free after weights and "
            "activations (docs, reference/memory), max_num_tokens 8192",
        ),
    )


# Architectures whose windowed layers llama.cpp caches in full: it loads them as its plain `llama` or `qwen2` graph.
_WINDOWS_IGNORED = frozenset({"mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "phi3", "starcoder2"})


def _llama_cpp(plan: ServingPlan, shape: ModelShape, device: Device) -> EngineRule:
    """Compute buffer with flash attention on CUDA: n_ub (V + h) 4 B, exact in logs (300.75, 105.00 MiB)."""
    rows = shape.head.rows if shape.head is not None else 0
    return EngineRule(
        version="2026-06 (as vendored by llama-cpp-python 0.3.36)",
        budget=device.memory_capacity_bytes - LLAMA_CPP_MARGIN,
        prefill_tokens=LLAMA_CPP_UBATCH,
        in_flight=LLAMA_CPP_UBATCH,
        activation_floor=LLAMA_CPP_UBATCH * (rows + shape.hidden) * 4,
        terms=(_context_term(),),
        context_step=256,
        convolution="fp32",
        windows=shape.model_type not in _WINDOWS_IGNORED,
        assumptions=(
            "llama.cpp with all layers on the GPU, flash attention, a micro-batch of 512 and one cache of the whole "
            "context for each sequence; contexts are padded to 256",
            "llama.cpp's own fit rule leaves 1024 MiB free",
        ),
    )


def _transformers(plan: ServingPlan, device: Device) -> EngineRule:
    return EngineRule(
        version="5.23",
        budget=device.memory_capacity_bytes,
        prefill_tokens=UNBOUNDED,
        prompt_tokens=plan.requests.prompt_tokens,
        terms=(_context_term(),),
        assumptions=(
            "transformers 5.23 generate() with its dynamic cache: all prompts in one forward pass, logits of the last "
            "position only, fused attention",
        ),
    )


def _ideal(plan: ServingPlan, device: Device) -> EngineRule:
    share, whose = _share(plan, 1.0)
    return EngineRule(
        version="",
        budget=int(device.memory_capacity_bytes * share),
        prefill_tokens=IDEAL_CHUNK,
        prompt_tokens=plan.requests.prompt_tokens,
        assumptions=(
            f"ideal engine with {whose} share {share:g} of memory: weights, exact cache and one prefill chunk of at "
            f"most {IDEAL_CHUNK} tokens; no runtime, no fragmentation, no graphs: a lower bound",
        ),
    )
