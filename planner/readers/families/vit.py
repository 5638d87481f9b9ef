"""ViT: a pre-norm encoder over the patches of one image (Dosovitskiy et al. 2020, arXiv:2010.11929)."""

from __future__ import annotations

from planner.ledger.weights.convolution import convolution_weights
from planner.ledger.weights.linear import linear_weights
from planner.model.shape import Block, Head, ModelShape, Readout
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import LAYER_NORM, MOST_LAYERS, published_dtype, quantization_method
from planner.readers.families.encoder import (
    architecture,
    bidirectional_attention,
    labels,
    parameter,
    plain_mlp,
    square_patches,
)

__all__ = ["READERS"]

_CLASSES = ("ViTModel", "ViTForImageClassification")


def _block(view: ConfigView, hidden: int, dropout: float) -> Block:
    qkv_bias = view.bool("qkv_bias", True)
    mixer = bidirectional_attention(
        view,
        hidden,
        view.int("num_attention_heads", 12),
        q_bias=qkv_bias,
        k_bias=qkv_bias,
        v_bias=qkv_bias,
        names=tuple(f"attention.{part}_proj" for part in "qkv"),
        out_name="attention.o_proj",
        dropout=view.float("attention_probs_dropout_prob", 0.0, maximum=1.0),
    )
    mlp = plain_mlp(view.int("intermediate_size", 3072), view.str("hidden_act", "gelu"), ("mlp.fc1", "mlp.fc2"))
    return Block(
        mixer=mixer,
        ffn=mlp,
        norm=LAYER_NORM,
        norm_names=("layernorm_before", "layernorm_after"),
        dropout=dropout,
    )


def _vit(view: ConfigView) -> ModelShape:
    """The encoder with its pooler, or with a classifier in place of it. Names are those of transformers 5."""
    kind = architecture(view, _CLASSES[0], _CLASSES)
    base = "" if kind == "ViTModel" else "vit."
    hidden, dropout = view.int("hidden_size", 768), view.float("hidden_dropout_prob", 0.0, maximum=1.0)
    patches, side = square_patches(view, image=224, patch=16)
    channels, pixels = view.int("num_channels", 3), view.int("image_size", 224)
    readout = None
    view.ignore("encoder_stride", "pooler_act", "pooler_output_size")
    extra = (
        parameter(f"{base}embeddings.cls_token", 1, 1, hidden, component="embed_in"),
        parameter(f"{base}embeddings.position_embeddings", 1, patches + 1, hidden, component="embed_in"),
        *convolution_weights(
            f"{base}embeddings.patch_embeddings.projection",
            hidden,
            channels,
            (side, side),
            bias=True,
            component="embed_in",
        ),
    )
    if base:
        extra += linear_weights("classifier", labels(view), hidden, bias=True, component="other")
        readout = Readout(task="labels", first=True, classes=labels(view), classifier="classifier")
    else:
        pooled = view.int("pooler_output_size", hidden)
        extra += linear_weights("pooler.dense", pooled, hidden, bias=True, component="other")
    return ModelShape(
        name="",
        model_type=view.owner,
        hidden=hidden,
        blocks=(_block(view, hidden, dropout),) * view.int("num_hidden_layers", 12, maximum=MOST_LAYERS),
        embedding=None,
        head=Head(rows=0, tied=False, norm=LAYER_NORM, norm_name=f"{base}layernorm", readout=readout),
        extra=extra,
        max_positions=patches + 1,
        tokens=patches + 1,
        image=(channels, pixels, pixels),
        dtype=published_dtype(view),
        quantization=quantization_method(view),
        prefix=f"{base}layers",
        uncovered=() if readout is not None else ("pooler on the first position",),
    )


READERS = {"vit": _vit}
