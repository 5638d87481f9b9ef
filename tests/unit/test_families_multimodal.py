"""Encoders, encoder-decoders, vision, multimodal and diffusion families: counts by component, structure, errors."""

from __future__ import annotations

from typing import Any

import pytest

from planner.errors import ModelConfigError
from planner.ledger.weights import active_parameters, named_weights, parameter_counts
from planner.model.shape import Attention, GatedDeltaNet, Mlp, ModelShape, Moe
from planner.readers.hf_config import shape_from_config
from planner.readers.models import load_model

# Parameters by component, summed over the names of the instantiated classes of transformers 5.23.0. Flan-T5: with the
# output matrix that the published checkpoints hold. Components that are zero are left out.
COMPONENTS: dict[str, dict[str, int]] = {
    "Llama-3.2-11B-Vision": {
        "embed_in": 525_369_344,
        "lm_head": 525_336_576,
        "attention": 1_677_721_616,
        "mlp_dense": 7_046_430_720,
        "norm": 333_824,
        "vision_or_audio": 895_028_755,
    },
    "Llama-3.2-90B-Vision": {
        "embed_in": 1_050_738_688,
        "lm_head": 1_050_673_152,
        "attention": 15_099_494_440,
        "mlp_dense": 70_464_307_200,
        "norm": 1_651_712,
        "vision_or_audio": 926_490_131,
    },
    "Llama-4-Scout-17B-16E": {
        "embed_in": 1_034_485_760,
        "lm_head": 1_034_485_760,
        "attention": 3_019_898_880,
        "experts_routed": 96_636_764_160,
        "experts_shared": 6_039_797_760,
        "router": 3_932_160,
        "norm": 496_640,
        "vision_or_audio": 871_932_416,
    },
    "Llama-4-Maverick-17B-128E": {
        "embed_in": 1_034_485_760,
        "lm_head": 1_034_485_760,
        "attention": 3_019_898_880,
        "mlp_dense": 6_039_797_760,
        "experts_routed": 386_547_056_640,
        "experts_shared": 3_019_898_880,
        "router": 15_728_640,
        "norm": 496_640,
        "vision_or_audio": 871_932_416,
    },
    "Devstral-Small-2-24B-Instruct-2512": {
        "embed_in": 671_088_640,
        "lm_head": 671_088_640,
        "attention": 2_097_152_000,
        "mlp_dense": 20_132_659_200,
        "norm": 414_720,
        "vision_or_audio": 438_958_080,
    },
    "Qwen3.5-27B": {
        "embed_in": 1_271_398_400,
        "lm_head": 1_271_398_400,
        "attention": 1_677_721_600,
        "ssm": 5_562_044_928,
        "mlp_dense": 17_112_760_320,
        "norm": 674_816,
        "vision_or_audio": 460_730_096,
    },
    "Qwen3.5-35B-A3B": {
        "embed_in": 508_559_360,
        "lm_head": 508_559_360,
        "attention": 272_629_760,
        "ssm": 1_011_550_080,
        "experts_routed": 32_212_254_720,
        "experts_shared": 125_911_040,
        "router": 20_971_520,
        "norm": 174_848,
        "vision_or_audio": 446_571_248,
    },
    "Qwen3.5-122B-A10B": {
        "embed_in": 762_839_040,
        "lm_head": 762_839_040,
        "attention": 943_718_400,
        "ssm": 3_186_823_680,
        "experts_routed": 115_964_116_992,
        "experts_shared": 453_132_288,
        "router": 37_748_736,
        "norm": 308_736,
        "vision_or_audio": 451_290_864,
    },
    "Qwen3.5-397B-A17B": {
        "embed_in": 1_017_118_720,
        "lm_head": 1_017_118_720,
        "attention": 1_572_864_000,
        "ssm": 5_310_633_600,
        "experts_routed": 386_547_056_640,
        "experts_shared": 755_220_480,
        "router": 125_829_120,
        "norm": 509_056,
        "vision_or_audio": 456_010_480,
    },
    "Qwen3-VL-8B-Instruct": {
        "embed_in": 622_329_856,
        "lm_head": 622_329_856,
        "attention": 1_509_949_440,
        "mlp_dense": 5_435_817_984,
        "norm": 308_224,
        "vision_or_audio": 576_388_336,
    },
    "Qwen3-VL-30B-A3B-Instruct": {
        "embed_in": 311_164_928,
        "lm_head": 311_164_928,
        "attention": 905_969_664,
        "experts_routed": 28_991_029_248,
        "router": 12_582_912,
        "norm": 210_944,
        "vision_or_audio": 538_631_408,
    },
    "Qwen2-VL-7B-Instruct": {
        "embed_in": 544_997_376,
        "lm_head": 544_997_376,
        "attention": 822_212_608,
        "mlp_dense": 5_703_204_864,
        "norm": 204_288,
        "vision_or_audio": 675_759_104,
    },
    "Qwen2.5-VL-7B-Instruct": {
        "embed_in": 544_997_376,
        "lm_head": 544_997_376,
        "attention": 822_212_608,
        "mlp_dense": 5_703_204_864,
        "norm": 204_288,
        "vision_or_audio": 676_550_144,
    },
    "gemma-3-4b-it": {
        "embed_in": 671_252_480,
        "attention": 534_773_760,
        "mlp_dense": 2_673_868_800,
        "norm": 368_128,
        "vision_or_audio": 419_816_304,
    },
    "gemma-3-12b-it": {
        "embed_in": 1_006_878_720,
        "attention": 2_264_924_160,
        "mlp_dense": 8_493_465_600,
        "norm": 765_696,
        "vision_or_audio": 421_290_864,
    },
    "gemma-3-27b-it": {
        "embed_in": 1_409_630_208,
        "attention": 4_095_737_856,
        "mlp_dense": 21_502_623_744,
        "norm": 1_354_496,
        "vision_or_audio": 423_060_336,
    },
    "gemma-4-26B-A4B": {
        "embed_in": 738_197_504,
        "attention": 1_110_179_840,
        "experts_routed": 22_837_985_280,
        "router": 10_901_760,
        "norm": 612_096,
        "vision_or_audio": 572_792_112,
        "experts_shared": 535_265_280,
    },
    "t5-small": {"embed_in": 16_449_536, "attention": 18_874_880, "mlp_dense": 25_165_824, "norm": 16_384},
    "t5-base": {"embed_in": 24_674_304, "attention": 84_935_424, "mlp_dense": 113_246_208, "norm": 47_616},
    "t5-large": {"embed_in": 32_899_072, "attention": 301_990_912, "mlp_dense": 402_653_184, "norm": 124_928},
    "t5-3b": {"embed_in": 32_899_072, "attention": 1_207_961_600, "mlp_dense": 1_610_612_736, "norm": 124_928},
    "t5-11b": {"embed_in": 32_899_072, "attention": 4_831_846_400, "mlp_dense": 6_442_450_944, "norm": 124_928},
    "flan-t5-small": {
        "embed_in": 16_449_536,
        "lm_head": 16_449_536,
        "attention": 18_874_752,
        "mlp_dense": 25_165_824,
        "norm": 21_504,
    },
    "flan-t5-base": {
        "embed_in": 24_674_304,
        "lm_head": 24_674_304,
        "attention": 84_935_424,
        "mlp_dense": 113_246_208,
        "norm": 47_616,
    },
    "flan-t5-large": {
        "embed_in": 32_899_072,
        "lm_head": 32_899_072,
        "attention": 301_990_912,
        "mlp_dense": 415_236_096,
        "norm": 124_928,
    },
    "flan-t5-xl": {
        "embed_in": 65_798_144,
        "lm_head": 65_798_144,
        "attention": 1_207_961_600,
        "mlp_dense": 1_509_949_440,
        "norm": 249_856,
    },
    "flan-t5-xxl": {
        "embed_in": 131_596_288,
        "lm_head": 131_596_288,
        "attention": 4_831_842_304,
        "mlp_dense": 6_039_797_760,
        "norm": 499_712,
    },
    "bert-base-uncased": {
        "embed_in": 23_835_648,
        "attention": 28_348_416,
        "mlp_dense": 56_669_184,
        "norm": 38_400,
        "other": 590_592,
    },
    "bert-large-uncased": {
        "embed_in": 31_780_864,
        "attention": 100_761_600,
        "mlp_dense": 201_449_472,
        "norm": 100_352,
        "other": 1_049_600,
    },
    "roberta-base": {
        "embed_in": 38_999_040,
        "attention": 28_348_416,
        "mlp_dense": 56_669_184,
        "norm": 38_400,
        "other": 590_592,
    },
    "roberta-large": {
        "embed_in": 51_998_720,
        "attention": 100_761_600,
        "mlp_dense": 201_449_472,
        "norm": 100_352,
        "other": 1_049_600,
    },
    "distilbert-base-uncased": {
        "embed_in": 23_834_112,
        "attention": 14_174_208,
        "mlp_dense": 28_334_592,
        "norm": 19_968,
    },
    "vit-base-patch16-224": {
        "embed_in": 742_656,
        "attention": 28_348_416,
        "mlp_dense": 56_669_184,
        "norm": 38_400,
        "other": 769_000,
    },
    "vit-large-patch16-224": {
        "embed_in": 990_208,
        "attention": 100_761_600,
        "mlp_dense": 201_449_472,
        "norm": 100_352,
        "other": 1_025_000,
    },
    "vit-huge-patch14-224-in21k": {
        "embed_in": 1_084_160,
        "attention": 209_879_040,
        "mlp_dense": 419_635_200,
        "norm": 166_400,
        "other": 1_639_680,
    },
    "clip-vit-base-patch32": {
        "embed_in": 25_336_320,
        "attention": 12_607_488,
        "mlp_dense": 25_196_544,
        "norm": 25_600,
        "vision_or_audio": 87_849_216,
        "other": 262_145,
    },
    "clip-vit-large-patch14": {
        "embed_in": 38_004_480,
        "attention": 28_348_416,
        "mlp_dense": 56_669_184,
        "norm": 38_400,
        "vision_or_audio": 303_966_208,
        "other": 589_825,
    },
    "whisper-tiny": {
        "embed_in": 20_664_192,
        "attention": 7_091_712,
        "mlp_dense": 9_452_544,
        "norm": 16_896,
        "vision_or_audio": 535_296,
    },
    "whisper-base": {
        "embed_in": 27_552_256,
        "attention": 18_902_016,
        "mlp_dense": 25_196_544,
        "norm": 32_768,
        "vision_or_audio": 910_336,
    },
    "whisper-small": {
        "embed_in": 41_328_384,
        "attention": 85_017_600,
        "mlp_dense": 113_338_368,
        "norm": 95_232,
        "vision_or_audio": 1_955_328,
    },
    "whisper-medium": {
        "embed_in": 55_104_512,
        "attention": 302_211_072,
        "mlp_dense": 402_898_944,
        "norm": 249_856,
        "vision_or_audio": 3_393_536,
    },
    "whisper-large-v2": {
        "embed_in": 68_880_640,
        "attention": 629_514_240,
        "mlp_dense": 839_270_400,
        "norm": 414_720,
        "vision_or_audio": 5_224_960,
    },
    "whisper-large-v3": {
        "embed_in": 68_881_920,
        "attention": 629_514_240,
        "mlp_dense": 839_270_400,
        "norm": 414_720,
        "vision_or_audio": 5_409_280,
    },
    "whisper-large-v3-turbo": {
        "embed_in": 68_881_920,
        "attention": 262_297_600,
        "mlp_dense": 472_089_600,
        "norm": 199_680,
        "vision_or_audio": 5_409_280,
    },
    "llava-1.5-7b-hf": {
        "embed_in": 131_334_144,
        "lm_head": 131_334_144,
        "attention": 2_147_483_648,
        "mlp_dense": 4_328_521_728,
        "norm": 266_240,
        "vision_or_audio": 324_487_168,
    },
    "ModernBERT-base": {
        "embed_in": 38_682_624,
        "attention": 51_904_512,
        "mlp_dense": 58_392_576,
        "norm": 35_328,
        "other": 589_824,
        "lm_head": 50_368,
    },
}

