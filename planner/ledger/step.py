"""One forward and backward pass of a whole model, recorded once for each kind of block.

The record has one segment for the embedding, one for each distinct block, and one for the final norm, head and loss.
`layers` says which segment each block of the model is; a fold over the record repeats segments as the model does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from planner.errors import NotCovered
from planner.ledger.attention_families import attention_of
from planner.ledger.contrastive import run_contrastive
from planner.ledger.embedding import embed
from planner.ledger.encoder_decoder import encoder_of, run_encoder_decoder
from planner.ledger.encoders import TEXT_ENCODERS, WITHOUT_MASKS, embed_text, trained_loss
from planner.ledger.gathering import ShardedOperations
from planner.ledger.loss_head import loss_of
from planner.ledger.masks import shared_masks
from planner.ledger.megatron import megatron_embed, megatron_loss
from planner.ledger.norm import normalise
from planner.ledger.operations import Operations
from planner.ledger.parameters import state_tensors
from planner.ledger.prompt_tuning import make_prefix, prepend_prompt
from planner.ledger.record import StepRecord, cut
from planner.ledger.rotary import rotary_tables
from planner.ledger.setting import Setting, asks_inputs_for_gradients, recomputes, tape_for, unit_of
from planner.ledger.speech import run_speech
from planner.ledger.stack import run_blocks
from planner.ledger.tape import Storage, Tensor
from planner.ledger.targets import check_method
from planner.ledger.vision import IMAGE_MODELS, embed_image, image_input
from planner.model.shape import Attention, Head, LatentAttention, ModelShape

__all__ = ["record_step"]

_TRAINED_CLASSES = {
    "bert": "BertForMaskedLM or BertForSequenceClassification",
    "roberta": "RobertaForMaskedLM or RobertaForSequenceClassification",
    "xlm-roberta": "XLMRobertaForMaskedLM or XLMRobertaForSequenceClassification",
    "distilbert": "DistilBertForMaskedLM or DistilBertForSequenceClassification",
    "vit": "ViTForImageClassification",
}


def record_step(shape: ModelShape, setting: Setting) -> StepRecord:
    """Record one pass. Raises NotCovered when the model has a part whose activations are not in the ledger."""
    check_method(shape, setting.method, setting.profile, sharded=setting.gathering is not None)
    _check_trained(shape)
    if shape.image is not None and shape.tokens is not None:
        setting = replace(setting, sequence_length=shape.tokens)
    t = tape_for(shape, setting)
    t.attention = _attention(shape, setting)
    t.inputs_require_grad = setting.recompute.mode != "none" and asks_inputs_for_gradients(setting)
    if setting.gathering is not None:
        tensors = state_tensors(shape, setting.method, setting.precision)
        t.units[0] = unit_of([tensor for tensor in tensors if tensor.unit == "root"], setting)
    if shape.embedding is not None:
        t.embedding_name = f"{shape.embedding.name}.weight"
    t.begin("forward", 0)
    t.enter("forward", 0)
    text = t.dim("text", setting.sequence_length) if setting.method.name == "prompt" else "S"
    live = [image_input(t, shape) if _sees(shape) else t.constant("input_ids", ("B", text), "int64")]
    layers, head = _forward(t, shape, setting, live, text)
    if t.selective and not t.selected:
        raise NotCovered(f"selective recomputation of {shape.model_type}'s attention is not in the ledger.")
    return _close(t, layers, head, live)


def _forward(
    t: ShardedOperations, shape: ModelShape, setting: Setting, live: list[Tensor], text: str
) -> tuple[Sequence[int], int]:
    """Run the model up to its loss, which joins `live`; the segments of its blocks, and of its head."""
    encoder = encoder_of(shape)
    pairs = shape.head is not None and shape.head.readout is not None and shape.head.readout.task == "pairs"
    beside = next((tower for tower in shape.towers if tower is not encoder), None)
    if beside is not None and not pairs:
        raise NotCovered(f"activations of the {beside.role} tower {beside.name} are not in the ledger.")
    if encoder is None and not pairs:
        return _one_stack(t, shape, setting, live, text)
    if setting.gathering is not None or setting.recompute.mode not in ("none", "full"):
        raise NotCovered("models of two stacks are in the ledger without sharding, recomputed fully or not at all.")
    recomputed = recomputes(setting.recompute)
    if pairs:
        return run_contrastive(t, shape, live, recomputed=recomputed, loss=setting.loss)
    assert encoder is not None
    if shape.model_type == "whisper":
        return run_speech(t, shape, encoder, live, recomputed=recomputed, loss=setting.loss)
    return run_encoder_decoder(t, shape, encoder, live, recomputed=recomputed)


def _one_stack(
    t: ShardedOperations, shape: ModelShape, setting: Setting, live: list[Tensor], text: str
) -> tuple[Sequence[int], int]:
    """Embedding, blocks, head and loss of a model that is one stack."""
    if shape.head is None:
        raise NotCovered(f'a model without an output head ("{shape.model_type}") has no training step in the ledger.')
    t.family = shape.model_type
    t.attention = attention_of(t.family, t.attention)
    t.positions = shape.max_positions or 0
    t.recomputes = recomputes(setting.recompute)
    past = make_prefix(t, shape, setting.precision.weights) if setting.method.name == "prefix" else []
    caller: list[Storage] = []  # local variables around the model's forward
    if setting.method.name == "prompt":
        t.virtual = partial(prepend_prompt, caller=caller)
    flow = [embed_image(t, shape, live[0]) if _sees(shape) else _embedded(t, shape, text)]
    _shared_tables(t, shape, flow[0].dtype)
    if t.family not in WITHOUT_MASKS and not _sees(shape):
        shared_masks(t, shape, flow[0].dtype)
    layers = run_blocks(t, shape, setting, flow, past)
    head = max(layers, default=0) + 1
    t.prefix = ""
    t.begin("forward", head)
    t.enter("forward", head)
    x = normalise(t, shape.head.norm, shape.head.norm_name, flow.pop())
    t.model_locals.clear()
    if not x.requires_grad:
        t.held.clear()  # blocks without gradients keep no tables
    t.returned.clear()
    if not recomputes(setting.recompute):
        t.masks.clear()  # recomputed blocks keep the masks and tables that they were called with
        t.rotary = ()
    last_graph = _kept_by_last_graph(t, layers)
    live.append(_loss(t, shape.head, x, setting.loss))
    del x, last_graph
    t.window.clear()
    caller.clear()
    t.cache.clear()
    return layers, head


def _loss(t: ShardedOperations, head: Head, x: Tensor, variant: str) -> Tensor:
    if head.readout is not None:
        return trained_loss(t, head, x, variant)
    return megatron_loss(t, head, x) if t.profile.name == "megatron" else loss_of(t, head, x, variant)


def _sees(shape: ModelShape) -> bool:
    """Whether the model's one stack takes images."""
    return shape.image is not None and shape.model_type in IMAGE_MODELS


def _attention(shape: ModelShape, setting: Setting) -> str:
    """The attention that runs: models with sinks have no sdpa (_supports_sdpa is False) and fall back to eager."""
    if not any(isinstance(block.mixer, Attention) and block.mixer.sinks for block in shape.blocks):
        return setting.attention
    if setting.attention == "flash":
        raise NotCovered("flash attention with learned sinks is not in the ledger; eager is.")
    return "eager"


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
    return (
        megatron_embed(t, shape.embedding) if t.profile.name == "megatron" else embed(t, shape.embedding, sequence=text)
    )


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
    return cut(t, tuple(layers), head, stashed)


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
