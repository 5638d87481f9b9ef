"""`LiveMemory`: the byte-exact curve of the memory that a PyTorch program holds, without its arithmetic.

A `TorchDispatchMode` placed over `FakeTensorMode` sees every operator after autograd has been applied, so also those
of the backward pass and of the optimizer. It follows *storages*, not tensors: views share one, and a storage lives
until its last holder (a Python name, a saved tensor of the autograd graph, a `.grad`) lets go, which a weak
reference reports at once.

Each storage counts ceil(bytes / 512) * 512: the granularity in which PyTorch's CUDA caching allocator accounts for
the blocks it hands out (`kMinBlockSize = 512` in c10/cuda/CUDACachingAllocator; `memory_allocated` sums these
rounded sizes).

Not seen: memory that a kernel takes and returns inside one operator. Where that is known to matter on CUDA,
`planner.measure.cuda_semantics` makes it visible; the rest (sort scratch of embedding backward, cuBLAS workspaces)
is named there.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

__all__ = ["ALLOCATION_GRANULARITY_BYTES", "LiveMemory", "LiveTensor", "Peak", "rounded_bytes"]

ALLOCATION_GRANULARITY_BYTES = 512

# Derivative formulas avoid in-place operators on tensor subclasses, fake tensors among them (FunctionsManual.cpp,
# `areAnyTensorSubclassLike`); on plain tensors they scatter into their fresh zeros in place. Put back what really
# happens.
_OUT_OF_PLACE_FOR_SUBCLASSES = {
    torch.ops.aten.scatter.src: torch.ops.aten.scatter_.src,
    torch.ops.aten.scatter_add.default: torch.ops.aten.scatter_add_.default,
    torch.ops.aten.index_put.default: torch.ops.aten.index_put_.default,
}

_untyped_storage = torch.Tensor.untyped_storage


# `Tensor._use_count` as this mode sees it when the engine's buffer is the only holder: the buffer, and the wrapper's
# own three.
_SOLE_HOLDER = 4


def _accumulates(args: Any) -> bool:
    """Whether these are the arguments of an addition by which autograd's engine adds up gradients in place.

    torch/csrc/autograd/input_buffer.cpp, `can_accumulate_inplace`: the first gradient is dense, nobody else holds
    it, and no other tensor shares its storage (a gradient that is a view keeps its base alive). The engine asks,
    too, that it be no subclass, which a fake tensor is: so it adds out of place here, where on plain tensors it
    would not.
    """
    first, second = args[0], args[1]
    if not isinstance(first, FakeTensor) or not isinstance(second, FakeTensor):
        return False
    caller = sys._getframe(2)
    while caller is not None and caller.f_code.co_name in ("_fn", "inner"):  # torch's wrappers of a dispatch mode
        caller = caller.f_back
    if caller is None or caller.f_code.co_name != "_engine_run_backward":
        return False
    with torch._C.DisableTorchFunction():
        holders = torch._C._storage_Use_Count(_untyped_storage(first)._cdata)
        alone = holders == 2 and torch.Tensor._use_count(first) == _SOLE_HOLDER  # pyright: ignore[reportAttributeAccessIssue]
        return alone and first.shape == second.shape and first.dtype == second.dtype


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a distributed tensor; any other tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def rounded_bytes(nbytes: int, granularity: int = ALLOCATION_GRANULARITY_BYTES) -> int:
    """What the CUDA caching allocator counts for a request of `nbytes`: the next multiple of 512.

    >>> rounded_bytes(1), rounded_bytes(512), rounded_bytes(513), rounded_bytes(0)
    (512, 512, 1024, 0)
    """
    return -(-nbytes // granularity) * granularity


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveTensor:
    """One storage that was live at a moment: its rounded size and where it came from."""

    bytes: int
    operator: str
    module: str
    phase: str
    shape: tuple[int, ...]
    dtype: str
    category: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The highest point of the curve inside a window, and everything that was live there, largest first."""

    bytes: int
    phase: str
    tensors: tuple[LiveTensor, ...]

    def by_category(self) -> dict[str, int]:
        """Bytes per category; the values add up to `bytes`."""
        totals: dict[str, int] = {}
        for tensor in self.tensors:
            totals[tensor.category] = totals.get(tensor.category, 0) + tensor.bytes
        return dict(sorted(totals.items(), key=lambda item: -item[1]))


