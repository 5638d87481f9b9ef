"""One residual block, by its kind of residual stream."""

from __future__ import annotations

from planner.errors import NotCovered
from planner.ledger.attention import attend
from planner.ledger.attention_families import OWN_ATTENTION
from planner.ledger.bottleneck import ADAPTER_NAMES, bottleneck
from planner.ledger.encoders import TEXT_ENCODERS, run_encoder_block
from planner.ledger.latent_attention import attend_latent
from planner.ledger.linear_attention import mix_by_delta_rule
from planner.ledger.mlp import feed_forward, feed_forward_inline
from planner.ledger.moe import mixture_of_experts
from planner.ledger.norm import normalise
from planner.ledger.operations import Operations
from planner.ledger.state_space import mix_by_chunk_scan, mix_by_selective_scan
from planner.ledger.tape import Tensor
from planner.model.shape import Attention, Block, GatedDeltaNet, LatentAttention, Mamba1, Mamba2, Mixer, Mlp, Moe

__all__ = ["run_block"]


def run_block(t: Operations, block: Block, x: Tensor) -> Tensor:
    """The block's output for input x, (B, S, H)."""
    if t.family in TEXT_ENCODERS:
        return run_encoder_block(t, block, x)
    result = _RESIDUALS[block.residual](t, block, x)
    del t.returned[:-1]
    return result


