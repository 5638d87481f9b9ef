"""What CUDA does differently from the CPU on which a dry run is replayed, so far as memory is concerned.

`CudaSemantics` is a `TorchFunctionMode`: it answers, in CUDA's manner, the calls whose CPU kernels keep other tensors.

========================================  ===============================================  =====================================
call                                      on the CPU                                       on CUDA, and here
========================================  ===============================================  =====================================
scaled_dot_product_attention              math path for dropout, fp32, unequal head sizes  flash, memory-efficient or math kernel
dropout                                   keeps a mask in the input's own format           `native_dropout` keeps one bool a value
rms_norm                                  a chain of elementwise operators                 one fused kernel keeping fp32 1/rms
softmax(half, dtype=float32)              converts first, keeps the fp32 copy              one kernel, no copy
========================================  ===============================================  =====================================

Sources: aten/src/ATen/native/transformers/cuda/{attention.cu, attention_backward.cu, flash_attn/flash_api.cpp},
aten/src/ATen/native/{Dropout.cpp, SoftMax.cpp, layer_norm.cpp} of PyTorch, and csrc/flash_attn/flash_api.cpp of FlashAttention 2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from planner.errors import PlanError, nearest

__all__ = ["CUBLAS_WORKSPACE_BYTES", "SDPA_KERNELS", "CudaSemantics", "flash_attention"]

# One cuBLAS handle's workspace, taken through the caching allocator at the first matrix product and kept. PyTorch's default
# (CUDABlas.cpp, CUBLAS_WORKSPACE_CONFIG :4096:2:16:8): 2 * 4096 KiB + 8 * 16 KiB; on compute capability 9.0, 32 MiB.
# A training process holds two: one for the forward thread's handle, one for the backward thread's.
CUBLAS_WORKSPACE_BYTES = {"sm80": 2 * 4096 * 1024 + 8 * 16 * 1024, "sm90": 32 * 1024 * 1024}

SDPA_KERNELS = ("auto", "flash", "mem_efficient", "math")

_FLASH_MAX_HEAD_SIZE = 256
_16_BIT = (torch.float16, torch.bfloat16)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _flash_head_size(head_size: int) -> int:
    return _round_up(head_size, 32) if head_size <= 128 else _round_up(head_size, 64)


class _Flash(torch.autograd.Function):
    """FlashAttention 2 on tensors laid out (batch, sequence, heads, head size).

    Forward keeps q, k, v, the output and the fp32 log-sum-exp (batch, heads, sequence).
    Backward takes dq, dk, dv, and for its own duration: the fp32 accumulator of dq, with the sequence rounded up to 128 and the
    head size to 32 (64 above 128); `softmax_d` in fp32; and, with grouped heads, dk and dv of *all* query heads, which it then sums.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        batch, length, heads, _ = q.shape
        out = torch.empty_like(q)
        log_sum_exp = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
        ctx.save_for_backward(q, k, v, out, log_sum_exp)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, out, log_sum_exp = ctx.saved_tensors
        grad_out = grads[0].contiguous()
        out = out.contiguous()
        batch, length, heads, head_size = q.shape
        rounded_length = _round_up(length, 128)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        softmax_d = torch.empty(batch, heads, rounded_length, dtype=torch.float32, device=q.device)
        dq_accumulator = torch.empty(
            batch, rounded_length, heads, _flash_head_size(head_size), dtype=torch.float32, device=q.device
        )
        expanded = ()
        if k.shape[2] != heads:
            whole = (batch, k.shape[1], heads, head_size)
            expanded = (torch.empty(whole, dtype=k.dtype, device=k.device), torch.empty(whole, dtype=k.dtype, device=k.device))
        del softmax_d, dq_accumulator, expanded, grad_out, out, log_sum_exp
        return dq, dk, dv


def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """FlashAttention on (batch, sequence, heads, head size), padding the head size to a multiple of 8 as the real wrapper does."""
    head_size = q.shape[-1]
    if head_size % 8:
        q, k, v = (F.pad(t, (0, 8 - head_size % 8)) for t in (q, k, v))
        return _Flash.apply(q, k, v)[..., :head_size]
    return _Flash.apply(q, k, v)


