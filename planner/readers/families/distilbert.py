"""DistilBERT: BERT with half of the layers, no token types and no pooler (Sanh et al. 2019, arXiv:1910.01108)."""

from __future__ import annotations

from dataclasses import replace

from planner.ledger.weights.linear import linear_weights
from planner.model.shape import Block, Embedding, Head, ModelShape, Readout
from planner.readers.config_view import ConfigView
from planner.readers.families.bert import dense_and_norm, masked_tokens, uncovered_head
from planner.readers.families.decoder import LAYER_NORM, MOST_LAYERS, published_dtype, quantization_method
from planner.readers.families.encoder import architecture, bidirectional_attention, labels, plain_mlp

__all__ = ["READERS"]

_CLASSES = ("DistilBertModel", "DistilBertForMaskedLM", "DistilBertForSequenceClassification")


def _block(view: ConfigView, hidden: int) -> Block:
    """Post-norm; dropout follows the feed-forward branch only, the attention branch is added as it is."""
    mixer = bidirectional_attention(
        view,
        hidden,
        view.int("n_heads", 12, also=("num_attention_heads",)),
        names=tuple(f"attention.{part}_lin" for part in "qkv"),
        out_name="attention.out_lin",
        dropout=view.float("attention_dropout", 0.1, maximum=1.0),
    )
    mlp = plain_mlp(view.int("hidden_dim", 3072), view.str("activation", "gelu"), ("ffn.lin1", "ffn.lin2"))
    return Block(
        mixer=mixer,
        ffn=mlp,
        residual="post",
        norm=LAYER_NORM,
        norm_names=("sa_layer_norm", "output_layer_norm"),
        dropout=view.float("dropout", 0.1, maximum=1.0),
        mixer_dropout=False,
    )


def _distilbert(view: ConfigView) -> ModelShape:
    """The bare encoder, the masked-language model, and the classifier."""
    kind = architecture(view, _CLASSES[0], _CLASSES)
    hidden, vocab = view.int("dim", 768, also=("hidden_size",)), view.int("vocab_size", 30_522)
    positions = view.int("max_position_embeddings", 512)
    tied = view.bool("tie_word_embeddings", True)
    view.ignore("sinusoidal_pos_embds", "qa_dropout", "seq_classif_dropout", "tie_weights_")
    base = "" if kind == _CLASSES[0] else "distilbert."
    head, extra = Head(rows=0, tied=False), ()
    if kind == "DistilBertForMaskedLM":
        transform = dense_and_norm(hidden, "vocab_transform", "vocab_layer_norm")
        readout = replace(
            masked_tokens("vocab_transform", "vocab_layer_norm"), activation=view.str("activation", "gelu")
        )
        head = Head(rows=vocab, tied=tied, bias=True, name="vocab_projector", extra=transform, readout=readout)
    elif kind == "DistilBertForSequenceClassification":
        extra = dense_and_norm(hidden, "pre_classifier")
        extra += linear_weights("classifier", labels(view), hidden, bias=True, component="other")
        readout = Readout(
            task="labels",
            first=True,
            dense="pre_classifier",
            activation="relu",
            dropouts=(0.0, view.float("seq_classif_dropout", 0.2, maximum=1.0)),
            classes=labels(view),
            classifier="classifier",
        )
        head = Head(rows=0, tied=False, readout=readout)
    embedding = Embedding(
        rows=vocab,
        size=hidden,
        name=f"{base}embeddings.word_embeddings",
        positions=positions,
        position_name=f"{base}embeddings.position_embeddings",
        norm=LAYER_NORM,
        norm_name=f"{base}embeddings.LayerNorm",
        dropout=view.float("dropout", 0.1, maximum=1.0),
    )
    return ModelShape(
        name="",
        model_type=view.owner,
        hidden=hidden,
        blocks=(_block(view, hidden),) * view.int("n_layers", 6, maximum=MOST_LAYERS, also=("num_hidden_layers",)),
        embedding=embedding,
        head=head,
        extra=extra,
        max_positions=positions,
        dtype=published_dtype(view),
        quantization=quantization_method(view),
        prefix=f"{base}transformer.layer",
        uncovered=uncovered_head(head, extra),
    )


READERS = {"distilbert": _distilbert}
