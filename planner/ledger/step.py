"""One forward and backward pass of a whole model, recorded once for each kind of block.

The record has one segment for the embedding, one for each distinct block, and one for the final norm, head and loss.
`layers` says which segment each block of the model is; a fold over the record repeats segments as the model does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.errors import NotCovered, PlanError
from planner.ledger import litgpt, torchtune
from planner.ledger.adapters import adapter_for, is_target, preparation_for
from planner.ledger.attention import rotary_tables, shared_masks
from planner.ledger.attention_families import attention_of
from planner.ledger.block import run_block
from planner.ledger.contrastive import run_contrastive
from planner.ledger.embedding import embed
from planner.ledger.encoder_decoder import encoder_of, run_encoder_decoder
from planner.ledger.encoders import TEXT_ENCODERS, WITHOUT_MASKS, embed_text, trained_loss
from planner.ledger.gathering import Gathering, ShardedOperations, Unit
from planner.ledger.loss_head import loss_of
from planner.ledger.megatron import megatron_block, megatron_embed, megatron_loss
from planner.ledger.norm import normalise
from planner.ledger.operations import Operations
from planner.ledger.parameters import StateTensor, block_tensors, state_tensors, trained_around
from planner.ledger.profile import Profile
from planner.ledger.prompt_tuning import make_prefix, prepend_prompt
from planner.ledger.speech import run_speech
from planner.ledger.tape import Storage, Tensor
from planner.ledger.targets import check_method
from planner.ledger.vision import IMAGE_MODELS, embed_image, image_input
from planner.model.shape import Attention, Block, LatentAttention, ModelShape
from planner.plan import Method, Precision, Recompute

__all__ = ["CATEGORIES", "Setting", "StepRecord", "Stretch", "record_step"]

CATEGORIES = (
    "inputs",
    "activations",
    "logits_and_loss",
    "gradients",
    "unsharded_parameters",
    "communication_buffers",
    "temporaries",
)
_INPUTS = ("input_ids", "pixel_values", "input_features", "labels")
_TRAINED_CLASSES = {
    "bert": "BertForMaskedLM or BertForSequenceClassification",
    "roberta": "RobertaForMaskedLM or RobertaForSequenceClassification",
    "xlm-roberta": "XLMRobertaForMaskedLM or XLMRobertaForSequenceClassification",
    "distilbert": "DistilBertForMaskedLM or DistilBertForSequenceClassification",
    "vit": "ViTForImageClassification",
}
LARGEST_TENSOR_BYTES = 2**50
_OF_SHARDING = {
    "gathered weights": "unsharded_parameters",
    "prefetched weights": "communication_buffers",
    "all-gather result": "communication_buffers",
    "reduce-scatter input": "communication_buffers",
    "sharded gradient": "gradients",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Everything about a plan that decides what a forward and backward pass keeps. B and S may be arrays."""

    micro_batch_size: Any
    sequence_length: Any
    precision: Precision
    method: Method
    recompute: Recompute
    attention: str
    loss: str
    profile: Profile
    accumulate: bool = False
    hooked: bool = False
    offload_activations: bool = False
    lengths: str = "constant"
    gathering: Gathering | None = None
    tensor: int = 1
    sequence_parallel: bool = False


@dataclass(frozen=True, slots=True)
class Stretch:
    """A stretch of the record: allocated (+) and freed (-) bytes in order, and each one's category.

    deltas: (n,) or (n, grid). total: their sum. peak: the highest running sum, at least 0.
    """

    deltas: NDArray[np.int64]
    rows: NDArray[np.int64]
    total: Any
    peak: Any


@dataclass(frozen=True, slots=True)
class StepRecord:
    """The record, cut into stretches. `layers[i]` is the segment of block i; segment 0 is the embedding."""

    tape: ShardedOperations
    layers: tuple[int, ...]
    head: int
    forward: dict[int, Stretch]
    backward: dict[int, Stretch]
    release: dict[int, Stretch]
    categories: NDArray[np.int64]
    stashed: dict[int, list[int]]


