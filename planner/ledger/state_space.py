"""State-space mixers, Mamba 1 and Mamba 2, as transformers 5.23 runs them without further packages.

The described path is the one in PyTorch alone: `mamba_selective_scan` of modeling_mamba.py (also Falcon-Mamba's and
Jamba's), a Python loop that keeps two states for each position, and `mamba2_chunk_scan` of modeling_mamba2.py (also
Nemotron-H's and Granite 4's), everything in fp32. The kernels of the packages mamba_ssm and causal_conv1d, which the
modules take where those are installed, never write states to memory and keep far less; they are not described here.

Letters: B batch, S sequence, H hidden, I inner width, N state size, K width of the convolution, R rank of the step;
Mamba 2: M heads, P head size, G groups, l positions of a chunk, n chunks.
"""

from __future__ import annotations

from planner.errors import NotCovered
from planner.formats import BITS
from planner.ledger.norm import normalise
from planner.ledger.operations import Operations
from planner.ledger.tape import Dims, Parameter, Tensor, allocated_bytes, trains
from planner.model.shape import Mamba1, Mamba2, Norm

__all__ = ["mix_by_chunk_scan", "mix_by_selective_scan"]


# ---- Mamba 1 --------------------------------------------------------------------------------------------------------


def mix_by_selective_scan(t: Operations, spec: Mamba1, x: Tensor, hidden: str) -> Tensor:
    """The branch of a Mamba 1 mixer for x, (B, S, H). MambaMixer.forward and its kin."""
    _check(t, spec)
    name, dtype = spec.name, x.dtype
    batch, sequence = x.dims[:2]
    inner, state, rank = t.dim("I", spec.inner), t.dim("N", spec.state), t.dim("R", spec.dt_rank)
    projected = t.linear(f"{name}.in_proj", x, t.dim("2I", 2 * spec.inner), bias=spec.proj_bias)
    projected = _permuted(t, projected, (batch, projected.dims[-1], sequence))
    rates = _rates(t, name, (inner, state))
    stream, gate = t.split(projected, [(batch, inner, sequence)] * 2)
    stream = _convolved(t, spec, stream)
    low = t.dim("R+2N", spec.dt_rank + 2 * spec.state)
    reads = [(batch, sequence, rank), (batch, sequence, state), (batch, sequence, state)]
    step, into, out = t.split(t.linear(f"{name}.x_proj", t.copy(t.view(stream, (batch, sequence, inner))), low), reads)
    if spec.norms != "none":
        norm = Norm(kind="rmsnorm", affine=spec.norms == "weighted")
        step = normalise(t, norm, f"{name}.dt_layernorm", step)
        into = normalise(t, norm, f"{name}.b_layernorm", into)
        out = normalise(t, norm, f"{name}.c_layernorm", out)
    t.module = f"{name}.dt_proj"
    step = _permuted(t, t.product(step, t.weight(f"{t.module}.weight", (inner, rank)), (batch, sequence, inner)))
    step = t.copy(t.view(step, stream.dims))
    offset = _upcast(t, t.weight(f"{t.module}.bias", (inner,)))
    t.module = f"{name}.scan"
    core = _selective_scan(t, name, stream, step, offset, rates, into, out, gate)
    core = t.to(t.view(core, (batch, sequence, inner)), dtype)
    return t.linear(f"{name}.out_proj", t.copy(core), hidden, bias=spec.proj_bias)


def _selective_scan(
    t: Operations,
    name: str,
    stream: Tensor,
    step: Tensor,
    offset: Tensor | Parameter,
    rates: Tensor,
    into: Tensor,
    out: Tensor,
    gate: Tensor,
) -> Tensor:
    """mamba_selective_scan; (B, I, S). Of the whole (B, I, S, N), fp32, live until the end: the decay, which exp keeps;
    step * B, which the next product keeps; and step * B * x, which nobody does.
    """
    batch, inner, sequence = stream.dims
    state = rates.dims[-1]
    column, wide = (*stream.dims, "1"), (*stream.dims, state)
    step = t.map("softplus", _shifted(t, step, offset))
    decay = t.map("exp", t.mul(t.view(rates, ("1", inner, "1", state)), t.view(step, column), wide), saves="output")
    reach = t.mul(t.view(step, column), t.to(t.view(into, (batch, "1", sequence, state)), "fp32"), wide)
    drive = t.mul(reach, t.to(t.view(stream, column), "fp32"), wide)
    core, _outputs, _last = _scanned(t, decay, drive, out, stream.dtype)
    skip = _upcast(t, t.weight(f"{name}.D", (inner,)))
    core = t.add(core, t.mul(stream, skip, stream.dims))
    return t.mul(core, t.map("silu", gate))


