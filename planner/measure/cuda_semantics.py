"""What CUDA does differently from the CPU on which a dry run is replayed, so far as memory is concerned.

`CudaSemantics` registers, for as long as it is entered, CUDA's manner of these operators with PyTorch's dispatcher,
under the key of autograd on the CPU. That holds in every thread state, also where checkpointing replays forward code
inside the engine, which function modes do not reach.

- `scaled_dot_product_attention`: the CPU takes its math path for dropout, fp32 and unequal head sizes; CUDA has the
  flash, cuDNN, memory-efficient and math kernels, of which only the last keeps scores.
- `dropout`: the CPU keeps a mask in the input's own format; CUDA's `native_dropout` one bool a value.
- `rms_norm`: the CPU chains elementwise operators; CUDA has one fused kernel that keeps 1/rms in fp32.
- `layer_norm`: mean and 1/std are in the input's format on the CPU, in fp32 on CUDA.
- `softmax` of fp16 with dtype=float32: the CPU converts first; CUDA has one kernel that makes no copy.

`KERNEL_SCRATCH` lists what CUDA's kernels take for their own duration, by operator: the product grad * output of
softmax's backward, the partial sums of embedding's backward, the mask of `_safe_softmax`, and the buffer of reductions
that are split over thread blocks.

Not modelled: sort scratch of embedding's backward (under 0.5 MB), and the memory-efficient kernel's workspace for
16-bit heads above 128, which is counted at its largest and was measured up to a third smaller.

Sources: aten/src/ATen/native/transformers/cuda/{attention.cu, attention_backward.cu, flash_attn/flash_api.cpp},
aten/src/ATen/native/{Dropout.cpp, SoftMax.cpp, layer_norm.cpp}, aten/src/ATen/native/cuda/{SoftMax.cu,
EmbeddingBackwardKernel.cu} of PyTorch, and csrc/flash_attn/flash_api.cpp of FlashAttention 2. Checked against one
H200, torch 2.11 (2026-11-23): what each of these operators keeps, and its peak in forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F

from planner.errors import PlanError, nearest

__all__ = ["CUBLAS_WORKSPACE_BYTES", "KERNEL_SCRATCH", "SDPA_KERNELS", "CudaSemantics", "flash_attention"]

# One cuBLAS handle's workspace, taken through the caching allocator at the first matrix product and kept. PyTorch's
# default (CUDABlas.cpp, CUBLAS_WORKSPACE_CONFIG :4096:2:16:8): 2 * 4096 KiB + 8 * 16 KiB; on compute capability 9.0,
# 32 MiB. A training process holds two: one for the forward thread's handle, one for the backward thread's.
CUBLAS_WORKSPACE_BYTES = {"sm80": 2 * 4096 * 1024 + 8 * 16 * 1024, "sm90": 32 * 1024 * 1024}

# Where reductions' buffers stop growing: 1 MiB for each of an H200's multiprocessors.
REDUCTION_BUFFER_LIMIT_BYTES = 132 * 1024 * 1024

SDPA_KERNELS = ("auto", "auto-cudnn", "flash", "cudnn", "mem_efficient", "math")

_FLASH_MAX_HEAD_SIZE = 256
_16_BIT = (torch.float16, torch.bfloat16)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _flash_head_size(head_size: int) -> int:
    return _round_up(head_size, 32) if head_size <= 128 else _round_up(head_size, 64)


def _expanded_gradients(k: torch.Tensor, v: torch.Tensor, heads: int) -> list[torch.Tensor]:
    """dk and dv for every query head, which grouped-query kernels write before they sum over each group."""
    if k.shape[2] == heads:
        return []
    return [torch.empty(*t.shape[:2], heads, t.shape[3], dtype=t.dtype, device=t.device) for t in (k, v)]


class _Flash(torch.autograd.Function):
    """FlashAttention 2 on tensors laid out (batch, sequence, heads, head size).

    Forward keeps q, k, v, the output, the fp32 log-sum-exp (batch, heads, sequence) and two small generator states.
    Backward takes dq, dk, dv, and for its own duration: the fp32 accumulator of dq, with the sequence rounded up to
    128 and the head size to 32 (64 above 128); `softmax_d` in fp32; and, with grouped heads, dk and dv of *all*
    query heads, which it then sums.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        batch, length, heads, _ = q.shape
        out = torch.empty_like(q)
        log_sum_exp = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
        generator_state = torch.empty(2, dtype=torch.uint64, device=q.device)
        unused = torch.empty((), dtype=torch.uint64, device=q.device)
        ctx.save_for_backward(q, k, v, out, log_sum_exp, generator_state, unused)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, out, *_ = ctx.saved_tensors
        grad_out = grads[0].contiguous()
        out = out.contiguous()
        batch, length, heads, head_size = q.shape
        rounded_length = _round_up(length, 128)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        softmax_d = torch.empty(batch, heads, rounded_length, dtype=torch.float32, device=q.device)
        dq_accumulator = torch.empty(
            batch, rounded_length, heads, _flash_head_size(head_size), dtype=torch.float32, device=q.device
        )
        expanded = _expanded_gradients(k, v, heads)
        del softmax_d, dq_accumulator, expanded, grad_out, out
        return dq, dk, dv


