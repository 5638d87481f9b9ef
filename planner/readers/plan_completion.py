"""What a plan document leaves open and one of its other fields decides.

Four things are worked out from given fields instead of taken from a default: the number of accelerators, when only
parallel degrees are given; the replicas that fill the accelerators of a serving plan; the interleaved schedule, when
there are virtual stages; and requests that fit a short context. A field that the document gives is never changed.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import replace
from math import gcd
from typing import TypeVar

from planner.plan import Parallelism, ServingPlan, TrainingPlan

__all__ = ["completed"]

AnyPlan = TypeVar("AnyPlan", TrainingPlan, ServingPlan)

_GPUS_IN_A_USUAL_NODE = 8
_MOST_ACCELERATORS = 2**20


def completed(read: TrainingPlan | ServingPlan, given: AbstractSet[str]) -> TrainingPlan | ServingPlan:
    """The plan with its open fields worked out; `given` holds the dotted names of the fields that are not open."""
    if isinstance(read, TrainingPlan):
        return _with_accelerators(_with_schedule(read, given), given)
    return _with_replicas(_with_accelerators(_with_fitting_requests(read, given), given), given)


def _with_schedule(read: TrainingPlan, given: AbstractSet[str]) -> TrainingPlan:
    """Several stages a rank mean the interleaved schedule, unless a schedule is given."""
    degrees = read.parallelism
    if degrees.virtual_stages > 1 and degrees.pipeline > 1 and "parallelism.schedule" not in given:
        return replace(read, parallelism=replace(degrees, schedule="interleaved"))
    return read


def _with_accelerators(read: AnyPlan, given: AbstractSet[str]) -> AnyPlan:
    """Nodes, and accelerators a node, that hold the given parallel degrees, where the document leaves them open."""
    degrees, hardware = read.parallelism, read.hardware
    open_node, open_nodes = "hardware.gpus_per_node" not in given, "hardware.nodes" not in given
    replica = degrees.tensor * (degrees.context if isinstance(degrees, Parallelism) else 1)
    stated_data = degrees.data if "parallelism.data" in given else None
    # Experts are spread over the ranks of a replica first, and over further replicas when those do not suffice.
    data = stated_data or degrees.expert // gcd(degrees.expert, replica)
    needed = data * replica * degrees.pipeline
    gpus = hardware.gpus_per_node * hardware.nodes
    # Data parallelism that is not given fills whatever is there, so that is only worked out when it falls short.
    if not (open_node or open_nodes) or gpus == needed or (stated_data is None and gpus > needed):
        return read
    if needed > _MOST_ACCELERATORS:  # left to the rule that compares degrees with accelerators, which will refuse
        return read
    gpus_per_node, nodes = hardware.gpus_per_node, hardware.nodes
    if open_node:
        gpus_per_node = min(needed, _GPUS_IN_A_USUAL_NODE) if open_nodes else max(1, needed // nodes)
    if open_nodes:
        nodes = max(1, needed // gpus_per_node)
    return replace(read, hardware=replace(hardware, gpus_per_node=gpus_per_node, nodes=nodes))


def _with_replicas(read: ServingPlan, given: AbstractSet[str]) -> ServingPlan:
    """Replicas of the engine on the accelerators that tensor and pipeline parallelism leave."""
    degrees, hardware = read.parallelism, read.hardware
    gpus, group = hardware.gpus_per_node * hardware.nodes, degrees.tensor * degrees.pipeline
    if "parallelism.data" in given or gpus % group or gpus == group:
        return read
    return replace(read, parallelism=replace(degrees, data=gpus // group))


def _with_fitting_requests(read: ServingPlan, given: AbstractSet[str]) -> ServingPlan:
    """Prompt and output lengths that fit a given context, where the document leaves them open."""
    load = read.requests
    context = load.context_length
    if context is None or load.prompt_tokens + load.output_tokens <= context:
        return read
    if "requests.prompt_tokens" in given:
        output = context - load.prompt_tokens if "requests.output_tokens" not in given else load.output_tokens
        fitting = replace(load, output_tokens=max(1, output))
    else:
        output = load.output_tokens if "requests.output_tokens" in given else min(load.output_tokens, context // 2)
        fitting = replace(load, output_tokens=output, prompt_tokens=max(1, context - output))
    return replace(read, requests=fitting)
