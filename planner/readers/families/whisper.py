"""Whisper: two convolutions over a mel spectrogram, an encoder, and a decoder that attends to it.

Radford et al. 2022 (arXiv:2212.04356).
"""

from __future__ import annotations

from dataclasses import replace

from planner.errors import ModelConfigError
from planner.ledger.weights.convolution import convolution_weights
from planner.model.shape import Attention, Block, Embedding, Head, ModelShape, Tower, Weight
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import LAYER_NORM, MOST_LAYERS, published_dtype, quantization_method
from planner.readers.families.encoder import architecture, bidirectional_attention, parameter, plain_mlp

__all__ = ["READERS"]

_KERNEL = (3,)  # of both convolutions; the second one has stride 2


def _attention(view: ConfigView, hidden: int, side: str, module: str) -> Attention:
    """Biases everywhere but on the keys."""
    return bidirectional_attention(
        view,
        hidden,
        view.int(f"{side}_attention_heads", 6),
        k_bias=False,
        names=tuple(f"{module}.{part}_proj" for part in "qkv"),
        out_name=f"{module}.out_proj",
        dropout=view.float("attention_dropout", 0.0, maximum=1.0),
    )


def _block(view: ConfigView, hidden: int, side: str) -> Block:
    mlp = plain_mlp(
        view.int(f"{side}_ffn_dim", 1536),
        view.str("activation_function", "gelu"),
        ("fc1", "fc2"),
        dropout=view.float("activation_dropout", 0.0, maximum=1.0),
    )
    return Block(
        mixer=_attention(view, hidden, side, "self_attn"),
        ffn=mlp,
        norm=LAYER_NORM,
        norm_names=("self_attn_layer_norm", "final_layer_norm"),
        dropout=view.float("dropout", 0.0, maximum=1.0),
    )


def _front(view: ConfigView, hidden: int, positions: int) -> tuple[Weight, ...]:
    """The two convolutions and the fixed sinusoids, which the reference class stores as a frozen table."""
    path, mels = "model.encoder", view.int("num_mel_bins", 80)
    return (
        *convolution_weights(f"{path}.conv1", hidden, mels, _KERNEL, bias=True, component="vision_or_audio"),
        *convolution_weights(f"{path}.conv2", hidden, hidden, _KERNEL, bias=True, component="vision_or_audio"),
        replace(
            parameter(f"{path}.embed_positions.weight", positions, hidden, kind="embedding", component="embed_in"),
            frozen=True,
        ),
    )


def _whisper(view: ConfigView) -> ModelShape:
    """The decoder is the main stack; the encoder always sees 30 seconds, 1500 positions, however long the speech."""
    architecture(view, "WhisperForConditionalGeneration", ("WhisperForConditionalGeneration",))
    hidden = view.int("d_model", 384)
    positions, sources = view.int("max_target_positions", 448), view.int("max_source_positions", 1500)
    dropout = view.float("dropout", 0.0, maximum=1.0)
    view.ignore("encoder_layerdrop", "decoder_layerdrop", "num_hidden_layers", "scale_embedding", "mask_feature_length")
    view.ignore("use_weighted_layer_sum", "classifier_proj_size", "median_filter_width", "apply_spec_augment")
    for layerdrop in ("encoder_layerdrop", "decoder_layerdrop"):
        if view.float(layerdrop, 0.0, maximum=1.0):
            raise ModelConfigError(f'whisper config: "{layerdrop}" skips layers at random, which no fixed plan covers.')
    encoder = Tower(
        name="model.encoder.layers",
        role="encoder",
        hidden=hidden,
        blocks=(_block(view, hidden, "encoder"),) * view.int("encoder_layers", 4, maximum=MOST_LAYERS),
        tokens=sources,
        final_norm=LAYER_NORM,
        final_norm_name="model.encoder.layer_norm",
        extra=_front(view, hidden, sources),
        dropout=dropout,
    )
    plain = _block(view, hidden, "decoder")
    assert isinstance(plain.mixer, Attention)
    block = replace(
        plain,
        mixer=replace(plain.mixer, causal=True),
        cross=replace(_attention(view, hidden, "decoder", "encoder_attn"), cross=True),
        cross_norm_name="encoder_attn_layer_norm",
    )
    vocab = view.int("vocab_size", 51_865)
    embedding = Embedding(
        rows=vocab,
        size=hidden,
        name="model.decoder.embed_tokens",
        positions=positions,
        position_name="model.decoder.embed_positions",
        dropout=dropout,
    )
    head = Head(
        rows=vocab,
        tied=view.bool("tie_word_embeddings", True),
        norm=LAYER_NORM,
        norm_name="model.decoder.layer_norm",
        name="proj_out",
    )
    return ModelShape(
        name="",
        model_type=view.owner,
        hidden=hidden,
        blocks=(block,) * view.int("decoder_layers", 4, maximum=MOST_LAYERS),
        embedding=embedding,
        head=head,
        towers=(encoder,),
        max_positions=positions,
        dtype=published_dtype(view),
        quantization=quantization_method(view),
        prefix="model.decoder.layers",
    )


READERS = {"whisper": _whisper}
