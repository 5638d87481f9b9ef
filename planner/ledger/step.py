"""One forward and backward pass of a whole model, recorded once for each kind of block.

The record has one segment for the embedding, one for each distinct block, and one for the final norm, head and loss.
`layers` says which segment each block of the model is; a fold over the record repeats segments as the model does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.ledger.adapters import adapter_for
from planner.ledger.attention import rotary_tables
from planner.ledger.block import run_block
from planner.ledger.embedding import embed
from planner.ledger.loss_head import loss_of
from planner.ledger.norm import normalise
from planner.ledger.operations import Operations
from planner.ledger.profile import Profile
from planner.ledger.tape import Tensor
from planner.model.shape import Attention, Block, LatentAttention, ModelShape
from planner.plan import Method, Precision, Recompute

__all__ = ["CATEGORIES", "Setting", "Stretch", "StepRecord", "record_step"]

CATEGORIES = ("inputs", "activations", "logits_and_loss", "gradients", "temporaries")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Everything about a plan that decides what a forward and backward pass keeps. B and S may be arrays."""

    micro_batch_size: Any
    sequence_length: Any
    precision: Precision
    method: Method
    recompute: Recompute
    attention: str
    loss: str
    profile: Profile
    accumulate: bool = False
    hooked: bool = False


@dataclass(frozen=True, slots=True)
class Stretch:
    """A stretch of the record: allocated (+) and freed (-) bytes in order, and each one's category.

    deltas: (n,) or (n, grid). total: their sum. peak: the highest running sum, at least 0.
    """

    deltas: NDArray[np.int64]
    rows: NDArray[np.int64]
    total: Any
    peak: Any


@dataclass(frozen=True, slots=True)
class StepRecord:
    """The record, cut into stretches. `layers[i]` is the segment of block i; segment 0 is the embedding."""

    tape: Operations
    layers: tuple[int, ...]
    head: int
    forward: dict[int, Stretch]
    backward: dict[int, Stretch]
    release: dict[int, Stretch]
    categories: NDArray[np.int64]


def record_step(shape: ModelShape, setting: Setting) -> StepRecord:
    """Record one pass. Raises NotCovered when the model has a part whose activations are not in the ledger."""
    t = _tape(setting)
    t.begin("forward", 0)
    ids = t.constant("input_ids", ("B", "S"), "int64")
    if shape.embedding is not None:
        t.embedding_name = f"{shape.embedding.name}.weight"
    x = embed(t, shape.embedding) if shape.embedding is not None else t.constant("input", ("B", "S", "H"), "fp32")
    if setting.method.name in ("lora", "qlora", "ia3", "adapter") and setting.recompute.mode != "none":
        x.requires_grad = True  # peft's enable_input_require_grads, without which a checkpointed block has no gradient
    _shared_tables(t, shape, x.dtype)
    layers, segments = _run_blocks(t, shape, setting, [x])
    x = segments.pop()
    head = max(layers, default=0) + 1
    t.prefix = ""
    t.begin("forward", head)
    assert shape.head is not None
    x = normalise(t, shape.head.norm, shape.head.norm_name, x)
    loss = loss_of(t, shape.head, x, setting.loss)
    del x
    for segment in range(head + 1):
        t.begin("release", segment)
        for name in [name for name, cast in t.casts.items() if t.rows[cast.storage.index - 1].segment == segment]:
            del t.casts[name]
    t.begin("backward", head)
    t.backward(loss)
    t.begin("end", 0)
    del loss
    t.held.clear()
    t.rotary = ()
    t.masks.clear()
    del ids
    return _cut(t, tuple(layers), head)


def _tape(setting: Setting) -> Operations:
    precision, method = setting.precision, setting.method
    full = method.name == "full"
    upcast = method.name == "qlora" and method.upcast
    base = "fp32" if upcast else precision.weights
    return Operations(
        sizes={"1": 1, "B": setting.micro_batch_size, "S": setting.sequence_length},
        accumulate=setting.accumulate,
        hooked=setting.hooked,
        reentrant=setting.profile.reentrant,
        profile=setting.profile,
        attention=setting.attention,
        weight_dtype=lambda _: base,
        trainable=lambda _: full,
        compute=precision.compute if precision.autocast else None,
        unpacked=precision.compute,
        quantized=(lambda name: name != "lm_head") if method.name == "qlora" else (lambda _: False),
        adapter=adapter_for(method),
    )


