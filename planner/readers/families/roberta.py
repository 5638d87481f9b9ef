"""RoBERTa and XLM-RoBERTa: BERT's encoder with other tables and heads (Liu et al. 2019, arXiv:1907.11692)."""

from __future__ import annotations

from planner.ledger.weights.linear import linear_weights
from planner.model.shape import Head, ModelShape, Readout
from planner.readers.config_view import ConfigView
from planner.readers.families.bert import bert_encoder, dense_and_norm, dropout_before_classifier, masked_tokens
from planner.readers.families.encoder import architecture, labels

__all__ = ["READERS"]


def _roberta(view: ConfigView) -> ModelShape:
    """The class with a pooler, with the masked-language head, and with a classifier."""
    stem = "XLMRoberta" if view.owner == "xlm-roberta" else "Roberta"
    classes = (f"{stem}Model", f"{stem}ForMaskedLM", f"{stem}ForSequenceClassification")
    kind = architecture(view, classes[0], classes)
    hidden, vocab = view.int("hidden_size", 768), view.int("vocab_size", 50_265)
    tied = view.bool("tie_word_embeddings", True)
    head, extra, base = Head(rows=0, tied=False), (), "roberta."
    if kind == classes[0]:
        extra, base = dense_and_norm(hidden, "pooler.dense"), ""
    elif kind == classes[1]:
        transform = dense_and_norm(hidden, "lm_head.dense", "lm_head.layer_norm")
        readout = masked_tokens("lm_head.dense", "lm_head.layer_norm")
        head = Head(rows=vocab, tied=tied, bias=True, name="lm_head.decoder", extra=transform, readout=readout)
    else:
        extra = dense_and_norm(hidden, "classifier.dense")
        extra += linear_weights("classifier.out_proj", labels(view), hidden, bias=True, component="other")
        dropout = dropout_before_classifier(view)
        readout = Readout(
            task="labels",
            first=True,
            dense="classifier.dense",
            activation="tanh",
            dropouts=(dropout, dropout),
            classes=labels(view),
            classifier="classifier.out_proj",
        )
        head = Head(rows=0, tied=False, readout=readout)
    return bert_encoder(view, base, vocab=50_265, types=2, head=head, extra=extra)


READERS = {"roberta": _roberta, "xlm-roberta": _roberta}
