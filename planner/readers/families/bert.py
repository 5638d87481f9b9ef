"""BERT: a post-norm bidirectional encoder with learned positions (Devlin et al. 2018, arXiv:1810.04805)."""

from __future__ import annotations

from dataclasses import replace

from planner.ledger.weights.linear import linear_weights
from planner.ledger.weights.norm import norm_weights
from planner.model.shape import Block, Embedding, Head, ModelShape, Readout, Weight
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import LAYER_NORM, MOST_LAYERS, published_dtype, quantization_method
from planner.readers.families.encoder import architecture, bidirectional_attention, labels, plain_mlp

__all__ = [
    "READERS",
    "bert_encoder",
    "dense_and_norm",
    "dropout_before_classifier",
    "masked_tokens",
    "uncovered_head",
]

_CLASSES = ("BertModel", "BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification")


def bert_encoder(
    view: ConfigView, base: str, *, vocab: int, types: int, head: Head, extra: tuple[Weight, ...]
) -> ModelShape:
    """Embeddings and blocks under the module path `base` ("" or "bert."), with the given head and further weights."""
    hidden, heads = view.int("hidden_size", 768), view.int("num_attention_heads", 12)
    dropout = view.float("hidden_dropout_prob", 0.1, maximum=1.0)
    positions = view.int("max_position_embeddings", 512)
    view.str("position_embedding_type", "absolute", among=("absolute",))
    view.ignore("classifier_dropout", "gradient_checkpointing")
    if view.bool("add_cross_attention", False):
        raise view.fail("add_cross_attention", "false; decoders with cross-attention are not covered")
    block = Block(
        mixer=bidirectional_attention(
            view,
            hidden,
            heads,
            names=tuple(f"attention.self.{part}" for part in ("query", "key", "value")),
            out_name="attention.output.dense",
            causal=view.bool("is_decoder", False),
            dropout=view.float("attention_probs_dropout_prob", 0.1, maximum=1.0),
        ),
        ffn=plain_mlp(
            view.int("intermediate_size", 3072), view.str("hidden_act", "gelu"), ("intermediate.dense", "output.dense")
        ),
        residual="post",
        norm=LAYER_NORM,
        norm_names=("attention.output.LayerNorm", "output.LayerNorm"),
        dropout=dropout,
    )
    embedding = Embedding(
        rows=view.int("vocab_size", vocab),
        size=hidden,
        name=f"{base}embeddings.word_embeddings",
        positions=positions,
        position_name=f"{base}embeddings.position_embeddings",
        types=view.int("type_vocab_size", types),
        type_name=f"{base}embeddings.token_type_embeddings",
        norm=LAYER_NORM,
        norm_name=f"{base}embeddings.LayerNorm",
        dropout=dropout,
    )
    return ModelShape(
        name="",
        model_type=view.owner,
        hidden=hidden,
        blocks=(block,) * view.int("num_hidden_layers", 12, maximum=MOST_LAYERS),
        embedding=embedding,
        head=head,
        extra=extra,
        max_positions=positions,
        dtype=published_dtype(view),
        quantization=quantization_method(view),
        prefix=f"{base}encoder.layer",
        uncovered=uncovered_head(head, extra),
    )


def uncovered_head(head: Head, extra: tuple[Weight, ...]) -> tuple[str, ...]:
    """What stands after the last block and has weights, but no description of what it keeps."""
    return () if head.readout is not None or not extra else ("pooler and classifier on the first position",)


def dropout_before_classifier(view: ConfigView) -> float:
    """Dropout of a classifier's inputs: its own, or else that of the hidden states."""
    common = view.float("hidden_dropout_prob", 0.1, maximum=1.0)
    return view.float("classifier_dropout", common, maximum=1.0)


def dense_and_norm(hidden: int, dense: str, norm: str = "") -> tuple[Weight, ...]:
    """The (H, H) layer and the norm that stand between the encoder and a projection to the vocabulary, or a pooler."""
    return linear_weights(dense, hidden, hidden, bias=True, component="other") + norm_weights(
        LAYER_NORM, norm, hidden, component="other"
    )


def masked_tokens(dense: str, norm: str) -> Readout:
    """A dense layer, GELU and a norm before the projection to the vocabulary, trained on tokens at every position."""
    return Readout(task="masked", dense=dense, activation="gelu", norm=LAYER_NORM, norm_name=norm)


def _bert(view: ConfigView) -> ModelShape:
    """The classes with a pooler, with the masked-language head, with both, and with a classifier."""
    kind = architecture(view, "BertModel", _CLASSES)
    hidden, vocab = view.int("hidden_size", 768), view.int("vocab_size", 30_522)
    tied = view.bool("tie_word_embeddings", True)
    base = "" if kind == "BertModel" else "bert."
    head, extra = Head(rows=0, tied=False), ()
    if kind != "BertForMaskedLM":
        extra += dense_and_norm(hidden, f"{base}pooler.dense")
    if kind == "BertForSequenceClassification":
        extra += linear_weights("classifier", labels(view), hidden, bias=True, component="other")
        readout = Readout(
            task="labels",
            first=True,
            dense="bert.pooler.dense",
            activation="tanh",
            dropouts=(0.0, dropout_before_classifier(view)),
            classes=labels(view),
            classifier="classifier",
        )
        head = replace(head, readout=readout)
    if kind in ("BertForMaskedLM", "BertForPreTraining"):
        transform = dense_and_norm(hidden, "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm")
        head = Head(rows=vocab, tied=tied, bias=True, name="cls.predictions.decoder", extra=transform)
    if kind == "BertForMaskedLM":
        readout = masked_tokens("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm")
        head = replace(head, readout=replace(readout, activation=view.str("hidden_act", "gelu")))
    if kind == "BertForPreTraining":
        extra += linear_weights("cls.seq_relationship", 2, hidden, bias=True, component="other")
    return bert_encoder(view, base, vocab=30_522, types=2, head=head, extra=extra)


READERS = {"bert": _bert}