# Totals of further models, counted on the class that is named, on the meta device unless it says otherwise.
TOTALS = {
    "Kimi-K2.5": 1_026_879_353_328,  # transformers 5.23.0, Kimi_K25ForConditionalGeneration
    "MiniMax-M3": 426_174_565_632,  # transformers 5.23.0, MiniMaxM3VLForCausalLM: the published config is the text part
    "DiT-S-2": 32_963_360,  # facebookresearch/DiT on the CPU, fixed position table included
    "DiT-B-2": 130_512_416,
    "DiT-L-2": 458_102_816,
    "DiT-XL-2": 675_129_632,
    "FLUX.1-dev": 11_901_408_320,  # diffusers 0.42.1 on the meta device
    "SDXL-base-1.0-unet": 2_567_463_684,
    "stable-diffusion-v1-5-unet": 859_520_964,
}


@pytest.mark.parametrize("name", COMPONENTS)
def test_parameters_by_component(name: str) -> None:
    counts = parameter_counts(load_model(name))
    total = counts.pop("total")
    assert {component: count for component, count in counts.items() if count} == COMPONENTS[name]
    assert total == sum(COMPONENTS[name].values())


@pytest.mark.parametrize("name", TOTALS)
def test_total_parameters(name: str) -> None:
    assert parameter_counts(load_model(name))["total"] == TOTALS[name]


