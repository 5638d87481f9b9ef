"""Prompt tuning (arXiv:2104.08691) and prefix tuning (arXiv:2101.00190): v trained virtual tokens before the text.

As peft 0.21 runs them: peft_model.py, PeftModelForCausalLM.forward and PeftModel.get_prompt.

    prompt   v rows of width H stand before the embedded text: every tensor of the model is v positions longer,
             labels included (the prompt's are -100)
    prefix   v keys and v values for each layer, one row of a (v, 2 L K D) table, reach the layers as a cache. Each
             layer puts them before its own keys and values, so attention is no longer square: a mask is made, which
             keeps scaled_dot_product_attention from its flash kernel, and the gradients of all layers' prefixes wait
             for one another until the cache itself is differentiated, last of all

Letters: B batch, S sequence (with a prompt's tokens), H hidden, v virtual tokens, L layers, K key/value heads, D head
size.
"""

from __future__ import annotations

from planner.errors import NotCovered, PlanError
from planner.ledger.operations import Operations
from planner.ledger.tape import Storage, Tensor
from planner.model.shape import Attention, ModelShape

__all__ = ["PROMPT_TABLE", "extend_with_prefix", "make_prefix", "prefix_width", "prepend_prompt"]

PROMPT_TABLE = "prompt_encoder.embedding.weight"


def prepend_prompt(t: Operations, x: Tensor, caller: list[Storage]) -> Tensor:
    """The embedded text x, (B, text, H), with the prompt before it, (B, S, H).

    caller: takes what local variables of the calling function keep until the loss is there.
    """
    method, (batch, _, hidden) = t.method, x.dims
    t.module = "prompt_encoder"
    virtual = t.dim("v", method.virtual_tokens)
    labels = [t.constant("full", (batch, virtual), "int64"), t.constant("cat", (batch, "S"), "int64")]
    table = t.weight(PROMPT_TABLE, (virtual, hidden), dtype=method.adapter_dtype, trainable=True)
    tokens = t.constant("expand", (batch, virtual), "int64")
    (prompt,) = t.apply("embedding", [table], [(("1", virtual, hidden), table.dtype)], saves=[tokens])
    del tokens
    prompt = t.copy(prompt, (batch, virtual, hidden), "repeat")
    prompt = t.to(prompt, x.dtype)
    whole = t.cat([prompt, x], (batch, "S", hidden))
    caller.extend(tensor.storage for tensor in (*labels, prompt, whole))
    return whole


def prefix_width(shape: ModelShape) -> int:
    """K * D of the layers: a prefix has as many keys, and as many values, for each of its tokens.

    Raises NotCovered where layers differ or do not keep a plain cache of keys and values.
    """
    widths: set[tuple[int, int, int | None, int | None]] = set()
    for block in shape.blocks:
        mixer = block.mixer
        plain = isinstance(mixer, Attention) and block.cross is None and not mixer.shares_kv
        if not plain or not isinstance(mixer, Attention) or mixer.value_dim not in (None, mixer.head_dim):
            raise NotCovered("prefix tuning is covered for models whose layers are all plain self-attention.")
        widths.add((mixer.kv_heads, mixer.head_dim, mixer.window, mixer.chunk))
    if len(widths) != 1:
        raise NotCovered("prefix tuning is not covered for layers that differ in their key/value heads or windows.")
    heads, size, _, chunk = widths.pop()
    if chunk is not None:
        raise NotCovered("prefix tuning is not covered for chunked attention.")
    return heads * size


def make_prefix(t: Operations, shape: ModelShape, dtype: str) -> list[tuple[Tensor, Tensor]]:
    """Keys and values, (B, K, v, D) each, for every layer of the model, in the format of its activations."""
    if t.recomputes:
        raise PlanError("method prefix does not work with recompute: peft refuses gradient checkpointing with a cache.")
    width, layers, method = prefix_width(shape), len(shape.blocks), t.method
    first = shape.blocks[0].mixer
    assert isinstance(first, Attention)
    t.module = "prompt_encoder"
    virtual, groups, size = t.dim("v", method.virtual_tokens), t.dim("K", first.kv_heads), t.dim("D", first.head_dim)
    t.dim("v+S", method.virtual_tokens + t.sizes["S"])
    wide, both = t.dim("2LKD", 2 * layers * width), t.dim("2", 2)
    table = t.weight(PROMPT_TABLE, (virtual, wide), dtype=method.adapter_dtype, trainable=True)
    tokens = t.constant("expand", ("B", virtual), "int64")
    (past,) = t.apply("embedding", [table], [(("B", virtual, wide), table.dtype)], saves=[tokens])
    del tokens
    past = t.view(t.to(past, dtype), ("B", virtual, wide))
    parts = t.split(past, [(both, "B", groups, virtual, size)] * layers)
    del past
    row = ("B", groups, virtual, size)
    pairs: list[tuple[Tensor, Tensor]] = []
    for part in parts:
        key, value = t.split(part, [row, row])
        pairs.append((t.cat([key], row), t.cat([value], row)))
    return pairs


def extend_with_prefix(t: Operations, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's prefix before its own keys and values: DynamicLayer.update of transformers' cache_utils.py.

    The cache keeps the results until the model's forward pass has returned.
    """
    assert t.past is not None
    past_key, past_value = t.past
    t.past = None
    t.module = "cache"
    dims = (*key.dims[:2], "v+S", key.dims[3])
    key = t.cat([past_key, key], dims)
    del past_key
    value = t.cat([past_value, value], (*value.dims[:2], "v+S", value.dims[3]))
    t.cache.extend((key.storage, value.storage))
    return key, value
