"""Linear attention with a gated delta rule, as transformers 5.23 runs it without further packages.

modeling_qwen3_next.py, torch_chunk_gated_delta_rule: everything in fp32, in chunks of 64 positions, and one step of a
Python loop for each chunk. The kernels of flash-linear-attention, which the modules take where that package and a GPU
are there, keep far less; they are not described here.

Letters: B batch, S sequence, H hidden, P key heads, W value heads, X and Y key and value head size, n chunks.
"""

from __future__ import annotations

from planner.ledger.operations import Operations
from planner.ledger.tape import Dims, Tensor
from planner.model.shape import GatedDeltaNet

__all__ = ["CHUNK", "mix_by_delta_rule"]

CHUNK = 64


def mix_by_delta_rule(t: Operations, spec: GatedDeltaNet, x: Tensor, hidden: str) -> Tensor:
    """The mixer's branch for x, (B, S, H)."""
    batch, sequence = x.dims[:2]
    keys_wide = t.dim("PX", spec.key_heads * spec.key_dim)
    values_wide = t.dim("WY", spec.value_heads * spec.value_dim)
    mixed, gate, beta, step, _projected, unmixed = _inputs(t, spec, x, keys_wide, values_wide)
    mixed = _convolved(t, spec, mixed)
    del unmixed
    parts = [(batch, sequence, keys_wide), (batch, sequence, keys_wide), (batch, sequence, values_wide)]
    query, key, value = t.split(mixed, parts)
    heads = t.dim("W", spec.value_heads)
    beta_ = t.map("sigmoid", beta, saves="output")
    decay = _decay(t, spec, step, heads)
    core = _delta_rule(t, spec, query, key, value, decay, beta_)
    core = _gated_norm(t, spec, core, gate)
    return t.linear(f"{spec.name}.out_proj", core, hidden)