def record_step(shape: ModelShape, setting: Setting) -> StepRecord:
    """Record one pass. Raises NotCovered when the model has a part whose activations are not in the ledger."""
    check_method(shape, setting.method, setting.profile, sharded=setting.gathering is not None)
    if shape.image is not None and shape.tokens is not None:
        setting = replace(setting, sequence_length=shape.tokens)
    t = _tape(shape, setting)
    if any(isinstance(block.mixer, Attention) and block.mixer.sinks for block in shape.blocks):
        if setting.attention == "flash":
            raise NotCovered("flash attention with learned sinks is not in the ledger; eager is.")
        t.attention = "eager"  # what transformers falls back to: _supports_sdpa is False for models with sinks
    if setting.gathering is not None:
        tensors = state_tensors(shape, setting.method, setting.precision)
        t.units[0] = unit_of([tensor for tensor in tensors if tensor.unit == "root"], setting)
    _check_trained(shape)
    t.begin("forward", 0)
    t.enter("forward", 0)
    text = t.dim("text", setting.sequence_length) if setting.method.name == "prompt" else "S"
    sees = shape.image is not None and shape.model_type in IMAGE_MODELS
    ids = image_input(t, shape) if sees else t.constant("input_ids", ("B", text), "int64")
    if shape.embedding is not None:
        t.embedding_name = f"{shape.embedding.name}.weight"
    encoder = encoder_of(shape)
    if shape.head is not None and shape.head.readout is not None and shape.head.readout.task == "pairs":
        if setting.gathering is not None or setting.recompute.mode not in ("none", "full"):
            raise NotCovered("models of two stacks are in the ledger without sharding, recomputed fully or not at all.")
        live = [ids]
        del ids
        t.inputs_require_grad = setting.recompute.mode != "none" and _asks_inputs_for_gradients(setting)
        layers, head = run_contrastive(t, shape, live, recomputed=_recomputes(setting.recompute), loss=setting.loss)
        return _close(t, layers, head, live)
    beside = next((tower for tower in shape.towers if tower is not encoder), None)
    if beside is not None:
        raise NotCovered(f"activations of the {beside.role} tower {beside.name} are not in the ledger.")
    if encoder is not None:
        if setting.gathering is not None or setting.recompute.mode not in ("none", "full"):
            raise NotCovered("encoder-decoder models are in the ledger without sharding, recomputed fully or not at all.")
        live = [ids]
        del ids
        recomputed = _recomputes(setting.recompute)
        if shape.model_type == "whisper":
            t.inputs_require_grad = setting.recompute.mode != "none" and _asks_inputs_for_gradients(setting)
            layers, head = run_speech(t, shape, encoder, live, recomputed=recomputed, loss=setting.loss)
        else:
            layers, head = run_encoder_decoder(t, shape, encoder, live, recomputed=recomputed)
        return _close(t, layers, head, live)
    t.inputs_require_grad = setting.recompute.mode != "none" and _asks_inputs_for_gradients(setting)
    t.family = shape.model_type
    t.attention = attention_of(t.family, t.attention)
    t.positions = shape.max_positions or 0
    t.recomputes = _recomputes(setting.recompute)
    past = make_prefix(t, shape, setting.precision.weights) if setting.method.name == "prefix" else []
    caller: list[Storage] = []  # local variables around the model's forward
    if setting.method.name == "prompt":
        t.virtual = partial(prepend_prompt, caller=caller)
    x = embed_image(t, shape, ids) if sees else _embedded(t, shape, text)
    _shared_tables(t, shape, x.dtype)
    if t.family not in WITHOUT_MASKS and not sees:
        shared_masks(t, shape, x.dtype)
    flow = [x]
    del x
    layers = _run_blocks(t, shape, setting, flow, past)
    head = max(layers, default=0) + 1
    t.prefix = ""
    t.begin("forward", head)
    t.enter("forward", head)
    if shape.head is None:
        raise NotCovered(f'a model without an output head ("{shape.model_type}") has no training step in the ledger.')
    x = normalise(t, shape.head.norm, shape.head.norm_name, flow.pop())
    t.model_locals.clear()
    if not x.requires_grad:
        t.held.clear()  # blocks without gradients keep no tables
    t.returned.clear()
    if not _recomputes(setting.recompute):
        t.masks.clear()  # recomputed blocks keep the masks and tables that they were called with
        t.rotary = ()
    last_graph = _kept_by_last_graph(t, layers)
    megatron = t.profile.name == "megatron"
    if shape.head.readout is not None:
        loss = trained_loss(t, shape.head, x, setting.loss)
    else:
        loss = megatron_loss(t, shape.head, x) if megatron else loss_of(t, shape.head, x, setting.loss)
    del x, last_graph
    t.window.clear()
    caller.clear()
    t.cache.clear()
    live = [ids, loss]
    del ids, loss
    return _close(t, layers, head, live)


