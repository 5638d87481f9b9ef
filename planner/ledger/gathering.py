"""Sharded weights on the tape: the windows in which a unit is whole, and what its gradients pass through.

A unit is one block, or the root (embedding, final norm, head), which stays whole from its first use to the end.
Everything a neighbour's transfer keeps alive while a block runs is charged to that block, which has the same size.

FSDP2 (torch 2.x, torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py, _fsdp_collectives.py):
    forward    the flat all-gather result is kept until the next unit has gathered (AllGatherState),
               the last block's until the root's forward ends (_fsdp_state.py, _post_forward)          + 1 unit
    entering   wait_for_unshard's own variable keeps that of the block before while this one's weights
               are copied out of theirs                                                                + 1 unit
    backward   the previous block's flat all-gather result is already there (backward prefetch)        + 1 unit
               the reduce-scatter input of the block after is kept until this one reduces              + 1 unit, reduce
    reduction  whole weights are freed first; then a reduce-scatter input beside the unsharded gradients, then the share
FSDP1 (torch/distributed/fsdp/_runtime_utils.py, _flat_param.py):
    forward    one unit at a time (limit_all_gathers); its flat vector is what the weights are views of
    backward   the previous block's vector is already there (BACKWARD_PRE)                             + 1 unit
    adapters   are units of their own, gathered one at a time; the previous block is fetched at the first one's turn
    reduction  the views' gradients are put together into one flat gradient, which is reduced
DeepSpeed stage 3 (runtime/zero/partition_parameters.py): each tensor is gathered on its own; prefetched tensors up to
    the size of one block are live beside the running block's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from planner.ledger.operations import Operations
from planner.ledger.tape import Node, Storage

__all__ = ["Gathering", "ShardedOperations", "Unit"]


@dataclass(frozen=True, slots=True)
class Unit:
    """Sizes of one unit in elements: what is gathered, by format, and what of it trains."""

    gathered: tuple[tuple[str, int], ...]
    trained: tuple[tuple[str, int], ...]
    frozen: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathering:
    """How weights are sharded: over how many ranks, by whom, and the format that gradients are reduced in.

    kept_format: of the reduced share. shards_weights False: only gradients are reduced to a share (stages 1 and 2).
    """

    engine: str
    ranks: Any
    reduce_format: str | None = None
    kept_format: str | None = None
    shards_weights: bool = True
    casts: bool = False
    reshard: bool = True
    prefetch: int = 1


@dataclass(slots=True)
class ShardedOperations(Operations):
    """Operations whose segments gather weights when they begin and reduce gradients when they end.

    units: by segment; 0 is the root, which also holds every segment that has no unit of its own.
    """

    gathering: Gathering | None = None
    keeps_shares: bool = True  # False: shares are added into gradients that exist already
    offloads: bool = False  # what a block saves for backward goes to the host when its forward pass ends
    stashed: dict[int, list[int]] = field(default_factory=dict)
    units: dict[int, Unit] = field(default_factory=dict)
    root: list[Storage] = field(default_factory=list)
    window: list[Storage] = field(default_factory=list)
    prefetched: list[Storage] = field(default_factory=list)
    whole: dict[int, list[Storage]] = field(default_factory=dict)  # blocks that stay gathered until their backward
    kept: list[Storage] = field(default_factory=list)
    sharded: list[Storage] = field(default_factory=list)
    fetches_at: str = ""  # the weight whose gradient makes FSDP1 fetch the block before; "" when nothing waits

    def enter(self, phase: str, segment: int) -> None:
        """Allocate what the running unit, and its neighbours in flight, hold."""
        if phase == "backward":
            self.events.extend(self.stashed.pop(segment, ()))
        if self.gathering is None or not self.gathering.shards_weights:
            return
        self.module = "sharding"
        if phase == "forward":
            self._enter_forward(segment)
        else:
            self._enter_backward(segment)

    def _enter_forward(self, segment: int) -> None:
        assert self.gathering is not None
        fsdp2 = self.gathering.engine == "fsdp2"
        if self._is_root(segment):
            if not self.root:
                if fsdp2:
                    self._gather(self.units[0], self.window, "all-gather result")
                self._gather(self.units[0], self.root, "gathered weights")
            elif fsdp2 and len(self.units) > 1:
                self._gather(self.units[self._last], self.window, "all-gather result")  # no unit comes to free it
            return
        before, self.window = self.window, []  # the root's flat result, where this is the first block
        if fsdp2:
            if not before:
                self._gather(self.units[segment], before, "all-gather result")
            self._gather(self.units[segment], self.window, "all-gather result")
        whole = self.window if self.gathering.reshard else self.whole.setdefault(segment, [])
        self._gather(self.units[segment], whole, "gathered weights")
        before.clear()

    def _enter_backward(self, segment: int) -> None:
        assert self.gathering is not None
        fsdp2, fetches = self.gathering.engine == "fsdp2", self.gathering.prefetch and self.gathering.reshard
        if self._is_root(segment):
            if segment == 0 and fsdp2 and 1 in self.units:
                self._reduce_input(self.units[1], self.window)
            elif segment != 0 and len(self.units) > 1 and fetches:
                self._gather(self.units[self._last], self.window, "prefetched weights")
            return
        unit = self.units[segment]
        if fsdp2 and segment != self._last:
            self._reduce_input(unit, self.window)
        if segment in self.whole:
            self.window.extend(self.whole.pop(segment))
        else:
            flat: list[Storage] = []
            if fsdp2:
                self._gather(unit, flat, "all-gather result")
            self._gather(unit, self.window, "gathered weights")
            del flat
        if fetches and segment > 1:  # the first has none before it
            self.fetches_at = self._first_adapter(segment) if self.gathering.engine == "fsdp1" and unit.frozen else ""
            if not self.fetches_at:
                self._prefetch(segment)

    def _prefetch(self, segment: int) -> None:
        assert self.gathering is not None
        for _ in range(self.gathering.prefetch):
            self._gather(self.units[segment], self.prefetched, "prefetched weights")

    def _first_adapter(self, segment: int) -> str:
        """The first trained weight of a block, or nothing. FSDP1 prefetches the unit that ran before the one at hand.

        Before a block with adapters ends, its last adapter has run; before that, another; before its first adapter,
        the previous block (_exec_order_utils.py, get_handle_to_backward_prefetch).
        """
        mine = (weight.name for weight in self.parameters if weight.trainable and weight.name.startswith(f"{segment}."))
        return next(mine, "")

    def _run(self, node: Node) -> None:
        if self.fetches_at and any(edge.parameter and edge.parameter.name == self.fetches_at for edge in node.edges):
            self.fetches_at = ""
            self._prefetch(node.segment)
        Operations._run(self, node)

    @property
    def _last(self) -> int:
        """The segment of the last block, which is always one of its own."""
        return max(self.units)

    def leave(self, phase: str, segment: int) -> None:
        """Free the window; in backward, reduce the unit's gradients first."""
        if phase == "forward" and self.offloads:
            self._stash(segment)
        if self.gathering is None:
            return
        self.module = "sharding"
        if phase == "backward" and (segment == 0 or not self._is_root(segment)):
            self._reduce(segment)
            if segment == 0:
                self.root.clear()
                self.kept.clear()
        self.window.clear()
        self.prefetched.clear()

    def recomputed(self, x: Storage, gradient: Storage | None) -> None:
        """FSDP1 with frozen weights under reentrant checkpointing keeps each recomputed input and its gradient.

        _register_post_backward_reshard_only_hook puts a multi-grad hook on the unit's inputs and holds it until the
        backward pass ends; a recomputed input is a leaf, whose accumulation node refers to it and to its .grad.
        """
        if self.gathering is None or self.gathering.engine != "fsdp1" or not self.reentrant:
            return
        if self.units.get(self.segment, self.units[0]).frozen:
            self.kept.append(x)
            if gradient is not None:
                self.kept.append(gradient)

    def _is_root(self, segment: int) -> bool:
        return segment == 0 or segment not in self.units

    def _gather(self, unit: Unit, into: list[Storage], operator: str) -> None:
        for dtype, elements in unit.gathered:
            into.append(self.allocate(operator, (self.dim("unit", elements),), dtype))

    def _reduce_input(self, unit: Unit, into: list[Storage]) -> None:
        assert self.gathering is not None
        for dtype, elements in unit.trained:
            reduced = self.gathering.reduce_format or dtype
            into.append(self.allocate("reduce-scatter input", (self.dim("unit", elements),), reduced))

    def _reduce(self, segment: int) -> None:
        """Reduce this unit's gradients to a share and free the whole ones."""
        assert self.gathering is not None
        unit = self.units[segment]
        if not unit.trained:
            return
        made_in = {name: self.rows[grad.index - 1].segment for name, grad in self.gradients.items()}
        mine = [
            name for name, origin in made_in.items() if origin == segment or (segment == 0 and self._is_root(origin))
        ]
        staged: list[Storage] = []
        if self.gathering.engine == "fsdp2":
            self.window.clear()
        if self.gathering.engine in ("fsdp1", "fsdp2"):
            self._reduce_input(unit, staged)
        for name in mine:
            del self.gradients[name]
        for dtype, elements in unit.trained:
            share = self.dim("share", -(-elements // self.gathering.ranks))
            grad = self.allocate("sharded gradient", (share,), self.gathering.kept_format or dtype)
            if self.keeps_shares:
                self.sharded.append(grad)
            del grad
        staged.clear()

    def _stash(self, segment: int) -> None:
        """Move this segment's saved tensors to the host: off the record now, back when its backward pass begins.

        The tensor that flows on to the next block stays until that block has moved it.
        """
        shared = {storage.index for storage in self.held}
        saved = {storage.index for node in self.nodes if node.segment == segment for storage in node.saved}
        mine = sorted(saved - shared)
        self.stashed[segment] = mine
        self.events.extend(-index for index in mine)

    def stashed_rows(self, segment: int) -> list[int]:
        """Rows of the record that a segment keeps on the host between its forward and backward pass."""
        return self.stashed.get(segment, [])
