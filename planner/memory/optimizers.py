"""Optimizers: the state each keeps for a parameter tensor, and what its step allocates for a moment.

Each entry names the code it describes. `state` is GPU bytes of all states; `step` is the highest level of temporaries
during `optimizer.step()`. n is the number of elements of a tensor, s the bytes of a state element, g those of a
gradient element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from planner.errors import UnknownField, nearest
from planner.formats import BITS
from planner.ledger.parameters import StateTensor
from planner.ledger.tape import allocated_bytes
from planner.plan import Optimizer

__all__ = ["OPTIMIZERS", "OptimizerBytes", "optimizer_bytes"]

EIGHT_BIT_BLOCK = 256  # bitsandbytes optimizer.py: blockwise quantisation of states, one fp32 absmax each
EIGHT_BIT_SMALLEST = 4096  # min_8bit_size: smaller tensors keep fp32 states
REDUCED_ROWS = 1024  # sums over so many rows are split over thread blocks, which combine them in a buffer
REDUCTION_BUFFER_BYTES = 132 * 1024 * 1024  # its largest size: 1 MiB for each of an H200's multiprocessors
PAGED_SMALLEST = 100_000  # get_state_buffer: smaller tensors are not paged


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerBytes:
    """GPU bytes of the states and of the step's temporaries; paged states live in managed memory and count apart."""

    states: int
    step: int
    paged: int = 0


def optimizer_bytes(optimizer: Optimizer, tensors: Sequence[StateTensor], state_format: str) -> OptimizerBytes:
    """States and temporaries for the trained tensors. state_format: fp32, bf16, ... for optimizers that follow it.

    A tensor kept in a wider format than `state_format` (fp32 adapters beside 16-bit weights) keeps states of its own
    width, as torch's optimizers make them with `zeros_like`.
    """
    rule = OPTIMIZERS.get(optimizer.name)
    if rule is None:
        raise UnknownField(f'optimizer "{optimizer.name}" is not known; {nearest(optimizer.name, OPTIMIZERS)}')
    return rule(optimizer, [tensor for tensor in tensors if tensor.trainable], state_format)


def _width(tensor: StateTensor, state_format: str) -> int:
    return max(BITS[tensor.dtype], BITS[state_format]) // 8


def _each(tensors: Sequence[StateTensor], size: Callable[[StateTensor], int]) -> int:
    return sum(tensor.repeat * allocated_bytes(size(tensor)) for tensor in tensors)


def _largest(tensors: Sequence[StateTensor], size: Callable[[StateTensor], int]) -> int:
    return max((allocated_bytes(size(tensor)) for tensor in tensors), default=0)


def _in_turn(tensors: Sequence[StateTensor]) -> Iterator[tuple[StateTensor | None, StateTensor]]:
    """Each tensor with the one that is stepped just before it; a block's first also follows a block's last."""
    before = first = None
    for tensor in tensors:
        if before is not None and first is not None and tensor.unit != before.unit and before.repeat > 1:
            yield before, first
        if first is None or before is None or tensor.unit != before.unit:
            first = tensor
        yield before, tensor
        before = tensor


def _adam(optimizer: Optimizer, tensors: Sequence[StateTensor], state_format: str) -> OptimizerBytes:
    """exp_avg and exp_avg_sq, 2 n s (3 with amsgrad). torch/optim/adam.py:

    foreach   exp_avg_sq_sqrt = _foreach_sqrt(exp_avg_sqs), for all tensors at once                          n s
    for-loop  exp_avg_sq.sqrt() and its quotient, and the quotient of the tensor before, still named     2 n s + n' s
    fused     none, but one fp32 step counter for each tensor is on the GPU
    """

    def size(tensor: StateTensor) -> int:
        return allocated_bytes(tensor.elements * _width(tensor, state_format))

    states = (3 if optimizer.amsgrad else 2) * _each(tensors, size)
    if optimizer.implementation == "fused":
        return OptimizerBytes(states=states + _each(tensors, lambda _: 4), step=0)
    if optimizer.implementation == "foreach":
        return OptimizerBytes(states=states, step=_each(tensors, size))
    step = max((2 * size(tensor) + (size(before) if before else 0) for before, tensor in _in_turn(tensors)), default=0)
    return OptimizerBytes(states=states, step=step)


