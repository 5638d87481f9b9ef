"""Answers as pandas DataFrames: figures with their unit in the column's name, or text for people to read.

Every function takes the answer as `Estimate.to_dict()` gives it. Figures are bytes and shares, nothing rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from planner.answer.parts import device_parts
from planner.units import format_bytes, format_share

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["MEANINGS", "breakdown_frame", "breakdown_text", "moments_frame", "serving_text", "states_frame"]

Answer = Mapping[str, Any]
Unit = Literal["GiB", "GB"]

MEANINGS: Mapping[str, str] = {
    "weights": "the model's parameters, as they are stored while training",
    "master_weights": "the copy in full precision that the optimizer updates, where weights are kept in 16 bits",
    "gradients": "one gradient for each trained parameter",
    "optimizer_states": "what the optimizer remembers between steps: for Adam, two moments a trained parameter",
    "inputs": "token ids and what is made of them before the first layer",
    "activations": "what forward keeps for backward, layer by layer; in serving, what one forward pass holds",
    "logits_and_loss": "scores over the whole vocabulary, their copies in the loss, and their gradients",
    "temporaries": "what one operation holds only while it runs",
    "unsharded_parameters": "layers that are whole for a moment, gathered from the other ranks",
    "communication_buffers": "buffers in which gradients and weights travel between ranks",
    "library_workspaces": "scratch memory of cuBLAS",
    "kv_cache": "keys and values of all tokens in flight",
    "non_torch": "what the driver and libraries take outside PyTorch",
    "cuda_graphs": "recorded launches that the engine replays, with their buffers",
    "allocator_slack": "memory that PyTorch's allocator keeps cached; it gives it back before it fails, so the verdict "
    "does not count it as needed",
    "cuda_context": "what the driver and loaded kernels take",
    "nccl_buffers": "what the communication library takes",
    "peak_allocated": "the most that tensors hold at once: torch.cuda.max_memory_allocated()",
    "peak_reserved": "what the allocator holds from the driver: torch.cuda.max_memory_reserved()",
    "device_used": "what nvidia-smi shows",
}


def breakdown_frame(answer: Answer) -> DataFrame:
    """The parts of `device_used`: one row a category, with its bytes and its share of the card's capacity.

    Tensors at the peak come first, then the terms outside them. Parts that hold nothing are left out.
    """
    from pandas import DataFrame

    memory = answer["memory"]
    sizes = device_parts(memory)
    return DataFrame(
        {
            "bytes": list(sizes.values()),
            "share_of_capacity": [size / memory["capacity"] for size in sizes.values()],
        },
        index=list(sizes),
    ).rename_axis("category")


def breakdown_text(answer: Answer, unit: Unit = "GiB") -> DataFrame:
    """`breakdown_frame` for people: sizes with their unit, shares in per cent, and each figure that a tool reads
    (`peak_allocated`, `peak_reserved`, `device_used`) below the parts that it is the sum of."""
    from pandas import DataFrame

    memory = answer["memory"]
    parts = device_parts(memory)
    outside = {name: parts.pop(name) for name in list(parts) if name in (memory.get("device_terms") or {})}
    rows = [(_words(name), size) for name, size in parts.items()]
    if "peak_allocated" in memory:
        slack = {name: outside.pop(name) for name in list(outside) if name == "allocator_slack"}
        rows.append(("= peak_allocated", memory["peak_allocated"]))
        rows += [(_words(name), size) for name, size in slack.items()]
        rows.append(("= peak_reserved", memory["peak_reserved"]))
    rows += [(_words(name), size) for name, size in outside.items()]
    rows.append(("= device_used", memory["device_used"]))
    return DataFrame(
        {
            "part": [name for name, _ in rows],
            "size": [format_bytes(size, unit) for _, size in rows],
            "of capacity": [format_share(size / memory["capacity"]) for _, size in rows],
        }
    )


def serving_text(answer: Answer, unit: Unit = "GiB") -> DataFrame:
    """What a serving deployment can hold, for people: a row each figure. A limit that memory does not set says so."""
    from pandas import DataFrame

    memory = answer["memory"]
    token = "KiB" if unit == "GiB" else "kB"
    rows = {
        "cache of one token": format_bytes(memory["kv_cache_bytes_per_token"], token),
        "room for caches": format_bytes(memory["kv_cache_pool"], unit),
        "tokens that fit": _limit(memory["kv_token_capacity"]),
        f"longest context of {memory['concurrency']:,} sequences": _limit(memory["longest_context"]),
        f"most sequences of {memory['context_length']:,} tokens": _limit(memory["max_concurrent_sequences"]),
    }
    return DataFrame({"figure": list(rows), "value": list(rows.values())})


def moments_frame(answer: Answer) -> DataFrame:
    """The moments of a training step: one row each, one column a category, in bytes; `total` is the row's sum."""
    from pandas import DataFrame

    frame = DataFrame(answer["memory"]["breakdowns"]).T.rename_axis("moment")
    return frame.assign(total=frame.sum(axis=1))


def states_frame(states: Mapping[str, Mapping[str, int]]) -> DataFrame:
    """Training states under several ways of sharding, {label: {category: bytes}}: a row each, with `total`."""
    from pandas import DataFrame

    frame = DataFrame(states).T.rename_axis("sharding")
    return frame.assign(total=frame.sum(axis=1))


def _limit(count: int | None) -> str:
    return "not limited by memory" if count is None else f"{count:,}"


def _words(name: str) -> str:
    return name.replace("_", " ").replace("cuda", "CUDA").replace("nccl", "NCCL").replace("kv ", "KV ")
