"""Every parameter tensor of a model under a training method: its format, whether it trains, how often it occurs.

Adapters that the method adds are tensors like any other. Training states are folds over these values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

from planner.ledger.adapters import is_target
from planner.ledger.bottleneck import ADAPTER_NAMES, adapter_shapes
from planner.ledger.ia3 import scales_input
from planner.ledger.prompt_tuning import PROMPT_TABLE, prefix_width
from planner.ledger.tape import allocated_bytes
from planner.ledger.targets import is_linear
from planner.ledger.weights import block_weights, model_weights
from planner.model.shape import Block, ModelShape, Weight, WeightKind
from planner.plan import Method, Precision

__all__ = ["StateTensor", "block_tensors", "four_bit_bytes", "state_tensors", "trained_around"]

DOUBLE_QUANTIZATION_BLOCK = 256  # bitsandbytes functional.py: blocksize of the nested absmax
FOUR_BIT_BLOCK = 64  # bitsandbytes Linear4bit's default blocksize


@dataclass(frozen=True, slots=True, kw_only=True)
class StateTensor:
    """One parameter tensor, `repeat` times over.

    shape: on this rank. unit: `block` for what is gathered block by block, `root` for what surrounds the blocks.
    layer: index of the first block that holds it; -1 outside the blocks.
    packed: stored in 4 bits.
    """

    name: str
    shape: tuple[int, ...]
    kind: WeightKind
    dtype: str
    trainable: bool
    repeat: int
    unit: str
    packed: bool = False

    @property
    def elements(self) -> int:
        """Elements of one copy."""
        return prod(self.shape)


@lru_cache(maxsize=256)
def state_tensors(shape: ModelShape, method: Method, precision: Precision) -> tuple[StateTensor, ...]:
    """Every parameter tensor of the model under a method, adapters included, unsharded."""
    return tuple(_tensors(shape, method, precision))


def trained_around(shape: ModelShape, method: Method) -> frozenset[str]:
    """Names of the weights around the blocks that train: the output projection under `frozen`, that and the embedding
    table with `train_embeddings`. A tied projection is the embedding table. `full` trains everything and is not asked.
    """
    names: set[str] = set()
    head, embedding = shape.head, shape.embedding
    tied = method.name == "frozen" and head is not None and head.tied
    if embedding is not None and (method.train_embeddings or tied):
        names.add(f"{embedding.name}.weight")
    if head is not None and head.rows and (method.train_embeddings or method.name == "frozen"):
        names.update([f"{head.name}.weight"] * (not head.tied) + [f"{head.name}.bias"] * head.bias)
    return frozenset(names)


def block_tensors(
    block: Block, hidden: int, method: Method, precision: Precision, *, trains: bool, family: str = ""
) -> tuple[StateTensor, ...]:
    """The parameter tensors of one block, adapters included. trains: whether `frozen` trains this block."""
    tensors: list[StateTensor] = []
    for weight in block_weights(block, hidden):
        base = _base(weight, 1, True, method, precision, family)
        tensors.append(replace(base, trainable=trains) if method.name == "frozen" else base)
        tensors.extend(_adapters(weight, base, method, family=family))
    if method.name == "adapter":
        tensors.extend(_bottlenecks(block, hidden, 1, method))
    return tuple(tensors)


def _tensors(shape: ModelShape, method: Method, precision: Precision) -> Iterator[StateTensor]:
    first_trained = len(shape.blocks) - method.trainable_layers
    around = trained_around(shape, method)
    head = shape.head.name if shape.head is not None else ""
    for group in model_weights(shape):
        in_block = bool(group.layers) and group.prefix == shape.prefix
        trained = sum(layer >= first_trained for layer in group.layers) if in_block else 0
        for weight in group.weights:
            base = _base(weight, group.repeat, in_block, method, precision, shape.model_type)
            if method.name == "frozen":
                count = group.repeat if weight.name in around and not group.layers else trained
                if count:
                    yield replace(base, trainable=True, repeat=count)
                if count < group.repeat:
                    yield replace(base, trainable=False, repeat=group.repeat - count)
                continue
            yield base
            if weight.name in around and not group.layers:
                name = f"{weight.name.rpartition('.')[0]}.modules_to_save.{weight.name.rpartition('.')[2]}"
                yield replace(base, name=name, trainable=True, packed=False)
            else:
                yield from _adapters(weight, base, method, head, family=shape.model_type)
        if method.name == "adapter" and in_block:
            yield from _bottlenecks(shape.blocks[group.layers[0]], shape.hidden, group.repeat, method)
    yield from _virtual_tokens(shape, method)


def _base(
    weight: Weight, repeat: int, in_block: bool, method: Method, precision: Precision, family: str
) -> StateTensor:
    head = method.quantizes_head and weight.component == "lm_head"
    packed = method.name == "qlora" and is_linear(weight, family) and (in_block or head)
    upcast = method.name == "qlora" and not packed and method.upcast
    upcast = upcast and (method.upcast_embeddings or _is_norm(weight))
    return StateTensor(
        name=weight.name,
        shape=weight.shape,
        kind=weight.kind,
        dtype="fp32" if upcast else precision.weights,
        trainable=method.name == "full" and not weight.frozen,
        repeat=repeat,
        unit="block" if in_block else "root",
        packed=packed,
    )


def _is_norm(weight: Weight) -> bool:
    return "norm" in weight.name or ".ln_" in weight.name


def _adapters(
    weight: Weight, base: StateTensor, method: Method, head: str = "", *, family: str = ""
) -> Iterator[StateTensor]:
    """LoRA's A (r, in) and B (out, r); DoRA's magnitude (out,); IA3's scale. head: name of the output projection."""
    module, _, leaf = weight.name.rpartition(".")
    if not is_linear(weight, family) or leaf != "weight" or not is_target(method, module, head):
        return
    out, inner = weight.shape
    adapter = replace(base, dtype=method.adapter_dtype, trainable=True, packed=False, kind="other")
    if method.name in ("lora", "qlora"):
        yield replace(adapter, name=f"{module}.lora_A.weight", shape=(method.rank, inner), kind="linear")
        yield replace(adapter, name=f"{module}.lora_B.weight", shape=(out, method.rank), kind="linear")
        if method.dora:
            yield replace(adapter, name=f"{module}.lora_magnitude_vector.weight", shape=(out,))
    elif method.name == "ia3":
        yield replace(adapter, name=f"{module}.ia3_l", shape=(1, inner) if scales_input(module) else (out, 1))