@pytest.mark.parametrize("name", [*COMPONENTS, *TOTALS])
def test_no_parameter_has_two_owners(name: str) -> None:
    names = [path for path, _ in named_weights(load_model(name))]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "active"),
    [
        ("Llama-4-Scout-17B-16E", 18_044_827_136),
        ("Llama-4-Maverick-17B-128E", 18_056_623_616),
        ("Qwen3-VL-30B-A3B-Instruct", 3_891_664_112),
        ("Qwen3.5-397B-A17B", 17_805_051_376),
        ("gemma-4-26B-A4B", 4_395_322_672),
    ],
)
def test_active_parameters(name: str, active: int) -> None:
    assert active_parameters(load_model(name)) == active


def _attention(shape: ModelShape, layer: int = 0) -> Attention:
    mixer = shape.blocks[layer].mixer
    assert isinstance(mixer, Attention)
    return mixer


def test_t5_is_an_encoder_tower_and_a_decoder_with_cross_attention() -> None:
    shape = load_model("t5-base")
    encoder = shape.towers[0]
    first, second = encoder.blocks[:2]
    assert isinstance(first.mixer, Attention) and isinstance(second.mixer, Attention)
    assert (first.mixer.relative_buckets, second.mixer.relative_buckets) == (32, 0)
    assert second.mixer.position_bias == "relative" and not second.mixer.causal
    assert encoder.shares_embedding and encoder.embedding is None
    decoder = shape.blocks[1]
    assert decoder.cross is not None and decoder.cross.cross and decoder.cross.position_bias == "none"
    assert _attention(shape).causal and decoder.dropout == 0.1
    assert isinstance(decoder.ffn, Mlp) and decoder.ffn.activation == "relu" and decoder.ffn.dropout == 0.1
    assert shape.head is not None and shape.head.scaled and shape.head.tied


