"""Encoders of text: what BERT and its kin do their own way, from the sum of three tables to the loss.

Each program has the shape of its module's forward in transformers 5.23 (modeling_bert.py, modeling_roberta.py,
modeling_distilbert.py). Nothing is masked: packed sequences of the full length need no mask in either direction, so
that attention runs the flash kernel, in fp32 the memory-efficient one, and dropout inside them keeps nothing.

Letters: B batch, S sequence, H hidden, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import numpy as np

from planner.errors import NotCovered, PlanError
from planner.ledger.attention import attend, heads_merged
from planner.ledger.loss_head import cross_entropy, project
from planner.ledger.mlp import activate
from planner.ledger.norm import normalise
from planner.ledger.operations import Operations
from planner.ledger.profile import profile_named
from planner.ledger.tape import Tensor
from planner.model.shape import Attention, Block, Embedding, Head, Mlp

__all__ = [
    "TEXT_ENCODERS",
    "WITHOUT_MASKS",
    "check_positions",
    "check_setting",
    "embed_text",
    "run_encoder_block",
    "trained_loss",
]

_COUNTS_POSITIONS = frozenset({"roberta", "xlm-roberta"})  # along each example, as padding has no position
_POSITIONS_BEFORE_FIRST = dict.fromkeys(_COUNTS_POSITIONS, 2)  # pad_token_id 1: padding's row and one that is unused
WITHOUT_MASKS = frozenset({"bert", "distilbert", *_COUNTS_POSITIONS})
TEXT_ENCODERS = WITHOUT_MASKS | {"modernbert"}


def check_setting(t: Operations, family: str, loss: str) -> None:
    """Raise NotCovered for modules and losses other than the newest transformers' own, and for packed weights."""
    newest = profile_named("transformers")
    used = f"{t.profile.name} {t.profile.version}"
    if t.profile.kernels is not None:
        used = f"the kernels of {t.profile.kernels}"
    if t.profile != newest:
        raise NotCovered(
            f"{family} models are in the ledger as transformers {newest.version} runs them, not with {used}."
        )
    if loss != "default":
        raise NotCovered(f"{family} models are in the ledger with their default loss, not with {loss}.")
    if t.method.name == "qlora":
        raise NotCovered(f"method qlora is not in the ledger for {family} models.")


# ---- embedding ----------------------------------------------------------------------------------------------------


def embed_text(t: Operations, spec: Embedding) -> Tensor:
    """Hidden states (B, S, H): words + types + positions, normalised and dropped out.

    The model keeps a name for them; ModernBERT, which has no table of positions, does not.
    """
    x = _summed(t, spec)
    if spec.positions:
        t.model_locals.append(x.storage)
    return x


def check_positions(t: Operations, spec: Embedding) -> None:
    """Raise PlanError for a sequence (of a grid: the longest) that has no row for each position in the table."""
    unused = _POSITIONS_BEFORE_FIRST.get(t.family, 0)
    longest = int(np.max(t.sizes["S"]))
    if longest > spec.positions - unused:
        raise PlanError(
            f"sequence_length {longest} is beyond the {spec.positions - unused} positions that this {t.family} model has."
        )


def _summed(t: Operations, spec: Embedding) -> Tensor:
    if spec.positions:
        check_positions(t, spec)
    size = t.dim("H", spec.size)
    t.module = spec.name
    rows_of = "B" if t.family in _COUNTS_POSITIONS else "1"
    ids = t.constant("position_ids", ("B", "S"), "int64") if t.family in _COUNTS_POSITIONS else None
    kinds = t.constant("token_type_ids", (rows_of, "S"), "int64") if spec.types else None
    words = _looked_up(t, spec.name, "V", spec.rows, size, "B", None)
    if t.inputs_require_grad and not words.requires_grad:
        words.requires_grad = True
        t.hold(words)  # a leaf: the graph refers to it to the end
    x = words
    if kinds is not None:
        kind = _looked_up(t, spec.type_name, "types", spec.types, size, "B", kinds)
        x = t.add(words, kind)
    if spec.positions:
        place = _looked_up(t, spec.position_name, "positions", spec.positions, size, rows_of, ids)
        x = t.add(x, place)
    x = normalise(t, spec.norm, spec.norm_name, x)
    return t.dropout(x, spec.dropout)


def _looked_up(t: Operations, name: str, letter: str, rows: int, size: str, batch: str, ids: Tensor | None) -> Tensor:
    """Rows of a table. Positions that are not counted come from a buffer of the module, and need no memory."""
    table = t.weight(f"{name}.weight", (t.dim(letter, rows), size))
    return t.apply("embedding", [table], [((batch, "S", size), table.dtype)], saves=[ids])[0]


# ---- blocks -------------------------------------------------------------------------------------------------------


