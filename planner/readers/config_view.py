"""A config.json read strictly: every key is asked for by name and type, and what nobody asked for is reported.

A family reader takes its values through a `ConfigView`, so that three things hold for every architecture:
a value of the wrong type, sign or size is one sentence that names the key; a key that is absent takes the default
of the reference class *and is listed as assumed*; a key that looks architectural and was never asked for is
either refused (it belongs to another kind of model) or listed as not understood.
"""

from __future__ import annotations

import builtins
import math
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Final

from planner.errors import ModelConfigError

__all__ = ["LARGEST_DIMENSION", "REQUIRED", "ConfigView", "Required"]

LARGEST_DIMENSION: Final = 2**31  # a dimension beyond it is a typing error, not a model


class Required(Enum):
    """The marker for "this key has no default"."""

    REQUIRED = "required"


REQUIRED: Final = Required.REQUIRED

# Keys that say how a model was trained, tokenised, generated from or saved, and never which tensors it has.
_NEVER_STRUCTURAL: Final = frozenset(
    [
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "_attn_implementation",
        "auto_map",
        "base_model_ep_plan",
        "base_model_pp_plan",
        "base_model_tp_plan",
        "cache_implementation",
        "chunk_size_feed_forward",
        "custom_pipelines",
        "diversity_penalty",
        "dtype",
        "encoder_no_repeat_ngram_size",
        "experts_implementation",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "gradient_checkpointing",
        "id2label",
        "initializer_factor",
        "initializer_range",
        "init_std",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "language",
        "layer_norm_eps",
        "layer_norm_epsilon",
        "layernorm_epsilon",
        "length_penalty",
        "max_length",
        "min_length",
        "model_type",
        "norm_eps",
        "norm_epsilon",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "output_scores",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "pruned_heads",
        "quantization_config",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "router_aux_loss_coef",
        "sep_token_id",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "top_k",
        "top_p",
        "transformers.js_config",
        "transformers_version",
        "typical_p",
        "unsloth_version",
        "unsloth_fixed",
        "use_bfloat16",
        "use_cache",
        "no_repeat_ngram_size",
        "num_labels",
        "task_specific_params",
        "suppress_tokens",
        "begin_suppress_tokens",
        "bad_words_ids",
        "early_stopping",
        "exponential_decay_length_penalty",
        "temperature",
        "do_sample",
        "cross_attention_hidden_size",
        "add_cross_attention",
        "output_past",
        "ffn_hidden_size_divisor",
        "rope_local_base_freq",
        "rope_type",
        "partial_rotary_factors",
    ]
)
_TOKEN_KEY: Final = re.compile(r"(_token_id|_token_index|_token_ids|_ids|_idx)$|^(bos|eos|pad|unk)_")
_LOOKS_STRUCTURAL: Final = re.compile(
    r"^(num|n)_|^use_|^is_|^has_|_layers?$|_heads?$|_dims?$|_size$|_rank$|_bias$|_type$|_types$|_norm$|experts?|_width$"
    r"|_proj|_interval$|_pattern$|_step$|_freq$|_dropout$|_pdrop$|_config$|window|embed|multi_query|parallel|gate|tie_|lora|_state"
)
# Keys that add, remove or resize tensors wherever they are known: on a family that never reads them, they mean that
# the config describes some other architecture, so a total would be wrong.
_ALWAYS_STRUCTURAL: Final = frozenset(
    [
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "moe_num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "n_shared_experts",
        "num_shared_experts",
        "shared_expert_intermediate_size",
        "kv_lora_rank",
        "q_lora_rank",
        "qk_rope_head_dim",
        "qk_nope_head_dim",
        "v_head_dim",
        "vision_config",
        "audio_config",
        "text_config",
        "speech_config",
        "mamba_d_state",
        "ssm_state_size",
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "attn_layer_period",
        "hybrid_override_pattern",
        "layers_block_type",
        "index_n_heads",
        "index_head_dim",
        "num_kv_shared_layers",
        "hidden_size_per_layer_input",
        "cross_attention_layers",
        "altup_num_inputs",
        "block_configs",
        "multi_query",
    ]
)


