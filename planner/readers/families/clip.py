"""CLIP: a causal text encoder and a vision transformer, compared through two projections.

Radford et al. 2021 (arXiv:2103.00020).
"""

from __future__ import annotations

from planner.ledger.weights.convolution import convolution_weights
from planner.ledger.weights.linear import linear_weights
from planner.ledger.weights.norm import norm_weights
from planner.model.shape import Block, Embedding, Head, ModelShape, Readout, Tower
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import LAYER_NORM, MOST_LAYERS, published_dtype, quantization_method
from planner.readers.families.encoder import bidirectional_attention, parameter, plain_mlp, square_patches

__all__ = ["READERS", "clip_block", "clip_vision_tower"]


def clip_block(view: ConfigView, hidden: int, *, heads: int, width: int, act: str, causal: bool = False) -> Block:
    """The block that both encoders of CLIP and of SigLIP are made of; the keyword values are class defaults."""
    mixer = bidirectional_attention(
        view,
        hidden,
        view.int("num_attention_heads", heads),
        names=tuple(f"self_attn.{part}_proj" for part in "qkv"),
        out_name="self_attn.out_proj",
        dropout=view.float("attention_dropout", 0.0, maximum=1.0),
        causal=causal,
    )
    mlp = plain_mlp(view.int("intermediate_size", width), view.str("hidden_act", act), ("mlp.fc1", "mlp.fc2"))
    return Block(mixer=mixer, ffn=mlp, norm=LAYER_NORM, norm_names=("layer_norm1", "layer_norm2"))


def clip_vision_tower(view: ConfigView, path: str) -> Tower:
    """The vision transformer of CLIP at the module `path`: a class token, one norm before the blocks.

    The norm after them sees the class token alone, so it stands among the further weights.
    """
    hidden = view.int("hidden_size", 768)
    patches, side = square_patches(view, image=224, patch=32)
    view.ignore("projection_dim", "vocab_size")
    convolution = convolution_weights(
        f"{path}.embeddings.patch_embedding",
        hidden,
        view.int("num_channels", 3),
        (side, side),
        bias=False,
        component="vision_or_audio",
    )
    extra = (
        parameter(f"{path}.embeddings.class_embedding", hidden),
        *convolution,
        parameter(f"{path}.embeddings.position_embedding.weight", patches + 1, hidden, kind="embedding"),
        *norm_weights(LAYER_NORM, f"{path}.pre_layrnorm", hidden),
        *norm_weights(LAYER_NORM, f"{path}.post_layernorm", hidden),
    )
    block = clip_block(view, hidden, heads=12, width=3072, act="quick_gelu")
    return Tower(
        name=f"{path}.encoder.layers",
        role="vision",
        hidden=hidden,
        blocks=(block,) * view.int("num_hidden_layers", 12, maximum=MOST_LAYERS),
        tokens=patches + 1,
        extra=extra,
    )


def _clip(view: ConfigView) -> ModelShape:
    """The text encoder is the main stack, the vision transformer a tower; the loss compares pooled vectors."""
    text, vision = view.sub("text_config", "clip_text_model"), view.sub("vision_config", "clip_vision_model")
    view.ignore("text_config_dict", "vision_config_dict", "logit_scale_init_value")
    text.ignore("projection_dim")
    tower = clip_vision_tower(vision, "vision_model")
    pixels = vision.int("image_size", 224)
    hidden, positions = text.int("hidden_size", 512), text.int("max_position_embeddings", 77)
    shared = view.int("projection_dim", 512)
    embedding = Embedding(
        rows=text.int("vocab_size", 49_408),
        size=hidden,
        name="text_model.embeddings.token_embedding",
        positions=positions,
        position_name="text_model.embeddings.position_embedding",
    )
    block = clip_block(text, hidden, heads=8, width=2048, act="quick_gelu", causal=True)
    extra = (
        parameter("logit_scale", component="other"),
        *linear_weights("visual_projection", shared, tower.hidden, bias=False, component="vision_or_audio"),
        *linear_weights("text_projection", shared, hidden, bias=False, component="other"),
    )
    return ModelShape(
        name="",
        model_type=view.owner,
        hidden=hidden,
        blocks=(block,) * text.int("num_hidden_layers", 12, maximum=MOST_LAYERS),
        embedding=embedding,
        head=Head(
            rows=0,
            tied=False,
            norm=LAYER_NORM,
            norm_name="text_model.final_layer_norm",
            readout=Readout(task="pairs"),
        ),
        towers=(tower,),
        extra=extra,
        max_positions=positions,
        dtype=published_dtype(view),
        quantization=quantization_method(view),
        prefix="text_model.encoder.layers",
        image=(vision.int("num_channels", 3), pixels, pixels),
    )


READERS = {"clip": _clip}