def _bottlenecks(block: Block, hidden: int, repeat: int, method: Method) -> Iterator[StateTensor]:
    """An adapter for each branch of the block."""
    for name, branch in zip(ADAPTER_NAMES, (block.mixer, block.ffn), strict=True):
        if branch is not None:
            for tensor, sizes in adapter_shapes(name, hidden, method.bottleneck):
                yield _added(tensor, sizes, repeat, "block", method)


def _virtual_tokens(shape: ModelShape, method: Method) -> Iterator[StateTensor]:
    """(v, H) for a prompt; for a prefix, v keys and v values of each layer, (v, 2 L K D)."""
    if method.name == "prompt":
        yield _added(PROMPT_TABLE, (method.virtual_tokens, shape.hidden), 1, "root", method)
    elif method.name == "prefix":
        width = 2 * len(shape.blocks) * prefix_width(shape)
        yield _added(PROMPT_TABLE, (method.virtual_tokens, width), 1, "root", method)


def _added(name: str, sizes: tuple[int, ...], repeat: int, unit: str, method: Method) -> StateTensor:
    return StateTensor(
        name=name, shape=sizes, kind="other", dtype=method.adapter_dtype, trainable=True, repeat=repeat, unit=unit
    )


def four_bit_bytes(elements: int, *, double_quantization: bool) -> int:
    """GPU bytes of one NF4 or FP4 weight: packed values, block scales and their own tables, each an allocation.

    bitsandbytes functional.py quantize_4bit:            without              with double quantization
        values        two an element-byte                 n/2                  n/2
        absmax        one for each 64 elements            4 * n/64             n/64
        its absmax    one for each 256 of those                                4 * n/(64*256)
        code tables   16 fp32, and 256 fp32 nested        64                   64 + 1024
        offset        one fp32                                                 4
    """
    blocks = -(-elements // FOUR_BIT_BLOCK)
    total = allocated_bytes(-(-elements // 2)) + allocated_bytes(16 * 4)
    if not double_quantization:
        return total + allocated_bytes(4 * blocks)
    nested = -(-blocks // DOUBLE_QUANTIZATION_BLOCK)
    return total + allocated_bytes(blocks) + allocated_bytes(4 * nested) + allocated_bytes(256 * 4) + allocated_bytes(4)