def _check_trained(shape: ModelShape) -> None:
    """Raise NotCovered for a model that returns hidden states and no loss."""
    if shape.head is not None and not shape.head.rows and shape.head.readout is None:
        known = _TRAINED_CLASSES.get(shape.model_type)
        advice = f'; say which one to train: {known} as "architectures" in its config' if known else ""
        raise NotCovered(f"this {shape.model_type} model has no head whose loss is in the ledger{advice}.")


def _embedded(t: ShardedOperations, shape: ModelShape, text: str) -> Tensor:
    """Hidden states that enter the first block; `text` is the dim of the given tokens, without virtual ones."""
    if shape.embedding is None:
        raise NotCovered(f'a model without token embedding ("{shape.model_type}") has no training step in the ledger.')
    if t.family in TEXT_ENCODERS:
        return embed_text(t, shape.embedding)
    return megatron_embed(t, shape.embedding) if t.profile.name == "megatron" else embed(t, shape.embedding, sequence=text)


def _close(t: ShardedOperations, layers: Sequence[int], head: int, live: list[Tensor]) -> StepRecord:
    """Run backward from the loss, the last of `live`, and let everything go."""
    for segment in range(head + 1):
        t.begin("release", segment)
        for name in [name for name, cast in t.casts.items() if t.rows[cast.storage.index - 1].segment == segment]:
            del t.casts[name]
    stashed = dict(t.stashed)
    t.begin("backward", head)
    t.backward(live[-1])
    t.begin("end", 0)
    t.held.clear()
    t.rotary = ()
    t.masks.clear()
    live.clear()
    return _cut(t, tuple(layers), head, stashed)


def _asks_inputs_for_gradients(setting: Setting) -> bool:
    """Whether the embedding's output is made to need a gradient, so that checkpointed blocks below the first that
    trains run again and backward, too.

    transformers does it whenever checkpointing is switched on (modeling_utils.py, enable_input_require_grads), and so
    does peft; others do it for adapters.
    """
    return setting.method.name in ("lora", "qlora", "ia3", "adapter") or setting.profile.name == "transformers"


def _tape(shape: ModelShape, setting: Setting) -> ShardedOperations:
    precision, method = setting.precision, setting.method
    around = trained_around(shape, method)
    head = shape.head.name if shape.head is not None else ""
    virtual = method.virtual_tokens if method.name == "prompt" else 0
    full = method.name == "full"
    packed = method.name == "qlora"
    base = "fp32" if packed and method.upcast and method.upcast_embeddings else precision.weights
    norms_upcast = packed and bool(method.upcast)

    def quantized(name: str) -> bool:
        return packed and (name != "lm_head" or method.quantizes_head)

    gathering = setting.gathering
    if gathering is not None and gathering.shards_weights and gathering.casts:
        base = precision.compute
    return ShardedOperations(
        gathering=gathering,
        sizes={"1": 1, "B": setting.micro_batch_size, "S": setting.sequence_length + virtual},
        accumulate=setting.accumulate and gathering is None,
        keeps_shares=not setting.accumulate,
        offloads=setting.offload_activations,
        hooked=setting.hooked,
        reentrant=setting.profile.reentrant,
        profile=setting.profile,
        attention=setting.attention,
        tensor=setting.tensor,
        sequence_parallel=setting.sequence_parallel,
        selective=setting.recompute.mode == "selective",
        weight_dtype=lambda name: "fp32" if norms_upcast and ("norm" in name or ".ln_" in name) else base,
        trainable=lambda name: full or name in around,
        compute=precision.compute if precision.autocast and not (gathering and gathering.casts) else None,
        unpacked=precision.compute,
        packed_from=setting.profile.packs_from or precision.weights,
        double_quantization=method.double_quantization,
        quantized=quantized,
        method=method,
        follows_equal=setting.lengths == "constant",
        targeted=lambda name: method.name in ("lora", "qlora") and is_target(method, name, head),
        adapter=adapter_for(method, head),
        prepare=preparation_for(method, head),
    )


