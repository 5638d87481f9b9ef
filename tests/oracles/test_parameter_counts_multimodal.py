"""Names and shapes of every parameter, against the reference classes of transformers and diffusers on the meta device.

The configs are small in depth and width, so that each instantiation takes milliseconds; sizes are all different, so
that two of them cannot be mistaken for each other.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from planner.ledger.weights import named_weights, parameter_counts
from planner.readers.hf_config import shape_from_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

Config = dict[str, Any]

_CLIP_TOWER: Config = {
    "model_type": "clip_vision_model",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
_SIGLIP_TOWER: Config = {**_CLIP_TOWER, "model_type": "siglip_vision_model", "vision_use_head": False}
_PIXTRAL_TOWER: Config = {**_CLIP_TOWER, "model_type": "pixtral", "head_dim": 12, "hidden_act": "silu"}
_TEXT: Config = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 256,
}
_QWEN3_TOWER: Config = {
    "depth": 3,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_heads": 4,
    "num_position_embeddings": 36,
    "out_hidden_size": 64,
    "patch_size": 6,
}
_EXPERTS: Config = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_DELTA: Config = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "num_hidden_layers": 5,
    "head_dim": 20,
}
_BERT: Config = {key: size for key, size in _TEXT.items() if key != "num_key_value_heads"} | {"type_vocab_size": 3}
_T5: Config = {
    "model_type": "t5",
    "d_model": 48,
    "d_ff": 100,
    "d_kv": 10,
    "num_heads": 4,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "vocab_size": 130,
}

CASES: dict[str, tuple[str, Config]] = {
    "t5": ("T5ForConditionalGeneration", _T5),
    "t5-encoder": ("T5EncoderModel", _T5),
    "flan-t5": ("T5ForConditionalGeneration", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "bert": ("BertModel", {"model_type": "bert", **_BERT}),
    "bert-masked": ("BertForMaskedLM", {"model_type": "bert", **_BERT}),
    "bert-pretraining": ("BertForPreTraining", {"model_type": "bert", **_BERT}),
    "bert-classifier": ("BertForSequenceClassification", {"model_type": "bert", **_BERT, "num_labels": 5}),
    "roberta": ("RobertaModel", {"model_type": "roberta", **_BERT}),
    "roberta-masked": ("RobertaForMaskedLM", {"model_type": "roberta", **_BERT}),
    "roberta-classifier": ("RobertaForSequenceClassification", {"model_type": "roberta", **_BERT, "num_labels": 3}),
    "xlm-roberta": ("XLMRobertaForMaskedLM", {"model_type": "xlm-roberta", **_BERT}),
    "distilbert": (
        "DistilBertModel",
        {"model_type": "distilbert", "dim": 48, "hidden_dim": 100, "n_heads": 4, "n_layers": 2, "vocab_size": 99},
    ),
    "distilbert-masked": (
        "DistilBertForMaskedLM",
        {"model_type": "distilbert", "dim": 24, "n_heads": 2, "n_layers": 2},
    ),
    "distilbert-classifier": ("DistilBertForSequenceClassification", {"model_type": "distilbert", "n_layers": 1}),
    "modernbert": (
        "ModernBertForMaskedLM",
        {"model_type": "modernbert", "hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4}
        | {"intermediate_size": 40, "vocab_size": 50_368},
    ),
    "modernbert-bare": ("ModernBertModel", {"model_type": "modernbert", "num_hidden_layers": 2, "norm_bias": True}),
    "vit": ("ViTModel", {"model_type": "vit", "num_hidden_layers": 2, "image_size": 64, "pooler_output_size": 40}),
    "vit-classifier": (
        "ViTForImageClassification",
        {"model_type": "vit", "num_hidden_layers": 2, "num_labels": 7, "qkv_bias": False},
    ),
    "clip": (
        "CLIPModel",
        {"model_type": "clip", "projection_dim": 40, "vision_config": _CLIP_TOWER}
        | {"text_config": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 90}},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        {"model_type": "whisper", "d_model": 48, "encoder_layers": 3, "decoder_layers": 2, "encoder_ffn_dim": 100}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 6, "decoder_ffn_dim": 60, "num_mel_bins": 17},
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        {"model_type": "llava", "text_config": {"model_type": "llama", **_TEXT}, "vision_config": _CLIP_TOWER},
    ),
    "llava-siglip-qwen2": (
        "LlavaForConditionalGeneration",
        {"model_type": "llava", "text_config": {"model_type": "qwen2", **_TEXT}, "vision_feature_layer": [-2, -1]}
        | {"vision_config": {**_SIGLIP_TOWER, "vision_use_head": True}, "multimodal_projector_bias": False},
    ),
    "pixtral": (
        "LlavaForConditionalGeneration",
        {"model_type": "llava", "text_config": {"model_type": "mistral", **_TEXT}, "vision_config": _PIXTRAL_TOWER},
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        {"model_type": "mistral3", "text_config": {"model_type": "ministral3", **_TEXT}, "tie_word_embeddings": False}
        | {"vision_config": _PIXTRAL_TOWER},
    ),
    "qwen2-vl": (
        "Qwen2VLForConditionalGeneration",
        {"model_type": "qwen2_vl", "text_config": {"model_type": "qwen2_vl_text", **_TEXT}}
        | {"vision_config": {"depth": 2, "embed_dim": 40, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 3}},
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {"model_type": "qwen2_5_vl", "text_config": {"model_type": "qwen2_5_vl_text", **_TEXT}}
        | {"vision_config": {"depth": 2, "hidden_size": 40, "out_hidden_size": 64, "num_heads": 4, "in_channels": 3}},
    ),
    "qwen3-vl": (
        "Qwen3VLForConditionalGeneration",
        {"model_type": "qwen3_vl", "text_config": {"model_type": "qwen3_vl_text", "head_dim": 24, **_TEXT}}
        | {"vision_config": {**_QWEN3_TOWER, "deepstack_visual_indexes": [0, 2]}},
    ),
    "qwen3-vl-moe": (
        "Qwen3VLMoeForConditionalGeneration",
        {"model_type": "qwen3_vl_moe", "vision_config": {**_QWEN3_TOWER, "deepstack_visual_indexes": [1]}}
        | {"text_config": {"model_type": "qwen3_vl_moe_text", "head_dim": 24, **_TEXT, **_EXPERTS}},
    ),
    "qwen3.5": (
        "Qwen3_5ForConditionalGeneration",
        {"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_text", **_TEXT, **_DELTA}}
        | {"vision_config": _QWEN3_TOWER},
    ),
    "qwen3.5-text": ("Qwen3_5ForCausalLM", {"model_type": "qwen3_5_text", **_TEXT, **_DELTA}),
    "qwen3.5-moe": (
        "Qwen3_5MoeForConditionalGeneration",
        {"model_type": "qwen3_5_moe", "vision_config": _QWEN3_TOWER}
        | {
            "text_config": {"model_type": "qwen3_5_moe_text", **_TEXT, **_DELTA, **_EXPERTS}
            | {"shared_expert_intermediate_size": 30}
        },
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "head_dim": 20, **_TEXT}}
        | {"vision_config": _SIGLIP_TOWER, "mm_tokens_per_image": 4},
    ),
    "gemma4": (
        "Gemma4ForConditionalGeneration",
        {
            "model_type": "gemma4",
            "audio_config": None,
            "vision_config": {
                "model_type": "gemma4_vision",
                "hidden_size": 48,
                "intermediate_size": 72,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 12,
                "position_embedding_size": 33,
            },
            "text_config": {
                "model_type": "gemma4_text",
                **_TEXT,
                "num_hidden_layers": 7,
                "head_dim": 20,
                "global_head_dim": 28,
                "num_global_key_value_heads": 1,
                "attention_k_eq_v": True,
                "hidden_size_per_layer_input": 0,
                "enable_moe_block": True,
                "num_experts": 8,
                "top_k_experts": 2,
                "moe_intermediate_size": 24,
            },
        },
    ),
    "gemma4-dense": (
        "Gemma4ForCausalLM",
        {"model_type": "gemma4_text", **_TEXT, "hidden_size_per_layer_input": 0, "num_hidden_layers": 6},
    ),
    "kimi-k2.5": (
        "Kimi_K25ForConditionalGeneration",
        {
            "model_type": "kimi_k25",
            "projection_hidden_size": 48,
            "tie_word_embeddings": False,
            "text_config": {
                "model_type": "deepseek_v3",
                **_TEXT,
                "num_key_value_heads": 4,
                "moe_intermediate_size": 24,
                "n_routed_experts": 8,
                "num_experts_per_tok": 2,
                "n_group": 2,
                "topk_group": 1,
                "first_k_dense_replace": 1,
                "q_lora_rank": 20,
                "kv_lora_rank": 12,
                "qk_nope_head_dim": 10,
                "qk_rope_head_dim": 6,
                "v_head_dim": 14,
            },
            "vision_config": {
                "hidden_size": 48,
                "intermediate_size": 72,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "pos_emb_height": 9,
                "pos_emb_width": 11,
            },
        },
    ),
    "minimax-m3": (
        "MiniMaxM3SparseForConditionalGeneration",
        {
            "model_type": "minimax_m3_vl",
            "projector_hidden_size": 56,
            "text_config": {
                "model_type": "minimax_m3_vl_text",
                **_TEXT,
                "head_dim": 24,
                "rotary_dim": 12,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                "dense_intermediate_size": 88,
                "shared_intermediate_size": 36,
                "index_n_heads": 2,
                "index_head_dim": 24,
                "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
                "mlp_layer_types": ["dense", "dense", "sparse"],
            },
            "vision_config": {
                "hidden_size": 48,
                "intermediate_size": 72,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
            },
        },
    ),
    "llama4": (
        "Llama4ForConditionalGeneration",
        {
            "model_type": "llama4",
            "text_config": {
                "model_type": "llama4_text",
                **_TEXT,
                "head_dim": 24,
                "num_hidden_layers": 4,
                "intermediate_size_mlp": 88,
                "interleave_moe_layer_step": 2,
                "num_local_experts": 6,
            },
            "vision_config": {
                **_CLIP_TOWER,
                "model_type": "llama4_vision_model",
                "intermediate_size": 192,  # four patches of the width are one: the class expects 4 x 48
                "vision_output_dim": 36,
                "projector_input_dim": 36,
                "projector_output_dim": 36,
            },
        },
    ),
    "mllama": (
        "MllamaForConditionalGeneration",
        {
            "model_type": "mllama",
            "text_config": {
                "model_type": "mllama_text_model",
                **_TEXT,
                "cross_attention_layers": [1],
                "pad_token_id": 0,
            },
            "vision_config": {
                "model_type": "mllama_vision_model",
                "hidden_size": 48,
                "attention_heads": 4,
                "intermediate_size": 72,
                "num_hidden_layers": 3,
                "num_global_layers": 2,
                "intermediate_layers_indices": [0, 2],
                "vision_output_dim": 144,
                "image_size": 28,
                "patch_size": 7,
                "max_num_tiles": 3,
                "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [2, 1], [3, 1]],
            },
        },
    ),
}


def _reference(kind: str, config: Config) -> Any:
    """The reference class, built from the config without memory."""
    known = dict(config)
    made = transformers.CONFIG_MAPPING[known.pop("model_type")](**known)
    with torch.device("meta"):
        return getattr(transformers, kind)(made)


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_has_the_name_and_shape_of_the_reference(case: str) -> None:
    kind, config = CASES[case]
    model = _reference(kind, config)
    theirs = {name: tensor for name, tensor in model.named_parameters(remove_duplicate=False)}
    ours = dict(named_weights(shape_from_config({**config, "architectures": [kind]})))
    assert {name: weight.shape for name, weight in ours.items()} == {
        name: tuple(theirs[name].shape) if name in theirs else "absent" for name in ours
    }
    counted = {id(theirs[name]) for name in ours}
    assert [name for name, tensor in theirs.items() if id(tensor) not in counted] == []
    assert len(counted) == len(ours), "one tensor counted under two names"


@pytest.mark.parametrize("case", CASES)
def test_the_total_is_the_number_of_unique_elements(case: str) -> None:
    kind, config = CASES[case]
    shape = shape_from_config({**config, "architectures": [kind]})
    expected = sum(tensor.numel() for tensor in _reference(kind, config).parameters())
    assert parameter_counts(shape)["total"] == expected


@pytest.mark.parametrize("case", CASES)
def test_the_config_that_the_reference_saves_reads_the_same(case: str) -> None:
    """Saved configs hold every key of the class, defaults and nulls included; none may be misread or refused."""
    kind, config = CASES[case]
    saved = json.loads(json.dumps(_reference(kind, config).config.to_dict() | {"architectures": [kind]}))
    shape = shape_from_config(saved)
    expected = shape_from_config({**config, "architectures": [kind]})
    assert list(named_weights(shape)) == list(named_weights(expected))
    assert shape.blocks == expected.blocks and shape.head == expected.head
    assert [tower.blocks for tower in shape.towers] == [tower.blocks for tower in expected.towers]
    assert [sentence for sentence in shape.uncovered if "not understood" in sentence] == []


def test_an_untied_t5_owns_the_matrix_that_the_reference_shares() -> None:
    """transformers 5 ties it whatever the config says; the published Flan-T5 checkpoints hold both tables."""
    tied = parameter_counts(shape_from_config(_T5))["total"]
    untied = parameter_counts(shape_from_config({**_T5, "tie_word_embeddings": False}))
    assert untied["total"] - tied == untied["lm_head"] == _T5["vocab_size"] * _T5["d_model"]


_SMALL_UNET: Config = {
    "block_out_channels": [32, 64, 96],
    "layers_per_block": 1,
    "cross_attention_dim": 40,
    "attention_head_dim": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
DIFFUSERS_CASES: dict[str, tuple[str, Config]] = {
    "flux-dev": ("FluxTransformer2DModel", {"num_layers": 2, "num_single_layers": 3, "guidance_embeds": True}),
    "flux-schnell": ("FluxTransformer2DModel", {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 4}),
    "unet": ("UNet2DConditionModel", _SMALL_UNET),
    "unet-xl": (
        "UNet2DConditionModel",
        _SMALL_UNET
        | {
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 3],
            "attention_head_dim": [4, 8, 12],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 16,
            "projection_class_embeddings_input_dim": 72,
        },
    ),
}


@pytest.mark.parametrize("case", DIFFUSERS_CASES)
def test_diffusion_models_have_the_parameters_of_diffusers(case: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    kind, config = DIFFUSERS_CASES[case]
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**config)
    theirs = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    ours = {name: weight.shape for name, weight in named_weights(shape_from_config({"_class_name": kind, **config}))}
    assert ours == theirs
    saved = shape_from_config({**model.config, "_class_name": kind})
    assert list(named_weights(saved)) == list(named_weights(shape_from_config({"_class_name": kind, **config})))
    assert [sentence for sentence in saved.uncovered if "not understood" in sentence] == []