def _sgd(optimizer: Optimizer, tensors: Sequence[StateTensor], state_format: str) -> OptimizerBytes:
    """No state, no temporaries: the gradient is added in place (torch/optim/sgd.py)."""
    return OptimizerBytes(states=0, step=0)


def _momentum(optimizer: Optimizer, tensors: Sequence[StateTensor], state_format: str) -> OptimizerBytes:
    """momentum_buffer, n s; updated and applied in place (torch/optim/sgd.py)."""
    return OptimizerBytes(states=_each(tensors, lambda tensor: tensor.elements * _width(tensor, state_format)), step=0)


def _lion(optimizer: Optimizer, tensors: Sequence[StateTensor], state_format: str) -> OptimizerBytes:
    """exp_avg, n s. One tensor at a time: a clone of exp_avg, its sum with the gradient (arXiv:2302.06675, alg. 2)."""

    def size(tensor: StateTensor) -> int:
        return tensor.elements * _width(tensor, state_format)

    return OptimizerBytes(states=_each(tensors, size), step=2 * _largest(tensors, size))


def _adafactor(optimizer: Optimizer, tensors: Sequence[StateTensor], state_format: str) -> OptimizerBytes:
    """Row and column means of the squared gradient in fp32 for matrices, all n for vectors (arXiv:1804.04235).

    transformers/optimization.py (not torch's own Adafactor), one tensor at a time, in fp32:
                                                                     16-bit weights   fp32 weights
        the gradient's copy                                                4 n            0
        the weight's copy                                                  4 n            0
        grad ** 2 beside its sum with eps, later the update beside it      8 n            8 n
        the update of the tensor before, still named                       4 n'           4 n'
    or, instead of the last two, the sum with eps (4 n) and what its mean over 1024 rows or more takes: 8 n up to
    132 MiB (`planner.measure.cuda_semantics`, measured on one H200). A tensor's RMS is one fp32 number on the GPU.
    """

    def state(tensor: StateTensor) -> int:
        if len(tensor.shape) < 2:
            return allocated_bytes(4 * tensor.elements) + allocated_bytes(4)
        rows, columns = tensor.shape[-2:]
        outer = tensor.elements // (rows * columns)
        return allocated_bytes(4 * outer * rows) + allocated_bytes(4 * outer * columns) + allocated_bytes(4)

    def temporaries(before: StateTensor | None, tensor: StateTensor) -> int:
        one = allocated_bytes(4 * tensor.elements)
        copies = 2 * one if BITS[tensor.dtype] < 32 else 0
        sums = 2 * one + (allocated_bytes(4 * before.elements) if before else 0)
        reduces = len(tensor.shape) == 2 and tensor.shape[0] >= REDUCED_ROWS
        mean = one + min(2 * one, REDUCTION_BUFFER_BYTES) if reduces else 0
        return copies + max(sums, mean)

    return OptimizerBytes(
        states=sum(tensor.repeat * state(tensor) for tensor in tensors),
        step=max((temporaries(before, tensor) for before, tensor in _in_turn(tensors)), default=0),
    )


def _adam_8bit(optimizer: Optimizer, tensors: Sequence[StateTensor], state_format: str) -> OptimizerBytes:
    """Two block-wise 8-bit states with their fp32 absmax; tensors under 4096 elements keep fp32 states.

    bitsandbytes/optim/optimizer.py: 2 (n + 4 n/256) and two shared 256-entry fp32 maps. The kernels update in place.
    """
    states, paged = _eight_bit(tensors, paged=False)
    return OptimizerBytes(states=states, step=0, paged=paged)


def _paged_adam_8bit(optimizer: Optimizer, tensors: Sequence[StateTensor], state_format: str) -> OptimizerBytes:
    """As adamw-8bit, with the two states of tensors of 100,000 elements or more in CUDA managed memory."""
    states, paged = _eight_bit(tensors, paged=True)
    return OptimizerBytes(states=states, step=0, paged=paged)


