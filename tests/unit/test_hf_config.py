"""Reading config.json: what is refused, what is said about it, and what every family fills in."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import planner.model.catalogue as catalogue
from planner.errors import ModelConfigError, SourceUnavailable, UnknownName
from planner.ledger.weights import parameter_counts
from planner.model.catalogue import (
    catalogue_entries,
    find_entry,
    fold_name,
    hub_id,
    model_names,
    nearest_names,
)
from planner.model.shape import Attention, LatentAttention, Mlp, ModelShape, Moe
from planner.readers.families.registry import MODULE_OF, known_types, reader_of
from planner.readers.hf_config import cached_config_path, shape_from_config, shape_from_hub, shape_from_path
from planner.readers.models import load_model

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
}


def attention(shape: ModelShape, layer: int = 0) -> Attention:
    mixer = shape.blocks[layer].mixer
    assert isinstance(mixer, Attention)
    return mixer


def mlp(shape: ModelShape, layer: int = 0) -> Mlp:
    ffn = shape.blocks[layer].ffn
    assert isinstance(ffn, Mlp)
    return ffn


# What is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": -64}, ["hidden_size", "-64"]),
        ({"hidden_size": 0}, ["hidden_size", "from 1"]),
        ({"hidden_size": "64"}, ["hidden_size", "'64'"]),
        ({"hidden_size": 64.5}, ["hidden_size", "64.5"]),
        ({"hidden_size": True}, ["hidden_size", "True"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"hidden_size": 10**30}, ["hidden_size", "to 2147483648"]),
        ({"hidden_size": math.nan}, ["hidden_size", "nan"]),
        ({"hidden_size": [64]}, ["hidden_size", "[64]"]),
        ({"num_hidden_layers": 10**6}, ["num_hidden_layers", "to 10000"]),
        ({"attention_dropout": math.inf}, ["attention_dropout", "inf"]),
        ({"attention_dropout": 1.5}, ["attention_dropout", "to 1"]),
        ({"attention_bias": "yes"}, ["attention_bias", "true or false"]),
        ({"num_key_value_heads": 3}, ["4 query heads", "3 key/value heads"]),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, ["64", "5 heads"]),
        ({"rope_parameters": [1]}, ["rope_parameters", "mapping"]),
        ({"torch_dtype": 16}, ["torch_dtype", "string"]),
    ],
)
def test_values_out_of_range_are_named(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ModelConfigError) as caught:
        shape_from_config({**LLAMA, **changes})
    message = str(caught.value)
    assert "llama" in message and "\n" not in message and len(message) < 300
    for word in words:
        assert word in message


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers"])
def test_a_missing_size_is_named(key: str) -> None:
    with pytest.raises(ModelConfigError, match=f'"{key}" is missing'):
        shape_from_config({name: value for name, value in LLAMA.items() if name != key})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_local_experts", 8),
        ("n_routed_experts", 64),
        ("kv_lora_rank", 512),
        ("vision_config", {"hidden_size": 8}),
        ("ssm_state_size", 128),
    ],
)
def test_keys_of_another_architecture_are_refused(key: str, value: object) -> None:
    with pytest.raises(ModelConfigError, match=key):
        shape_from_config({**LLAMA, key: value})


def test_an_unknown_architectural_key_is_reported_and_others_are_not() -> None:
    shape = shape_from_config({**LLAMA, "num_magic_layers": 3, "eos_token_id": 2, "initializer_range": 0.02, "fun": 1})
    assert shape.uncovered == ("config key num_magic_layers=3 is not understood",)
    assert shape_from_config({**LLAMA, "num_magic_layers": 0, "use_magic": False}).uncovered == ()


def test_an_unknown_type_is_never_read_as_another() -> None:
    with pytest.raises(ModelConfigError) as caught:
        shape_from_config({**LLAMA, "model_type": "lama"})
    assert '"lama"' in str(caught.value) and '"llama"' in str(caught.value) and "hidden_size" in str(caught.value)


@pytest.mark.parametrize("config", [{}, {"model_type": None}, {"model_type": 3}, {"model_type": ""}, [], "llama", None])
def test_what_is_no_config_is_refused(config: Any) -> None:
    with pytest.raises(ModelConfigError):
        shape_from_config(config)


@pytest.mark.parametrize("model_type", known_types())
def test_no_reader_fails_otherwise_than_by_saying_so(model_type: str) -> None:
    """Whatever a file holds, the answer is a shape or a ModelConfigError."""
    keys = [key for entry in catalogue_entries() if entry.family == model_type for key in entry.config][:60]
    for key in keys or ["hidden_size"]:
        if key == "model_type":
            continue
        base = next((dict(entry.config) for entry in catalogue_entries() if entry.family == model_type), {})
        for value in (-1, 0, 10**40, "x", [], [1], {}, {"a": 1}, math.nan, True, None, [None], ["x"] * 3):
            try:
                shape = shape_from_config({**base, "model_type": model_type, key: value})
            except ModelConfigError as error:
                assert len(str(error)) < 700
            else:
                assert parameter_counts(shape)["total"] >= 0


# Defaults ---------------------------------------------------------------------------------------------------


def test_sizes_left_to_the_class_are_listed() -> None:
    partial = {key: value for key, value in LLAMA.items() if key not in ("vocab_size", "intermediate_size")}
    shape = shape_from_config(partial)
    assert set(shape.assumed) == {"vocab_size=32000", "intermediate_size=11008"}
    assert shape_from_config(LLAMA).assumed == ()


def test_null_and_absent_differ_where_the_class_says_so() -> None:
    base = {**LLAMA, "model_type": "mistral"}
    assert attention(shape_from_config(base)).window == 4096
    assert attention(shape_from_config({**base, "sliding_window": None})).window is None
    assert attention(shape_from_config({**base, "sliding_window": 512})).window == 512


def test_a_number_written_as_float_is_taken_when_whole() -> None:
    assert shape_from_config({**LLAMA, "hidden_size": 64.0}) == shape_from_config(LLAMA)


def test_a_class_without_output_head_is_said_to_be_read_with_one() -> None:
    assert shape_from_config({**LLAMA, "architectures": ["LlamaForCausalLM"]}).uncovered == ()
    (sentence,) = shape_from_config({**LLAMA, "architectures": ["LlamaForSequenceClassification"]}).uncovered
    assert "LlamaForSequenceClassification" in sentence


def test_dtype_and_quantisation_are_read() -> None:
    shape = shape_from_config(
        {**LLAMA, "torch_dtype": "torch.bfloat16", "quantization_config": {"quant_method": "fp8"}}
    )
    assert (shape.dtype, shape.quantization) == ("bfloat16", "fp8")
    assert shape.uncovered == ()


# What the ledger relies on ----------------------------------------------------------------------------------


def test_window_patterns() -> None:
    gemma2 = load_model("gemma-2-9b")
    assert [attention(gemma2, layer).window for layer in range(4)] == [4096, None, 4096, None]
    assert attention(gemma2).softcap and gemma2.head is not None and gemma2.head.softcap
    gemma3 = load_model("gemma-3-1b-it")
    assert [attention(gemma3, layer).window for layer in range(7)] == [512] * 5 + [None, 512]
    oss = load_model("gpt-oss-20b")
    assert [attention(oss, layer).window for layer in range(3)] == [128, None, 128]
    assert attention(oss).sinks
    qwen = {**LLAMA, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}
    assert [attention(shape_from_config(qwen), layer).window for layer in range(3)] == [None, None, 16]
    qwen["use_sliding_window"] = False
    assert {attention(shape_from_config(qwen), layer).window for layer in range(3)} == {None}
    olmo = load_model("Olmo-3-7B")
    assert [attention(olmo, layer).window for layer in range(4)] == [4096, 4096, 4096, None]
    stated = {**LLAMA, "model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
    with pytest.raises(ModelConfigError, match="layer_types"):
        shape_from_config({**stated, "layer_types": ["full_attention"]})


def test_positions() -> None:
    smol = load_model("SmolLM3-3B")
    assert [attention(smol, layer).rotary_dim for layer in range(4)] == [128, 128, 128, 0]
    assert attention(load_model("pythia-1b")).rotary_dim == 64
    assert attention(load_model("gpt-neox-20b")).rotary_dim == 24
    assert attention(load_model("phi-2")).rotary_dim == 32
    assert attention(load_model("bloom-560m")).position_bias == "alibi"
    assert attention(load_model("gpt2")).rotary_dim == 0
    for name, rows in (("gpt2", 1024), ("opt-125m", 2050)):
        embedding = load_model(name).embedding
        assert embedding is not None and embedding.positions == rows


def test_residual_structures() -> None:
    kinds = {
        "Llama-2-7b-hf": ("sequential", 2, 0),
        "pythia-1b": ("parallel", 2, 0),
        "falcon-7b": ("parallel", 1, 0),
        "falcon-40b": ("parallel", 2, 0),
        "phi-2": ("parallel", 1, 0),
        "gemma-2-2b": ("sandwich", 2, 2),
        "OLMo-2-1124-7B": ("post_only", 0, 2),
        "opt-350m": ("post", 2, 0),
        "mamba-130m-hf": ("single", 1, 0),
        "aya-23-8B": ("parallel", 1, 0),
    }
    for name, (residual, before, after) in kinds.items():
        block = load_model(name).blocks[0]
        assert (block.residual, len(block.norm_names), len(block.post_norm_names)) == (residual, before, after), name


def test_norms_biases_dropout_and_activations() -> None:
    gpt2 = load_model("gpt2")
    assert attention(gpt2).dropout == gpt2.blocks[0].dropout == 0.1
    assert gpt2.embedding is not None and gpt2.embedding.dropout == 0.1
    assert mlp(gpt2).activation == "gelu_new" and not mlp(gpt2).gated
    norm = gpt2.blocks[0].norm
    assert norm is not None and (norm.kind, norm.bias, norm.fp32) == ("layernorm", True, False)
    llama_norm = load_model("Llama-3.1-8B").blocks[0].norm
    assert llama_norm is not None and (llama_norm.kind, llama_norm.fp32) == ("rmsnorm", True)
    gemma_norm = load_model("gemma-2b").blocks[0].norm
    assert gemma_norm is not None and gemma_norm.kind == "rmsnorm_1p"
    assert mlp(load_model("gemma-2b")).activation == "gelu_pytorch_tanh"
    qwen = attention(load_model("Qwen2.5-7B"))
    assert qwen.q_bias and qwen.k_bias and qwen.v_bias and not qwen.out_bias
    assert attention(load_model("Qwen3-8B")).qk_norm is not None
    assert attention(load_model("OLMo-2-1124-7B")).qk_norm_over == "width"
    olmo_norm = load_model("OLMo-1B-hf").blocks[0].norm
    assert olmo_norm is not None and not olmo_norm.affine


def test_experts() -> None:
    deepseek = load_model("DeepSeek-V3")
    assert [type(block.ffn) for block in deepseek.blocks[:4]] == [Mlp, Mlp, Mlp, Moe]
    assert isinstance(deepseek.blocks[0].mixer, LatentAttention)
    moe = deepseek.blocks[3].ffn
    assert isinstance(moe, Moe) and (moe.experts, moe.top_k, moe.width) == (256, 8, 2048)
    assert moe.shared is not None and moe.shared.width == 2048
    qwen = load_model("Qwen1.5-MoE-A2.7B").blocks[0].ffn
    assert isinstance(qwen, Moe) and qwen.shared_gate == "mlp.shared_expert_gate"
    with pytest.raises(ModelConfigError, match="picked out of"):
        shape_from_config({**LLAMA, "model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3})


def test_equal_blocks_are_one_object() -> None:
    assert len({id(block) for block in load_model("Llama-3.1-405B").blocks}) == 1
    assert len({id(block) for block in load_model("gemma-2-27b").blocks}) == 2


# Files ------------------------------------------------------------------------------------------------------


def test_file_and_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    by_folder, by_file = shape_from_path(folder), shape_from_path(folder / "config.json")
    assert by_folder.name == by_file.name == "my-model"
    assert load_model(str(folder)).blocks == by_folder.blocks == load_model(folder).blocks
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(LLAMA).encode())
    assert shape_from_path(folder).blocks == by_folder.blocks


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (b"{", ModelConfigError, "not valid JSON"),
        (b"\xff\xfe{}", ModelConfigError, "UTF-8"),
        (b"[1, 2]", ModelConfigError, "JSON list"),
        (b"[" * 200_000, ModelConfigError, "nested too deeply"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", ModelConfigError, "too many digits"),
        (b" " * 5_000_001, ModelConfigError, "5000001 bytes"),
    ],
)
def test_files_that_hold_no_config(tmp_path: Path, content: bytes, error: type[Exception], words: str) -> None:
    place = tmp_path / "config.json"
    place.write_bytes(content)
    with pytest.raises(error, match=words):
        shape_from_path(place)


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(SourceUnavailable, match="holds no config"):
        shape_from_path(tmp_path)
    with pytest.raises(SourceUnavailable, match="no model config"):
        shape_from_path(tmp_path / "missing.json")
    for odd in ("./nowhere", "/" + "x" * 3000, "~/nowhere/config.json", "a.json"):
        with pytest.raises(SourceUnavailable):
            load_model(odd)


def test_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert cached_config_path("someone/toy") is None
    with pytest.raises(SourceUnavailable, match="--fetch"):
        shape_from_hub("someone/toy")
    for revision, layers in (("aaa", 3), ("bbb", 5)):
        folder = tmp_path / "models--someone--toy" / "snapshots" / revision
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": layers}), encoding="utf-8")
    reference = tmp_path / "models--someone--toy" / "refs"
    reference.mkdir()
    (reference / "main").write_text("aaa", encoding="utf-8")
    assert len(load_model("someone/toy").blocks) == 3
    assert load_model("https://huggingface.co/someone/toy/tree/main").name == "someone/toy"
    (reference / "main").write_text("bbb", encoding="utf-8")
    assert len(shape_from_hub("someone/toy").blocks) == 5


@pytest.mark.parametrize("name", ["../../etc", "a/b/c", "", "a b", "org/", "/x"])
def test_ids_that_are_no_ids(name: str) -> None:
    assert cached_config_path(name) is None
    with pytest.raises(SourceUnavailable):
        shape_from_hub(name)


# The catalogue ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "Llama-3.1-8B",
        "llama-3.1-8b",
        "Meta-Llama-3.1-8B",
        "meta-llama/Llama-3.1-8B",
        "meta-llama/Meta-Llama-3.1-8B-Instruct",
        "llama3.1 8b",
        "LLAMA_3.1_8B",
        "https://huggingface.co/meta-llama/Llama-3.1-8B",
        "https://huggingface.co/meta-llama/Llama-3.1-8B/tree/main",
        "https://huggingface.co/meta-llama/Llama-3.1-8B/blob/main/config.json?x=1",
        "huggingface.co/meta-llama/Meta-Llama-3.1-8B",
        " hf.co/meta-llama/Llama-3.1-8B ",
    ],
)
def test_one_model_by_its_many_names(name: str) -> None:
    assert load_model(name) is load_model("Llama-3.1-8B")


def test_names_that_only_look_alike_stay_apart() -> None:
    assert fold_name("opt-1.3b") != fold_name("opt-13b")
    assert load_model("opt-1.3b") != load_model("opt-13b")
    assert load_model("Llama-2-7b") != load_model("Llama-2-70b")
    assert find_entry("someone-else/Llama-3.1-8B") is None


def test_unknown_names_say_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean Llama") as caught:
        load_model("Lama-3.1-8B")
    assert "--fetch" in str(caught.value)
    assert nearest_names("qwen2.5-7") and nearest_names("zzzzzzzz") == ()
    for odd in ("", "   ", "x" * 10_000, "a\0b"):
        with pytest.raises(UnknownName):
            load_model(odd)


def test_the_index_is_the_one_that_the_files_call_for() -> None:
    stored = Path(catalogue.__file__).with_suffix("") / "index.json"
    assert json.loads(stored.read_text(encoding="utf-8")) == {
        name: list(where) for name, where in catalogue.build_index().items()
    }, "run: python -c 'from planner.model.catalogue import write_index; write_index()'"


def test_the_index_and_the_files_agree() -> None:
    entries = catalogue_entries()
    assert [entry.name for entry in entries] == list(model_names())
    assert len({fold_name(entry.name) for entry in entries}) == len(entries)
    for entry in entries:
        for name in (entry.name, entry.hub, *entry.aliases):
            assert not name or find_entry(name) is entry, name
        assert entry.family in MODULE_OF and reader_of(entry.family) is not None
        assert entry.source and "/work" not in entry.source
        assert (entry.parameters is None) == (entry.parameters_source == ""), entry.name
        assert (entry.published == "") == (entry.published_source == ""), entry.name


def test_addresses() -> None:
    assert hub_id("https://huggingface.co/gpt2") == "gpt2"
    assert hub_id("http://www.huggingface.co/org/name#files") == "org/name"
    assert hub_id("org/name") == "org/name"


def test_every_registered_type_has_a_reader() -> None:
    for model_type in known_types():
        assert reader_of(model_type) is not None
    assert reader_of("never-heard-of") is None