def mix(t: Operations, mixer: Mixer | None, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The token mixer's branch, and what else the module returns, which a local variable of the block keeps."""
    if isinstance(mixer, Attention) and t.family in OWN_ATTENTION:
        result, weights = OWN_ATTENTION[t.family](t, mixer, x, x.dims[-1])
        if weights is not None and not t.nested:
            t.returned.append(weights)  # the block returns them, and the model holds them while the next block runs
        return result, weights
    if isinstance(mixer, Attention):
        return attend(t, mixer, x, x.dims[-1])
    if isinstance(mixer, LatentAttention):
        return attend_latent(t, mixer, x, x.dims[-1]), None
    if isinstance(mixer, GatedDeltaNet):
        return mix_by_delta_rule(t, mixer, x, x.dims[-1]), None
    if isinstance(mixer, Mamba1):
        return mix_by_selective_scan(t, mixer, x, x.dims[-1]), None
    if isinstance(mixer, Mamba2):
        return mix_by_chunk_scan(t, mixer, x, x.dims[-1]), None
    raise NotCovered(f"activations of {type(mixer).__name__} are not in the ledger.")


def transform(t: Operations, ffn: Mlp | Moe | None, x: Tensor) -> Tensor:
    """The feed-forward branch."""
    if isinstance(ffn, Mlp):
        return feed_forward(t, ffn, x, x.dims[-1])
    if isinstance(ffn, Moe):
        return mixture_of_experts(t, ffn, x, x.dims[-1])
    raise NotCovered(f"activations of {type(ffn).__name__} are not in the ledger.")


def _sequential(t: Operations, block: Block, x: Tensor) -> Tensor:
    residual = x
    x = normed = normalise(t, block.norm, block.norm_names[0], x)
    x, _weights = mix(t, block.mixer, x)
    x = _branch(t, block, x, mixer=True)
    _kept = (x, normed) if t.family in _NAMES_NORMED else x if t.family in _NAMES_MIXED else None
    del normed
    x = t.add(residual, x)
    residual = x
    x = normalise(t, block.norm, block.norm_names[1], x)
    if t.family in _INLINES_FFN and isinstance(block.ffn, Mlp):
        held = [x]
        del x
        x = feed_forward_inline(t, block.ffn, held, residual.dims[-1])
    else:
        x = transform(t, block.ffn, x)
    x = _branch(t, block, x)
    return t.add(residual, x)


def _parallel(t: Operations, block: Block, x: Tensor) -> Tensor:
    """Both branches read the block's input; they share a norm or have one each."""
    normed = normalise(t, block.norm, block.norm_names[0], x)
    if len(block.norm_names) == 1:
        mixed, _weights = mix(t, block.mixer, normed)
        mixed = _branch(t, block, mixed, mixer=True)
        fed = _branch(t, block, transform(t, block.ffn, normed))
    elif t.family == "falcon":
        other = normalise(t, block.norm, block.norm_names[1], x)
        mixed, _weights = mix(t, block.mixer, normed)
        fed = transform(t, block.ffn, other)
    else:
        mixed, _weights = mix(t, block.mixer, normed)
        del normed
        mixed = _branch(t, block, mixed, mixer=True)
        fed = _branch(t, block, transform(t, block.ffn, normalise(t, block.norm, block.norm_names[1], x)))
    if t.family == "falcon":
        fed = t.add_(fed, mixed)
        return t.add(x, t.dropout(fed, block.dropout))
    return t.add(t.add(mixed, fed), x)


def _post(t: Operations, block: Block, x: Tensor) -> Tensor:
    residual = x
    x, _weights = mix(t, block.mixer, x)
    x = t.add(residual, _branch(t, block, x, mixer=True))
    del residual
    x = normalise(t, block.norm, block.norm_names[0], x)
    residual = x
    x = transform(t, block.ffn, x)
    x = t.add(residual, _branch(t, block, x))
    return normalise(t, block.norm, block.norm_names[1], x)


def _sandwich(t: Operations, block: Block, x: Tensor) -> Tensor:
    residual = x
    x = normalise(t, block.norm, block.norm_names[0], x)
    x, _weights = mix(t, block.mixer, x)
    x = normalise(t, block.norm, block.post_norm_names[0], x)
    x = t.add(residual, _branch(t, block, x, mixer=True))
    residual = x
    x = normalise(t, block.norm, block.norm_names[1], x)
    x = transform(t, block.ffn, x)
    x = normalise(t, block.norm, block.post_norm_names[1], x)
    return t.add(residual, _branch(t, block, x))


def _post_only(t: Operations, block: Block, x: Tensor) -> Tensor:
    residual = x
    x, _weights = mix(t, block.mixer, x)
    x = normalise(t, block.norm, block.post_norm_names[0], x)
    x = t.add(residual, _branch(t, block, x, mixer=True))
    residual = x
    x = transform(t, block.ffn, x)
    x = normalise(t, block.norm, block.post_norm_names[1], x)
    return t.add(residual, _branch(t, block, x))


def _single(t: Operations, block: Block, x: Tensor) -> Tensor:
    residual = x
    if block.residual_fp32:
        x = normalise(t, block.norm, block.norm_names[0], t.to(x, t.weight_dtype(f"{block.norm_names[0]}.weight")))
        residual = t.to(residual, "fp32")
    else:
        x = normalise(t, block.norm, block.norm_names[0], x)
    if block.mixer is None:
        x = transform(t, block.ffn, x)
    else:
        x, _weights = mix(t, block.mixer, x)
    return t.add(residual, _branch(t, block, x, mixer=block.mixer is not None))


def _branch(t: Operations, block: Block, x: Tensor, *, mixer: bool = False) -> Tensor:
    """What happens to a branch before it is added: a constant factor, dropout, a bottleneck adapter."""
    if block.branch_scaled:
        x = t.scale(x)
    x = t.dropout(x, block.dropout) if block.mixer_dropout or not mixer else x
    if t.method.name == "adapter":
        x = bottleneck(t, t.method, ADAPTER_NAMES[0 if mixer else 1], x)
    return x


_NAMES_NORMED = frozenset({"stablelm", "falcon"})  # as below, and the output of the first norm with it
_INLINES_FFN = frozenset({"opt"})  # the feed-forward layer is no module of its own: its input's name is used again
_NAMES_MIXED = frozenset(
    {"gpt2", "gpt_bigcode"}
)  # attn_output, a local variable of the block's forward, lives to its end

_RESIDUALS = {
    "sequential": _sequential,
    "parallel": _parallel,
    "post": _post,
    "sandwich": _sandwich,
    "post_only": _post_only,
    "single": _single,
}
