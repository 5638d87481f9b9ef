"""One rank of a data-parallel group, on a process group that moves no data: DDP, FSDP1 and FSDP2 as PyTorch runs them.

The engines' own Python decides when a weight is whole, when a buffer is freed and what a gradient passes through; the
collectives only have the right shapes. The device is the CPU's fake one, on which the engines take the same path as
on CUDA but for streams, and streams do not change when a tensor's last holder lets go: `memory_allocated` falls as
soon as that happens, also for blocks that another stream still uses (c10/cuda/CUDACachingAllocator.cpp, `free`).

Checked on one H200, torch 2.11.0 (2026-11-23): the same engines over the same process group on real CUDA tensors ask
the allocator for the same bytes at every moment of a step (FSDP2, FSDP1 and DDP of a small Llama over 2 and 8 ranks;
one moment of two of the seven steps differed, by 3 kB and, below 1024 tokens, by 0.1 %).

Not counted: what the communication library itself takes outside PyTorch's allocator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import DeviceMesh

from planner.errors import NotCovered, PlanError, nearest

__all__ = ["CALLER_ROLES", "Sharding", "one_rank_of", "shard"]

ENGINES = ("ddp", "fsdp1", "fsdp2")

# What the engines' functions allocate (torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py, _fsdp_param.py;
# torch/distributed/fsdp/_flat_param.py, _runtime_utils.py; torch/nn/parallel/distributed.py).
CALLER_ROLES = {
    "init_all_gather_outputs": "unsharded_parameters",
    "foreach_all_gather": "communication_buffers",
    "foreach_reduce": "communication_buffers",
    "init_flat_param_attributes": "unsharded_parameters",
    "_reduce_grad": "communication_buffers",
    "_ddp_init_helper": "communication_buffers",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """How one rank of `ranks` holds the model.

    param_dtype, reduce_dtype: of the mixed-precision policy; None leaves the parameters' own.
    reshard_after_forward: whether a block's weights are freed after its forward pass.
    blocks: the modules that are units of their own, beside the root; None asks the model (`_no_split_modules`).
    """

    engine: str
    ranks: int
    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    reshard_after_forward: bool = True
    blocks: Callable[[torch.nn.Module], Sequence[torch.nn.Module]] | None = None

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise PlanError(f'no sharding engine "{self.engine}" in the dry run; {nearest(self.engine, ENGINES)}')


@contextmanager
def one_rank_of(ranks: int) -> Iterator[DeviceMesh]:
    """For its duration, this process is rank 0 of a default process group of `ranks` whose collectives do nothing.

    Yields the group's mesh, whose own little tensors are real ones.
    """
    import torch.distributed._tools.fake_collectives  # noqa: F401 (registers the collectives for fake tensors)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise PlanError("a sharded dry run needs a process without a process group of its own.")
    data_ptr = FakeTensor.data_ptr
    # FSDP1 compares addresses to see whether a vector is whole (_runtime_utils.py, _catch_all_reshard); fakes have 0.
    FakeTensor.data_ptr = _address  # pyright: ignore[reportAttributeAccessIssue]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (ranks,))
    finally:
        FakeTensor.data_ptr = data_ptr
        dist.destroy_process_group()


def _address(tensor: torch.Tensor) -> int:
    """A number that two tensors share if they begin at the same place of the same storage."""
    with torch._C.DisableTorchFunction():
        return torch.Tensor.untyped_storage(tensor)._cdata + tensor.storage_offset() * tensor.element_size()


def shard(model: torch.nn.Module, sharding: Sharding, mesh: DeviceMesh) -> torch.nn.Module:
    """`model` as this rank trains it. Called under the fake mode, inside `one_rank_of`."""
    return {"ddp": _ddp, "fsdp1": _fsdp1, "fsdp2": _fsdp2}[sharding.engine](model, sharding, mesh)


def _blocks(model: torch.nn.Module, sharding: Sharding) -> list[torch.nn.Module]:
    if sharding.blocks is not None:
        return list(sharding.blocks(model))
    names: set[str] = set()
    for module in model.modules():
        names.update(getattr(module, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        raise NotCovered("the model does not say which of its modules are blocks; pass `blocks`, a function of it.")
    return found


def _ddp(model: torch.nn.Module, sharding: Sharding, mesh: DeviceMesh) -> torch.nn.Module:
    wrapped = torch.nn.parallel.DistributedDataParallel(model, init_sync=False)
    wrapped.register_comm_hook(None, _reduce_in_place)
    wrapped.reducer = _SettledReducer(wrapped.reducer)  # pyright: ignore[reportAttributeAccessIssue]
    return wrapped


class _SettledReducer:
    """DDP's reducer without its second look at the order of gradients, which reads numbers from a tensor.

    Buckets are then filled in the order of the parameters; together they have the same size.
    """

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False


def _reduce_in_place(_, bucket):  # unannotated: DDP compares annotations with types, and here they are strings
    """DDP's own all-reduce, which ends in the bucket it began in."""
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def _fsdp2(model: torch.nn.Module, sharding: Sharding, mesh: DeviceMesh) -> torch.nn.Module:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    settings: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=sharding.param_dtype, reduce_dtype=sharding.reduce_dtype),
    }
    for block in _blocks(model, sharding):
        fully_shard(block, reshard_after_forward=sharding.reshard_after_forward, **settings)
    fully_shard(model, **settings)
    return model


def _is_trained_leaf(module: torch.nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.nn.Parameter) and weight.requires_grad and not list(module.children())


def _fsdp1(model: torch.nn.Module, sharding: Sharding, mesh: DeviceMesh) -> torch.nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
    from torch.distributed.fsdp.wrap import CustomPolicy

    units = {id(block) for block in _blocks(model, sharding)}
    if not all(parameter.requires_grad for parameter in model.parameters()):
        # Each adapter's linear is a unit too, as a flat vector has one format (peft/utils/other.py,
        # fsdp_auto_wrap_policy).
        units.update(id(module) for module in model.modules() if _is_trained_leaf(module))
    policy = None
    if sharding.param_dtype is not None or sharding.reduce_dtype is not None:
        policy = MixedPrecision(param_dtype=sharding.param_dtype, reduce_dtype=sharding.reduce_dtype)
    return FullyShardedDataParallel(
        model,
        sharding_strategy=(
            ShardingStrategy.FULL_SHARD if sharding.reshard_after_forward else ShardingStrategy.SHARD_GRAD_OP
        ),
        auto_wrap_policy=CustomPolicy(lambda module: id(module) in units),
        mixed_precision=policy,
        device_id=torch.device("cpu"),
        use_orig_params=True,
        limit_all_gathers=True,
    )