def run_encoder_block(t: Operations, block: Block, x: Tensor) -> Tensor:
    """norm(x + attention(x)), and norm of that + feed-forward."""
    assert isinstance(block.mixer, Attention) and isinstance(block.ffn, Mlp)
    if block.mixer.causal:
        raise NotCovered(f"a {t.family} model as a decoder (is_decoder) is not in the ledger.")
    if t.family == "distilbert":
        return _distilbert(t, block, block.mixer, block.ffn, x)
    if t.family == "modernbert":
        return _modernbert(t, block, block.mixer, block.ffn, x)
    attended, _weights = _attention(t, block, block.mixer, x)
    inner = t.linear(block.ffn.names[0], attended, t.dim("F", block.ffn.width), bias=True)
    inner = activate(t, block.ffn.activation, inner)
    return _output(t, block, block.ffn.names[1], block.norm_names[1], inner, attended)


def _attention(t: Operations, block: Block, spec: Attention, x: Tensor) -> tuple[Tensor, Tensor | None]:
    heads, weights = heads_merged(t, spec, x)
    return _output(t, block, spec.out_name, block.norm_names[0], heads, x), weights


def _output(t: Operations, block: Block, dense: str, norm: str, x: Tensor, residual: Tensor) -> Tensor:
    """norm(dropout(dense(x)) + residual)."""
    result = t.linear(dense, x, residual.dims[-1], bias=True)
    result = t.dropout(result, block.dropout)
    return normalise(t, block.norm, norm, t.add(result, residual))


def _distilbert(t: Operations, block: Block, spec: Attention, mlp: Mlp, x: Tensor) -> Tensor:
    """The same without dropout after attention."""
    hidden = x.dims[-1]
    mixed, _weights = heads_merged(t, spec, x)
    mixed = t.linear(spec.out_name, mixed, hidden, bias=True)
    mixed = normalise(t, block.norm, block.norm_names[0], t.add(mixed, x))
    inner = t.linear(mlp.names[0], mixed, t.dim("F", mlp.width), bias=True)
    inner = activate(t, mlp.activation, inner)
    inner = t.linear(mlp.names[1], inner, hidden, bias=True)
    inner = t.dropout(inner, block.dropout)
    return normalise(t, block.norm, block.norm_names[1], t.add(inner, mixed))


def _modernbert(t: Operations, block: Block, spec: Attention, mlp: Mlp, x: Tensor) -> Tensor:
    """x + attention(norm(x)), and that + down(act(gate) * up) of its norm. The first block has no first norm."""
    normed = normalise(t, block.norm, block.norm_names[0], x) if block.norm_names[0] else x
    held = [normed]
    del normed
    mixed, _weights = _attended(t, spec, held, x.dims[-1])
    x = t.add(x, mixed)
    return t.add(x, _gated(t, mlp, normalise(t, block.norm, block.norm_names[1], x), x.dims[-1]))


def _attended(t: Operations, spec: Attention, held: list[Tensor], hidden: str) -> tuple[Tensor, Tensor | None]:
    result, weights = attend(t, spec, held[0], hidden)
    held.clear()
    return t.dropout(result, spec.dropout), weights


def _gated(t: Operations, mlp: Mlp, x: Tensor, hidden: str) -> Tensor:
    width = t.dim("F", mlp.width)
    both = t.linear(mlp.names[0], x, t.dim("2F", 2 * mlp.width), bias=mlp.up_bias)
    inner, gate = t.split(both, [(*x.dims[:-1], width)] * 2)
    del both
    inner = t.dropout(t.mul(activate(t, mlp.activation, inner), gate), mlp.dropout)
    return t.linear(mlp.names[1], inner, hidden, bias=mlp.down_bias)


# ---- head and loss ------------------------------------------------------------------------------------------------


def trained_loss(t: Operations, head: Head, x: Tensor, variant: str) -> Tensor:
    """Cross-entropy of the token at each position, or of one class for each example."""
    readout = head.readout
    assert readout is not None
    check_setting(t, t.family, variant)
    t.module = readout.dense or readout.classifier
    labels = None
    if readout.task == "labels":
        labels = t.constant("labels", ("B",), "int64")
    if readout.first:
        (x_,) = t.slices(x, [("B", x.dims[-1])])
    else:
        x_ = x
    x_ = t.dropout(x_, readout.dropouts[0])
    if readout.dense:
        x_ = t.linear(readout.dense, x_, x.dims[-1], bias=readout.dense_bias)
        x_ = activate(t, readout.activation, x_)
    if readout.norm is not None:
        x_ = normalise(t, readout.norm, readout.norm_name, x_)
    x_ = t.dropout(x_, readout.dropouts[1])
    if readout.task == "labels":
        logits = t.linear(readout.classifier, x_, t.dim("classes", readout.classes), bias=True)
    else:
        logits = project(t, head, x_)
    del x_
    t.module = "loss"
    if readout.upcasts:
        return cross_entropy(t, t.to(logits, "fp32"), labels)
    return cross_entropy(t, logits, labels)
