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
    projected = _transposed(t, projected, (batch, projected.dims[-1], sequence))
    rates = _rates(t, name, (inner, state))
    stream, gate = t.split(projected, [(batch, inner, sequence)] * 2)
    low = t.dim("R+2N", spec.dt_rank + 2 * spec.state)
    stream, laid = _activated(t, name, _convolved(t, spec, stream), low)
    reads = [(batch, sequence, rank), (batch, sequence, state), (batch, sequence, state)]
    step, into, out = t.split(t.linear(f"{name}.x_proj", laid, low), reads)
    del laid
    if spec.norms != "none":
        norm = Norm(kind="rmsnorm", affine=spec.norms == "weighted")
        step = normalise(t, norm, f"{name}.dt_layernorm", step)
        into = normalise(t, norm, f"{name}.b_layernorm", into)
        out = normalise(t, norm, f"{name}.c_layernorm", out)
    t.module = f"{name}.dt_proj"
    raised = t.product(step, t.weight(f"{t.module}.weight", (inner, rank)), (batch, sequence, inner))
    step = t.copy(_transposed(t, raised, stream.dims))
    del raised
    offset = _upcast(t, t.weight(f"{t.module}.bias", (inner,)))
    t.module = f"{name}.scan"
    core = _selective_scan(t, name, stream, step, offset, rates, into, out, gate)
    core = t.view(core, (batch, sequence, inner))
    if core.dtype != dtype:
        (core,) = t.apply("to", [core], [((_several(t, batch), sequence, inner), dtype)])
    return t.linear(f"{name}.out_proj", t.copy(t.view(core, (batch, sequence, inner))), hidden, bias=spec.proj_bias)


def _several(t: Operations, batch: str) -> str:
    """The batch dim of a copy that is made for several examples alone.

    What is transposed to (B, I, S) is copied before the next matrix product; one example is read as it lies.
    """
    return t.dim("B if > 1", t.sizes[batch] * (t.sizes[batch] > 1))


def _activated(t: Operations, name: str, x: Tensor, low: str) -> tuple[Tensor, Tensor]:
    """silu(x), and the same in the order of x_proj's input: a copy for several examples, itself for one.

    Where x_proj keeps it to the end, the one row that always exists is the copy; elsewhere it is silu's output.
    """
    batch, inner, sequence = x.dims
    some, in_order = (_several(t, batch), inner, sequence), (batch, sequence, inner)
    kept = t.enabled and t.weight(f"{name}.x_proj.weight", (low, inner)).trainable
    (stream,) = t.apply("silu", [x], [(some if kept else x.dims, x.dtype)], saves=[x])
    (copied,) = t.apply("copy", [stream], [(in_order if kept else some, x.dtype)], alias=True)
    return t.view(stream, x.dims), t.view(copied, in_order)


def _transposed(t: Operations, x: Tensor, dims: Dims) -> Tensor:
    """The same memory in another order; the gradient is copied back into the first order, for several examples."""
    copied = ((_several(t, x.dims[0]), *x.dims[1:]), x.dtype)
    return t.apply("transpose", [x], [(dims, x.dtype)], view=True, backward_scratch=[copied])[0]


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