class _MemoryEfficient(torch.autograd.Function):
    """The memory-efficient (CUTLASS) kernel on (batch, sequence, heads, head size).

    Forward keeps q, k, v, an additive mask, the output and the fp32 log-sum-exp with the sequence rounded up to 32.
    Backward takes dq, dk, dv and an fp32 row sum `delta`; for 16-bit inputs also an fp32 accumulator of dq (the kernel's
    workspace); for fp32 inputs `delta` is computed by operators of its own, through one product of the output's size.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        batch, length, heads, _ = q.shape
        out = torch.empty(batch, length, heads, v.shape[-1], dtype=q.dtype, device=q.device)
        log_sum_exp = torch.empty(batch, heads, _round_up(length, 32), dtype=torch.float32, device=q.device)
        ctx.save_for_backward(q, k, v, mask, out, log_sum_exp)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, mask, out, log_sum_exp = ctx.saved_tensors
        grad_out = grads[0]
        batch, length, heads, head_size = q.shape
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
        dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        dmask = torch.empty_like(mask) if mask is not None and ctx.needs_input_grad[3] else None
        workspace = None
        if q.dtype == torch.float32:
            delta = (grad_out * out).sum(-1).transpose(-2, -1).contiguous()
        else:
            delta = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
            workspace = torch.empty(
                batch, heads, _round_up(length, 64), _round_up(head_size, 32), dtype=torch.float32, device=q.device
            )
        del delta, workspace, grad_out, out, log_sum_exp
        return dq, dk, dv, dmask


class CudaSemantics(TorchFunctionMode):
    """Answers SDPA, dropout, rms_norm and mixed softmax as CUDA does; everything else passes through untouched.

    `kernel` names the kernel of `scaled_dot_product_attention`; "auto" is PyTorch's own order: flash for 16-bit inputs without a
    mask and head sizes that are equal and at most 256, memory-efficient for what else it covers, math for the rest.
    """

    def __init__(self, *, kernel: str = "auto") -> None:
        super().__init__()
        if kernel not in SDPA_KERNELS:
            raise PlanError(f'no attention kernel "{kernel}"; {nearest(kernel, SDPA_KERNELS)}')
        self.kernel = kernel

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        answer = _ANSWERS.get(func)
        return func(*args, **kwargs) if answer is None else answer(self, func, args, kwargs)

    def _backward(self, func: Any, args: Any, kwargs: Any) -> Any:
        # A mode is off while it handles a call, but checkpointing replays forward code inside this one.
        with self:
            return _backward(*args, **kwargs)

    def _attention(self, func: Any, args: Any, kwargs: Any) -> Any:
        return self.attend(*args, **kwargs)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """`scaled_dot_product_attention` on (batch, heads, sequence, head size), by the kernel that CUDA would pick."""
        kernel = self.kernel if self.kernel != "auto" else _kernel_picked(query, key, value, attn_mask)
        if kernel == "math":
            out, _ = torch.ops.aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
            return out
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if kernel == "flash":
            return flash_attention(q, k, v).transpose(1, 2)
        mask = attn_mask
        if mask is not None:
            if mask.dtype == torch.bool:  # convert_boolean_attn_mask: an additive mask in the query's format
                mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
            if mask.shape[-1] % 8:  # pad_bias: the kernel reads aligned rows
                mask = F.pad(mask, (0, 8 - mask.shape[-1] % 8))
            mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], mask.shape[-1])
        return _MemoryEfficient.apply(q, k, v, mask).transpose(1, 2)

    def _dropout(self, func: Any, args: Any, kwargs: Any) -> Any:
        return _dropout(*args, **kwargs)

    def _softmax(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensor = args[0] if args else kwargs["input"]
        if kwargs.get("dtype") == torch.float32 and tensor.dtype == torch.float16:
            dim = kwargs["dim"] if "dim" in kwargs else args[1]
            return torch.ops.aten._softmax.default(tensor, dim, True)
        return func(*args, **kwargs)

    def _rms_norm(self, func: Any, args: Any, kwargs: Any) -> Any:
        return _rms_norm(*args, **kwargs)


def _backward(
    tensor: torch.Tensor, gradient: Any = None, retain_graph: bool | None = None, create_graph: bool = False, inputs: Any = None
) -> None:
    torch.autograd.backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    if inplace or not training or p == 0.0 or p == 1.0 or input.numel() == 0:
        return torch.dropout_(input, p, training) if inplace else torch.dropout(input, p, training)
    return torch.ops.aten.native_dropout(input, p, True)[0]


class _RmsNorm(torch.autograd.Function):
    """`_fused_rms_norm`: keeps the input, the weight and 1/rms in fp32, one value a row; backward takes the two gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, normalized_dims: int, weight: torch.Tensor | None) -> torch.Tensor:
        rows = (*x.shape[: x.dim() - normalized_dims], *(1 for _ in range(normalized_dims)))
        ctx.save_for_backward(x, weight, torch.empty(rows, dtype=torch.float32, device=x.device))
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, _ = ctx.saved_tensors
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dweight = torch.empty_like(weight) if weight is not None and ctx.needs_input_grad[2] else None
        return dx, None, dweight


def _rms_norm(input: torch.Tensor, normalized_shape: Any, weight: torch.Tensor | None = None, eps: float | None = None) -> torch.Tensor:
    return _RmsNorm.apply(input.contiguous(), len(normalized_shape), weight)


def _kernel_picked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> str:
    head_size, value_size = query.shape[-1], value.shape[-1]
    grouped = key.shape[1] != query.shape[1]
    if query.dtype in _16_BIT and mask is None and head_size == value_size and head_size <= _FLASH_MAX_HEAD_SIZE:
        return "flash"
    alignment = 4 if query.dtype == torch.float32 else 8
    if query.dtype in (*_16_BIT, torch.float32) and not grouped and not head_size % alignment and not value_size % alignment:
        return "mem_efficient"
    return "math"


_ANSWERS: dict[Any, Any] = {
    torch.Tensor.backward: CudaSemantics._backward,
    F.scaled_dot_product_attention: CudaSemantics._attention,
    F.dropout: CudaSemantics._dropout,
    torch.dropout: CudaSemantics._dropout,
    torch.rms_norm: CudaSemantics._rms_norm,
    F.softmax: CudaSemantics._softmax,
    torch.softmax: CudaSemantics._softmax,
    torch.Tensor.softmax: CudaSemantics._softmax,
}
