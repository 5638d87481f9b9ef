"""What a serving deployment needs on each GPU, and how much load fits: weights, cache, transients, the engine's share.

All bytes are those of one GPU: of the pipeline stage that has least room, on one tensor-parallel rank. Tokens and
sequences are those of the whole deployment, all replicas together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from planner.errors import PlanError
from planner.hardware import Device
from planner.memory.device import DeviceTerm
from planner.memory.kv_cache import (
    UNBOUNDED,
    CacheLayers,
    affine_bytes,
    cache_layers,
    largest_that_fits,
    token_bytes,
)
from planner.memory.kv_pages import page_plan
from planner.memory.serving_activations import forward_bytes, logits_bytes
from planner.memory.serving_engines import EngineRule, engine_rule
from planner.memory.serving_weights import ServingWeights, serving_weights
from planner.model.shape import Attention, LatentAttention, ModelShape, Moe
from planner.plan import ServingPlan

__all__ = ["ServingMemory", "serving_memory"]

GIB = 2**30
_GGML_CACHES = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingMemory:
    """Bytes of the fullest GPU; tokens and sequences of the deployment.

    kv_cache_bytes_per_token: one more token inside every window; beyond the windows it is
        kv_cache_growth_per_token x context + kv_cache_fixed_per_sequence.
    kv_cache: the cache of the requested load; kv_cache_pool: what the engine can give to caches.
    kv_token_capacity: tokens of sequences of the plan's context that the pool holds at once.
    Limits are None where memory sets none.
    longest_context: at the plan's concurrency, at most the model's own positions; longest_context_by_memory without
        that bound. max_concurrent_sequences: at the plan's context, by memory alone.
    device_used: the sum of `breakdown`: what is live at the requested load. reserved: what nvidia-smi shows where the
        engine takes its pool at start.
    """

    weights: int
    kv_cache_bytes_per_token: int
    kv_cache_growth_per_token: int
    kv_cache_fixed_per_sequence: int
    kv_cache: int
    kv_cache_pool: int
    kv_token_capacity: int
    max_concurrent_sequences: int | None
    longest_context: int | None
    longest_context_by_memory: int | None
    peak_activations: int
    budget: int
    capacity: int
    device_used: int
    reserved: int
    fits: bool
    breakdown: Mapping[str, int]
    terms: tuple[DeviceTerm, ...]
    context_length: int
    concurrency: int
    replicas: int
    stage: int
    engine_version: str
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The `memory` section of a serving answer, in bytes; assumptions and warnings stand beside it."""
        names = (
            "weights", "kv_cache_bytes_per_token", "kv_cache_growth_per_token", "kv_cache_fixed_per_sequence",
            "kv_cache", "kv_cache_pool", "kv_token_capacity", "max_concurrent_sequences", "longest_context",
            "longest_context_by_memory", "peak_activations", "budget", "capacity", "device_used", "reserved", "fits",
            "context_length", "concurrency", "replicas", "stage", "engine_version",
        )  # fmt: skip
        answer: dict[str, Any] = {name: getattr(self, name) for name in names}
        answer["breakdown"] = dict(self.breakdown)
        answer["terms"] = [
            {"name": t.name, "bytes": t.bytes, "low_bytes": t.low_bytes, "high_bytes": t.high_bytes,
             "source": t.source.title} for t in self.terms
        ]  # fmt: skip
        return answer


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stage:
    """One pipeline stage on one rank. needs: cache bytes of one sequence by its context."""

    index: int
    weights: int
    layers: tuple[CacheLayers, ...]
    rule: EngineRule
    other: int

    def room(self, activations: int) -> int:
        """Bytes that the engine can give to the cache."""
        taken = self.weights if self.rule.static else self.weights + activations + self.other
        return int((self.rule.budget - taken) * self.rule.pool_fraction)