def _scanned(
    t: Operations, decay: Tensor, drive: Tensor, out: Tensor, dtype: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loop over positions: state = decay[s] * state + drive[s]; output[s] = state.to(dtype) @ C[s].

    Returns the stacked outputs, (B, I, S); and what lives on in local variables: each position's output, and the last
    state where it is not kept anyhow. Kept for each position, (B, I, N) each: the state before it, in fp32, for the gradient of its decay (the
    zeros before the first are in `dtype`), and the state after it in `dtype`, for the gradient of C: one and the same
    tensor where `dtype` is fp32.

    Backward writes the gradient of every slice into zeros of the whole, (B, I, S, N), and adds that to the sum: three
    whole tensors at once, the sums for decay and for drive and one slice's. When they first meet, two positions' states
    have gone and two gradients of a state are there: less by one fp32 state, or by none where `dtype` is fp32.
    """
    batch, inner, sequence, state = decay.dims
    one = (batch, inner, state)
    wide = (decay.dims, "fp32")
    fewer = t.dim("S-1", t.sizes[sequence] - 1)
    same = dtype == "fp32"
    states = (
        [_each(t, sequence, one, dtype)] if same else [_each(t, fewer, one, "fp32"), _each(t, sequence, one, dtype)]
    )
    kept = [(one, dtype), *states]
    flows = t.enabled and (trains(decay) or trains(drive) or trains(out))
    outputs = t.constant("outputs", *_each(t, sequence, (batch, inner), dtype))
    last = None if same and flows else t.constant("last state", one, "fp32")
    (core,) = t.apply(
        "scan",
        [decay, drive, out],
        [((batch, inner, sequence), dtype)],
        saves=[decay, out],
        extra_saved=kept if flows else (),
        backward_scratch=[((batch, inner, sequence if same else fewer, state), "fp32")],
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
    row = x.dims[:2]
    inner, heads = t.dim("I", spec.inner), t.dim("M", spec.heads)
    shared = spec.groups * spec.state
    both, wide = t.dim("GN", shared), t.dim("I+2GN", spec.inner + 2 * shared)
    total = t.dim("2I+2GN+M", 2 * spec.inner + 2 * shared + spec.heads)
    projected = t.linear(f"{name}.in_proj", x, total, bias=spec.proj_bias)
    rates = _rates(t, name, (heads,))
    gate, stream, step = t.split(projected, [(*row, inner), (*row, wide), (*row, heads)])
    stream = t.map("silu", _convolved(t, spec, t.view(stream, (row[0], wide, row[1]))))
    stream = t.view(stream, (*row, wide))
    parts = t.split(stream, [(*row, inner), (*row, both), (*row, both)])
    t.module = f"{name}.scan"
    core = _chunk_scan(t, spec, parts, step, rates)
    core = _gated_norm(t, spec, core, gate)
    return t.linear(f"{name}.out_proj", t.to(core, dtype), hidden, bias=spec.proj_bias)


def _chunk_scan(t: Operations, spec: Mamba2, parts: list[Tensor], step: Tensor, rates: Tensor) -> Tensor:
    """mamba2_chunk_scan; (B, S, I), fp32. What comes in is turned to fp32, B and C repeated for every head, and all of
    it padded to whole chunks: a copy even where nothing is added.
    """
    values, keys, queries = parts
    batch, sequence, heads = step.dims
    size, state = t.dim("P", spec.head_dim), t.dim("N", spec.state)
    by_head = (batch, sequence, heads, size)
    step = _shifted(t, step, t.weight(f"{spec.name}.dt_bias", (heads,)))
    step = t.map("softplus", step)
    (step,) = t.apply(
        "clamp", [step], [(step.dims, step.dtype)], saves=[step], backward_scratch=[(step.dims, "bool")] * 2
    )
    values = t.to(t.view(values, by_head), "fp32")
    keys, queries = _for_each_head(t, spec, keys, state), _for_each_head(t, spec, queries, state)
    padded = t.dim("S up to l", -(-t.sizes[sequence] // spec.chunk) * spec.chunk)
    long = (batch, padded, heads, size)
    skipped = t.mul(t.weight(f"{spec.name}.D", (heads,)), _padded(t, values, long), long)
    values = t.mul(values, t.to(t.view(step, (*step.dims, "1")), "fp32"), by_head)
    decay = t.mul(rates, t.to(step, "fp32"), step.dims)
    chunked = (batch, t.dim("n", t.sizes[padded] // spec.chunk), t.dim("l", spec.chunk), heads)
    values, decay, keys, queries = (
        _permuted(t, _padded(t, values, long), (*chunked, size)),
        t.view(_padded(t, decay, long[:3]), (batch, heads, *chunked[1:3])),
        _permuted(t, _padded(t, keys, (*long[:3], state)), (*chunked, state)),
        _permuted(t, _padded(t, queries, (*long[:3], state)), (*chunked, state)),
    )
    core = _scan_chunks(t, values, decay, keys, queries)
    core = t.add(t.view(core, long), skipped)
    return _cut(t, core, (batch, sequence, t.dim("I", spec.inner)))


def _scan_chunks(t: Operations, values: Tensor, decay: Tensor, keys: Tensor, queries: Tensor) -> Tensor:
    """Within each chunk as attention, across chunks by a matrix state: (B, n, l, M, P). Saved, in fp32:

        exp of the pairwise sums, and the scores      (B, n, l, l, M)     3
        C, B, B decayed and C again, in bmm's order   (B, n, l, M, N)     4, and B itself for the decay
        values, in the order of two products          (B, n, l, M, P)     2
        C times state, for the decay                  (B, n, l, M, P)     1
        states, twice                                 (B, n, M, P, N)     (2 n + 1) / n

    Where all positions fit into one chunk (n = 1) torch reads values and states as they lie, without the copies that
    are stated here: then P M (N - l) fp32 values more are kept for each example, and less passes by.
    """
    batch, chunks, chunk, heads, size = values.dims
    state = keys.dims[-1]
    total = t.apply("cumsum", [decay], [(decay.dims, "fp32")])[0]
    within = t.map("exp", _segment_sum(t, decay), saves="output")
    pairs = (batch, chunks, chunk, chunk, heads)
    scores = t.matmul(t.copy(queries), t.copy(keys), pairs)
    weights = t.mul(scores, t.view(within, pairs))
    diagonal = _permuted(t, t.matmul(weights, t.copy(values), values.dims), values.dims)
    to_end = t.map("exp", t.scale(total, "sub"), saves="output")
    fading = t.mul(keys, t.view(to_end, (*values.dims[:4], "1")), keys.dims)
    by_chunk = (batch, chunks, heads, size, state)
    states = _permuted(t, t.matmul(t.copy(fading), t.copy(values), by_chunk), by_chunk)
    before = t.constant("zeros_like", (batch, "1", heads, size, state), "fp32")
    one_more = t.dim("n+1", t.sizes[chunks] + 1)
    states = t.cat([before, states], (batch, one_more, heads, size, state))
    ends = t.apply("pad", [total], [((batch, heads, one_more), "fp32")])
    across = t.map("exp", _segment_sum(t, ends.pop()), saves="output")
    states = _permuted(t, t.matmul(across, t.copy(states), states.dims), states.dims)
    (states,) = t.slices(states, [by_chunk])
    from_start = t.map("exp", total, saves="output")
    read = _permuted(t, t.matmul(t.copy(queries), t.copy(states), values.dims), values.dims)
    beyond = t.mul(read, t.view(from_start, (*values.dims[:4], "1")), values.dims)
    return t.copy(t.add(diagonal, beyond))


def _segment_sum(t: Operations, x: Tensor) -> Tensor:
    """Sums over all stretches of the last dim, (..., l, l): two triangular masks, each kept inverted."""
    pairs = ((*x.dims, x.dims[-1]), "fp32")
    mask = ((x.dims[-1], x.dims[-1]), "bool")
    lower = t.constant("tril", *mask)
    (x,) = t.apply("masked_fill", [x], [pairs], extra_saved=[mask], raw_gradients=[pairs])
    (x,) = t.apply("cumsum", [x], [pairs], backward_scratch=[pairs] * 2)
    (x,) = t.apply("masked_fill", [x], [pairs], extra_saved=[mask])
    del lower
    return x


def _for_each_head(t: Operations, spec: Mamba2, x: Tensor, state: str) -> Tensor:
    """The groups' B or C in fp32, repeated for every head."""
    row = x.dims[:2]
    x = t.to(t.view(x, (*row, t.dim("G", spec.groups), state)), "fp32")
    return t.copy(x, (*row, t.dim("M", spec.heads), state), "repeat_interleave")


def _padded(t: Operations, x: Tensor, dims: Dims) -> Tensor:
    return t.apply("pad", [x], [(dims, x.dtype)])[0]


def _cut(t: Operations, x: Tensor, dims: Dims) -> Tensor:
    """x without the padded positions: a view, whose gradient is written into zeros of the whole, if there are any."""
    longer = t.sizes[x.dims[1]]
    cut = t.dim("S up to l, if cut", longer * (longer > t.sizes[dims[1]]))
    whole = ((x.dims[0], cut, *x.dims[2:]), x.dtype)
    return t.apply("slice", [x], [(dims, x.dtype)], view=True, backward_scratch=[whole])[0]


def _gated_norm(t: Operations, spec: Mamba2, x: Tensor, gate: Tensor) -> Tensor:
    """weight * norm(x * silu(z)), by group, in fp32 all through as x is."""
    t.module = f"{spec.name}.norm"
    x = t.mul(x, t.map("silu", t.to(gate, "fp32")))
    groups = "1" if t.family in _NORMS_TOGETHER else t.dim("G", spec.groups)
    row = ((*x.dims[:2], groups, "1"), "fp32")
    (mean,) = t.apply("mean", [t.map("pow", x)], [row])
    scale = t.map("rsqrt", t.scale(mean, "add scalar"), saves="output")
    x = t.view(t.mul(t.view(x, (*x.dims, "1")), scale, (*x.dims, "1")), x.dims)
    return t.mul(t.weight(f"{t.module}.weight", (x.dims[-1],)), x)


# ---- both -----------------------------------------------------------------------------------------------------------


def _check(t: Operations, spec: Mamba1 | Mamba2) -> None:
    if t.profile.name == "transformers" and not t.profile.version.startswith("5"):
        raise NotCovered(
            f"state-space mixers of transformers {t.profile.version} are not in the ledger; those of 5 are."
        )
    if isinstance(spec, Mamba1) and t.quantized(f"{spec.name}.dt_proj"):
        raise NotCovered(
            "Mamba 1 with 4-bit weights is not in the ledger: it multiplies with dt_proj outside its module."
        )


def _rates(t: Operations, name: str, dims: Dims) -> Tensor:
    """-exp(A_log), in fp32."""
    log = _upcast(t, t.weight(f"{name}.A_log", dims))
    return t.scale(t.apply("exp", [log], [(dims, "fp32")], saves_outputs=(0,))[0], "neg")


def _upcast(t: Operations, weight: Parameter) -> Tensor | Parameter:
    """weight.float()."""
    return weight if weight.dtype == "fp32" else t.apply("to", [weight], [(weight.dims, "fp32")])[0]


def _shifted(t: Operations, step: Tensor, offset: Tensor | Parameter) -> Tensor:
    """step + offset.to(step.dtype), one offset a channel or head."""
    if offset.dtype != step.dtype:
        (offset,) = t.apply("to", [offset], [(offset.dims, step.dtype)])
    whole = (step.dims, step.dtype)
    return t.apply("add", [step, offset], [whole], alias=[True, False], raw_gradients=[None, whole])[0]


def _permuted(t: Operations, x: Tensor, dims: Dims) -> Tensor:
    """The same memory in another order of dims; the gradient is copied back into the first order."""
    return t.apply("permute", [x], [(dims, x.dtype)], view=True, copies=True)[0]


def _convolved(t: Operations, spec: Mamba1 | Mamba2, x: Tensor) -> Tensor:
    """A causal depthwise convolution of x, (B, C, S), computed for K - 1 positions too many and cut."""
    batch, channels, sequence = x.dims
    t.module = f"{spec.name}.conv1d"
    own = [t.weight(f"{t.module}.weight", (channels, "1", t.dim("K", spec.conv)))]
    if spec.conv_bias:
        own.append(t.weight(f"{t.module}.bias", (channels,)))
    weights = [weight if t.compute in (None, weight.dtype) else t.cast(weight) for weight in own]
    longer = t.dim("S+K-1", t.sizes[sequence] + spec.conv - 1)
    saves = [x, weights[0] if isinstance(weights[0], Tensor) else None]
    (result,) = t.apply("convolution", [x, *weights], [((batch, channels, longer), x.dtype)], saves=saves)
    return t.slices(result, [x.dims])[0]


_NORMS_TOGETHER = frozenset({"granitemoehybrid", "bamba"})  # one norm over all groups