def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """FlashAttention on (batch, sequence, heads, head size), padding the head size to a multiple of 8 as the real
    wrapper does.
    """
    head_size = q.shape[-1]
    if head_size % 8:
        q, k, v = (F.pad(t, (0, 8 - head_size % 8)) for t in (q, k, v))
        return _Flash.apply(q, k, v)[..., :head_size]
    return _Flash.apply(q, k, v)


class _CuDnn(torch.autograd.Function):
    """cuDNN's attention on (batch, sequence, heads, head size), PyTorch's first choice on Hopper as of torch 2.11.

    Forward keeps q, k, v, an additive mask, the output, the fp32 log-sum-exp, and two scalars of the random generator.
    Backward takes dq, dk, dv, an fp32 accumulator of dq, an fp32 row sum, and with grouped heads dk and dv of all
    query heads.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        batch, length, heads, _ = q.shape
        layout = sorted(
            range(4), key=lambda d: (-q.stride(d), d)
        )  # the output takes the order of the query's dimensions
        out = torch.empty_permuted((batch, length, heads, v.shape[-1]), layout, dtype=q.dtype, device=q.device)
        log_sum_exp = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
        seed, offset = (torch.empty((), dtype=torch.int64, device=q.device) for _ in range(2))
        torch.empty(1, dtype=torch.uint8, device=q.device)  # cuDNN's workspace, while the kernel runs
        ctx.save_for_backward(q, k, v, mask, out, log_sum_exp, seed, offset)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, *_ = ctx.saved_tensors
        batch, length, heads, _ = q.shape
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        row_sum = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
        dq_accumulator = torch.empty(q.shape, dtype=torch.float32, device=q.device)
        expanded = _expanded_gradients(k, v, heads)
        workspace = torch.empty(1, dtype=torch.uint8, device=q.device)
        del row_sum, dq_accumulator, expanded, workspace
        return dq, dk, dv, None


class _MemoryEfficient(torch.autograd.Function):
    """The memory-efficient (CUTLASS) kernel on (batch, sequence, heads, head size).

    Forward keeps q, k, v, an additive mask, the output and the fp32 log-sum-exp with the sequence rounded up to 32;
    16-bit heads above 128 also take an fp32 accumulator of the output. Backward takes dq, dk, dv and an fp32 row sum
    `delta`; for 16-bit inputs an fp32 accumulator of dq (and above 128 of dk and dv); for fp32 inputs `delta` comes
    from operators of its own, through one product of the output's size that lives as long as the C++ expression.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        batch, length, heads, _ = q.shape
        out = torch.empty(batch, length, heads, v.shape[-1], dtype=q.dtype, device=q.device)
        log_sum_exp = torch.empty(batch, heads, _round_up(length, 32), dtype=torch.float32, device=q.device)
        if v.shape[-1] > 128 and q.dtype != torch.float32:
            torch.empty(out.shape, dtype=torch.float32, device=q.device)
        ctx.save_for_backward(q, k, v, mask, out, log_sum_exp)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, mask, out, _ = ctx.saved_tensors
        batch, length, heads, head_size = q.shape
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        dmask = torch.empty_like(mask) if mask is not None and ctx.needs_input_grad[3] else None
        held: list[torch.Tensor] = []
        if q.dtype == torch.float32:
            held = [grads[0] * out]
            held.append(held[0].sum(-1))
            held.append(held[1].transpose(-2, -1).contiguous())
        else:
            held = [torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)]
            for t in (q, k, v) if head_size > 128 else (q,):
                width = _round_up(t.shape[-1], 64 if head_size <= 64 else 128) if head_size <= 128 else t.shape[-1]
                rounded = (batch, heads, _round_up(t.shape[1], 64), width)
                held.append(torch.empty(rounded, dtype=torch.float32, device=q.device))
            block = 64 if head_size <= 64 else 128  # each block of queries has a counter of 16 bytes in the workspace
            held.append(torch.empty(batch, heads, -(-length // block), 16, dtype=torch.uint8, device=q.device))
        held.clear()
        return dq, dk, dv, dmask


class _RmsNorm(torch.autograd.Function):
    """`_fused_rms_norm`: keeps the input, the weight and 1/rms in fp32, one value a row; backward takes the two
    gradients.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: tuple[int, ...], weight: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight, torch.empty(rows, dtype=torch.float32, device=x.device))
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, _ = ctx.saved_tensors
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        return dx, None, torch.empty_like(weight) if ctx.needs_input_grad[2] else None


class _LayerNorm(torch.autograd.Function):
    """`native_layer_norm`: keeps the input, the weight, and mean and 1/std in fp32, one value a row each."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, rows: tuple[int, ...], weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        mean, deviation = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
        ctx.save_for_backward(x, weight, bias, mean, deviation)
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, bias, *_ = ctx.saved_tensors
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dweight = torch.empty_like(weight) if ctx.needs_input_grad[2] else None
        return dx, None, dweight, torch.empty_like(bias) if ctx.needs_input_grad[3] else None


class CudaSemantics:
    """A context in which SDPA, dropout, the norms and mixed softmax keep on the CPU what they keep on CUDA.

    `kernel` names the kernel of `scaled_dot_product_attention`. "auto" is PyTorch's order before Hopper: flash for
    16-bit inputs without a mask and head sizes that are equal and at most 256, memory-efficient for what else it
    covers, math for the rest. "auto-cudnn" puts cuDNN first for every 16-bit input with head sizes up to 256, as
    torch 2.11 does on an H200.
    """

    def __init__(self, *, kernel: str = "auto") -> None:
        if kernel not in SDPA_KERNELS:
            raise PlanError(f'no attention kernel "{kernel}"; {nearest(kernel, SDPA_KERNELS)}')
        self.kernel = kernel
        self._library: torch.library.Library | None = None

    def __enter__(self) -> CudaSemantics:
        self._library = library = torch.library.Library("aten", "IMPL")
        for name, implementation in (
            ("scaled_dot_product_attention", self.attend),
            ("dropout", _dropout),
            ("rms_norm", _rms_norm),
            ("layer_norm", _layer_norm),
            ("softmax.int", _softmax),
        ):
            library.impl(name, implementation, "AutogradCPU")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._library is not None:
            self._library._destroy()
            self._library = None

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """`scaled_dot_product_attention` on (batch, heads, sequence, head size), by the kernel that CUDA would pick."""
        kernel = self.kernel
        if kernel.startswith("auto"):
            kernel = _kernel_picked(query, key, value, attn_mask, cudnn_first=kernel == "auto-cudnn")
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
            if mask.shape[-1] % 8 and kernel == "mem_efficient":  # pad_bias: the kernel reads aligned rows
                mask = F.pad(mask, (0, 8 - mask.shape[-1] % 8))
            mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], mask.shape[-1])
        return (_CuDnn if kernel == "cudnn" else _MemoryEfficient).apply(q, k, v, mask).transpose(1, 2)


def _kernel_picked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, *, cudnn_first: bool
) -> str:
    head_size, value_size = query.shape[-1], value.shape[-1]
    grouped = key.shape[1] != query.shape[1]
    if cudnn_first and query.dtype in _16_BIT and head_size <= 256 and not head_size % 8 and not value_size % 8:
        return "cudnn"
    if query.dtype in _16_BIT and mask is None and head_size == value_size and head_size <= _FLASH_MAX_HEAD_SIZE:
        return "flash"
    alignment = 4 if query.dtype == torch.float32 else 8
    if (
        query.dtype in (*_16_BIT, torch.float32)
        and not grouped
        and not head_size % alignment
        and not value_size % alignment
    ):
        return "mem_efficient"
    return "math"