def _eight_bit(tensors: Sequence[StateTensor], *, paged: bool) -> tuple[int, int]:
    states, managed = 2 * allocated_bytes(256 * 4), 0
    for tensor in tensors:
        n = tensor.elements
        if n < EIGHT_BIT_SMALLEST:
            states += tensor.repeat * 2 * allocated_bytes(4 * n)
            continue
        states += tensor.repeat * 2 * allocated_bytes(4 * -(-n // EIGHT_BIT_BLOCK))
        if paged and n >= PAGED_SMALLEST:
            managed += tensor.repeat * 2 * n
        else:
            states += tensor.repeat * 2 * allocated_bytes(n)
    return states, managed


def _adam_mini(optimizer: Optimizer, tensors: Sequence[StateTensor], state_format: str) -> OptimizerBytes:
    """exp_avg, n s, and one second moment for each row of a matrix (arXiv:2406.16793); one quotient at a time."""

    def size(tensor: StateTensor) -> int:
        return tensor.elements * _width(tensor, state_format)

    def second(tensor: StateTensor) -> int:
        return 4 * (tensor.elements // tensor.shape[-1] if len(tensor.shape) > 1 else 1)

    return OptimizerBytes(states=_each(tensors, size) + _each(tensors, second), step=_largest(tensors, size))


def _galore(optimizer: Optimizer, tensors: Sequence[StateTensor], state_format: str) -> OptimizerBytes:
    """Adam on gradients projected to rank r, for the blocks' matrices; plain Adam elsewhere (arXiv:2403.03507).

    For an (out, in) matrix: the projector has r rows of the shorter side, the two states r of the longer.
    Temporaries: refreshing a projector decomposes the fp32 gradient, 4 n, into U and V, 4 k (out + in), k the shorter.
    """

    def projected(tensor: StateTensor) -> bool:
        return tensor.unit == "block" and tensor.kind == "linear" and min(tensor.shape) > optimizer.rank

    def state(tensor: StateTensor) -> int:
        width = _width(tensor, state_format)
        if not projected(tensor):
            return 2 * allocated_bytes(tensor.elements * width)
        short, long = sorted(tensor.shape)
        return allocated_bytes(optimizer.rank * short * width) + 2 * allocated_bytes(optimizer.rank * long * width)

    def temporaries(tensor: StateTensor) -> int:
        if not projected(tensor):
            return 2 * tensor.elements * _width(tensor, state_format)
        return 4 * (tensor.elements + min(tensor.shape) * sum(tensor.shape))

    return OptimizerBytes(
        states=sum(tensor.repeat * state(tensor) for tensor in tensors), step=_largest(tensors, temporaries)
    )


def _muon(optimizer: Optimizer, tensors: Sequence[StateTensor], state_format: str) -> OptimizerBytes:
    """One momentum for the blocks' matrices, Adam elsewhere (torch/optim/_muon.py).

    Newton-Schulz for one matrix at a time, in bf16: the update, two copies of it, two (k, k) products; k the shorter.
    """
    hidden = [tensor for tensor in tensors if tensor.unit == "block" and len(tensor.shape) == 2]
    others = [tensor for tensor in tensors if not (tensor.unit == "block" and len(tensor.shape) == 2)]
    adam = _adam(optimizer, others, state_format)

    def temporaries(tensor: StateTensor) -> int:
        return tensor.elements * (BITS[tensor.dtype] // 8 + 4) + 4 * min(tensor.shape) ** 2

    momentum = _momentum(optimizer, hidden, state_format).states
    return OptimizerBytes(states=adam.states + momentum, step=max(adam.step, _largest(hidden, temporaries)))


def _lomo(optimizer: Optimizer, tensors: Sequence[StateTensor], state_format: str) -> OptimizerBytes:
    """No state: each weight is updated in backward, through fp32 copies of itself and its gradient when it is 16-bit
    (arXiv:2306.09782)."""
    step = _largest(tensors, lambda tensor: tensor.elements * (8 if BITS[tensor.dtype] < 32 else 0))
    return OptimizerBytes(states=0, step=step)


Rule = Callable[[Optimizer, Sequence[StateTensor], str], OptimizerBytes]

OPTIMIZERS: dict[str, Rule] = {
    "sgd": _sgd,
    "sgd-momentum": _momentum,
    "adam": _adam,
    "adamw": _adam,
    "adafactor": _adafactor,
    "lion": _lion,
    "adamw-8bit": _adam_8bit,
    "paged-adamw-8bit": _paged_adam_8bit,
    "adam-mini": _adam_mini,
    "galore": _galore,
    "muon": _muon,
    "lomo": _lomo,
}