def serving_memory(plan: ServingPlan, shape: ModelShape, device: Device) -> ServingMemory:
    """Memory of the plan's engine under its load. Latency, throughput and money are not computed here.

    Raises PlanError where the engine could not run the plan at all, UnknownName for a quantization or a cache format.
    """
    _check(plan, shape)
    rule = engine_rule(plan, shape, device)
    degrees, load = plan.parallelism, plan.requests
    context = load.context_length or load.prompt_tokens + load.output_tokens
    sequences = -(-load.concurrency // degrees.data)
    weights = serving_weights(
        shape, plan.quantization, engine=plan.engine, tensor=degrees.tensor, expert=degrees.expert
    )
    cache = _cache_format(plan, shape)
    layers = cache_layers(
        shape,
        cache,
        degrees.tensor,
        encoder_tokens=load.prompt_tokens,
        windows=rule.windows,
        convolution=rule.convolution,
    )
    element = 4 if cache == "fp32" and plan.engine == "transformers" else 2
    stages = _stages(weights, layers, rule, degrees.pipeline)

    for_token = forward_bytes(shape, 1, degrees.tensor, element_bytes=element)
    for_row = logits_bytes(shape, 1, element_bytes=element)

    def transient(count: int) -> int:
        return rule.activations(for_token, for_row, count)

    peak = transient(sequences)
    answers = [_load(stage, context, sequences, peak, transient) for stage in stages]
    tightest = min(range(len(stages)), key=lambda index: answers[index].room - answers[index].cache)
    stage, answer = stages[tightest], answers[tightest]
    concurrent = degrees.data * min(each.concurrent for each in answers)
    longest = min(each.longest for each in answers)
    bounded = longest if shape.max_positions is None else min(longest, shape.max_positions)
    fits = all(each.cache <= each.room for each in answers)
    breakdown = {"weights": stage.weights, "kv_cache": answer.cache, "activations": peak}
    breakdown.update({term.name: term.bytes for term in rule.terms})
    used = sum(breakdown.values())
    growth, fixed = affine_bytes(stage.layers)
    pool = max(0, answer.room)
    return ServingMemory(
        weights=stage.weights,
        kv_cache_bytes_per_token=token_bytes(stage.layers),
        kv_cache_growth_per_token=growth,
        kv_cache_fixed_per_sequence=fixed,
        kv_cache=answer.cache,
        kv_cache_pool=pool,
        kv_token_capacity=degrees.data * min(each.tokens for each in answers),
        max_concurrent_sequences=_limit(concurrent),
        longest_context=_limit(bounded),
        longest_context_by_memory=_limit(longest),
        peak_activations=peak,
        budget=rule.budget,
        capacity=device.memory_capacity_bytes,
        device_used=used,
        reserved=used - answer.cache + pool if rule.reserves else used,
        fits=fits,
        breakdown=breakdown,
        terms=rule.terms,
        context_length=context,
        concurrency=load.concurrency,
        replicas=degrees.data,
        stage=stage.index,
        engine_version=rule.version,
        assumptions=_assumptions(plan, shape, device, rule, weights, cache),
        warnings=_warnings(plan, shape, rule, context, fits, concurrent, longest, layers),
    )


def _limit(found: int) -> int | None:
    """None where memory sets no limit."""
    return None if found >= UNBOUNDED else found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Load:
    room: int
    cache: int
    concurrent: int
    longest: int
    tokens: int


def _load(stage: _Stage, context: int, sequences: int, peak: int, transient: Callable[[int], int]) -> _Load:
    """What one stage holds at the load, and the inverses: most sequences, longest context, tokens."""
    rule = stage.rule
    needs = rule.sequence_needs(stage.layers)
    room, one = stage.room(peak), needs(context)

    def needed(count: int) -> int:
        return count * one - stage.room(transient(count))

    concurrent = largest_that_fits(needed, 0) if needed(0) <= 0 else 0
    longest = largest_that_fits(lambda n: sequences * needs(n), room) if room >= 0 else 0
    if rule.pages and stage.layers and room > 0:
        plan = page_plan(stage.layers, rule.block_size, rule.in_flight)
        blocks = room // plan.page_bytes
        pages = plan.sequence_pages(context)
        concurrent = blocks // pages
        longest = largest_that_fits(lambda n: sequences * plan.sequence_pages(n), blocks)
        whole = len(plan.groups) == 1 and plan.groups[0].layers.kind == "full"
        tokens = blocks * plan.groups[0].block_tokens if whole else blocks * context // pages
    elif one and all(group.kind == "full" for group in stage.layers):
        cell = sum(len(group.layers) * group.cell_bytes for group in stage.layers)
        tokens = max(0, room) // (cell * rule.block_size) * rule.block_size
    else:
        tokens = max(0, room) * context // one if one else 0
    return _Load(room=room, cache=sequences * one, concurrent=concurrent, longest=longest, tokens=tokens)


def _stages(
    weights: ServingWeights, layers: tuple[CacheLayers, ...], rule: EngineRule, pipeline: int
) -> tuple[_Stage, ...]:
    """Equal numbers of blocks; what is left over goes to stages before the last, which has the output projection."""
    other = sum(term.bytes for term in rule.terms)
    count = len(weights.layers)
    if pipeline > max(1, count):
        raise PlanError(f"parallelism.pipeline {pipeline} is more than the model's {count} blocks.")
    sizes = [count // pipeline] * pipeline
    for extra in range(count % pipeline):
        sizes[-2 - extra] += 1
    stages, start = [], 0
    for index, size in enumerate(sizes):
        stop = start + size
        held = layers if pipeline == 1 else tuple(_within(layers, start, stop))
        stages.append(_Stage(index=index, weights=weights.stage(start, stop), layers=held, rule=rule, other=other))
        start = stop
    return tuple(stages)


def _within(layers: tuple[CacheLayers, ...], start: int, stop: int) -> list[CacheLayers]:
    held = [replace(group, layers=tuple(n for n in group.layers if start <= n < stop)) for group in layers]
    return [group for group in held if group.layers]


def _cache_format(plan: ServingPlan, shape: ModelShape) -> str:
    """`auto` is the format the model computes in: 16 bits, or fp32 where transformers loads an fp32 checkpoint."""
    given = plan.kv_cache.dtype
    if given != "auto":
        return given
    wide = plan.quantization in ("none", "F32") and shape.dtype in ("float32", "float") and shape.quantization is None
    return "fp32" if plan.engine == "transformers" and wide else "bf16"


def _check(plan: ServingPlan, shape: ModelShape) -> None:
    dtype, engine, tensor = plan.kv_cache.dtype, plan.engine, plan.parallelism.tensor
    if dtype in _GGML_CACHES and engine not in ("llama.cpp", "ideal"):
        raise PlanError(f"kv_cache.dtype {dtype} is llama.cpp's; {engine} has auto, bf16, fp16, fp8 or int8.")
    if engine == "llama.cpp" and dtype in ("fp8", "int8", "int4"):
        raise PlanError(f"llama.cpp has no {dtype} cache; use q8_0 or q4_0.")
    if engine in ("ideal", "llama.cpp"):
        return
    for block in shape.blocks:
        if isinstance(block.mixer, (Attention, LatentAttention)) and block.mixer.heads % tensor:
            raise PlanError(
                f"{engine} divides attention by whole heads: parallelism.tensor {tensor} does not divide "
                f"{block.mixer.heads} query heads."
            )


def _assumptions(
    plan: ServingPlan, shape: ModelShape, device: Device, rule: EngineRule, weights: ServingWeights, cache: str
) -> tuple[str, ...]:
    stated = ["memory is that of one GPU, the fullest; tokens and sequences are those of the deployment"]
    stated.extend(rule.assumptions)
    stated.extend(weights.assumptions)
    if plan.kv_cache.dtype == "auto":
        stated.append(f"kv_cache.dtype auto: {'fp32' if cache == 'fp32' else '16 bits'}, as the model computes")
    if plan.quantization == "nf4":
        stated.append("nf4 with double quantisation: 4.127 bits a weight; without it 4.5")
    stacked = any(isinstance(block.ffn, Moe) and block.ffn.stacked for block in shape.blocks)
    if plan.engine == "transformers" and plan.quantization in ("nf4", "int8") and stacked:
        stated.append("bitsandbytes replaces nn.Linear alone: stacked experts stay in 16 bits under transformers 5")
    if plan.quantization == "fp8" and shape.quantization != "fp8":
        stated.append("fp8 with one fp32 scale for each output row; embeddings and output projection in 16 bits")
    if plan.engine == "vllm" and plan.quantization in ("none", "mxfp4") and shape.model_type == "gpt_oss":
        stated.append("vllm on Hopper pads the packed rows of mxfp4 experts to 256, inferred from two logged loads")
    if plan.engine == "llama.cpp" and shape.embedding is not None and not (shape.head and shape.head.tied):
        stated.append("llama.cpp keeps the token embedding in host memory; it is counted in weights here")
    if any(tower.role in ("vision", "audio") for tower in shape.towers):
        stated.append(
            "the vision or audio tower is held whole on every tensor-parallel rank; its activations are not in"
        )
    if device.memory_capacity_assumption:
        stated.append(device.memory_capacity_assumption)
    stated.extend(f"model: {assumed} (a default of the reference class)" for assumed in shape.assumed)
    stated.append("latency, throughput and cost of serving are not computed by this version")
    return tuple(stated)


def _warnings(
    plan: ServingPlan,
    shape: ModelShape,
    rule: EngineRule,
    context: int,
    fits: bool,
    concurrent: int,
    longest: int,
    layers: tuple[CacheLayers, ...],
) -> tuple[str, ...]:
    found = [f"not covered: {part}" for part in shape.uncovered]
    if shape.max_positions is not None and context > shape.max_positions:
        found.append(f"context_length {context} is beyond the model's {shape.max_positions} positions")
    if not layers:
        found.append("the model keeps no cache between tokens that this version describes")
    if plan.hardware.memory_utilization is not None and plan.engine in ("transformers", "llama.cpp"):
        found.append(f"hardware.memory_utilization is not used: {plan.engine} reserves no share of the device")
    most = None if rule.most_sequences is None else rule.most_sequences * plan.parallelism.data
    if most is not None and plan.requests.concurrency > most:
        found.append(f"{plan.engine} runs {most} sequences at once by default; --max-num-seqs raises it, and its peak")
    if not fits and concurrent > 0:
        found.append(
            f"{concurrent} sequences of {context} tokens run at once; the rest of {plan.requests.concurrency} wait"
        )
    if not fits and concurrent == 0 and longest > 0:
        found.append(f"not one sequence of {context} tokens fits; {longest} tokens would, at the plan's concurrency")
    if not fits and longest == 0:
        found.append("weights and what the engine needs leave no room for a single token of cache")
    return tuple(found)
