"""A tape on which a layer's forward pass is written once, on shapes instead of tensors.

A ledger program looks like the module it describes: it calls `tape.linear`, `tape.mul`, `tape.scaled_dot_product`, and
its local variables keep results alive exactly as they do in the module, because a `Storage` is freed by Python's own
reference count, as a tensor's is. The tape records every allocation and release in order; `backward` replays autograd
over what was recorded. Memory at any moment, the saved tensors of a layer and its breakdown are folds over that record.

Rules of autograd that the tape follows (torch 2.x, `torch/csrc/autograd`):
    1. An operation gets a backward node if any of its inputs requires a gradient; what it saves depends on which.
    2. A node releases what it saved once its backward function has returned, and its output's gradient with it.
    3. Nodes run newest first. A second gradient for the same tensor is added in place if nobody else refers to the
       first and it is no view (which keeps its base alive), and into a new tensor otherwise (input_buffer.cpp).
    4. The first gradient of a parameter becomes its `.grad` without a copy; a later one is added in place.

Sizes may be integers or NumPy arrays: the record is the same, and then it answers for a whole grid of plans.
Dims are names ("B", "S", "H") looked up in `sizes`; a row of the ledger therefore keeps its symbolic shape.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from planner.formats import BITS
from planner.ledger.graph import (
    ALLOCATION_BYTES,
    Dims,
    Edge,
    Node,
    Parameter,
    Row,
    Storage,
    Tensor,
    allocated_bytes,
    edge_to,
    trains,
)

__all__ = [
    "ALLOCATION_BYTES",
    "Dims",
    "Node",
    "Parameter",
    "Row",
    "Storage",
    "Tape",
    "Tensor",
    "allocated_bytes",
    "trains",
]

REDUCTION_BUFFER_LIMIT_BYTES = 132 * 1024 * 1024  # 1 MiB for each multiprocessor of an H200


@dataclass(slots=True)
class Tape:
    """The record of one forward and backward pass over a few segments (embedding, one block of each kind, head).

    sizes: what each dim name stands for.
    enabled: False inside torch.no_grad, as in the first pass over a checkpointed block.
    accumulate: gradients already exist (gradient accumulation): new ones are added into them and freed.
    hooked: gradients are consumed as soon as they are ready (optimizer in backward, sharded reduction).
    """

    sizes: dict[str, Any]
    enabled: bool = True
    accumulate: bool = False
    hooked: bool = False
    reentrant: bool = True
    nested: bool = False
    reached: bool = False  # whether any operation since this was reset has an input that trains
    unpacks: bool = False  # saved tensors come out of a checkpoint's hooks: gone as soon as the formula has run
    needed: int = 0  # rows that existed when the latest operation to save something saved it
    rows: list[Row] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    marks: list[tuple[str, int, int]] = field(default_factory=list)  # (phase, segment, first event)
    segment: int = 0
    module: str = ""
    saved: set[int] = field(default_factory=set)
    gradients: dict[str, Storage] = field(default_factory=dict)
    waiting: dict[str, Storage] = field(default_factory=dict)  # gradients of parameters that have more to come
    waiting_views: set[str] = field(default_factory=set)
    uses: dict[str, int] = field(default_factory=dict)  # operations that will still give a parameter a gradient
    casts: dict[str, Tensor] = field(default_factory=dict)
    parameters: list[Parameter] = field(default_factory=list)
    operations: list[tuple[str, str, int, Any]] = field(default_factory=list)  # (operator, module, segment, flops)
    _bytes: dict[tuple[Dims, str], Any] = field(default_factory=dict)

    # ---- allocation -------------------------------------------------------------------------------------------

    def bytes_of(self, dims: Dims, dtype: str) -> Any:
        """Allocated bytes of a tensor of these dims and this format."""
        key = (dims, dtype)
        known = self._bytes.get(key)
        if known is None:
            known = self._bytes[key] = allocated_bytes((self.elements(dims) * BITS[dtype] + 7) // 8)
        return known

    def elements(self, dims: Iterable[str]) -> Any:
        """Number of elements of a tensor of these dims."""
        count: Any = 1
        for dim in dims:
            count = count * self.sizes[dim]
        return count

    def allocate(self, operator: str, dims: Dims, dtype: str, role: str = "temporary") -> Storage:
        """A new storage, entered into the record."""
        self.rows.append(Row(operator, self.module, dims, dtype, self.bytes_of(dims, dtype), self.segment, role))
        return Storage(self.events, len(self.rows))

    def begin(self, phase: str, segment: int) -> None:
        """Start a stretch of the record: `phase` is forward or backward."""
        self.segment = segment
        if not self.marks or self.marks[-1][:2] != (phase, segment):
            self.marks.append((phase, segment, len(self.events)))

    def dim(self, name: str, size: Any) -> str:
        """The name under which `size` is known: `name`, or `name'` when another layer kind took that name already."""
        while True:
            known = self.sizes.get(name)
            if known is None:
                self.sizes[name] = size
                return name
            same = known is size or known == size
            if same if isinstance(same, bool) else bool(np.all(same)):
                return name
            name += "'"

    def constant(self, operator: str, dims: Dims, dtype: str) -> Tensor:
        """A tensor that needs no gradient: ids, masks, rotary tables."""
        return Tensor(self.allocate(operator, dims, dtype), dims, dtype, requires_grad=False, node=None, output=0)

    # ---- the one rule behind every operation -------------------------------------------------------------------

    def apply(
        self,
        operator: str,
        inputs: Sequence[Tensor | Parameter],
        outputs: Sequence[tuple[Dims, str]],
        *,
        saves: Sequence[Tensor | None] = (),
        saves_outputs: Sequence[int] = (),
        extra_saved: Sequence[tuple[Dims, str]] = (),
        alias: bool | Sequence[bool] = False,
        view: bool = False,
        copies: bool = False,
        in_place: bool = False,
        scratch: Sequence[tuple[Dims, str]] = (),
        backward_scratch: Sequence[tuple[Dims, str]] = (),
        backward_first: Sequence[tuple[Dims, str]] = (),
        gradient_dims: Sequence[tuple[Dims, str] | None] | None = None,
        raw_gradients: Sequence[tuple[Dims, str] | None] = (),
        gradients_in: Sequence[Storage | None] = (),
        viewed: bool | Sequence[bool] = False,
    ) -> list[Tensor]:
        """Run one operation and record it.

        saves: inputs kept for backward (None entries are skipped); saves_outputs: outputs kept, by position;
        extra_saved: further tensors made only for backward (masks, statistics).
        alias: the gradient of every input is the output's gradient itself (add, views); or that, for each input.
        view: outputs share the first input's storage, and the gradient is the output's own unless it `copies`;
        in_place: the output is the first input's memory.
        scratch, backward_scratch: tensors that live only while the operation runs; backward_first: those that live
        only before the backward formula makes its results.
        gradient_dims: size of each input's gradient where it is not the input's own.
        raw_gradients: what the formula makes for each input before autograd sums it to the input's shape and casts
        it to the input's format (engine.cpp, validate_outputs: once all gradients of the node exist).
        viewed: the gradient arrives as a view, as through a reshaped product; for all inputs, or for each.
        gradients_in: for each input, memory that its gradient is written into by kernels that work in place.
        """
        flows = any(trains(value) for value in inputs)
        self.reached = self.reached or flows
        requires_grad = self.enabled and flows
        node = Node(operator, self.module, self.segment, len(outputs)) if requires_grad else None
        before = len(self.rows)
        held = [self.allocate(operator, dims, dtype) for dims, dtype in scratch]
        results = []
        for position, (dims, dtype) in enumerate(outputs):
            source = inputs[0] if view or in_place else None
            storage = source.storage if isinstance(source, Tensor) else self.allocate(operator, dims, dtype)
            results.append(Tensor(storage, dims, dtype, requires_grad=requires_grad, node=node, output=position))
        if node is not None:
            node.scratch, node.first = tuple(backward_scratch), tuple(backward_first)
            for value in saves:
                if value is not None:
                    self._save(node, value.storage)
            for position in saves_outputs:
                self._save(node, results[position].storage)
            for dims, dtype in extra_saved:
                self._save(node, self.allocate(operator, dims, dtype))
            for position, value in enumerate(inputs):
                if trains(value):
                    size = gradient_dims[position] if gradient_dims is not None else None
                    shared = alias if isinstance(alias, bool) else alias[position]
                    edge = edge_to(value, size or (value.dims, value.dtype), shared or (view and not copies))
                    edge.raw = raw_gradients[position] if raw_gradients else None
                    edge.alias = edge.alias or (shared and edge.raw is not None)
                    edge.viewed = (view and not copies) or (viewed if isinstance(viewed, bool) else viewed[position])
                    edge.memory = gradients_in[position] if gradients_in else None
                    node.edges.append(edge)
                    if edge.parameter is not None:
                        self.uses[edge.parameter.name] = self.uses.get(edge.parameter.name, 0) + 1
            self.nodes.append(node)
            weighs = alias is not True and any(isinstance(value, Parameter) for value in inputs)
            node.saves = bool(node.saved) or weighs
            if saves_outputs or extra_saved:
                self.needed = len(self.rows)
            elif node.saves:
                self.needed = before  # what is saved of an input is saved before the operation runs
        elif extra_saved:
            held.extend(self.allocate(operator, dims, dtype) for dims, dtype in extra_saved)
        held.clear()
        return results

    def _save(self, node: Node, storage: Storage) -> None:
        node.saved.append(storage)
        self.saved.add(storage.index)

    # ---- backward ----------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, first: int = 0) -> None:
        """Replay autograd from `loss` back to the node recorded at position `first`."""
        assert loss.node is not None, "the loss depends on nothing that trains"
        if loss.node.grads[loss.output] is None:
            loss.node.grads[loss.output] = self.allocate("ones_like", loss.dims, loss.dtype)
        self.run_backward(first)

    def run_backward(self, first: int = 0) -> None:
        """Run every recorded node that has received a gradient, newest first, down to position `first`."""
        nested = self.nested
        self.nested = True
        segment = None
        while len(self.nodes) > first:
            node = self.nodes.pop()
            if node.segment != segment and not nested:
                if segment is not None:
                    self.leave("backward", segment)
                segment = node.segment
                self.begin("backward", segment)
                self.enter("backward", segment)
            if any(grad is not None for grad in node.grads):
                self._run(node)
        if segment is not None:
            self.leave("backward", segment)
        self.nested = nested

    def enter(self, phase: str, segment: int) -> None:
        """Called when a segment begins; sharded training gathers weights here."""

    def recomputed(self, x: Storage, gradient: Storage | None) -> None:
        """Called with a recomputed block's input and its gradient, before they are let go."""

    def leave(self, phase: str, segment: int) -> None:
        """Called when a segment has ended; sharded training reduces gradients here."""

    def checkpoint(self, program: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Run `program` without recording what it would save, and run it again when its gradient is needed.

        What stays alive in between is the inputs. During the second run of the reentrant form the block's own output
        stays alive until its backward is done (torch/utils/checkpoint.py: a local variable holds it).
        Where nothing trains, nothing is kept: no weight of the block and no input; the reentrant form asks the inputs
        alone (CheckpointFunction sees no weights).
        """
        enabled, self.enabled = self.enabled, False
        reached, self.reached = self.reached, False
        result = program(*inputs)
        needed = any(x.requires_grad for x in inputs) if self.reentrant else self.reached
        self.enabled, self.reached = enabled, self.reached or reached
        if not enabled or not needed:
            return result
        node = Node("checkpoint", self.module, self.segment, 1)
        for x in inputs:
            self._save(node, x.storage)
            node.edges.append(Edge(x.node, x.output, None, True, x.dims, x.dtype))
            node.wanted.append(x.requires_grad)
        node.recompute = program
        self.nodes.append(node)
        return Tensor(result.storage, result.dims, result.dtype, requires_grad=True, node=node, output=0)

    def _rerun(self, node: Node) -> None:
        assert node.recompute is not None
        sinks = [Node("leaf", node.module, node.segment, 1) for _ in node.edges]
        inputs = [
            Tensor(storage, edge.dims, edge.dtype, requires_grad=wanted, node=sink, output=0)
            for storage, edge, wanted, sink in zip(node.saved, node.edges, node.wanted, sinks, strict=True)
        ]
        first, start = len(self.nodes), len(self.events)
        result = node.recompute(*inputs)
        self.casts.clear()  # the second run has an autocast region of its own, whose cache ends with it
        if result.node is not None:
            result.node.grads[result.output] = node.grads[0]
            node.grads.clear()
            node.saved.clear()
            held = [(x.storage, sink) for x, sink in zip(inputs, sinks, strict=True)]
            inputs.clear()
            if not self.reentrant:
                del result
                self.unpacks = True
                self._stop_early(first, start)
            self.run_backward(first)
            self.unpacks = False
            while held:
                self.recomputed(held[0][0], held[0][1].grads[0])
                held.pop(0)
        for edge, sink in zip(node.edges, sinks, strict=True):
            incoming = sink.grads.pop()
            if incoming is not None:
                self._deliver(edge, incoming)

    def _stop_early(self, first: int, start: int) -> None:
        """Put a second run, recorded from event `start` on, where torch's non-reentrant checkpoint has it.

        It begins when a node first asks for a saved tensor, so after the nodes that saved nothing have run; and it
        ends in the hook that packs the last saved tensor: what comes after is never computed
        (torch/utils/checkpoint.py, _checkpoint_hook and early_stop).
        """
        dead = {-event for event in self.events[start:] if event < -self.needed}
        second = [event for event in self.events[start:] if abs(event) not in dead]
        del self.events[start:]
        while len(self.nodes) > first:
            node = self.nodes[-1]
            reached = any(grad is not None for grad in node.grads)
            if node.saves and reached:
                break
            del self.nodes[-1]
            if reached:
                self._run(node)
        self.events.extend(second)

    def _run(self, node: Node) -> None:
        if node.recompute is not None:
            self._rerun(node)
            return
        self.module = node.module
        operator = f"{node.operator} backward"
        incoming = next(grad for grad in node.grads if grad is not None)
        through = bool(node.viewed)
        held = [self.allocate(operator, dims, dtype) for dims, dtype in node.first]
        held.clear()
        held = [self.allocate(operator, dims, dtype) for dims, dtype in node.scratch]
        produced = [
            incoming
            if edge.alias
            else edge.memory
            if edge.memory is not None
            else self.allocate(operator, *edge.raw)
            if edge.raw is not None
            else self.allocate(operator, edge.dims, edge.dtype, "gradient" if edge.parameter else "temporary")
            for edge in node.edges
        ]
        held.clear()
        if self.unpacks:
            node.saved.clear()
        for position, edge in enumerate(node.edges):
            if edge.raw is not None:
                role = "gradient" if edge.parameter else "temporary"
                buffer = self._reduction_buffer(operator, edge)
                produced[position] = self.allocate(operator, edge.dims, edge.dtype, role)
                del buffer
            edge.memory = None
        del incoming
        node.saved.clear()
        node.grads.clear()
        for edge in node.edges:
            self._deliver(edge, produced.pop(0), edge.viewed or (through and edge.alias and edge.raw is None))

    def _reduction_buffer(self, operator: str, edge: Edge) -> Storage | None:
        """Where thread blocks combine a sum over leading dims, as for the gradients of biases and norm weights.

        8 bytes an element up to 1 MiB a multiprocessor, and a semaphore for 128 columns, from 1024 rows on: measured
        on an H200, torch 2.11 (aten/src/ATen/native/cuda/Reduce.cuh allocates it).
        """
        kept = len(edge.dims)
        if edge.raw is None or not kept or len(edge.raw[0]) <= kept or edge.raw[0][-kept:] != edge.dims:
            return None
        name = "sum " + "*".join(edge.raw[0])
        if name not in self.sizes:
            rows, columns = self.elements(edge.raw[0][:-kept]), self.elements(edge.dims)
            size = np.minimum(8 * rows * columns, REDUCTION_BUFFER_LIMIT_BYTES) + 4 * -(-columns // 128)
            self.sizes[name] = size * (rows >= 1024)
        return self.allocate(operator, (name,), "int8")

    def _deliver(self, edge: Edge, grad: Storage, viewed: bool = False) -> None:
        if edge.parameter is not None:
            self._collect(edge, edge.parameter.name, grad, viewed)
            return
        target = edge.target
        if target is None:
            return
        known = target.grads[edge.output]
        if known is None:
            target.grads[edge.output] = grad
            if viewed:
                target.viewed.add(edge.output)
            return
        del known
        shared = sys.getrefcount(target.grads[edge.output]) > 2  # the list and the argument: somebody else looks at it
        if shared or edge.output in target.viewed:
            target.viewed.discard(edge.output)
            target.grads[edge.output] = self.allocate("accumulate gradient", edge.dims, edge.dtype)

    def _collect(self, edge: Edge, name: str, grad: Storage, viewed: bool) -> None:
        """A parameter's gradient: it waits until every use of the parameter has given its own, then counts.

        Two gradients of one parameter (a tied table) meet in the input buffer of its accumulation node, where they
        are summed out of place if the first is a view, as the transposed result of a matrix product is.
        """
        self.uses[name] -= 1
        if name not in self.waiting:
            self.waiting[name] = grad
            if viewed:
                self.waiting_views.add(name)
        elif name in self.waiting_views:
            self.waiting_views.remove(name)
            self.waiting[name] = self.allocate("accumulate gradient", edge.dims, edge.dtype, "gradient")
        if self.uses[name] == 0:
            whole = self.waiting.pop(name)
            if not self.hooked and not self.accumulate:
                self.gradients[name] = whole
