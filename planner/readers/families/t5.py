"""T5: an encoder and a decoder with relative position buckets, RMS norms and no biases.

Raffel et al. 2020 (arXiv:1910.10683); T5 v1.1 and Flan-T5 gate the feed-forward layer and have an output matrix of
their own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from planner.model.shape import Attention, Block, Embedding, Head, Mlp, ModelShape, Tower
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import MOST_LAYERS, RMS_NORM, published_dtype, quantization_method
from planner.readers.families.encoder import architecture

__all__ = ["READERS"]

_GENERATES = ("T5ForConditionalGeneration", "T5WithLMHeadModel")
_ENCODES = ("T5EncoderModel",)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What both stacks are built from."""

    attention: Attention
    mlp: Mlp
    buckets: int
    dropout: float


def _feed_forward(view: ConfigView, dropout: float) -> Mlp:
    """`relu`, or `gated-gelu`, which the reference class reads as the tanh approximation `gelu_new`."""
    stated = view.str("feed_forward_proj", "relu")
    first, _, second = stated.partition("-")
    if (first == "gated") != bool(second) or "-" in second:
        raise view.fail("feed_forward_proj", 'an activation such as "relu", or "gated-" and an activation')
    gated = first == "gated"
    return Mlp(
        width=view.int("d_ff", 2048),
        gated=gated,
        activation="gelu_new" if stated == "gated-gelu" else (second or first),
        names=("wi_0", "wi_1", "wo") if gated else ("wi", "wo"),
        dropout=dropout,
    )


def _parts(view: ConfigView) -> _Parts:
    dropout = view.float("dropout_rate", 0.1, maximum=1.0)
    heads, size = view.int("num_heads", 8), view.int("d_kv", 64)
    view.ignore(
        "dense_act_fn",
        "is_gated_act",
        "relative_attention_max_distance",
        "classifier_dropout",
        "n_positions",
        "output_past",
    )
    attention = Attention(heads=heads, kv_heads=heads, head_dim=size, dropout=dropout, position_bias="relative")
    buckets = view.int("relative_attention_num_buckets", 32)
    return _Parts(attention=attention, mlp=_feed_forward(view, dropout), buckets=buckets, dropout=dropout)


def _named(attention: Attention, module: str) -> Attention:
    q, k, v = (f"{module}.{letter}" for letter in "qkv")
    return replace(attention, names=(q, k, v), out_name=f"{module}.o")


def _stack(parts: _Parts, layers: int, *, decodes: bool) -> tuple[Block, ...]:
    """The blocks of one stack; the first one owns the position buckets that all of them add."""
    last = 2 if decodes else 1
    mixer = replace(_named(parts.attention, "layer.0.SelfAttention"), causal=decodes)
    cross = replace(_named(parts.attention, "layer.1.EncDecAttention"), causal=False, cross=True, position_bias="none")
    block = Block(
        mixer=mixer,
        ffn=replace(parts.mlp, names=tuple(f"layer.{last}.DenseReluDense.{name}" for name in parts.mlp.names)),
        norm=RMS_NORM,
        norm_names=("layer.0.layer_norm", f"layer.{last}.layer_norm"),
        cross=cross if decodes else None,
        cross_norm_name="layer.1.layer_norm" if decodes else "",
        dropout=parts.dropout,
    )
    first = replace(block, mixer=replace(mixer, relative_buckets=parts.buckets))
    return (first,) + (block,) * (layers - 1)


def _t5(view: ConfigView) -> ModelShape:
    """The decoder is the main stack, the encoder a tower; `T5EncoderModel` has the encoder alone.

    `tie_word_embeddings: false` (v1.1, Flan) means a separate output matrix, which the published checkpoints hold,
    and no scaling before it (`scale_decoder_outputs` where a config says it apart). Version 5 of the reference
    library shares the table all the same when it builds the class from a config, so that its own count is V x H
    smaller.
    """
    hidden, layers = view.int("d_model", 512), view.int("num_layers", 6, maximum=MOST_LAYERS)
    decoder_layers = view.int("num_decoder_layers", layers, maximum=MOST_LAYERS)
    tied = view.bool("tie_word_embeddings", True)
    parts = _parts(view)
    vocab = view.int("vocab_size", 32_128)
    embedding = Embedding(rows=vocab, size=hidden, name="shared", dropout=parts.dropout)
    common = ModelShape(
        name="",
        model_type=view.owner,
        hidden=hidden,
        blocks=_stack(parts, layers, decodes=False),
        embedding=embedding,
        head=Head(rows=0, tied=False, norm=RMS_NORM, norm_name="encoder.final_layer_norm", dropout=parts.dropout),
        prefix="encoder.block",
        dtype=published_dtype(view),
        quantization=quantization_method(view),
    )
    if architecture(view, _GENERATES[0], _GENERATES + _ENCODES) in _ENCODES:
        return common
    encoder = Tower(
        name="encoder.block",
        role="encoder",
        hidden=hidden,
        blocks=common.blocks,
        final_norm=RMS_NORM,
        final_norm_name="encoder.final_layer_norm",
        shares_embedding=True,
        dropout=parts.dropout,
        final_dropout=parts.dropout,
    )
    head = Head(
        rows=vocab,
        tied=tied,
        norm=RMS_NORM,
        norm_name="decoder.final_layer_norm",
        scaled=view.bool("scale_decoder_outputs", tied),
        dropout=parts.dropout,
    )
    blocks = _stack(parts, decoder_layers, decodes=True)
    return replace(common, blocks=blocks, head=head, towers=(encoder,), prefix="decoder.block")


READERS = {"t5": _t5}
