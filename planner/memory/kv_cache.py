"""The state that inference keeps for a sequence: affine in its length, layer by layer, exact for each kind of mixer.

bytes(S) = sum over layers of  cell x positions(S) + fixed

    layer                       cell, bytes a position on one rank          positions(S)       fixed
    MHA, GQA, MQA               max(1, ceil(K / tp)) (D + E) b               S                  0
    multi-head latent (MLA)     (kv_rank + rope) b, on every rank           S                  0
    sliding window W            as above                                    min(S, W)          0
    chunked local c             as above                                    min(S, c)          0
    cross-attention             as above                                    encoder length     0
    Mamba 1                     0                                           0     (I n s + I (k-1) c) / tp
    Mamba 2                     0                                           0     heads p n s + (I + 2 G n)(k-1) c
    gated delta rule            0                                           0     A_v E D s + (2 K_k D + A_v E)(k-1) c
    shared keys and values, encoders without a causal mask                  nothing

Letters: K key/value heads, D key size, E value size, b bytes of an element with its scales; I inner size, n state
size, k convolution width, p head size, G groups; s and c bytes of a recurrent and of a convolution element. Above
tp = K the heads are replicated and the cache stops shrinking.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from planner.errors import UnknownName, nearest
from planner.formats import BITS
from planner.model.shape import Attention, GatedDeltaNet, LatentAttention, Mamba1, Mamba2, Mixer, ModelShape
from planner.quantization import row_bytes

__all__ = [
    "KV_CACHE_FORMATS",
    "UNBOUNDED",
    "CacheLayers",
    "affine_bytes",
    "affine_kv_bytes",
    "cache_layers",
    "kv_bytes",
    "kv_bytes_per_token",
    "largest_that_fits",
    "longest_context",
    "most_sequences",
    "sequence_bytes",
    "token_bytes",
    "vector_bytes",
]

# Block formats of ggml, which llama.cpp's cache may have.
_GGML: Mapping[str, str] = {name.lower(): name for name in ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL")}
KV_CACHE_FORMATS = ("auto", "fp32", "bf16", "fp16", "fp8", "int8", "int4", *_GGML)

SCALE_BYTES = 4  # vLLM 0.33 int8/int4_per_token_head: one fp32 scale beside each head's vector
INDEXER_SCALE_BYTES = 4  # DeepSeek-V3.2's indexer keys: fp8 with one fp32 scale for each 128 of them
INDEXER_SCALED = 128
UNBOUNDED = 2**31  # the largest answer of the inverses: above any context or number of sequences in use


CacheKind = Literal["full", "window", "chunk", "cross", "state"]
_Entry = tuple[CacheKind, int, int | None, int]  # kind, cell bytes, limit, state bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayers:
    """Equal layers of the cache on one rank. cell_bytes: a position of one layer; state_bytes: a sequence, one layer.

    kind: `full`, `window` and `chunk` up to `limit` positions, `cross` always `limit` positions, `state` none.
    """

    kind: CacheKind
    layers: tuple[int, ...]
    cell_bytes: int = 0
    limit: int | None = None
    state_bytes: int = 0

    def positions(self, context: int, block_size: int = 1) -> int:
        """Positions that a sequence of `context` tokens holds in one of these layers, in whole blocks."""
        held = context if self.limit is None else self.limit if self.kind == "cross" else min(context, self.limit)
        return -(-held // block_size) * block_size

    def bytes(self, context: int, block_size: int = 1) -> int:
        """Bytes of one sequence in all of these layers."""
        return len(self.layers) * (self.cell_bytes * self.positions(context, block_size) + self.state_bytes)


def vector_bytes(dtype: str, size: int) -> int:
    """Bytes of one head's key or value of `size` elements, with the scales that an engine stores beside it.

    auto, bf16, fp16: 2 a piece. fp8: 1, one scale for a whole tensor. int8, int4: 1 and 1/2, and a scale a vector
    (vLLM's per-token-head formats). q8_0 ... iq4_nl: ggml's blocks of 32. Raises UnknownName.

    >>> [2 * vector_bytes(name, 128) for name in ("bf16", "fp8", "int8", "int4", "q8_0", "q4_0")]
    [512, 256, 264, 136, 272, 144]
    """
    if dtype in ("auto", "bf16", "fp16", "fp32"):
        return size * BITS["bf16" if dtype == "auto" else dtype] // 8
    if dtype == "fp8":
        return size
    if dtype in ("int8", "int4"):
        return -(-size * BITS[dtype] // 8) + SCALE_BYTES
    if dtype in _GGML:
        return row_bytes(_GGML[dtype], size)
    raise UnknownName(f'"{dtype[:60]}" is not a KV cache format; {nearest(dtype, KV_CACHE_FORMATS)}')


@lru_cache(maxsize=512)
def cache_layers(
    shape: ModelShape,
    dtype: str = "auto",
    tensor: int = 1,
    *,
    encoder_tokens: int | None = None,
    windows: bool = True,
    convolution: str = "bf16",
) -> tuple[CacheLayers, ...]:
    """What a model caches on one tensor-parallel rank, equal layers together, in order of first appearance.

    encoder_tokens: length of an encoder that the model itself leaves open; without it, one for each decoder token.
    windows: False for engines that keep every position of windowed layers.
    convolution: format of the convolution states; recurrent states are fp32, as their reference kernels keep them.
    """
    found: dict[_Entry, list[int]] = {}
    lengths = [tower.tokens for tower in shape.towers if tower.role != "text" and tower.tokens]
    encoder = lengths[0] if lengths else encoder_tokens
    for index, block in enumerate(shape.blocks):
        for mixer in (block.mixer, block.cross):
            entry = _entry(mixer, dtype, tensor, encoder, windows, convolution)
            if entry is not None:
                found.setdefault(entry, []).append(index)
    return tuple(
        CacheLayers(kind=kind, layers=tuple(layers), cell_bytes=cell, limit=limit, state_bytes=state)
        for (kind, cell, limit, state), layers in found.items()
    )


def _entry(
    mixer: Mixer | None, dtype: str, tensor: int, encoder: int | None, windows: bool, convolution: str
) -> _Entry | None:
    match mixer:
        case Attention():
            if mixer.shares_kv or not (mixer.causal or mixer.cross):
                return None
            heads = max(1, -(-mixer.kv_heads // tensor))
            cell = heads * (
                vector_bytes(dtype, mixer.head_dim) + vector_bytes(dtype, mixer.value_dim or mixer.head_dim)
            )
            if mixer.cross:
                return ("full", cell, None, 0) if encoder is None else ("cross", cell, encoder, 0)
            if windows and mixer.window is not None:
                return "window", cell, mixer.window, 0
            if windows and mixer.chunk is not None:
                return "chunk", cell, mixer.chunk, 0
            return "full", cell, None, 0
        case LatentAttention():
            cell = vector_bytes(dtype, mixer.kv_rank + mixer.rope_dim)
            if mixer.index_heads:
                cell += mixer.index_dim + INDEXER_SCALE_BYTES * -(-mixer.index_dim // INDEXER_SCALED)
            return "full", cell, None, 0
        case Mamba1() | Mamba2() | GatedDeltaNet():
            return "state", 0, None, _state_bytes(mixer, tensor, BITS[convolution] // 8)
        case None:
            return None


def _state_bytes(mixer: Mamba1 | Mamba2 | GatedDeltaNet, tensor: int, convolution: int) -> int:
    """One sequence's recurrent state in fp32 and the last inputs of its convolution, on one rank."""
    match mixer:
        case Mamba1():
            inner = -(-mixer.inner // tensor)
            return inner * mixer.state * 4 + inner * (mixer.conv - 1) * convolution
        case Mamba2():
            heads = -(-mixer.heads // tensor)
            groups = -(-mixer.groups // tensor)  # fewer groups than ranks are replicated
            channels = -(-mixer.inner // tensor) + 2 * groups * mixer.state
            return heads * mixer.head_dim * mixer.state * 4 + channels * (mixer.conv - 1) * convolution
        case GatedDeltaNet():
            keys, values = -(-mixer.key_heads // tensor), -(-mixer.value_heads // tensor)
            channels = 2 * keys * mixer.key_dim + values * mixer.value_dim
            return values * mixer.value_dim * mixer.key_dim * 4 + channels * (mixer.conv - 1) * convolution


def sequence_bytes(layers: tuple[CacheLayers, ...], context: int, block_size: int = 1) -> int:
    """Bytes of one sequence of `context` tokens, each layer's positions in whole blocks."""
    return sum(group.bytes(context, block_size) for group in layers)


def token_bytes(layers: tuple[CacheLayers, ...]) -> int:
    """Bytes that one token adds while it is inside every window."""
    return sum(len(group.layers) * group.cell_bytes for group in layers if group.kind != "cross")


def affine_bytes(layers: tuple[CacheLayers, ...]) -> tuple[int, int]:
    """(a, f) of bytes(S) = a S + f, for one sequence longer than every window."""
    slope = sum(len(group.layers) * group.cell_bytes for group in layers if group.kind == "full")
    fixed = sum(
        len(group.layers) * (group.cell_bytes * (group.limit or 0) + group.state_bytes)
        for group in layers
        if group.kind != "full"
    )
    return slope, fixed


def kv_bytes_per_token(shape: ModelShape, dtype: str = "auto", tensor: int = 1) -> int:
    """Bytes that one token adds on one rank while it is inside every window: all layers that grow, windowed or not.

    Beyond the windows it is less: see `affine_kv_bytes`. Cross-attention of known length and recurrent states do not
    grow and are not in it.
    """
    return token_bytes(cache_layers(shape, dtype, tensor))


def affine_kv_bytes(shape: ModelShape, dtype: str = "auto", tensor: int = 1) -> tuple[int, int]:
    """(a, f) of bytes(S) = a S + f on one rank, for one sequence longer than every window."""
    return affine_bytes(cache_layers(shape, dtype, tensor))


def kv_bytes(shape: ModelShape, context: int, dtype: str = "auto", block_size: int = 1, tensor: int = 1) -> int:
    """Bytes of one sequence of `context` tokens on one rank; `block_size` above 1 rounds positions up to blocks."""
    return sequence_bytes(cache_layers(shape, dtype, tensor), context, block_size)


def largest_that_fits(needed: Callable[[int], int], available: int, most: int = UNBOUNDED) -> int:
    """The largest n in 0..most with needed(n) <= available, for a function that never falls; 0 when none does."""
    if needed(most) <= available:
        return most
    low, high = 0, 1
    while high < most and needed(high) <= available:
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        if needed(middle) <= available:
            low = middle
        else:
            high = middle
    return low


def longest_context(
    shape: ModelShape,
    available: int,
    *,
    sequences: int = 1,
    dtype: str = "auto",
    block_size: int = 1,
    tensor: int = 1,
    most: int = UNBOUNDED,
) -> int:
    """The longest context that `sequences` sequences may all have within `available` bytes; 0 when none fits.

    `most` when memory sets no limit, as for models of windows and recurrent states alone.
    """
    layers = cache_layers(shape, dtype, tensor)
    return largest_that_fits(lambda n: sequences * sequence_bytes(layers, n, block_size), available, most)


def most_sequences(
    shape: ModelShape,
    available: int,
    context: int,
    *,
    dtype: str = "auto",
    block_size: int = 1,
    tensor: int = 1,
    most: int = UNBOUNDED,
) -> int:
    """How many sequences of `context` tokens fit in `available` bytes; `most` when the model caches nothing."""
    one = kv_bytes(shape, context, dtype, block_size, tensor)
    return most if one == 0 else max(0, min(most, available // one))
