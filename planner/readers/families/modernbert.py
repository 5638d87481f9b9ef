"""ModernBERT: a pre-norm bidirectional encoder with rotary positions, gated feed-forward and local attention.

Warner et al. 2024 (arXiv:2412.13663).
"""

from __future__ import annotations

from dataclasses import replace

from planner.ledger.weights.linear import linear_weights
from planner.ledger.weights.norm import norm_weights
from planner.model.shape import Attention, Block, Embedding, Head, Mlp, ModelShape, Norm, Readout
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import (
    FULL,
    MOST_LAYERS,
    SLIDING,
    published_dtype,
    quantization_method,
    window_kinds,
)
from planner.readers.families.encoder import architecture, bidirectional_attention

__all__ = ["READERS"]

_CLASSES = ("ModernBertForMaskedLM", "ModernBertModel")


def _attention(view: ConfigView, hidden: int, dropout: float) -> Attention:
    return bidirectional_attention(
        view,
        hidden,
        view.int("num_attention_heads", 12),
        bias=view.bool("attention_bias", False),
        rotary=True,
        names=("attn.Wqkv",),
        out_name="attn.Wo",
        dropout=dropout,
    )


def _modernbert(view: ConfigView) -> ModelShape:
    """Two layers out of three see `local_attention // 2` tokens on each side; the first block has no first norm."""
    kind = architecture(view, _CLASSES[0], _CLASSES)
    hidden, layers = view.int("hidden_size", 768), view.int("num_hidden_layers", 22, maximum=MOST_LAYERS)
    vocab = view.int("vocab_size", 50_368)
    norm = Norm(kind="layernorm", bias=view.bool("norm_bias", False), fp32=False)
    dropout = view.float("attention_dropout", 0.0, maximum=1.0)
    window = 2 * (view.int("local_attention", 128) // 2) + 1
    every = view.int("global_attn_every_n_layers", 3)
    kinds = window_kinds(view, layers, lambda layer: layer % every != 0)
    attention = _attention(view, hidden, dropout)
    bias = view.bool("mlp_bias", False)
    mlp = Mlp(
        width=view.int("intermediate_size", 1152),
        gated=True,
        activation=view.str("hidden_activation", "gelu"),
        names=("mlp.Wi", "mlp.Wo"),
        up_bias=bias,
        down_bias=bias,
        dropout=view.float("mlp_dropout", 0.0, maximum=1.0),
    )
    block = Block(mixer=attention, ffn=mlp, norm=norm, norm_names=("attn_norm", "mlp_norm"))
    of_kind = {FULL: block, SLIDING: replace(block, mixer=replace(attention, window=window))}
    blocks = [of_kind[name] for name in kinds]
    blocks[0] = replace(blocks[0], norm_names=("", "mlp_norm"))
    view.ignore("classifier_pooling", "classifier_dropout", "sparse_prediction", "deterministic_flash_attn")
    view.ignore("initializer_cutoff_factor", "sparse_pred_ignore_index", "global_rope_theta", "local_rope_theta")
    view.ignore("reference_compile", "repad_logits_with_grad", "classifier_activation")
    view.ignore("classifier_bias", "decoder_bias", "tie_word_embeddings")
    base = "" if kind == "ModernBertModel" else "model."
    head = Head(rows=0, tied=False, norm=norm, norm_name=f"{base}final_norm")
    if base:
        classifier_bias = view.bool("classifier_bias", False)
        transform = linear_weights("head.dense", hidden, hidden, bias=classifier_bias, component="other")
        head = replace(
            head,
            rows=vocab,
            tied=view.bool("tie_word_embeddings", True),
            bias=view.bool("decoder_bias", True),
            name="decoder",
            extra=transform + norm_weights(norm, "head.norm", hidden),
        )
    uncovered: tuple[str, ...] = ()
    if base and view.bool("sparse_prediction", False):
        uncovered = ("the loss on masked tokens alone",)
    elif base:
        readout = Readout(
            task="masked",
            dense="head.dense",
            dense_bias=view.bool("classifier_bias", False),
            activation=view.str("classifier_activation", "gelu"),
            norm=norm,
            norm_name="head.norm",
            upcasts=True,
        )
        head = replace(head, readout=readout)
    return ModelShape(
        name="",
        model_type=view.owner,
        hidden=hidden,
        blocks=tuple(blocks),
        embedding=Embedding(
            rows=vocab,
            size=hidden,
            name=f"{base}embeddings.tok_embeddings",
            norm=norm,
            norm_name=f"{base}embeddings.norm",
            dropout=view.float("embedding_dropout", 0.0, maximum=1.0),
        ),
        head=head,
        max_positions=view.int("max_position_embeddings", 8192),
        dtype=published_dtype(view),
        quantization=quantization_method(view),
        prefix=f"{base}layers",
        uncovered=uncovered,
    )


READERS = {"modernbert": _modernbert}