def test_flan_t5_gates_with_the_tanh_gelu_and_does_not_scale() -> None:
    shape = load_model("flan-t5-base")
    assert isinstance(shape.blocks[0].ffn, Mlp) and shape.blocks[0].ffn.gated
    assert shape.blocks[0].ffn.activation == "gelu_new"
    assert shape.head is not None and not shape.head.scaled and not shape.head.tied


def test_bert_normalises_after_each_branch_and_drops_in_training() -> None:
    shape = load_model("bert-base-uncased")
    block = shape.blocks[0]
    assert block.residual == "post" and block.dropout == 0.1 and block.mixer_dropout
    assert _attention(shape).dropout == 0.1 and not _attention(shape).causal
    assert shape.embedding is not None and shape.embedding.dropout == 0.1 and shape.embedding.types == 2
    assert not load_model("distilbert-base-uncased").blocks[0].mixer_dropout


def test_modernbert_alternates_windows_and_skips_its_first_norm() -> None:
    shape = load_model("ModernBERT-base")
    assert [_attention(shape, layer).window for layer in range(4)] == [None, 129, 129, None]
    assert shape.blocks[0].norm_names == ("", "mlp_norm") and shape.blocks[3].norm_names == ("attn_norm", "mlp_norm")


def test_vision_transformers_fix_their_number_of_positions() -> None:
    assert load_model("vit-base-patch16-224").tokens == 14 * 14 + 1
    assert load_model("clip-vit-large-patch14").towers[0].tokens == 16 * 16 + 1
    assert load_model("llava-1.5-7b-hf").towers[0].tokens == 24 * 24 + 1
    assert load_model("gemma-3-4b-it").towers[0].tokens == 64 * 64
    assert load_model("DiT-XL-2").tokens == 256
    assert load_model("whisper-tiny").towers[0].tokens == 1500
    assert load_model("Qwen2-VL-7B-Instruct").towers[0].tokens is None
    assert load_model("Llama-3.2-11B-Vision").towers[0].tokens == 4 * 1608