def _inputs(
    t: Operations, spec: GatedDeltaNet, x: Tensor, keys_wide: str, values_wide: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """What is convolved, the output gate z, beta and the time step; the projections, which live until the mixer is
    done; and what was put together to be convolved, which lives until that has been done.
    """
    batch, sequence = x.dims[:2]
    heads = t.dim("W", spec.value_heads)
    wide = t.dim("2PX+WY", 2 * spec.key_heads * spec.key_dim + spec.value_heads * spec.value_dim)
    name = spec.name
    if spec.projections == "split":
        mixed = t.linear(f"{name}.in_proj_qkv", x, wide)
        gate = t.linear(f"{name}.in_proj_z", x, values_wide)
        beta = t.linear(f"{name}.in_proj_b", x, heads)
        return mixed, gate, beta, t.linear(f"{name}.in_proj_a", x, heads), [], []
    total = 2 * (spec.key_heads * spec.key_dim + spec.value_heads * spec.value_dim)
    packed = t.linear(f"{name}.in_proj_qkvz", x, t.dim("2PX+2WY", total))
    both = t.linear(f"{name}.in_proj_ba", x, t.dim("2W", 2 * spec.value_heads))
    row = (batch, sequence)
    query, key, value, gate = t.split(packed, [(*row, wide_) for wide_ in (keys_wide, keys_wide, *[values_wide] * 2)])
    beta, step = t.split(both, [(*row, heads)] * 2)
    value, gate = t.copy(value), t.copy(gate)
    beta, step = t.copy(beta), t.copy(step)
    query, key = t.copy(query), t.copy(key)
    mixed = t.cat([query, key, value], (*row, wide))
    return mixed, gate, beta, step, [packed, both], [query, key, value]


def _convolved(t: Operations, spec: GatedDeltaNet, mixed: Tensor) -> Tensor:
    """silu of a causal depthwise convolution, computed for K - 1 positions too many and cut."""
    batch, sequence, wide = mixed.dims
    t.module = f"{spec.name}.conv1d"
    weight = t.weight(f"{t.module}.weight", (wide, "1", t.dim("K", spec.conv)))
    longer = t.dim("S+K-1", t.sizes[sequence] + spec.conv - 1)
    out = ((batch, wide, longer), mixed.dtype)
    (result,) = t.apply("convolution", [mixed, weight], [out], saves=[mixed])
    (result,) = t.slices(result, [(batch, wide, sequence)])
    return t.view(t.map("silu", result), mixed.dims)


def _decay(t: Operations, spec: GatedDeltaNet, step: Tensor, heads: str) -> Tensor:
    """-exp(A_log) * softplus(step + dt_bias), in fp32."""
    rate = t.weight(f"{spec.name}.A_log", (heads,))
    offset = t.weight(f"{spec.name}.dt_bias", (heads,))
    (pace,) = t.apply("exp", [rate], [((heads,), "fp32")], saves_outputs=(0,))
    size = (step.dims, "fp32")
    shifted = t.apply("add", [t.to(step, "fp32"), offset], [size], alias=[True, False], raw_gradients=[None, size])[0]
    return t.mul(t.scale(pace, "neg"), t.map("softplus", shifted), step.dims)


def _delta_rule(
    t: Operations, spec: GatedDeltaNet, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor
) -> Tensor:
    """The chunked rule; (B, S, W*Y) in the format that came in. Every local variable lives until the end."""
    t.module = f"{spec.name}.delta_rule"
    dtype = query.dtype
    batch, sequence = query.dims[:2]
    heads, wide, out = t.dim("W", spec.value_heads), t.dim("X", spec.key_dim), t.dim("Y", spec.value_dim)
    padded = t.dim("S64", (t.sizes[sequence] + CHUNK - 1) // CHUNK * CHUNK)
    if spec.key_heads != spec.value_heads:
        query, key = (t.copy(x, (batch, sequence, heads, wide), "repeat_interleave") for x in (query, key))
    keys, values, row = (batch, heads, sequence, wide), (batch, heads, sequence, out), (batch, heads, sequence)
    query, key, value, beta = (
        t.apply("to", [x], [(dims, "fp32")])[0]
        for x, dims in ((query, keys), (key, keys), (value, values), (beta, row))
    )
    query = _unit(t, query)
    key = _unit(t, key)
    query = t.scale(query)
    query, key, value = (_padded(t, x, (batch, heads, padded, x.dims[-1])) for x in (query, key, value))
    beta, decay = (_padded(t, x, (batch, heads, padded)) for x in (beta, decay))
    factor = t.view(beta, (batch, heads, padded, "1"))
    v_beta = t.mul(value, factor, value.dims)
    k_beta = t.mul(key, factor, key.dims)
    total = t.scale(decay, "cumsum")
    pairs = (batch, heads, padded, t.dim("64", CHUNK))
    pairwise = t.apply("sub", [total], [(pairs, "fp32")])[0]
    pairwise = t.scale(pairwise, "masked_fill")
    pairwise = t.map("exp", pairwise, saves="output")
    system = t.mul(t.matmul(k_beta, key, pairs), pairwise)
    within = t.mul(t.matmul(query, key, pairs), pairwise)
    decayed = t.mul(k_beta, _column(t, t.map("exp", total, saves="output")), k_beta.dims)
    new_values = _solved(t, system, v_beta)
    read = _solved(t, system, decayed)
    core = t.constant("zeros_like", new_values.dims, "fp32")
    query = t.mul(query, _column(t, t.map("exp", total, saves="output")), query.dims)
    key = t.mul(key, _column(t, t.map("exp", t.scale(total, "sub"), saves="output")), key.dims)
    core = _scanned(t, core, [new_values, read, query, within, key])
    (result,) = t.apply("to", [core], [((batch, sequence, t.dim("WY", spec.value_heads * spec.value_dim)), dtype)])
    return result


def _column(t: Operations, x: Tensor) -> Tensor:
    return t.view(x, (*x.dims, "1"))


def _unit(t: Operations, x: Tensor) -> Tensor:
    """x * rsqrt((x * x).sum(-1) + eps)."""
    row = ((*x.dims[:-1], "1"), "fp32")
    inverse = t.map("rsqrt", t.scale(t.apply("sum", [t.mul(x, x)], [row])[0], "add scalar"), saves="output")
    return t.mul(x, inverse, x.dims)


def _padded(t: Operations, x: Tensor, dims: Dims) -> Tensor:
    """F.pad to whole chunks: a copy even where nothing is added."""
    return t.apply("pad", [x], [(dims, x.dtype)])[0]


def _solved(t: Operations, system: Tensor, right: Tensor) -> Tensor:
    """solve_triangular: keeps the system and its own result."""
    return t.apply("solve_triangular", [system, right], [(right.dims, "fp32")], saves=[system], saves_outputs=(0,))[0]


def _scanned(t: Operations, core: Tensor, inputs: list[Tensor]) -> Tensor:
    """The loop over chunks: each keeps its corrected values and the matrix state (X, Y) that it read.

    Its backward takes every chunk's slice gradient as zeros of the whole input with the slice written in, and copies
    the output's gradient for every chunk that was written in place: two whole tensors beside the sums.
    """
    new_values, _, query = inputs[:3]
    batch, heads, padded, out = new_values.dims
    wide = query.dims[-1]
    chunks = t.dim("n", t.sizes[padded] // CHUNK)
    saved = [(new_values.dims, "fp32"), ((batch, heads, chunks, wide, out), "fp32")]
    passing = [((batch, heads, t.dim("64", CHUNK), out), "fp32")] * 3
    if not t.enabled:  # nothing is kept, but one chunk's values and the state before it live in local variables
        passing += [passing[0], ((batch, heads, wide, out), "fp32")]
    return t.apply(
        "scan",
        [core, *inputs],
        [(core.dims, "fp32")],
        saves=inputs,
        extra_saved=saved if t.enabled else (),
        in_place=True,
        scratch=passing,
        backward_scratch=[(inputs[3].dims, "fp32"), (core.dims, "fp32")],
    )[0]


def _gated_norm(t: Operations, spec: GatedDeltaNet, x: Tensor, gate: Tensor) -> Tensor:
    """weight * norm(x) * silu(z), the norm over each head: fp32 copies of both, of silu(z) and of the product."""
    t.module = f"{spec.name}.norm"
    dtype, dims = x.dtype, x.dims
    per_head = (*dims[:2], t.dim("W", spec.value_heads), t.dim("Y", spec.value_dim))
    x, gate = t.view(x, per_head), t.view(gate, per_head)
    upcast = t.to(x, "fp32")
    (mean,) = t.apply("mean", [t.map("pow", upcast)], [((*per_head[:3], "1"), "fp32")])
    upcast = t.mul(upcast, t.map("rsqrt", t.scale(mean, "add scalar"), saves="output"))
    normed = t.mul(t.weight(f"{t.module}.weight", (per_head[3],)), t.to(upcast, dtype))
    del upcast
    normed = t.mul(normed, t.map("silu", t.to(gate, "fp32")))
    return t.view(t.to(normed, dtype), dims)
