"""Models made of state-space blocks alone: Mamba, Falcon-Mamba, Mamba 2."""

from __future__ import annotations

from typing import Literal

from planner.errors import ModelConfigError
from planner.model.shape import Block, Embedding, Head, Mamba1, Mamba2, ModelShape
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import RMS_NORM, Trunk, assemble, read_trunk

__all__ = ["READERS", "dt_rank"]

# Initialisation and kernels: keys that change no tensor.
_NO_TENSORS = {
    "steps": ("time_step_scale", "time_step_min", "time_step_max", "time_step_init_scheme", "time_step_floor"),
    "limits": ("time_step_limit", "time_step_init", "rescale_prenorm_residual"),
    "kernels": ("use_mambapy", "use_falcon_mambapy", "use_associative_scan", "use_mamba_kernels", "chunk_size"),
    "older names": ("intermediate_size", "d_inner", "d_model", "n_layer", "ssm_cfg", "bias", "conv_bias"),
    "norms": ("fused_add_norm", "rms_norm", "mixer_rms_eps", "norm_before_gate", "hidden_act"),
    "vocabulary": ("pad_vocab_size_multiple",),
}


def dt_rank(view: ConfigView, key: str, hidden: int) -> int:
    """The rank of the step-size projection; "auto" is H/16, rounded up."""
    if not view.has(key) or view.is_text(key):
        if view.str(key, "auto") != "auto":
            raise view.fail(key, '"auto" or a whole number')
        return -(-hidden // 16)
    return view.int(key)


def _stack(view: ConfigView, trunk: Trunk, mixer: Mamba1 | Mamba2) -> ModelShape:
    """Blocks of one norm and one mixer, under the names of the reference classes."""
    for keys in _NO_TENSORS.values():
        view.ignore(*keys)
    upcast = view.bool("residual_in_fp32", True)
    block = Block(mixer=mixer, ffn=None, residual="single", norm=RMS_NORM, norm_names=("norm",), residual_fp32=upcast)
    return assemble(
        view,
        trunk,
        (block,) * trunk.layers,
        norm=RMS_NORM,
        embedding=Embedding(rows=trunk.vocab, size=trunk.hidden, name="backbone.embeddings"),
        head=Head(rows=trunk.vocab, tied=trunk.tied, norm=RMS_NORM, norm_name="backbone.norm_f"),
        prefix="backbone.layers",
    )


def _mamba(view: ConfigView) -> ModelShape:
    """Mamba 1; Falcon-Mamba normalises the step size, B and C without weights."""
    trunk = read_trunk(view, vocab=50_280, positions=None, tied=True)
    norms: Literal["none", "unweighted"] = "unweighted" if view.owner == "falcon_mamba" else "none"
    mixer = Mamba1(
        inner=view.int("expand", 2) * trunk.hidden,
        state=view.int("state_size", 16),
        conv=view.int("conv_kernel", 4),
        dt_rank=dt_rank(view, "time_step_rank", trunk.hidden),
        conv_bias=view.bool("use_conv_bias", True),
        proj_bias=view.bool("use_bias", False),
        norms=norms,
    )
    return _stack(view, trunk, mixer)


def _mamba2(view: ConfigView) -> ModelShape:
    """Mamba 2; the inner width is both expand x H and heads x head size."""
    trunk = read_trunk(view, hidden=4096, layers=64, vocab=32_768, positions=None, tied=False)
    heads, head_dim = view.int("num_heads", 128), view.int("head_dim", 64)
    inner = view.int("expand", 2) * trunk.hidden
    if inner != heads * head_dim:
        raise ModelConfigError(
            f"mamba2 config: expand x hidden_size is {inner}, but num_heads x head_dim is {heads * head_dim}."
        )
    view.ignore("time_step_rank")
    mixer = Mamba2(
        inner=inner,
        heads=heads,
        head_dim=head_dim,
        state=view.int("state_size", 128),
        groups=view.int("n_groups", 8),
        conv=view.int("conv_kernel", 4),
        conv_bias=view.bool("use_conv_bias", True),
        proj_bias=view.bool("use_bias", False),
        chunk=view.int("chunk_size", 256),
    )
    return _stack(view, trunk, mixer)


READERS = {"falcon_mamba": _mamba, "mamba": _mamba, "mamba2": _mamba2}