def test_llama4_chunks_where_it_rotates_and_normalises_without_weights() -> None:
    scout, maverick = load_model("Llama-4-Scout-17B-16E"), load_model("Llama-4-Maverick-17B-128E")
    local, everywhere = _attention(scout, 0), _attention(scout, 3)
    assert (local.chunk, local.rotary_dim) == (8192, 128) and (everywhere.chunk, everywhere.rotary_dim) == (None, 0)
    assert local.qk_norm is not None and not local.qk_norm.affine and everywhere.qk_norm is None
    assert _attention(maverick, 0).qk_norm is None
    assert [isinstance(block.ffn, Moe) for block in maverick.blocks[:4]] == [False, True, False, True]
    assert isinstance(scout.blocks[0].ffn, Moe) and scout.blocks[0].ffn.every_expert


def test_mllama_reads_the_image_in_layers_of_its_own() -> None:
    shape = load_model("Llama-3.2-11B-Vision")
    crossing = [layer for layer in range(len(shape.blocks)) if _attention(shape, layer).cross]
    assert crossing == [3, 8, 13, 18, 23, 28, 33, 38]
    assert _attention(shape, 3).rotary_dim == 0 and not _attention(shape, 3).causal
    assert [len(tower.blocks) for tower in shape.towers] == [32, 8]


def test_gemma4_has_two_kinds_of_attention() -> None:
    shape = load_model("gemma-4-26B-A4B")
    local, everywhere = _attention(shape, 0), _attention(shape, 5)
    assert (local.head_dim, local.kv_heads, local.window, local.value_from_key) == (256, 8, 1024, False)
    assert (everywhere.head_dim, everywhere.kv_heads, everywhere.window) == (512, 2, None)
    assert everywhere.value_from_key and everywhere.value_norm
    assert shape.head is not None and shape.head.softcap and shape.head.tied


def test_qwen3_5_mixes_recurrent_and_gated_attention_layers() -> None:
    shape = load_model("Qwen3.5-27B")
    assert [isinstance(block.mixer, GatedDeltaNet) for block in shape.blocks[:4]] == [True, True, True, False]
    attention = _attention(shape, 3)
    assert attention.gate and attention.rotary_dim == 64 and attention.qk_norm is not None
    assert attention.qk_norm.kind == "rmsnorm_1p"


def test_qwen2_5_vision_attends_within_windows_but_for_four_layers() -> None:
    tower = load_model("Qwen2.5-VL-7B-Instruct").towers[0]
    chunks = [block.mixer.chunk for block in tower.blocks if isinstance(block.mixer, Attention)]
    assert [layer for layer, chunk in enumerate(chunks) if chunk is None] == [7, 15, 23, 31]
    assert {chunk for chunk in chunks if chunk is not None} == {64}


