"""Who holds what: training states divided over a data-parallel group, and the windows in which they are whole again.

ZeRO (arXiv:1910.02054): stage 1 divides optimizer states, 2 gradients as well, 3 weights as well.
    FSDP2      divides each tensor along its first dim, ceil(rows / N) rows a rank (torch/distributed/fsdp/_fully_shard)
    FSDP1      flattens a unit's tensors into one vector, padded to N (torch/distributed/fsdp/_flat_param.py)
    DeepSpeed  flattens all trained tensors of one format (stages 1, 2), or each tensor (stage 3)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from planner.formats import BITS
from planner.ledger.parameters import StateTensor
from planner.ledger.tape import allocated_bytes
from planner.plan import Parallelism

__all__ = ["Held", "engine_of", "held_by_a_rank", "unit_elements"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Tensors of one rank: the weights it stores, the gradients it ends backward with, what its optimizer steps."""

    weights: tuple[StateTensor, ...]
    gradients: tuple[StateTensor, ...]
    optimizer: tuple[StateTensor, ...]


def engine_of(parallelism: Parallelism, data: int) -> str:
    """Who shards: ddp, fsdp1, fsdp2, deepspeed or megatron; `none` for one rank without sharding.

    `auto` is DDP for stage 0, DeepSpeed for 1 and 2, and FSDP2 for 3.
    """
    if parallelism.engine != "auto":
        return parallelism.engine
    if parallelism.zero == 3:
        return "fsdp2"
    if parallelism.zero:
        return "deepspeed"
    return "ddp" if data > 1 else "none"


def held_by_a_rank(tensors: Sequence[StateTensor], parallelism: Parallelism, data: int) -> Held:
    """Divide states over `data / replicas` ranks as the plan's ZeRO stage and engine do."""
    ranks = data // parallelism.replicas
    engine = engine_of(parallelism, data)
    whole = tuple(tensors)
    if ranks == 1 or parallelism.zero == 0:
        return Held(weights=whole, gradients=whole, optimizer=whole)
    divided = _divided(whole, ranks, engine)
    return Held(
        weights=divided if parallelism.zero == 3 else whole,
        gradients=divided if parallelism.zero >= 2 else whole,
        optimizer=tuple(_pieces(whole, ranks)) if engine == "fsdp1" else divided,
    )


def _divided(tensors: tuple[StateTensor, ...], ranks: int, engine: str) -> tuple[StateTensor, ...]:
    if engine == "fsdp2":
        return tuple(_rows(tensor, ranks) for tensor in tensors)
    return tuple(_flat(tensors, ranks))


def _rows(tensor: StateTensor, ranks: int) -> StateTensor:
    if not tensor.shape:
        return tensor
    return replace(tensor, shape=(-(-tensor.shape[0] // ranks), *tensor.shape[1:]))


def _flat(tensors: Iterable[StateTensor], ranks: int) -> Iterable[StateTensor]:
    """One vector for each unit, format and trainability; its length is padded to a multiple of the ranks."""
    groups: dict[tuple[str, str, bool, bool, int], list[StateTensor]] = {}
    for tensor in tensors:
        key = (tensor.unit, tensor.dtype, tensor.trainable, tensor.packed, tensor.repeat)
        groups.setdefault(key, []).append(tensor)
    for members in groups.values():
        total = sum(tensor.elements for tensor in members)
        yield replace(members[0], name="flat parameter", shape=(-(-total // ranks),), kind="other")


def _pieces(tensors: Iterable[StateTensor], ranks: int) -> Iterable[StateTensor]:
    """What FSDP1's optimizer steps with use_orig_params: the parts of tensors in the first rank's stretch of a unit."""
    room: dict[tuple[str, str, bool, bool, int], int] = {}
    members = list(tensors)
    for tensor in members:
        key = (tensor.unit, tensor.dtype, tensor.trainable, tensor.packed, tensor.repeat)
        room[key] = room.get(key, 0) + tensor.elements
    room = {key: -(-total // ranks) for key, total in room.items()}
    for tensor in members:
        key = (tensor.unit, tensor.dtype, tensor.trainable, tensor.packed, tensor.repeat)
        taken = min(room[key], tensor.elements)
        room[key] -= taken
        if taken:
            yield replace(tensor, shape=tensor.shape if taken == tensor.elements else (taken,))


def unit_elements(tensors: Iterable[StateTensor], blocks: int) -> dict[str, float]:
    """Elements of the root unit and of the average block, whole; packed tensors count their packed bytes apart."""
    root = sum(tensor.repeat * tensor.elements for tensor in tensors if tensor.unit == "root")
    inside = sum(tensor.repeat * tensor.elements for tensor in tensors if tensor.unit == "block")
    return {"root": root, "block": inside / max(blocks, 1)}


def whole_bytes(tensors: Iterable[StateTensor], dtype: str | None) -> int:
    """Bytes of these tensors gathered, in `dtype` or their own."""
    return sum(
        tensor.repeat * allocated_bytes(tensor.elements * BITS[dtype or tensor.dtype] // 8) for tensor in tensors
    )
