"""Published measurements, and what the planner says about the same runs."""

from planner.evidence.measured import (
    Comparison,
    KernelRun,
    MeasuredRun,
    Summary,
    compare,
    compare_kernels,
    kernel_runs,
    measured_runs,
    summaries,
)

__all__ = [
    "Comparison",
    "KernelRun",
    "MeasuredRun",
    "Summary",
    "compare",
    "compare_kernels",
    "kernel_runs",
    "measured_runs",
    "summaries",
]