def test_a_flat_config_and_a_nested_one_are_the_same_model() -> None:
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
    }
    vision = {"depth": 1, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2}
    flat = shape_from_config({"model_type": "qwen2_5_vl", "vision_config": vision, **text})
    nested = shape_from_config({"model_type": "qwen2_5_vl", "vision_config": vision, "text_config": text})
    assert list(named_weights(flat)) == list(named_weights(nested))


def test_parts_without_a_description_are_said_to_be_uncovered() -> None:
    assert load_model("FLUX.1-dev").uncovered == ("activations of every block of FLUX",)
    assert load_model("SDXL-base-1.0-unet").uncovered == ("activations of the whole U-Net",)
    assert "projector from the vision tower" in load_model("llava-1.5-7b-hf").uncovered


_TEXT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}

MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"model_type": "vit", "hidden_size": 100, "num_attention_heads": 12}, "not a multiple of 12 heads"),
    "patch": ({"model_type": "vit", "image_size": 8, "patch_size": 16}, "does not fit"),
    "class": ({"model_type": "bert", "architectures": ["BertForMaskedML"]}, "BertForMaskedLM"),
    "cross-attention": ({"model_type": "roberta", "add_cross_attention": True}, "add_cross_attention"),
    "feed-forward": ({"model_type": "t5", "feed_forward_proj": "gated"}, "feed_forward_proj"),
    "layerdrop": ({"model_type": "whisper", "encoder_layerdrop": 0.1}, "skips layers"),
    "tower": (
        {"model_type": "llava", "vision_config": {"model_type": "clip"}, "text_config": _TEXT},
        "clip_vision_model",
    ),
    "text type": ({"model_type": "llava", "text_config": {"model_type": "lama"}}, '"llama"'),
    "audio": ({"model_type": "gemma4", "audio_config": {"hidden_size": 8}}, "audio_config"),
    "per-layer inputs": ({"model_type": "gemma4_text", "hidden_size": 64, "num_hidden_layers": 1}, "per-layer inputs"),
    "cross layers": (
        {"model_type": "mllama", "text_config": {"num_hidden_layers": 4, "cross_attention_layers": [9]}},
        "exceed 4 layers",
    ),
    "taps": (
        {"model_type": "qwen3_vl", "vision_config": {"depth": 2, "deepstack_visual_indexes": [2]}},
        "exceed depth 2",
    ),
    "grid": ({"model_type": "dit", "input_size": 31}, "not a multiple of patch_size"),
    "levels": ({"model_type": "UNet2DConditionModel", "down_block_types": ["DownBlock2D"]}, "need to be as many"),
    "option": ({"model_type": "UNet2DConditionModel", "encoder_hid_dim": 64}, "encoder_hid_dim"),
    "experts": (
        {"model_type": "qwen3_5_moe_text", "hidden_size": 64, "num_hidden_layers": 1, "num_experts": 4},
        "cannot be picked out of 4",
    ),
    "vision in text": ({"model_type": "bert", "vision_config": {"hidden_size": 8}}, "vision_config"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_config_is_refused_in_one_sentence(case: str) -> None:
    config, part = MALFORMED[case]
    with pytest.raises(ModelConfigError) as caught:
        shape_from_config(config)
    assert part in str(caught.value) and "\n" not in str(caught.value)


DEPTHS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("num_layers", {"model_type": "t5", "num_decoder_layers": 3}),
    "bert": ("num_hidden_layers", {"model_type": "bert"}),
    "distilbert": ("n_layers", {"model_type": "distilbert"}),
    "vit": ("num_hidden_layers", {"model_type": "vit"}),
    "whisper": ("decoder_layers", {"model_type": "whisper"}),
    "dit": ("depth", {"model_type": "dit"}),
    "flux": ("num_layers", {"model_type": "FluxTransformer2DModel", "num_single_layers": 1}),
}


@pytest.mark.parametrize("case", DEPTHS)
def test_each_further_layer_adds_the_same_number_of_parameters(case: str) -> None:
    key, config = DEPTHS[case]
    totals = [parameter_counts(shape_from_config({**config, key: depth}))["total"] for depth in (2, 3, 4)]
    assert totals[2] - totals[1] == totals[1] - totals[0] > 0
