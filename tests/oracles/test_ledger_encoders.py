"""Encoders in the ledger against the dry run of their real modules: text, speech and images, moment by moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from planner.errors import NotCovered, PlanError
from planner.ledger.parameters import state_tensors
from planner.ledger.profile import profile_named
from planner.ledger.setting import Setting
from planner.ledger.step import record_step
from planner.memory.moments import PassLevels, pass_levels
from planner.model.shape import ModelShape
from planner.plan import Method, Precision, Recompute
from planner.readers.hf_config import shape_from_config
from planner.readers.models import load_trained_model

TOLERANCE = 0.0005
MOMENTS = ("forward_peak", "forward_end", "backward_peak")
LENGTH = 256
PIXELS, SIDE = 64, 8
FRAMES = 3000

_SIZES = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024, "num_hidden_layers": 3}
_BERT = {**_SIZES, "vocab_size": 2000, "max_position_embeddings": 512}
_DISTILBERT = {"dim": 256, "n_heads": 4, "hidden_dim": 1024, "n_layers": 3, "vocab_size": 2000}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
_WHISPER = {
    "d_model": 256,
    "vocab_size": 2000,
    "max_target_positions": 448,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    **_TOKENS,
    **{f"{side}_layers": 3 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 1024 for side in ("encoder", "decoder")},
}
_DROPOUTS = {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1}
_VIT = {**_SIZES, "image_size": PIXELS, "patch_size": SIDE, "num_labels": 100}

_MODERNBERT = {
    **_SIZES,
    "num_hidden_layers": 5,
    "intermediate_size": 384,
    "vocab_size": 2000,
    **{key: _TOKENS[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")},
    "cls_token_id": 1,
    "sep_token_id": 2,
}
_CLIP = {
    "projection_dim": 128,
    "text_config": {**_SIZES, "vocab_size": 2000, "max_position_embeddings": LENGTH},
    "vision_config": {**_SIZES, "hidden_size": 512, "image_size": PIXELS, "patch_size": SIDE},
}

# name: (configuration with its class, what LoRA is put on)
FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "bert": ({"model_type": "bert", "architectures": ["BertForMaskedLM"], **_BERT}, ("query", "value")),
    "bert labels": (
        {"model_type": "bert", "architectures": ["BertForSequenceClassification"], **_BERT},
        ("query", "value"),
    ),
    "roberta": ({"model_type": "roberta", "architectures": ["RobertaForMaskedLM"], **_BERT}, ("query", "value")),
    "roberta labels": (
        {"model_type": "roberta", "architectures": ["RobertaForSequenceClassification"], **_BERT},
        ("query", "value"),
    ),
    "distilbert": (
        {"model_type": "distilbert", "architectures": ["DistilBertForMaskedLM"], **_DISTILBERT},
        ("q_lin", "v_lin"),
    ),
    "distilbert labels": (
        {"model_type": "distilbert", "architectures": ["DistilBertForSequenceClassification"], **_DISTILBERT},
        ("q_lin", "v_lin"),
    ),
    "modernbert": (
        {"model_type": "modernbert", "architectures": ["ModernBertForMaskedLM"], **_MODERNBERT},
        ("Wqkv",),
    ),
    "modernbert dropout": (
        {
            "model_type": "modernbert",
            "architectures": ["ModernBertForMaskedLM"],
            **_MODERNBERT,
            **{f"{part}_dropout": 0.1 for part in ("attention", "mlp", "embedding")},
        },
        ("Wqkv",),
    ),
    "clip": ({"model_type": "clip", "architectures": ["CLIPModel"], **_CLIP}, ("q_proj", "v_proj")),
    "whisper": (
        {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"], **_WHISPER},
        ("q_proj", "v_proj"),
    ),
    "whisper dropout": (
        {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"], **_WHISPER, **_DROPOUTS},
        ("q_proj", "v_proj"),
    ),
    "vit": ({"model_type": "vit", "architectures": ["ViTForImageClassification"], **_VIT}, ("q_proj", "v_proj")),
    "vit dropout": (
        {
            "model_type": "vit",
            "architectures": ["ViTForImageClassification"],
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1,
            "qkv_bias": False,
            **_VIT,
        },
        ("q_proj", "v_proj"),
    ),
}
EVERYWHERE: list[dict[str, Any]] = [{}, {"recompute": True}, {"lora": True}, {"lora": True, "recompute": True}]
FURTHER: list[dict[str, Any]] = [
    {"attention": "eager"},
    {"attention": "flash_attention_2"},
    {"dtype": "fp32"},
    {"dtype": "fp32", "recompute": True},
    {"dtype": "fp32", "autocast": "bf16"},
    {"dtype": "fp32", "autocast": "bf16", "recompute": True},
    {"dtype": "fp16"},
]
WIDELY = ("bert", "distilbert", "modernbert", "whisper", "vit", "clip")
# Recomputed blocks of two kinds each hold tables or masks: the dry run lets those of one kind go when the last block of
# that kind has run backward, the ledger lets both go at the end.
LOOSER = {"modernbert": 0.012, "modernbert dropout": 0.012}
CASES = [(name, variant) for name in FAMILIES for variant in EVERYWHERE]
CASES += [(name, variant) for name in WIDELY for variant in FURTHER]


def _name(case: tuple[str, dict[str, Any]]) -> str:
    return " ".join([case[0], *(f"{key}={value}" for key, value in case[1].items())])


def _levels(shape: ModelShape, batch: Any, method: Method, variant: dict[str, Any], length: Any = LENGTH) -> PassLevels:
    dtype = variant.get("dtype", "bf16")
    compute = variant.get("autocast")
    setting = Setting(
        micro_batch_size=batch,
        sequence_length=length,
        precision=Precision(
            recipe="custom",
            weights=dtype,
            gradients=dtype,
            optimizer_states=dtype,
            compute=compute or dtype,
            autocast=compute is not None,
        ),
        method=method,
        recompute=Recompute(mode="full" if variant.get("recompute") else "none"),
        attention="flash" if variant.get("attention") == "flash_attention_2" else variant.get("attention", "sdpa"),
        loss="default",
        profile=profile_named("transformers", "5.23"),
    )
    return pass_levels(record_step(shape, setting))


def _step(shape: ModelShape, batch: int, dtype: str) -> tuple[Callable[[Any, Any], Any] | str, int]:
    """The loss of a step with inputs of the family's kind, and the bytes of inputs other than token ids."""
    import torch  # pyright: ignore[reportMissingImports]

    kept: dict[int, dict[str, Any]] = {}

    def of(make: Callable[[Any], dict[str, Any]]) -> Callable[[Any, Any], Any]:
        def loss(model: Any, ids: Any) -> Any:
            if id(ids) not in kept:
                kept.clear()
                kept[id(ids)] = make(ids)
            return model(**kept[id(ids)]).loss

        return loss

    def labels() -> Any:
        return torch.empty(batch, dtype=torch.int64)

    ids_bytes = batch * LENGTH * 8
    if shape.image is not None and shape.embedding is not None:

        def paired(ids: Any) -> dict[str, Any]:
            return {"input_ids": ids, "pixel_values": torch.empty(batch, 3, PIXELS, PIXELS, dtype=torch.float32)}

        return of(lambda ids: paired(ids) | {"return_loss": True}), batch * 3 * PIXELS * PIXELS * 4 + ids_bytes
    if shape.image is not None:
        images = of(
            lambda _: {"pixel_values": torch.empty(batch, 3, PIXELS, PIXELS, dtype=torch.float32), "labels": labels()}
        )
        return images, batch * 3 * PIXELS * PIXELS * 4 + 512
    if shape.towers:
        wide = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]

        def heard(ids: Any) -> dict[str, Any]:
            return {"input_features": torch.empty(batch, 80, FRAMES, dtype=wide), "labels": ids, "use_cache": False}

        return of(heard), batch * 80 * FRAMES * (4 if dtype == "fp32" else 2) + ids_bytes
    if shape.head is not None and not shape.head.rows:
        return of(lambda ids: {"input_ids": ids, "labels": labels()}), ids_bytes + 512
    return "default", ids_bytes


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_every_moment_agrees_with_the_dry_run(case: tuple[str, dict[str, Any]]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from planner.measure.dry_run import replay_training_step

    name, variant = case
    config, targets = FAMILIES[name]
    dtype = variant.get("dtype", "bf16")
    method, lora = Method(), None
    if variant.get("lora"):
        pytest.importorskip("peft")
        method = Method(name="lora", rank=16, targets=targets)
        lora = {"r": 16, "target_modules": list(targets), "task_type": None}
    shape = shape_from_config(config)
    batch = 8 if shape.image is not None else 2
    loss, inputs_bytes = _step(shape, batch, dtype)

    def build() -> Any:
        settings = {key: value for key, value in config.items() if key != "model_type"}
        built = transformers.AutoConfig.for_model(config["model_type"], **settings)
        return getattr(transformers, config["architectures"][0])._from_config(built, dtype=torch.get_default_dtype())

    run = replay_training_step(
        build,
        micro_batch_size=batch,
        sequence_length=LENGTH,
        dtype=dtype,
        attention=variant.get("attention", "sdpa"),
        autocast=variant.get("autocast"),
        gradient_checkpointing="non-reentrant" if variant.get("recompute") else False,
        lora=lora,
        loss=loss,
    )
    states_bytes = run.moments["steady"] - inputs_bytes
    levels = _levels(shape, batch, method, variant)
    for moment in MOMENTS:
        real, level = run.moments[moment] - states_bytes, int(getattr(levels, moment))
        print(f"{name} {moment}: ledger {level:,} dry run {real:,} ratio {level / real:.6f}")
        recomputed = LOOSER.get(name, TOLERANCE) if variant.get("recompute") else TOLERANCE
        assert abs(level / real - 1) < recomputed, moment


@pytest.mark.parametrize("name", ["bert", "modernbert", "whisper", "vit", "clip"])
def test_a_grid_of_batches_answers_as_each_batch_does(name: str) -> None:
    shape = shape_from_config(FAMILIES[name][0])
    batches = np.array([1, 3, 8])
    grid = _levels(shape, batches, Method(), {})
    for position, batch in enumerate(batches):
        one = _levels(shape, int(batch), Method(), {})
        for moment in MOMENTS:
            assert int(getattr(grid, moment)[position]) == int(getattr(one, moment))


def test_the_sequence_length_does_not_change_what_an_image_needs() -> None:
    shape = shape_from_config(FAMILIES["vit"][0])
    short, long = (_levels(shape, 4, Method(), {}, length) for length in (16, 4096))
    assert short.backward_peak == long.backward_peak


def test_fixed_sinusoids_never_train() -> None:
    shape = shape_from_config(FAMILIES["whisper"][0])
    frozen = [tensor.name for tensor in state_tensors(shape, Method(), Precision()) if not tensor.trainable]
    assert frozen == ["model.encoder.embed_positions.weight"]


def test_a_sequence_beyond_the_learned_positions_is_an_error() -> None:
    shape = shape_from_config(FAMILIES["roberta"][0])
    assert _levels(shape, 1, Method(), {}, 510).forward_peak > 0
    with pytest.raises(PlanError, match="beyond the 510 positions"):
        _levels(shape, 1, Method(), {}, 511)


def test_an_encoder_without_a_loss_is_refused_and_says_which_class_has_one() -> None:
    shape = shape_from_config({"model_type": "bert", "architectures": ["BertModel"], **_BERT})
    with pytest.raises(NotCovered, match="BertForMaskedLM"):
        _levels(shape, 1, Method(), {})


@pytest.mark.parametrize(
    ("config", "method", "profile", "sentence"),
    [
        (FAMILIES["bert"][0] | {"is_decoder": True}, Method(), "5.23", "as a decoder"),
        (FAMILIES["bert"][0], Method(name="qlora", targets=("query",)), "5.23", "qlora"),
        (FAMILIES["vit"][0], Method(), "4.48", "transformers 4.46"),
        (FAMILIES["whisper"][0], Method(), "4.48", "transformers 4.46"),
        (FAMILIES["clip"][0], Method(), "4.48", "transformers 4.46"),
        ({"model_type": "vit", "architectures": ["ViTModel"], **_VIT}, Method(), "5.23", "ViTForImageClassification"),
    ],
)
def test_what_is_not_described_is_refused(config: dict[str, Any], method: Method, profile: str, sentence: str) -> None:
    setting = Setting(
        micro_batch_size=1,
        sequence_length=64,
        precision=Precision(),
        method=method,
        recompute=Recompute(mode="none"),
        attention="sdpa",
        loss="default",
        profile=profile_named("transformers", profile),
    )
    with pytest.raises(NotCovered, match=sentence):
        record_step(shape_from_config(config), setting)


def test_an_encoder_that_names_no_class_trains_as_a_masked_language_model() -> None:
    shape, notes = load_trained_model("bert-base-uncased")
    assert shape.head is not None and shape.head.readout is not None and shape.head.readout.task == "masked"
    assert notes == ("trained as BertForMaskedLM, as the model names no class of its own",)
    stated, none = load_trained_model({"model_type": "bert", "architectures": ["BertModel"], **_BERT})
    assert stated.head is not None and stated.head.readout is None and none == ()
