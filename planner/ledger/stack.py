"""The stack of blocks: each distinct group runs once on the tape, in a segment of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from planner.errors import NotCovered
from planner.ledger import litgpt, torchtune
from planner.ledger.block import run_block
from planner.ledger.gathering import ShardedOperations
from planner.ledger.megatron import megatron_block
from planner.ledger.operations import Operations
from planner.ledger.parameters import block_tensors
from planner.ledger.setting import Setting, recomputes, unit_of
from planner.ledger.tape import Tensor
from planner.model.shape import Block, ModelShape
from planner.plan import Recompute

__all__ = ["run_blocks"]


def run_blocks(
    t: ShardedOperations, shape: ModelShape, setting: Setting, flow: list[Tensor], past: list[tuple[Tensor, Tensor]]
) -> list[int]:
    """Run each distinct group of blocks once; `flow` holds the running hidden states so that nobody else does.

    A group is what is checkpointed together, else one block. The first has a segment of its own: what it takes in is
    not another block's output, and may live longer. So has the last where its neighbour keeps what it passes on.
    With a prefix each block has its own, as each takes what is its own from the cache, `past`.
    """
    segment_of: dict[tuple[object, ...], int] = {}
    order: list[int] = []
    size = _group_size(setting.recompute, len(shape.blocks))
    first_trained = len(shape.blocks) - setting.method.trainable_layers
    keeps = setting.gathering is not None and setting.gathering.shards_weights
    kinds = _kinds(shape.blocks)
    for start in range(0, len(shape.blocks), size):
        indices = range(start, min(start + size, len(shape.blocks)))
        blocks = [shape.blocks[index] for index in indices]
        trains = tuple(setting.method.name == "frozen" and index >= first_trained for index in indices)
        last = keeps and indices.stop == len(shape.blocks)
        kind = tuple(kinds[index] for index in indices)
        key = (kind, flow[0].requires_grad, trains, start == 0, last, start * bool(past))
        segment = segment_of.get(key)
        if segment is None:
            segment = segment_of[key] = len(segment_of) + 1
            t.begin("forward", segment)
            if setting.gathering is not None:
                tensors = block_tensors(
                    blocks[0],
                    shape.hidden,
                    setting.method,
                    setting.precision,
                    trains=trains[0],
                    family=shape.model_type,
                )
                t.units[segment] = unit_of(tensors, setting)
            t.enter("forward", segment)
            if past:
                t.past = past.pop(0)
            program = _program(t, blocks, trains, f"{segment}", setting.method.name == "frozen")
            recomputed = recomputes(setting.recompute)
            flow.append(t.checkpoint(program, flow[0]) if recomputed else program(flow[0]))
            flow.pop(0)
            if t.past is not None:
                raise NotCovered(f"the attention of {shape.model_type} models takes no prefix in the ledger.")
            t.leave("forward", segment)
        order.append(segment)
    return order


def _kinds(blocks: Sequence[Block]) -> list[int]:
    """A number for each block, equal for equal blocks; by identity first, as hashing a block costs far more."""
    by_object: dict[int, int] = {}
    by_value: dict[Block, int] = {}
    for block in blocks:
        if id(block) not in by_object:
            by_object[id(block)] = by_value.setdefault(block, len(by_value))
    return [by_object[id(block)] for block in blocks]


def _group_size(recompute: Recompute, blocks: int) -> int:
    """Blocks checkpointed together: k for `every`, about sqrt(n) for `sqrt` (Chen et al. 2016, section 4.1)."""
    if recompute.mode == "every":
        return recompute.every
    return max(round(blocks**0.5), 1) if recompute.mode == "sqrt" else 1


def _program(
    t: Operations, blocks: Sequence[Block], trains: Sequence[bool], name: str, partly: bool
) -> Callable[[Tensor], Tensor]:
    """One group's forward pass. It names its weights itself, as it may run again in backward."""

    runs = {"litgpt": litgpt.run_block, "torchtune": torchtune.run_block, "megatron": megatron_block}
    run = runs.get(t.profile.name, run_block)

    def program(x: Tensor) -> Tensor:
        flow = [x]
        del x
        around = t.trainable
        for position, block in enumerate(blocks):
            t.prefix = f"{name}.{position}:"
            if partly:
                t.trainable = lambda _, trains=trains[position]: trains
            flow.append(run(t, block, flow[0]))
            flow.pop(0)
        t.trainable = around
        return flow.pop()

    return program