def _scanned(t: Operations, decay: Tensor, drive: Tensor, out: Tensor, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """The loop over positions: state = decay[s] * state + drive[s]; output[s] = state.to(dtype) @ C[s].

    Returns the stacked outputs, (B, I, S); and what lives on in local variables: each position's output, and the last
    state. Kept for each position, (B, I, N) each: the state before it, in fp32, for the gradient of its decay (the
    zeros before the first are in `dtype`), and the state after it in `dtype`, for the gradient of C: one and the same
    tensor where `dtype` is fp32.

    Backward writes the gradient of every slice into zeros of the whole, (B, I, S, N), and adds that to the sum: three
    whole tensors at once, the sums for decay and for drive and one slice's. When they first meet, the last position's
    states have gone and its gradient is there: together one fp32 state less.
    """
    batch, inner, sequence, state = decay.dims
    one = (batch, inner, state)
    wide = (decay.dims, "fp32")
    fewer = t.dim("S-1", t.sizes[sequence] - 1)
    kept: list[tuple[Dims, str]] = [(one, dtype)]
    if dtype == "fp32":
        kept.append(_each(t, sequence, one, "fp32"))
    else:
        kept += [_each(t, fewer, one, "fp32"), _each(t, sequence, one, dtype)]
    flows = t.enabled and (trains(decay) or trains(drive) or trains(out))
    outputs = t.constant("outputs", *_each(t, sequence, (batch, inner), dtype))
    last = t.constant("last state", one, "fp32")
    (core,) = t.apply(
        "scan",
        [decay, drive, out],
        [((batch, inner, sequence), dtype)],
        saves=[decay, out],
        extra_saved=kept if flows else (),
        backward_scratch=[((batch, inner, fewer, state), "fp32")],
        gradient_dims=[wide, wide, None],
    )
    return core, outputs, last


def _each(t: Operations, count: str, dims: Dims, dtype: str) -> tuple[Dims, str]:
    """`count` tensors of these dims, each an allocation of its own, so that each is rounded up."""
    padded = allocated_bytes(t.elements(dims) * BITS[dtype] // 8) * 8 // BITS[dtype]
    return (count, t.dim("*".join(dims), padded)), dtype


# ---- Mamba 2 --------------------------------------------------------------------------------------------------------


def mix_by_chunk_scan(t: Operations, spec: Mamba2, x: Tensor, hidden: str) -> Tensor:
    """The branch of a Mamba 2 mixer for x, (B, S, H). Mamba2Mixer.forward and its kin."""
    _check(t, spec)
    name, dtype = spec.name, x.dtype
    batch, sequence = x.dims[:2]
    inner, heads = t.dim("I", spec.inner), t.dim("M", spec.heads)
    group = spec.groups * spec.state
    wide, both = t.dim("I+2GN", spec.inner + 2 * group), t.dim("GN", group)
    total = t.dim("2I+2GN+M", 2 * spec.inner + 2 * group + spec.heads)
    projected = t.linear(f"{name}.in_proj", x, total, bias=spec.proj_bias)
    rates = _rates(t, name, (heads,))
    row = (batch, sequence)
    gate, stream, step = t.split(projected, [(*row, inner), (*row, wide), (*row, heads)])
    stream = _convolved(t, spec, t.view(stream, (batch, wide, sequence)))
    parts = t.split(t.view(stream, (*row, wide)), [(*row, inner), (*row, both), (*row, both)])
    t.module = f"{name}.scan"
    core = _chunk_scan(t, spec, parts, step, rates)
    core = _gated_norm(t, spec, core, gate)
    return t.linear(f"{name}.out_proj", t.to(core, dtype), hidden, bias=spec.proj_bias)


def _chunk_scan(t: Operations, spec: Mamba2, parts: list[Tensor], step: Tensor, rates: Tensor) -> Tensor:
    """mamba2_chunk_scan; (B, S, I) in fp32. All local variables live until the end."""
    values, keys, queries = parts
    batch, sequence, heads = step.dims
    offset = t.weight(f"{spec.name}.dt_bias", (heads,))
    size, state = t.dim("P", spec.head_dim), t.dim("N", spec.state)
    by_head = (batch, sequence, heads, size)
    step = _shifted(t, step, offset)
    step = t.map("softplus", step)
    (step,) = t.apply("clamp", [step], [(step.dims, step.dtype)], saves=[step], backward_scratch=[(step.dims, "bool")] * 2)
    values = t.to(t.view(values, by_head), "fp32")
    keys = _for_each_head(t, spec, keys, state)
    queries = _for_each_head(t, spec, queries, state)
    padded = t.dim("S up to l", -(-t.sizes[sequence] // spec.chunk) * spec.chunk)
    chunks, chunk = t.dim("n", t.sizes[padded] // spec.chunk), t.dim("l", spec.chunk)
    skip = t.weight(f"{spec.name}.D", (heads,))
    long = (batch, padded, heads, size)
    skipped = t.mul(t.weight_column(skip) if False else _head_column(skip), _padded(t, values, long), long)
    values = t.mul(values, t.to(t.view(step, (*step.dims, "1")), "fp32"), by_head)
    decay = t.mul(rates, t.to(step, "fp32"), step.dims)
    return skipped if values is decay else _within_and_across(t, spec, values, decay, keys, queries, skipped)
