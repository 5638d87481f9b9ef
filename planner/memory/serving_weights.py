"""Bytes of a model's weights as a serving engine holds them: by format, by tensor-parallel rank, by pipeline stage.

What stays wide. Embeddings, the output projection, norms, biases, routers, convolutions and vision or audio towers
keep 16 bits in every format but GGUF, whose recipes reach them too (`planner.memory.gguf_recipe`).

How tensor parallelism divides a block is in `planner.memory.serving_ranks`; the two vocabulary tables are divided by
rows, padded to 64 of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import cast

from planner.errors import NotCovered
from planner.formats import BITS
from planner.ledger.weights import WeightGroup, model_weights
from planner.memory.gguf_recipe import GgufModel, GgufRole, block_format_of
from planner.memory.serving_ranks import expert_matrix, is_down, rank_shape
from planner.model.shape import Attention, Block, LatentAttention, ModelShape, Moe, Weight
from planner.quantization import (
    GGUF_FILE_TYPES,
    MatrixFormat,
    block_format_fitting,
    canonical_quantization,
    matrix_bytes,
    row_bytes,
)

__all__ = ["ServingWeights", "rotary_table_bytes", "serving_weight_bytes", "serving_weights"]

VOCABULARY_PADDING = 64  # vLLM 0.33 vocab_parallel_embedding.py, DEFAULT_VOCAB_PADDING_SIZE
# vLLM on Hopper swizzles the packed values of mxfp4 experts (Triton), whose rows it pads. 256 is inferred: it turns
# 12.83 and 60.78 GiB of gpt-oss 20b and 120b into 13.43 and 64.34; logged are 13.47 and 64.38.
MXFP4_ROW = 256
_MERGING_ENGINES = ("vllm", "sglang")  # run GPTQ through Marlin, which frees the g_idx of checkpoints without act-order


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingWeights:
    """Bytes on one tensor-parallel rank. layers: of each block in order; first, last: what stands before and after.

    everywhere: buffers that each pipeline stage holds. tied: bytes of the embedding table when it is the output
    projection too; a last stage of its own keeps a copy.
    """

    layers: tuple[int, ...]
    first: int
    last: int
    everywhere: int
    tied: int
    assumptions: tuple[str, ...]

    @property
    def total(self) -> int:
        """The whole model on one rank, no pipeline."""
        return sum(self.layers) + self.first + self.last + self.everywhere

    def stage(self, start: int, stop: int) -> int:
        """The blocks of `range(start, stop)` and what belongs to the stage that holds them."""
        held = sum(self.layers[start:stop]) + self.everywhere
        if start == 0:
            held += self.first
        if stop == len(self.layers):
            held += self.last + (self.tied if start > 0 else 0)
        return held


def serving_weight_bytes(
    shape: ModelShape, quantization: str = "none", *, engine: str = "ideal", tensor: int = 1, expert: int = 1
) -> int:
    """Bytes of all weights on one tensor-parallel rank. Raises UnknownName for a quantization that is not known."""
    return serving_weights(shape, quantization, engine=engine, tensor=tensor, expert=expert).total


@lru_cache(maxsize=512)
def serving_weights(
    shape: ModelShape, quantization: str = "none", *, engine: str = "ideal", tensor: int = 1, expert: int = 1
) -> ServingWeights:
    """The weights on one tensor-parallel rank, block by block."""
    given = canonical_quantization(quantization)
    name, assumptions = _as_published(shape, given, engine)
    form = _Forms(shape, name, engine, tensor, expert)
    layers = [0] * len(shape.blocks)
    first = last = tied = 0
    head = shape.head
    after = tuple(f"{part}." for part in (head.name, head.norm_name, head.projection_name) if part) if head else ()
    table = f"{shape.embedding.name}.weight" if shape.embedding is not None and head is not None and head.tied else ""
    encoders = {tower.name: tower.blocks for tower in shape.towers if tower.role in ("encoder", "text")}
    for group in model_weights(shape):
        if group.layers and group.prefix == shape.prefix:
            for layer, size in form.blocks(group, shape.blocks[group.layers[0]]):
                layers[layer] += size
            continue
        if group.layers and group.prefix in encoders:
            first += sum(size for _, size in form.blocks(group, encoders[group.prefix][group.layers[0]]))
            continue
        for weight in group.weights:
            size = group.repeat * form.outside(weight)
            if not group.layers and weight.name.startswith(after):
                last += size
            else:
                first += size
            if weight.name == table:
                tied = size
    rotary = rotary_table_bytes(shape) if engine == "vllm" and not form.gguf else 0
    if rotary:
        assumptions += ("vllm keeps the cosines and sines of every position, counted with the weights",)
    return ServingWeights(
        layers=tuple(layers), first=first, last=last, everywhere=rotary, tied=tied, assumptions=assumptions
    )


def rotary_table_bytes(shape: ModelShape) -> int:
    """The cosine and sine tables that vLLM registers as buffers: positions x rotary width x 2 B for each kind of layer.

    vLLM logs "Model loading took 14.9888 GiB" for Llama-3.1-8B: 14.9575 of weights + 131072 x 128 x 2 B.
    """
    widths = set()
    for block in set(shape.blocks):
        mixer = block.mixer
        if isinstance(mixer, Attention) and mixer.rotary_dim:
            widths.add((mixer.rotary_dim, mixer.window if shape.model_type.startswith("gemma") else None))
        elif isinstance(mixer, LatentAttention):
            widths.add((mixer.rope_dim, None))
    return sum(width for width, _ in widths) * (shape.max_positions or 0) * 2


def _as_published(shape: ModelShape, name: str, engine: str) -> tuple[str, tuple[str, ...]]:
    """What `none` and `fp8` mean for this checkpoint, and the sentence that says so."""
    published = shape.quantization
    if name == "fp8" and published == "fp8":
        return "fp8-block", ()
    if name != "none":
        if published is not None:
            return name, (f"the checkpoint is published as {published}; {name} weights are made from it",)
        return name, ()
    match published:
        case None:
            if shape.dtype in ("float32", "float"):
                if engine == "transformers":
                    return "fp32", ("weights in fp32, as published: transformers 5 loads the checkpoint's own format",)
                return "16bit", ("the checkpoint is published in fp32; the engine casts it to 16 bits",)
            return "16bit", ()
        case "fp8":
            return "fp8-block", ("quantization none: the checkpoint as published, fp8 in blocks of 128 x 128",)
        case "mxfp4":
            return "mxfp4", ("quantization none: the checkpoint as published, experts in mxfp4",)
        case "gptq" | "awq":
            return f"{published}-4bit", (f"quantization none: the checkpoint as published, {published} in 4 bits",)
        case _:
            raise NotCovered(
                f'{shape.name or "the model"} is published quantised by "{published}", which is not covered; '
                "name a quantization, such as BF16, fp8 or awq-4bit."
            )


class _Forms:
    """Bytes of single tensors of one model in one quantization on one rank."""

    def __init__(self, shape: ModelShape, name: str, engine: str, tensor: int, expert: int) -> None:
        self.shape, self.name, self.engine, self.tensor, self.expert = shape, name, engine, tensor, expert
        self.gguf = name in GGUF_FILE_TYPES
        self.wide: MatrixFormat = "fp32" if name == "fp32" else "bf16"
        self.moe = any(isinstance(block.ffn, Moe) for block in shape.blocks)
        self.recipe = _gguf_model(shape) if self.gguf else None
        self.value_index = _value_indices(shape) if self.gguf else ()

    def outside(self, weight: Weight) -> int:
        """One tensor that is in no block of the main stack; the two vocabulary tables are divided by rows."""
        sizes = weight.shape
        if weight.component in ("embed_in", "lm_head") and len(sizes) == 2 and self.tensor > 1:
            padded = -(-sizes[0] // VOCABULARY_PADDING) * VOCABULARY_PADDING
            sizes = (-(-padded // self.tensor), sizes[1])
        if self.gguf:
            embedding = self.shape.embedding
            if len(sizes) < 2 or (embedding is not None and weight.name == f"{embedding.position_name}.weight"):
                return prod(sizes) * BITS["fp32"] // 8
            role: GgufRole = "other"
            if weight.component in ("embed_in", "lm_head"):
                role = "embedding" if weight.component == "embed_in" else "output"
            if weight.component == "vision_or_audio":
                return prod(sizes) * 2
            return self._gguf(role, sizes, 0)
        if self.name in ("nf4", "int8") and weight.kind == "linear" and weight.component == "vision_or_audio":
            return self._matrix(sizes)  # bitsandbytes replaces every nn.Linear but the output projection
        return prod(sizes) * BITS[self.wide] // 8

    def blocks(self, group: WeightGroup, block: Block) -> Iterator[tuple[int, int]]:
        """(layer, bytes) for every block of a group of blocks equal to `block`."""
        if not self.gguf:
            size = sum(self._in_block(weight, block) for weight in group.weights)
            for layer in group.layers:
                yield layer, size
            return
        plain, packed = 0, []
        for weight in group.weights:
            held = prod(rank_shape(weight, block, self.tensor, self.expert))
            if self._gguf_packs(weight):
                packed.extend((role, part, held, weight.count) for role, part in _gguf_parts(weight, block))
            else:
                plain += held * BITS["fp32"] // 8
        for layer in group.layers:  # formats are chosen for whole matrices, of which a rank then holds its share
            sizes = (-(-self._gguf(role, part, layer) * held // whole) for role, part, held, whole in packed)
            yield layer, plain + sum(sizes)

    def _in_block(self, weight: Weight, block: Block) -> int:
        sizes = rank_shape(weight, block, self.tensor, self.expert)
        if weight.kind == "linear" and weight.component != "router" and weight.name.endswith("weight"):
            if self.name == "mxfp4" and self.moe:
                return prod(sizes) * 2  # OpenAI's gpt-oss: experts alone are in mxfp4
            return self._matrix(sizes)
        if weight.kind == "experts":
            if self.name in ("nf4", "int8") and self.engine == "transformers":
                return prod(sizes) * 2  # bitsandbytes replaces nn.Linear; stacked experts are plain parameters
            return self._experts(sizes, block)
        return prod(sizes) * BITS[self.wide] // 8

    def _matrix(self, sizes: tuple[int, ...]) -> int:
        out, inner = sizes[0], prod(sizes[1:])
        if self.name in ("16bit", "fp32"):
            return matrix_bytes(self.wide, out, inner)
        form = "nf4-double" if self.name == "nf4" else self.name
        if form == "gptq-4bit" and self.engine in _MERGING_ENGINES:
            form = "awq-4bit"
        return matrix_bytes(cast(MatrixFormat, form), out, inner)

    def _experts(self, sizes: tuple[int, ...], block: Block) -> int:
        moe = block.ffn
        assert isinstance(moe, Moe), "stacked experts belong to a routed layer"
        count, out, inner = expert_matrix(sizes, moe)
        size = self._matrix((out, inner))
        if self.name == "mxfp4" and self.engine == "vllm":
            size += out * (-inner % MXFP4_ROW) // 2
        return count * size

    def _gguf_packs(self, weight: Weight) -> bool:
        """Matrices are packed; routers, convolutions, norms, biases and small tables stay in fp32."""
        return weight.kind in ("linear", "experts") and len(weight.shape) > 1 and weight.component != "router"

    def _gguf(self, role: GgufRole, sizes: tuple[int, ...], layer: int) -> int:
        assert self.recipe is not None, "only GGUF files have recipes"
        *rows, inner = sizes
        index = self.value_index[layer] if layer < len(self.value_index) else layer
        wanted = block_format_of(self.name, role, layer, index, self.recipe)
        return prod(rows) * row_bytes(block_format_fitting(wanted, inner), inner)


def _gguf_model(shape: ModelShape) -> GgufModel:
    attentions = [block.mixer for block in shape.blocks if isinstance(block.mixer, Attention)]
    experts = [block.ffn.experts for block in shape.blocks if isinstance(block.ffn, Moe)]
    grouping = max((mixer.heads // mixer.kv_heads for mixer in attentions), default=1)
    return GgufModel(
        layers=len(shape.blocks),
        attention_layers=len(attentions),
        queries_per_kv_head=grouping,
        experts=max(experts, default=0),
        tied=shape.head is None or shape.head.tied,
        large=len(shape.blocks) == 80 and shape.model_type in ("llama", "qwen2"),
        falcon=shape.model_type == "falcon",
    )


def _value_indices(shape: ModelShape) -> tuple[int, ...]:
    """For each block, how many blocks with a value projection come before it."""
    indices, count = [], 0
    for block in shape.blocks:
        indices.append(count)
        count += isinstance(block.mixer, Attention)
    return tuple(indices)


def _gguf_parts(weight: Weight, block: Block) -> Iterator[tuple[GgufRole, tuple[int, ...]]]:
    """The tensors of a GGUF file that one weight becomes: (role, (..., rows, columns))."""
    sizes = weight.shape
    module = weight.name.removesuffix(".weight")
    mixer, ffn = block.mixer, block.ffn
    if weight.kind == "experts":
        assert isinstance(ffn, Moe), "stacked experts belong to a routed layer"
        count, out, inner = expert_matrix(sizes, ffn)
        down = module.endswith(ffn.expert_names[-1])
        yield ("ffn_down" if down else "ffn_up"), (count, out, inner)
        return
    if isinstance(mixer, Attention):
        if module in mixer.names:
            roles: tuple[GgufRole, ...] = ("attn_q", "attn_k", "attn_v") if len(mixer.names) == 3 else ("attn_qkv",) * 2
            yield roles[mixer.names.index(module)], sizes
            return
        if module == mixer.out_name:
            yield "attn_output", sizes
            return
    if isinstance(mixer, LatentAttention):
        if module == "self_attn.kv_b_proj":  # llama.cpp keeps it as two absorbed matrices, keys transposed
            yield "other", (mixer.heads, mixer.kv_rank, mixer.nope_dim)
            yield "other", (mixer.heads, mixer.value_dim, mixer.kv_rank)
            return
        if module == "self_attn.o_proj":
            yield "attn_output", sizes
            return
    if weight.component in ("mlp_dense", "experts_shared", "experts_routed"):
        yield ("ffn_down" if is_down(module, block) else "ffn_up"), sizes
        return
    yield "other", sizes