class ConfigView:
    """One mapping of a config.json, and the record of what was asked of it.

    owner: the `model_type`, for messages. path: the keys that lead here ("text_config."), for messages.
    """

    __slots__ = ("_asked", "_assumed", "_children", "_mapping", "_path", "owner")

    def __init__(self, mapping: Mapping[builtins.str, Any], owner: builtins.str, path: builtins.str = "") -> None:
        self._mapping = mapping
        self._path = path
        self._asked: set[builtins.str] = set()
        self._assumed: list[builtins.str] = []
        self._children: dict[builtins.str, ConfigView] = {}
        self.owner = owner

    def has(self, key: builtins.str) -> builtins.bool:
        """Whether the key is there and not null (asking counts as reading it)."""
        self._asked.add(key)
        return self._mapping.get(key) is not None

    def says(self, key: builtins.str) -> builtins.bool:
        """Whether the key is there at all, null included."""
        self._asked.add(key)
        return key in self._mapping

    def is_text(self, key: builtins.str) -> builtins.bool:
        """Whether the key holds a string: some keys are a number or a word ("auto")."""
        return isinstance(self._mapping.get(key), str)

    def keys(self) -> tuple[builtins.str, ...]:
        """The keys that are there."""
        return tuple(key for key in self._mapping if isinstance(key, str))

    def ignore(self, *keys: builtins.str) -> None:
        """Declare keys of this family that change no tensor and nothing that is kept."""
        self._asked.update(keys)

    def fail(self, key: builtins.str, accepted: builtins.str) -> ModelConfigError:
        """The error for a key whose value cannot be used; `accepted` completes "needs ..."."""
        if key not in self._mapping:
            return ModelConfigError(f'{self.owner} config: "{self._path}{key}" is missing; it needs {accepted}.')
        given = repr(self._mapping[key])
        shown = given if len(given) <= 60 else given[:57] + "..."
        return ModelConfigError(f'{self.owner} config: "{self._path}{key}" is {shown}; it needs {accepted}.')

    def _value(
        self, key: builtins.str, default: object, accepted: builtins.str, also: Sequence[builtins.str]
    ) -> tuple[builtins.str, Any]:
        """The first of the key and its synonyms that has a value; None stands for "use the default"."""
        for name in (key, *also):
            self._asked.add(name)
            if self._mapping.get(name) is not None:
                return name, self._mapping[name]
        if isinstance(default, Required):
            raise self.fail(key, accepted)
        if key not in self._mapping and default not in (None, "") and not isinstance(default, (bool, float)):
            self._assumed.append(f"{self._path}{key}={default}")
        return key, None

    def int(
        self,
        key: builtins.str,
        default: builtins.int | Required = REQUIRED,
        *,
        minimum: builtins.int = 1,
        maximum: builtins.int = LARGEST_DIMENSION,
        also: Sequence[builtins.str] = (),
    ) -> builtins.int:
        """A whole number within [minimum, maximum]; an absent or null key is the default."""
        found = self.maybe_int(key, default, minimum=minimum, maximum=maximum, also=also)
        if found is not None:
            return found
        if isinstance(default, Required):
            raise self.fail(key, f"a whole number from {minimum}")
        return default

    def maybe_int(
        self,
        key: builtins.str,
        default: builtins.int | Required | None = None,
        *,
        minimum: builtins.int = 1,
        maximum: builtins.int = LARGEST_DIMENSION,
        also: Sequence[builtins.str] = (),
    ) -> builtins.int | None:
        """As `int`, but null is None: absent and null may differ (Mistral: absent 4096, null no window)."""
        accepted = f"a whole number from {minimum} to {maximum}"
        name, value = self._value(key, default, accepted, also)
        if value is None:
            return None if key in self._mapping or isinstance(default, Required) else default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self.fail(name, accepted)
        return value

    def float(
        self,
        key: builtins.str,
        default: builtins.float | Required = REQUIRED,
        *,
        minimum: builtins.float = 0.0,
        maximum: builtins.float = math.inf,
    ) -> builtins.float:
        """A finite number within [minimum, maximum]."""
        accepted = f"a finite number from {minimum:g}" + ("" if maximum == math.inf else f" to {maximum:g}")
        name, value = self._value(key, default, accepted, ())
        if value is None:
            assert not isinstance(default, Required)
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.fail(name, accepted)
        if not math.isfinite(value) or not minimum <= value <= maximum:
            raise self.fail(name, accepted)
        return float(value)

    def bool(self, key: builtins.str, default: builtins.bool | Required = REQUIRED) -> builtins.bool:
        """true or false."""
        name, value = self._value(key, default, "true or false", ())
        if value is None:
            assert not isinstance(default, Required)
            return default
        if not isinstance(value, bool):
            raise self.fail(name, "true or false")
        return value

    def str(
        self, key: builtins.str, default: builtins.str | Required = REQUIRED, *, among: Sequence[builtins.str] = ()
    ) -> builtins.str:
        """A string, one of `among` when that is given."""
        accepted = f"one of {', '.join(among)}" if among else "a string"
        name, value = self._value(key, default, accepted, ())
        if value is None:
            assert not isinstance(default, Required)
            return default
        if not isinstance(value, str) or (among and value not in among):
            raise self.fail(name, accepted)
        return value

    def strings(
        self, key: builtins.str, *, length: builtins.int | None = None, among: Sequence[builtins.str] = ()
    ) -> list[builtins.str] | None:
        """A list of strings of the given length, each one of `among`; None when absent or null."""
        accepted = f"a list of {length if length is not None else 'any number of'} strings"
        accepted += f" out of {', '.join(among)}" if among else ""
        name, value = self._value(key, None, accepted, ())
        if value is None:
            return None
        good = isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
        if not good or (length is not None and len(value) != length) or (among and not set(value) <= set(among)):
            raise self.fail(name, accepted)
        return list(value)

    def ints(
        self, key: builtins.str, *, length: builtins.int | None = None, minimum: builtins.int = 0
    ) -> list[builtins.int] | None:
        """A list of whole numbers from `minimum`; None when absent or null."""
        accepted = f"a list of {length if length is not None else 'any number of'} whole numbers from {minimum}"
        name, value = self._value(key, None, accepted, ())
        if value is None:
            return None
        good = isinstance(value, (list, tuple)) and all(type(item) is int and item >= minimum for item in value)
        if not good or (length is not None and len(value) != length):
            raise self.fail(name, accepted)
        return list(value)

    def subs(self, key: builtins.str, length: builtins.int) -> list[ConfigView]:
        """The views of a list of `length` mappings."""
        accepted = f"a list of {length} mappings"
        name, value = self._value(key, REQUIRED, accepted, ())
        good = isinstance(value, (list, tuple)) and all(isinstance(item, Mapping) for item in value)
        if not good or len(value) != length:
            raise self.fail(name, accepted)
        views = [ConfigView(item, self.owner, f"{self._path}{key}.{index}.") for index, item in enumerate(value)]
        self._children.update((f"{key}.{index}", child) for index, child in enumerate(views))
        return views

    def pairs(self, key: builtins.str) -> list[tuple[list[builtins.str], builtins.int]] | None:
        """A list of [names, repeat]; None when absent or null."""
        name, value = self._value(key, None, "a list of [names, repeat]", ())
        if value is None:
            return None
        good = isinstance(value, (list, tuple)) and all(
            isinstance(item, (list, tuple))
            and len(item) == 2
            and isinstance(item[0], (list, tuple))
            and all(isinstance(part, str) for part in item[0])
            and type(item[1]) is int
            and 0 < item[1] <= 10_000
            for item in value
        )
        if not good:
            raise self.fail(name, "a list of [names, repeat]")
        return [(list(names), repeat) for names, repeat in value]

    def sub(self, key: builtins.str, owner: builtins.str | None = None) -> ConfigView:
        """The view of a nested mapping, the same one each time; an absent or null one is empty: defaults apply."""
        name, value = self._value(key, None, "a mapping", ())
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise self.fail(name, "a mapping")
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = ConfigView(value, owner or self.owner, f"{self._path}{key}.")
        child.owner = owner or child.owner
        return child

    def length(self, key: builtins.str) -> builtins.int | None:
        """How many items the list has; None when the value is no list (some keys hold one number or a list of them)."""
        self._asked.add(key)
        value = self._mapping.get(key)
        return len(value) if isinstance(value, (list, tuple)) else None

    def equals(self, key: builtins.str, expected: object) -> builtins.bool:
        """Whether the value is exactly the one expected."""
        self._asked.add(key)
        return self._mapping.get(key) == expected

    def assume(self, line: builtins.str) -> None:
        """Note a choice that the config leaves open: "key=value"."""
        self._assumed.append(line)

    def assumed(self) -> tuple[builtins.str, ...]:
        """Sizes and names that the config does not state, with the class default that was used: "key=value"."""
        return tuple(dict.fromkeys(self._assumed)) + tuple(
            line for child in self._children.values() for line in child.assumed()
        )

    def not_understood(self) -> tuple[builtins.str, ...]:
        """Sentences on keys that look architectural and were never asked for.

        Raises ModelConfigError for keys that would add or resize tensors: the total would be wrong.
        """
        sentences: list[builtins.str] = []
        for key, value in self._mapping.items():
            if not isinstance(key, str) or key in self._asked or key in _NEVER_STRUCTURAL or key.startswith("_"):
                continue
            if value in (None, False, 0, "", [], {}) or _TOKEN_KEY.search(key):
                continue
            if key in _ALWAYS_STRUCTURAL:
                raise ModelConfigError(
                    f'{self.owner} config: "{self._path}{key}" changes which tensors exist, and models of type '
                    f'"{self.owner}" have no such part; is model_type right?'
                )
            if _LOOKS_STRUCTURAL.search(key):
                shown = repr(value)
                shown = shown if len(shown) <= 40 else shown[:37] + "..."
                sentences.append(f"config key {self._path}{key}={shown} is not understood")
        return tuple(sentences) + tuple(line for child in self._children.values() for line in child.not_understood())