def _shared_tables(t: Operations, shape: ModelShape, dtype: str) -> None:
    """Rotary tables of the first rotating block kind: every block of a model shares one pair."""
    for block in shape.blocks:
        mixer = block.mixer
        size = mixer.rotary_dim if isinstance(mixer, Attention) else None
        if isinstance(mixer, LatentAttention):
            size = mixer.rope_dim
        if size:
            t.module = "rotary"
            rotary_tables(t, "S", size, dtype)
            return


def _run_blocks(
    t: Operations, shape: ModelShape, setting: Setting, flow: list[Tensor]
) -> tuple[list[int], list[Tensor]]:
    """Run each distinct block once; `flow` holds the running hidden states so that nobody else keeps them alive."""
    segment_of: dict[tuple[int, bool, bool], int] = {}
    kinds: dict[int, int] = {}
    first_of: dict[Block, int] = {}
    layers: list[int] = []
    count = len(shape.blocks)
    for index, block in enumerate(shape.blocks):
        kind = kinds.get(id(block))
        if kind is None:
            kind = kinds[id(block)] = first_of.setdefault(block, len(first_of))
        trains = _layer_trains(setting.method, index, count)
        key = (kind, flow[0].requires_grad, trains)
        segment = segment_of.get(key)
        if segment is None:
            segment = segment_of[key] = len(segment_of) + 1
            t.begin("forward", segment)
            t.prefix = f"{segment}:"
            if setting.method.name == "frozen":
                t.trainable = lambda _, trains=trains: trains
            program = _program(t, block)
            if _recomputes(setting.recompute):
                flow.append(t.checkpoint(program, flow[0]))
            else:
                flow.append(program(flow[0]))
            flow.pop(0)
        layers.append(segment)
    if setting.method.name == "frozen":
        t.trainable = lambda _: True
    return layers, flow


def _program(t: Operations, block: Block) -> Callable[[Tensor], Tensor]:
    return lambda x: run_block(t, block, x)


def _layer_trains(method: Method, index: int, count: int) -> bool:
    return method.name == "frozen" and index >= count - method.trainable_layers


def _recomputes(recompute: Recompute) -> bool:
    return recompute.mode == "full"


def _cut(t: Operations, layers: tuple[int, ...], head: int) -> StepRecord:
    sizes = np.stack(np.broadcast_arrays(*[np.asarray(row.size, dtype=np.int64) for row in t.rows]))
    events = np.array(t.events, dtype=np.int64)
    rows = np.abs(events) - 1
    signs = np.sign(events).reshape((-1,) + (1,) * (sizes.ndim - 1))
    deltas = sizes[rows] * signs
    stretches: dict[str, dict[int, Stretch]] = {"forward": {}, "backward": {}, "release": {}, "end": {}}
    starts = [start for _, _, start in t.marks]
    for (phase, segment, start), stop in zip(t.marks, [*starts[1:], len(events)], strict=True):
        part = deltas[start:stop]
        if stop == start and segment in stretches[phase]:
            continue
        running = np.cumsum(part, axis=0)
        total = running[-1] if len(part) else np.int64(0)
        peak = np.maximum(running.max(axis=0), 0) if len(part) else np.int64(0)
        stretches[phase][segment] = Stretch(part, rows[start:stop], total, peak)
    return StepRecord(
        t, layers, head, stretches["forward"], stretches["backward"], stretches["release"], _categories(t, head)
    )


def _categories(t: Operations, head: int) -> NDArray[np.int64]:
    kept = {storage.index for storage in t.gradients.values()}
    result = np.full(len(t.rows), CATEGORIES.index("temporaries"), dtype=np.int64)
    for position, row in enumerate(t.rows):
        if row.role == "gradient" or position + 1 in kept:
            result[position] = CATEGORIES.index("gradients")
        elif row.operator == "input_ids":
            result[position] = CATEGORIES.index("inputs")
        elif row.module in ("loss", "lm_head"):
            result[position] = CATEGORIES.index("logits_and_loss")
        elif position + 1 in t.saved:
            result[position] = CATEGORIES.index("activations")
    return result
