"""A text decoder that also reads images: the decoder of its own family under another module path, with towers."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from planner.errors import ModelConfigError, nearest
from planner.model.shape import ModelShape, Tower
from planner.readers.config_view import ConfigView
from planner.readers.families.clip import clip_vision_tower
from planner.readers.families.decoder import published_dtype, quantization_method
from planner.readers.families.pixtral import pixtral_tower
from planner.readers.families.registry import known_types, reader_of
from planner.readers.families.siglip import siglip_vision_tower

__all__ = ["text_decoder", "vision_tower", "with_towers"]

_TOWERS: Final = {
    "clip_vision_model": clip_vision_tower,
    "siglip_vision_model": siglip_vision_tower,
    "pixtral": pixtral_tower,
}


def text_decoder(view: ConfigView, default: str, same_as: dict[str, str] | None = None) -> ModelShape:
    """What the family of the nested `text_config` makes of it; a config without one is flat and is read itself.

    default: the text type of the reference class. same_as: text types that another family's reader reads.
    """
    nested = view.has("text_config")
    stated = view.sub("text_config").str("model_type", default) if nested else default
    text_type = (same_as or {}).get(stated, stated)
    reader = reader_of(text_type)
    if reader is None:
        raise ModelConfigError(
            f'{view.owner} config: "text_config.model_type" {text_type[:80]!r} is not known; '
            f"{nearest(text_type, known_types())}"
        )
    return reader(view.sub("text_config", text_type) if nested else view)


def vision_tower(view: ConfigView, default: str, path: str) -> Tower:
    """The tower that `vision_config` describes, at the module `path`; `default` is the type of the reference class."""
    kind = view.sub("vision_config").str("model_type", default, among=tuple(_TOWERS))
    return _TOWERS[kind](view.sub("vision_config", kind), path)


def with_towers(
    view: ConfigView,
    text: ModelShape,
    *,
    towers: tuple[Tower, ...],
    uncovered: tuple[str, ...],
    tied: bool,
    path: str = "model.language_model",
    head_name: str = "lm_head",
) -> ModelShape:
    """The text decoder with its `model.` moved to `path`, and the towers beside it.

    tied: the default of the reference class, for a config that says nothing at either level.
    """
    assert text.embedding is not None and text.head is not None

    def moved(name: str) -> str:
        return f"{path}.{name.removeprefix('model.')}" if name.startswith("model.") else name

    inner = view.sub("text_config")
    share = view.bool("tie_word_embeddings", inner.bool("tie_word_embeddings", tied))
    return replace(
        text,
        model_type=view.owner,
        embedding=replace(text.embedding, name=moved(text.embedding.name)),
        head=replace(text.head, norm_name=moved(text.head.norm_name), name=head_name, tied=share),
        prefix=moved(text.prefix),
        towers=text.towers + towers,
        dtype=published_dtype(view) or text.dtype,
        quantization=quantization_method(view) or text.quantization,
        uncovered=text.uncovered + uncovered,
    )