def unit_of(tensors: Sequence[StateTensor], setting: Setting) -> Unit:
    """Sizes of one gathered unit: its tensors by the format they are gathered in, and those that train."""
    gathered: dict[str, int] = {}
    trained: dict[str, int] = {}
    gathering = setting.gathering
    casts = gathering is not None and gathering.casts
    frozen = any(not tensor.trainable for tensor in tensors)
    # FSDP1's flat vectors have one format each: adapters are small units of their own, gathered one at a time
    # (peft/utils/other.py, fsdp_auto_wrap_policy).
    apart = frozen and gathering is not None and gathering.engine == "fsdp1"
    for tensor in tensors:
        elements = tensor.repeat * tensor.elements
        if tensor.packed:
            gathered["uint8"] = gathered.get("uint8", 0) + elements // 2
            continue
        dtype = setting.precision.compute if casts else tensor.dtype
        if not (apart and tensor.trainable):
            gathered[dtype] = gathered.get(dtype, 0) + elements
        if tensor.trainable:
            trained[dtype] = trained.get(dtype, 0) + elements
    return Unit(tuple(gathered.items()), tuple(trained.items()), frozen)


def _shared_tables(t: Operations, shape: ModelShape, dtype: str) -> None:
    """Rotary tables of the first rotating block kind: every block of a model shares one pair."""
    for block in shape.blocks:
        mixer = block.mixer
        size = mixer.rotary_dim if isinstance(mixer, Attention) else None
        if isinstance(mixer, LatentAttention):
            size = mixer.rope_dim
        if size:
            t.module = "rotary"
            rotary_tables(t, "S", size, "fp32" if t.profile.name == "litgpt" else dtype)
            return


def _kept_by_last_graph(t: Operations, layers: Sequence[int]) -> Storage | None:
    """What the previous micro-batch's graph still holds while the next loss is computed.

    bitsandbytes up to 0.42 keeps a product's input as an attribute of its autograd node, not as a saved tensor, so
    backward does not free it; the graph lives until the training loop assigns the next loss (litgpt's loops do not
    detach it). Recorded where it matters, beside the head; for micro-batches that are all of one length.
    """
    if not t.kept_inputs or not t.follows_equal:
        return None
    total = sum(t.rows[index - 1].size * layers.count(t.rows[index - 1].segment) for index in sorted(t.kept_inputs))
    t.module = "last graph"
    return t.allocate("inputs kept by the last graph", (t.dim("last graph", total),), "uint8")


def _run_blocks(
    t: ShardedOperations, shape: ModelShape, setting: Setting, flow: list[Tensor], past: list[tuple[Tensor, Tensor]]
) -> list[int]:
    """Run each distinct group of blocks once; `flow` holds the running hidden states so that nobody else does.

    A group is what is checkpointed together, else one block. The first has a segment of its own: what it takes in is
    not another block's output, and may live longer. So has the last where its neighbour keeps what it passes on.
    With a prefix each block has its own, as each takes what is its own from the cache, `past`.
    """
    segment_of: dict[tuple[object, ...], int] = {}
    order: list[int] = []
    size = _group_size(setting.recompute, len(shape.blocks))
    first_trained = len(shape.blocks) - setting.method.trainable_layers
    keeps = setting.gathering is not None and setting.gathering.shards_weights
    kinds = _kinds(shape.blocks)
    for start in range(0, len(shape.blocks), size):
        indices = range(start, min(start + size, len(shape.blocks)))
        blocks = [shape.blocks[index] for index in indices]
        trains = tuple(setting.method.name == "frozen" and index >= first_trained for index in indices)
        last = keeps and indices.stop == len(shape.blocks)
        kind = tuple(kinds[index] for index in indices)
        key = (kind, flow[0].requires_grad, trains, start == 0, last, start * bool(past))
        segment = segment_of.get(key)
        if segment is None:
            segment = segment_of[key] = len(segment_of) + 1
            t.begin("forward", segment)
            if setting.gathering is not None:
                tensors = block_tensors(
                    blocks[0],
                    shape.hidden,
                    setting.method,
                    setting.precision,
                    trains=trains[0],
                    family=shape.model_type,
                )
                t.units[segment] = unit_of(tensors, setting)
            t.enter("forward", segment)
            if past:
                t.past = past.pop(0)
            program = _program(t, blocks, trains, f"{segment}", setting.method.name == "frozen")
            recomputed = _recomputes(setting.recompute)
            flow.append(t.checkpoint(program, flow[0]) if recomputed else program(flow[0]))
            flow.pop(0)
            if t.past is not None:
                raise NotCovered(f"the attention of {shape.model_type} models takes no prefix in the ledger.")
            t.leave("forward", segment)
        order.append(segment)
    return order


def _kinds(blocks: Sequence[Block]) -> list[int]:
    """A number for each block, equal for equal blocks; by identity first, as hashing a block costs far more."""
    by_object: dict[int, int] = {}
    by_value: dict[Block, int] = {}
    for block in blocks:
        if id(block) not in by_object:
            by_object[id(block)] = by_value.setdefault(block, len(by_value))
    return [by_object[id(block)] for block in blocks]


