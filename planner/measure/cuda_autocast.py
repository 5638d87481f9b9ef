"""CUDA's autocast on the CPU's dispatch key, for the operators on which the two devices' lists differ.

PyTorch keeps a list of operators for each device: CUDA runs `pow`, `rsqrt`, `softmax`, `layer_norm`, `sum` and others
in fp32, which the CPU's autocast leaves in the input's format; and the CPU's autocast promotes `cat` and `stack` by
copies, which CUDA leaves to the operator. `CudaAutocast` registers CUDA's manner for as long as it is entered, under
the key of autocast on the CPU. The lists of matrix products are the same where they matter (`linear`, `matmul`, `mm`,
`bmm`, `addmm`, `baddbmm`, `scaled_dot_product_attention`, convolutions), so PyTorch's own kernels serve for them, and
with them PyTorch's own cache of weights cast down.

Checked on one H200, torch 2.11.0 (2026-11-23): Llama, Qwen2 and GPT-2 with eager and fused attention, with and without
checkpointing, ask for the same bytes at every moment of a step.

Source: aten/src/ATen/autocast_mode.h of PyTorch 2.13 (AT_FORALL_LOWER_PRECISION_FP, AT_FORALL_FP32,
AT_FORALL_FP32_SET_OPT_DTYPE, AT_FORALL_PROMOTE) and autocast_mode.cpp (cached_cast; the CPU's lists).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch.utils._pytree import tree_map

__all__ = ["CudaAutocast"]

# Run in fp32: every floating-point argument is cast first.
_FP32 = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh",
    "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "native_layer_norm",
    "rms_norm", "group_norm", "logsumexp", "nll_loss", "nll_loss2d", "kl_div", "l1_loss", "smooth_l1_loss",
    "huber_loss", "mse_loss", "binary_cross_entropy_with_logits", "cdist", "dist", "renorm", "cosine_similarity",
)  # fmt: skip

# Run with an explicit dtype=float32 unless the caller gave one: these cast inside.
_FP32_BY_DTYPE = (
    "prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum", "linalg_vector_norm", "sum",
    "sum.dim_IntList",
)  # fmt: skip

# Run in the lower format, and missing from the CPU's list.
_LOWER = ("addmv", "addr", "einsum", "mv", "prelu", "linalg_multi_dot", "chain_matmul")

# On the CPU's list of promoted operators, on none of CUDA's.
_AS_THEY_ARE = ("cat", "stack", "index_copy")


class CudaAutocast:
    """A context in which `torch.autocast("cpu")` casts what `torch.autocast("cuda")` would."""

    def __init__(self) -> None:
        self._library: torch.library.Library | None = None

    def __enter__(self) -> CudaAutocast:
        self._library = library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*only once for all operators.*")  # that it overrides
            for names, policy in (
                (_FP32, _in_fp32), (_FP32_BY_DTYPE, _with_dtype), (_LOWER, _in_lower), (_AS_THEY_ARE, _unchanged)
            ):  # fmt: skip
                for name in names:
                    packet, _, overload = name.partition(".")
                    operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
                    library.impl(name, policy(operator), "AutocastCPU", allow_override=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._library is not None:
            self._library._destroy()
            self._library = None


def _outside_autocast() -> Any:
    """The guard under which autocast's own wrappers call on, so that what an operator is made of is not cast again."""
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU))


def _eligible(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda value: value.to(dtype) if _eligible(value) else value, values)


def _in_fp32(operator: Any) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _outside_autocast():
            return operator(*_cast(args, torch.float32), **_cast(kwargs, torch.float32))

    return run


def _in_lower(operator: Any) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype("cpu")
        with _outside_autocast():
            return operator(*_cast(args, dtype), **_cast(kwargs, dtype))

    return run


def _with_dtype(operator: Any) -> Callable[..., Any]:
    names = [argument.name for argument in operator._schema.arguments]
    place = names.index("dtype")

    def run(*args: Any, **kwargs: Any) -> Any:
        given = args[place] if len(args) > place else kwargs.get("dtype")
        with _outside_autocast():
            if given is None and _eligible(args[0]):
                return operator(*args[:place], **{**kwargs, "dtype": torch.float32})
            return operator(*args, **kwargs)

    return run


def _unchanged(operator: Any) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _outside_autocast():
            return operator(*args, **kwargs)

    return run