def _dropout(x: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    if not train or p == 0.0 or x.numel() == 0:
        return x
    if p == 1.0:
        return x * torch.zeros_like(x)
    return torch.ops.aten.native_dropout(x, p, True)[0]


def _rows(x: torch.Tensor, normalized_shape: Any) -> tuple[int, ...]:
    return (*x.shape[: x.dim() - len(normalized_shape)], *(1 for _ in normalized_shape))


def _rms_norm(
    x: torch.Tensor, normalized_shape: Any, weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    return _RmsNorm.apply(x.contiguous(), _rows(x, normalized_shape), weight)


def _layer_norm(
    x: torch.Tensor, normalized_shape: Any, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None,
    eps: float = 1e-5, cudnn_enable: bool = True,
) -> torch.Tensor:  # fmt: skip
    return _LayerNorm.apply(x.contiguous(), _rows(x, normalized_shape), weight, bias)


def _softmax(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    if x.dtype == torch.float16 and dtype == torch.float32:
        return torch.ops.aten._softmax.default(x, dim, True)
    return torch.ops.aten._softmax.default(x if dtype is None else x.to(dtype), dim, False)


def _softmax_backward_scratch(args: Any) -> int:
    grad, output = args[0], args[1]  # SoftMax.cu multiplies grad * output into a tensor of its own first
    return grad.numel() * torch.promote_types(grad.dtype, output.dtype).itemsize


def _safe_softmax_scratch(args: Any) -> int:
    scores, dim = args[0], args[1]  # which scores are -inf, and which rows are so altogether, one byte each
    return scores.numel() + scores.numel() // scores.shape[dim]


def _embedding_backward_scratch(args: Any) -> int:
    """EmbeddingBackwardKernel.cu: above 3072 indices they are sorted, and fp32 partial sums taken every 10 rows of a
    segment.

    Index tables of 8 bytes an entry: sorted and original (two of n), segment offsets, partials and their offsets
    (three of the most segments), and the offsets of the partial segments.
    """
    grad, indices, rows = args[0], args[1], args[2]
    count, width = indices.numel(), grad.shape[-1]
    if count <= 3072 and args[3] < 0:
        return 0
    segments = min(count, rows)
    partial_segments = count // 10 + segments
    counters = 2 * 512
    return partial_segments * _round_up(width, 32) * 4 + 8 * (2 * count + 3 * segments + partial_segments) + counters


def _reduction_scratch(args: Any) -> int:
    """The buffer in which thread blocks combine a sum over leading dimensions (gradients of biases and norm weights).

    Measured on an H200 (132 multiprocessors), torch 2.11: 8 bytes an element of a (rows, columns) input, in bf16 and in
    fp32 alike, up to 1 MiB a multiprocessor; read for 1024 to 65536 rows and 256 to 16384 columns (where the limit was
    exceeded by 3 % at 16384 columns), and a 4-byte semaphore for 128 columns. Fewer rows were not read, and are
    taken to be summed within one block.
    """
    x = args[0]
    dims = sorted(d % x.dim() for d in (args[1] if len(args) > 1 and args[1] is not None else ()))
    if not dims or dims != list(range(len(dims))) or len(dims) == x.dim():
        return 0
    rows = x.shape[: len(dims)].numel()
    semaphores = 4 * -(-(x.numel() // max(rows, 1)) // 128)
    return min(8 * x.numel(), REDUCTION_BUFFER_LIMIT_BYTES) + semaphores if rows >= 1024 else 0


KERNEL_SCRATCH: dict[Any, Callable[[Any], int]] = {
    torch.ops.aten._softmax_backward_data.default: _softmax_backward_scratch,
    torch.ops.aten._safe_softmax.default: _safe_softmax_scratch,
    torch.ops.aten.embedding_dense_backward.default: _embedding_backward_scratch,
    torch.ops.aten.sum.dim_IntList: _reduction_scratch,
    torch.ops.aten.mean.dim: _reduction_scratch,
}