class Allocation:
    """What is remembered of one storage. `role` is set from outside (weights, gradients, ...); `kept` marks
    activations.
    """

    __slots__ = (
        "born",
        "bytes",
        "died",
        "dtype",
        "kept",
        "module",
        "on_host",
        "operator",
        "phase",
        "reference",
        "role",
        "shape",
        "size_bytes",
    )

    def __init__(
        self, *, operator: str, module: str, phase: str, shape: tuple[int, ...], dtype: torch.dtype, born: int
    ) -> None:
        self.bytes = 0
        self.size_bytes = 0
        self.operator = operator
        self.module = module
        self.phase = phase
        self.shape = shape
        self.dtype = dtype
        self.born = born
        self.died: int | None = None
        self.role: str | None = None
        self.kept = False
        self.on_host = False
        self.reference: weakref.ref[Any] | None = None

    def as_live_tensor(self, nbytes: int, categorise: Callable[[Allocation], str]) -> LiveTensor:
        return LiveTensor(
            bytes=nbytes, operator=self.operator, module=self.module, phase=self.phase, shape=self.shape,
            dtype=str(self.dtype).removeprefix("torch."), category=categorise(self),
        )  # fmt: skip


class LiveMemory(TorchDispatchMode):
    """Follows every fake storage from birth to death while the mode is active.

    The curve is an event log: `(allocation, +bytes)` at a birth or growth, `(allocation, -bytes)` at a death or shrink.
    caller_roles: the role of whatever a function of torch.distributed allocates, by the function's name.
    `mark(name)` starts a new phase; windows between marks are asked for with `peak` and `at`.
    Only fake tensors count: real ones (random-generator states, constants) live on the host.
    """

    def __init__(
        self,
        *,
        granularity: int = ALLOCATION_GRANULARITY_BYTES,
        scratch: Mapping[Any, Callable[[Any], int]] | None = None,
        caller_roles: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.granularity = granularity
        self.scratch = dict(scratch or {})
        self.caller_roles = dict(caller_roles or {})
        self.current_bytes = 0
        self.events: list[tuple[Allocation, int]] = []
        self.marks: list[tuple[str, int]] = [("", 0)]
        self.phase = ""
        self.on_mark: Callable[[str], None] = lambda phase: None
        self._live: dict[int, Allocation] = {}
        self._modules: list[str] = []
        self._module_names: dict[int, str] = {}
        self._hooks: list[Any] = []
        self._original_resize: Any = None
        self._outermost_entry = 0

    def __enter__(self) -> LiveMemory:
        super().__enter__()
        module = torch.nn.modules.module
        self._hooks = [
            module.register_module_forward_pre_hook(self._enter_module),
            module.register_module_forward_hook(self._leave_module, always_call=True),
        ]
        self._original_resize = original = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            answer = original(storage, size)
            self._storage_resized(storage)
            return answer

        setattr(torch.UntypedStorage, "resize_", resize_)  # noqa: B010 (a method stands in for a method)
        return self

    def __exit__(self, *exception: Any) -> None:
        torch.UntypedStorage.resize_ = self._original_resize
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # seen again as operators on what each rank holds
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return self._scalar(args[0])
        if func in _OUT_OF_PLACE_FOR_SUBCLASSES and not self._modules and self._is_fresh_zeros(args[0]):
            func = _OUT_OF_PLACE_FOR_SUBCLASSES[func]
        if func is torch.ops.aten.add.Tensor and _accumulates(args):
            func = torch.ops.aten.add_.Tensor
        result = func(*args, **(kwargs or {}))
        if isinstance(result, FakeTensor):
            self._see(result, func)
        elif result is not None:
            for value in tree_iter(result):
                if isinstance(value, FakeTensor):
                    self._see(value, func)
        if func in self.scratch:
            self._use_scratch(func, self.scratch[func](args))
        return result

    def _scalar(self, tensor: torch.Tensor) -> float | int | bool:
        """What `.item()` answers where there is no arithmetic: one, as Adam's step counter and `mask.all()` have it;
        but a comparison "less than" is not met, which is how models draw the layers that they drop."""
        if tensor.dtype == torch.bool:
            known = self.allocation_of(tensor)
            return known is None or not known.operator.startswith("aten.lt.")
        return 1.0 if tensor.dtype.is_floating_point else 1

    def _is_fresh_zeros(self, tensor: torch.Tensor) -> bool:
        known = self.allocation_of(tensor)
        return known is not None and known.operator in ("aten.new_zeros.default", "aten.zeros.default")

    def _use_scratch(self, func: Any, nbytes: int) -> None:
        scratch = Allocation(
            operator=f"{func} (scratch)",
            module=self.module,
            phase=self.phase,
            shape=(nbytes,),
            dtype=torch.uint8,
            born=len(self.events),
        )
        self._change(scratch, rounded_bytes(nbytes, self.granularity))
        scratch.died = len(self.events)
        self._change(scratch, 0)

    def _see(self, tensor: torch.Tensor, func: Any) -> Allocation:
        tensor = _local(tensor)
        with torch._C.DisableTorchFunction():
            storage = _untyped_storage(tensor)
            nbytes = storage.nbytes()
        key = storage._cdata
        known = self._live.get(key)
        if known is not None:
            if not known.on_host and rounded_bytes(nbytes, self.granularity) != known.bytes:
                self._change(known, rounded_bytes(nbytes, self.granularity))
            return known
        allocation = Allocation(
            operator=func if isinstance(func, str) else str(func),
            module=self._modules[-1] if self._modules else "",
            phase=self.phase,
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
            born=len(self.events),
        )
        allocation.role = self._role_by_caller()

        def died(_: Any) -> None:
            del self._live[key]
            allocation.died = len(self.events)
            self._change(allocation, 0)
            allocation.reference = None

        allocation.reference = weakref.ref(storage, died)
        self._live[key] = allocation
        self._change(allocation, rounded_bytes(nbytes, self.granularity))
        return allocation

    def _role_by_caller(self) -> str | None:
        """The role of what is being allocated, when a function on the stack is known to allocate for one."""
        frame = sys._getframe(2) if self.caller_roles else None
        while frame is not None:
            role = self.caller_roles.get(frame.f_code.co_name)
            if role is not None and "distributed" in frame.f_code.co_filename:
                return role
            frame = frame.f_back
        return None

    def _change(self, allocation: Allocation, nbytes: int) -> None:
        delta = nbytes - allocation.bytes
        if delta:
            allocation.bytes = nbytes
            allocation.size_bytes = max(allocation.size_bytes, nbytes)
            self.current_bytes += delta
            self.events.append((allocation, delta))

    def _storage_resized(self, storage: torch.UntypedStorage) -> None:
        known = self._live.get(storage._cdata)
        if known is not None:
            self._change(known, rounded_bytes(storage.nbytes(), self.granularity))

    def allocation_of(self, tensor: torch.Tensor) -> Allocation | None:
        """The record of the storage under `tensor`, or None when it is not followed."""
        with torch._C.DisableTorchFunction():
            return self._live.get(_untyped_storage(_local(tensor))._cdata)

    def adopt(self, tensors: Iterable[torch.Tensor], *, role: str, operator: str = "made before the step") -> None:
        """Count storages that existed before the mode was entered, or give known ones their role."""
        for tensor in tensors:
            self._see(tensor, operator).role = role

    def set_aside(self, tensor: torch.Tensor) -> None:
        """Stop counting the storage under `tensor`: it lives on the host on a real machine (Adam's step counters)."""
        known = self.allocation_of(tensor)
        if known is not None:
            self._change(known, 0)
            known.on_host = True

    def name_modules(self, model: torch.nn.Module) -> None:
        """Learn the dotted names under which operators are reported."""
        self._module_names.update({id(module): name for name, module in model.named_modules(remove_duplicate=False)})

    @property
    def module(self) -> str:
        """The dotted name of the module whose forward is running, or the empty string."""
        return self._modules[-1] if self._modules else ""

    def _enter_module(self, module: torch.nn.Module, _: Any) -> None:
        if not self._modules:
            self._outermost_entry = len(self.events)
        self._modules.append(self._module_names.get(id(module), type(module).__name__) or type(module).__name__)

    def _leave_module(self, module: torch.nn.Module, _: Any, __: Any) -> None:
        self._modules.pop()
        if not self._modules:
            # Whatever the outermost call (the model, or a layer replayed by checkpointing) leaves behind is held for
            # backward.
            for allocation, _delta in self.events[self._outermost_entry :]:
                if allocation.died is None:
                    allocation.kept = True

    def mark(self, phase: str) -> int:
        """Start a phase; returns the position in the event log."""
        self.phase = phase
        self.marks.append((phase, len(self.events)))
        self.on_mark(phase)
        return len(self.events)

    def curve(self) -> list[int]:
        """Live bytes after each event."""
        total, points = 0, []
        for _, delta in self.events:
            total += delta
            points.append(total)
        return points

    def peak(self, start: int, end: int, categorise: Callable[[Allocation], str]) -> Peak:
        """The highest point between two positions of the event log (the level at `start` included)."""
        total = sum(delta for _, delta in self.events[:start])
        best, best_position = total, start
        for position in range(start, end):
            total += self.events[position][1]
            if total > best:
                best, best_position = total, position + 1
        return self.at(best_position, categorise)

    def at(self, position: int, categorise: Callable[[Allocation], str]) -> Peak:
        """Everything live after the first `position` events."""
        held: dict[Allocation, int] = {}
        for allocation, delta in self.events[:position]:
            held[allocation] = held.get(allocation, 0) + delta
        tensors = [a.as_live_tensor(nbytes, categorise) for a, nbytes in held.items() if nbytes]
        tensors.sort(key=lambda tensor: -tensor.bytes)
        phase = next((name for name, start in reversed(self.marks) if start < position), "")
        return Peak(bytes=sum(tensor.bytes for tensor in tensors), phase=phase, tensors=tuple(tensors))
