"""Where `transformers` and `peft` need a hand to run on fake tensors; the only place that knows their versions.

- FlashAttention 2 is not installed on a machine without a GPU: the attention interface gets a stand-in of the same
  memory.
- `transformers` 5 treats fake tensors as a trace and then builds masks that a real run skips: it is told that they
  are real.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from planner.errors import ModelConfigError, NotCovered
from planner.measure.cuda_semantics import flash_attention
from planner.readers.models import MASKED_CLASSES

__all__ = ["build_causal_lm", "with_adapters", "without_gpu_checks"]

_LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def build_causal_lm(config: Mapping[str, Any], *, layers: int | None = None) -> torch.nn.Module:
    """A causal language model from a `config.json`'s content, on the current default device, in the default dtype.

    Raises ModelConfigError when `model_type` is missing or the installed `transformers` does not know it.
    """
    import transformers

    settings = dict(config)
    model_type = settings.pop("model_type", None)
    if model_type is None:
        raise ModelConfigError("the configuration has no model_type.")
    for key in ("transformers_version", "auto_map", "quantization_config", "dtype", "torch_dtype"):
        settings.pop(key, None)
    try:
        built = transformers.AutoConfig.for_model(model_type, **settings)
    except ValueError as error:
        raise ModelConfigError(
            f'transformers {transformers.__version__} does not know the model type "{model_type}".'
        ) from error
    if layers is not None:
        text = built.get_text_config()
        key = next((key for key in _LAYER_KEYS if hasattr(text, key)), None)
        if key is None:
            raise ModelConfigError(f'no number of layers to override in a "{model_type}" configuration.')
        setattr(text, key, layers)
        if getattr(text, "layer_types", None) is not None:
            text.layer_types = text.layer_types[:layers]
    # Said explicitly, because from_config would else prefer the dtype of the configuration.
    name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    if model_type in MASKED_CLASSES:
        stated = list(config.get("architectures") or [MASKED_CLASSES[model_type]])
        if stated[0] != MASKED_CLASSES[model_type]:
            raise NotCovered(
                f"the dry run of a {model_type} model replays {MASKED_CLASSES[model_type]}, not {stated[0]}."
            )
        return transformers.AutoModelForMaskedLM.from_config(built, **{name: torch.get_default_dtype()})
    if type(built) not in transformers.AutoModelForCausalLM._model_mapping:
        raise NotCovered(
            f'transformers {transformers.__version__} has no causal language model of type "{model_type}".'
        )
    return transformers.AutoModelForCausalLM.from_config(built, **{name: torch.get_default_dtype()})


def with_adapters(model: torch.nn.Module, lora: Mapping[str, Any]) -> torch.nn.Module:
    """`model` (on the meta device) wrapped by peft with LoRA adapters, its other weights frozen."""
    import peft

    task = "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None
    return peft.get_peft_model(model, peft.LoraConfig(**{"task_type": task, **lora}))  # pyright: ignore


@contextmanager
def without_gpu_checks() -> Iterator[None]:
    """For its duration, `attn_implementation="flash_attention_2"` runs the stand-in and fake tensors pass for real
    ones.
    """
    try:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
        from transformers.utils import import_utils
    except ImportError:
        yield
        return
    before = ALL_ATTENTION_FUNCTIONS["flash_attention_2"]
    is_fake_tensor = getattr(import_utils, "is_fake_tensor", None)
    ALL_ATTENTION_FUNCTIONS["flash_attention_2"] = _flash_attention_forward  # pyright: ignore
    if is_fake_tensor is not None:
        import_utils.is_fake_tensor = lambda _: False
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["flash_attention_2"] = before
        if is_fake_tensor is not None:
            import_utils.is_fake_tensor = is_fake_tensor


def _flash_attention_forward(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **_: Any
) -> tuple[torch.Tensor, None]:
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    if q.dtype == torch.float32:  # the real wrapper computes in the weights' format when norms were kept in fp32
        target = next(m for m in module.modules() if isinstance(m, torch.nn.Linear)).weight.dtype
        if torch.is_autocast_enabled("cpu"):
            target = torch.get_autocast_dtype("cpu")
        q, k, v = (t.to(target) for t in (q, k, v))
    head_size, value_size = q.shape[-1], v.shape[-1]
    if value_size != head_size:
        v = F.pad(v, (0, head_size - value_size))
    return flash_attention(q, k, v)[..., :value_size] if value_size != head_size else flash_attention(q, k, v), None
