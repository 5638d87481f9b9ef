"""What a device holds beside the tensors of a step: library workspaces, the allocator's slack, the driver's context.

Every term has a name, a value, a band and a source; nothing is multiplied by a hidden factor.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.hardware import Device
from planner.memory.allocator import segment_bytes
from planner.sources import Source

__all__ = ["DeviceTerm", "device_terms", "workspace_bytes"]

MIB = 2**20
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTerm:
    """One term between what tensors need and what the driver reports. low_bytes <= bytes <= high_bytes."""

    name: str
    bytes: int
    low_bytes: int
    high_bytes: int
    source: Source


# max_memory_reserved over max_memory_allocated, less one: 0.003 lowest, 0.090 median, 0.334 highest. What decides it is
# the order of sizes in the step; PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True brings it near the lowest.
_OUR_RUNS = Source(
    title="31 training steps on one H200, torch 2.11.0 with CUDA 13.0, default allocator settings",
    kind="measured",
    date="2026-11-23",
)
# Centre: 0.749 to 0.763 GiB over the same 31 runs, less the driver's own reserve. Ends: other torch and CUDA versions.
_CONTEXT = Source(
    title="context and loaded kernels: 0.75 GiB on one H200 (torch 2.11.0, CUDA 13.0, driver 580.159); 0.47 GiB with "
    "torch 2.1 and lazy loading to 1.78 GiB with torch 1.10 on A100 (ml-engineering)",
    kind="measured",
    url="https://github.com/stas00/ml-engineering",
    date="2026-11-23",
)


def workspace_bytes(device: Device) -> int:
    """cuBLAS workspaces that count as allocated memory: one for each of the two threads that run products.

    aten/src/ATen/cuda/CublasHandlePool.cpp, getChosenWorkspaceSize (torch 2.x):
        compute capability 9.0, 10.0    8 x 4096 KiB                      = 32    MiB
        other NVIDIA devices            2 x 4096 KiB + 8 x 16 KiB         =  8.125 MiB
    The handle pool is per thread and stream: the forward thread and autograd's device thread hold one each.
    """
    capability = device.compute_capability
    if capability is None:
        return 0
    one = 32 * MIB if capability in ((9, 0), (10, 0)) else 2 * 4096 * 1024 + 8 * 16 * 1024
    return 2 * one


def device_terms(device: Device, peak_allocated: int, gpus: int) -> tuple[DeviceTerm, ...]:
    """The terms between `peak_allocated` and what nvidia-smi shows, in order: reserved, then context, then NCCL."""
    whole = segment_bytes(peak_allocated)
    terms = [
        DeviceTerm(
            name="allocator_slack",
            bytes=whole - peak_allocated + int(0.090 * peak_allocated),
            low_bytes=whole - peak_allocated + int(0.003 * peak_allocated),
            high_bytes=whole - peak_allocated + int(0.334 * peak_allocated),
            source=_OUR_RUNS,
        ),
        DeviceTerm(
            name="cuda_context",
            bytes=int(0.755 * GIB),
            low_bytes=int(0.47 * GIB),
            high_bytes=int(1.78 * GIB),
            source=_CONTEXT,
        ),
    ]
    if gpus > 1:
        terms.append(
            DeviceTerm(
                name="nccl_buffers",
                bytes=int(0.8 * GIB),
                low_bytes=int(0.3 * GIB),
                high_bytes=int(1.45 * GIB),
                source=Source(
                    title="first collective adds 1.45 GiB at most; about 0.5 GB for each communicator",
                    kind="published",
                    url="https://github.com/stas00/ml-engineering",
                ),
            )
        )
    return tuple(terms)