def _recomputes(recompute: Recompute) -> bool:
    """Whether whole blocks run again in backward."""
    return recompute.mode in ("full", "every", "sqrt")


def _group_size(recompute: Recompute, blocks: int) -> int:
    """Blocks checkpointed together: k for `every`, about sqrt(n) for `sqrt` (Chen et al. 2016, section 4.1)."""
    if recompute.mode == "every":
        return recompute.every
    return max(round(blocks**0.5), 1) if recompute.mode == "sqrt" else 1


def _program(
    t: Operations, blocks: Sequence[Block], trains: Sequence[bool], name: str, partly: bool
) -> Callable[[Tensor], Tensor]:
    """One group's forward pass. It names its weights itself, as it may run again in backward."""

    runs = {"litgpt": litgpt.run_block, "torchtune": torchtune.run_block, "megatron": megatron_block}
    run = runs.get(t.profile.name, run_block)

    def program(x: Tensor) -> Tensor:
        flow = [x]
        del x
        around = t.trainable
        for position, block in enumerate(blocks):
            t.prefix = f"{name}.{position}:"
            if partly:
                t.trainable = lambda _, trains=trains[position]: trains
            flow.append(run(t, block, flow[0]))
            flow.pop(0)
        t.trainable = around
        return flow.pop()

    return program


def _cut(t: ShardedOperations, layers: tuple[int, ...], head: int, stashed: dict[int, list[int]]) -> StepRecord:
    sizes = _sizes(t)
    events = np.array(t.events, dtype=np.int64)
    rows = np.abs(events) - 1
    signs = np.sign(events).reshape((-1,) + (1,) * (sizes.ndim - 1))
    deltas = sizes[rows] * signs
    stretches: dict[str, dict[int, Stretch]] = {"forward": {}, "backward": {}, "release": {}, "end": {}}
    starts = [start for _, _, start in t.marks]
    outlive: set[int] = set()
    for (phase, segment, start), stop in zip(t.marks, [*starts[1:], len(events)], strict=True):
        part = deltas[start:stop]
        if stop == start and segment in stretches[phase]:
            continue
        running = np.cumsum(part, axis=0)
        if not len(part):
            total = peak = 0
        elif part.ndim == 1:
            total, peak = int(running[-1]), max(int(running.max()), 0)
        else:
            total, peak = running[-1], np.maximum(running.max(axis=0), 0)
        stretches[phase][segment] = Stretch(part, rows[start:stop], total, peak)
        if phase == "forward":
            made = set(t.events[start:stop])
            outlive.update(event - 1 for event in made if event > 0 and -event not in made)
    return StepRecord(
        t,
        layers,
        head,
        stretches["forward"],
        stretches["backward"],
        stretches["release"],
        _categories(t, head, outlive),
        stashed,
    )


def _sizes(t: Operations) -> NDArray[np.int64]:
    """Bytes of each row, (rows,) or (rows, grid). Raises PlanError beyond what 64 bits can add up."""
    try:
        if all(type(row.size) is int for row in t.rows):
            sizes = np.array([row.size for row in t.rows], dtype=np.int64)
        else:
            sizes = np.stack(np.broadcast_arrays(*[np.asarray(row.size, dtype=np.int64) for row in t.rows]))
    except OverflowError:
        sizes = np.array([2**62])
    if sizes.max(initial=0) > LARGEST_TENSOR_BYTES:
        raise PlanError("this plan makes a single tensor of more than 1 PiB; check micro_batch_size and sequence_length.")
    return sizes


def _categories(t: Operations, head: int, outlive: set[int]) -> NDArray[np.int64]:
    """The category of each row; `outlive` are those still alive when the forward stretch that made them ends."""
    kept = {storage.index for storage in t.gradients.values()}
    result = np.full(len(t.rows), CATEGORIES.index("temporaries"), dtype=np.int64)
    for position, row in enumerate(t.rows):
        if row.operator in _OF_SHARDING:
            name = _OF_SHARDING[row.operator]
        elif row.role == "gradient" or position + 1 in kept:
            name = "gradients"
        elif row.operator in _INPUTS:
            name = "inputs"
        elif row.module in ("loss", "lm_head"):
            name = "logits_and_loss"
        elif position + 1 in t.saved or position in outlive:
            name = "activations"
        else:
            continue
        result[position] = CATEGORIES.index(name)
    return result
