"""Implementation profiles: which of the ledger's rows exist depends on whose modules run, and on their version.

A flag says what a named implementation does differently from the plainest one; each carries the place it was read in.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from planner.errors import PlanError, UnknownField, nearest

__all__ = ["Profile", "profile_named"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What one implementation does.

    fused_norm: RMS norms are one kernel. fused_rope: rotary embedding is one kernel, working in place. fused_glu:
    activation times gate is one kernel.
    in_place_gradients: fused kernels write gradients into memory that they are handed: a norm into the gradient of
    its output, a gated activation into its inputs.
    grouped_attention: the fused attention kernel reads K key/value heads; otherwise they are first repeated to A.
    repeats_for_flash: families that repeat them for every fused kernel.
    loss: how logits turn into a loss (see `planner.ledger.loss_head`); losses: the same, for the families (model_type)
    whose modules do it otherwise.
    full_loss: the loss when all weights train, where that is another one.
    fused_loss: whether that ends in a fused cross-entropy kernel.
    fused_linear_loss: which of Liger's fused projections and losses `loss: liger` runs, by its version.
    expert_modules: each routed expert is a module with linears of its own.
    reentrant: which form of torch's checkpoint recomputes a block.
    packs_from: the format that weights are in when they are packed to 4 bits; None means their own.
    packed_saves_input: products with 4-bit weights keep their input (bitsandbytes up to 0.42).
    adapters_follow_weights: adapters are in the base weights' format; otherwise as the plan says.
    """

    name: str
    version: str
    kernels: str | None = None
    fused_norm: bool = False
    fused_rope: bool = False
    fused_glu: bool = False
    in_place_gradients: bool = False
    grouped_attention: bool = True
    repeats_for_flash: tuple[str, ...] = ()
    loss: str = "float_then_flat"
    losses: tuple[tuple[str, str], ...] = field(default=())
    full_loss: str | None = None
    fused_loss: bool = False
    fused_linear_loss: str = "liger-0.6"
    expert_modules: bool = False
    reentrant: bool = False
    packed_saves_input: bool = False
    adapters_follow_weights: bool = False
    packs_from: str | None = None
    source: str = ""

    def loss_for(self, family: str) -> str:
        """The loss that this implementation's modules of a family compute when the plan asks for nothing else."""
        return dict(self.losses).get(family, self.loss)


# In transformers 4.x these compute the loss in the logits' own format (modeling_<family>.py, ...ForCausalLM.forward),
# and these turn the projection's result to fp32 at once.
_NO_UPCAST = ("gpt2", "gpt_bigcode", "gpt_neox", "opt", "bloom", "falcon", "mpt", "stablelm")
_UPCAST_AT_ONCE = ("gptj", "codegen")
_UPCAST_IN_5 = ("mamba", "mamba2", "falcon_mamba", "nemotron_h")  # lm_head(x).float() in 5.23, too
_LOSSES_OF_4 = (*((name, "shift") for name in _NO_UPCAST), *((name, "float_at_once") for name in _UPCAST_AT_ONCE))

_PROFILES: dict[str, tuple[Profile, ...]] = {
    "megatron": (
        Profile(
            name="megatron",
            version="3.0",
            fused_norm=True,
            reentrant=True,
            source="Korthikanti et al. 2022 (arXiv:2205.05198) and Megatron-LM 3.0: see planner/ledger/megatron.py",
        ),
    ),
    # newest first
    "transformers": (
        Profile(
            name="transformers",
            version="5.23",
            losses=tuple((name, "flat_at_once") for name in _UPCAST_IN_5),
            source="transformers 5.23.0: modeling_llama.py, loss/loss_utils.py, integrations/sdpa_attention.py",
        ),
        Profile(
            name="transformers",
            version="4.46",
            grouped_attention=False,
            loss="float_then_shift",
            losses=_LOSSES_OF_4,
            fused_linear_loss="liger-0.4",
            expert_modules=True,
            reentrant=True,
            source="transformers 4.48.1: modeling_llama.py, loss/loss_utils.py, modeling_utils.py",
        ),
        Profile(
            name="transformers",
            version="4.45",
            grouped_attention=False,
            repeats_for_flash=("mistral", "mixtral", "qwen2", "qwen2_moe", "starcoder2", "phi3", "jamba"),
            loss="float_at_once",
            losses=_LOSSES_OF_4,
            fused_linear_loss="liger-0.4",
            expert_modules=True,
            reentrant=True,
            source="transformers 4.45.2: modeling_llama.py, modeling_mistral.py, modeling_granite.py",
        ),
    ),
    "litgpt": (
        Profile(
            name="litgpt",
            version="0.4",
            packs_from="fp16",
            packed_saves_input=True,
            grouped_attention=False,
            loss="litgpt_chunks",
            full_loss="litgpt_flat",
            reentrant=False,
            adapters_follow_weights=True,
            source="litgpt 5895df10 (2024-04): model.py, lora.py, utils.py; Fabric 2.3: wrappers.py, bitsandbytes.py",
        ),
    ),
    "torchtune": (
        Profile(
            name="torchtune",
            version="0.4",
            loss="flat_at_once",
            adapters_follow_weights=True,
            source="torchtune 1814feb1 (2024-11): modules/transformer.py, modules/loss/ce_chunked_output_loss.py",
        ),
    ),
}

# What a kernel library changes in the modules of transformers.
_KERNELS: dict[str, dict[str, bool]] = {
    # Liger-Kernel 0.4 transformers/monkey_patch.py: rope, rms_norm, swiglu; ops/rms_norm.py (in_place), ops/swiglu.py
    "liger": {"fused_norm": True, "fused_rope": True, "fused_glu": True, "in_place_gradients": True},
    # fms-acceleration fused-ops-and-kernels, models/llama.py: RMSNorm, RoPE, loss; fused MLPs only with 4-bit LoRA
    "foak": {"fused_norm": True, "fused_rope": True, "in_place_gradients": True, "fused_loss": True},
}


def profile_named(name: str, version: str | None = None, kernels: str | None = None) -> Profile:
    """The profile of an implementation; the newest one when no version is given, else the newest not after it.

    kernels: a library that replaces some of its modules. Raises UnknownField for names and versions that are not
    described here, PlanError for kernels that do not go with the implementation.
    """
    known = _PROFILES.get(name)
    if known is None:
        raise UnknownField(f'implementation "{name}" is not known; {nearest(name, _PROFILES)}')
    return _with_kernels(_version(known, name, version), kernels)


def _version(known: tuple[Profile, ...], name: str, version: str | None) -> Profile:
    if version is None:
        return known[0]
    wanted = _numbers(version)
    for profile in known:
        if _numbers(profile.version) <= wanted:
            return profile
    oldest = known[-1].version
    raise UnknownField(f"{name} {version} is older than the oldest version described here, {oldest}.")


def _with_kernels(profile: Profile, kernels: str | None) -> Profile:
    if kernels is None:
        return profile
    if kernels not in _KERNELS:
        raise UnknownField(f'implementation.kernels "{kernels}" is not known; {nearest(kernels, _KERNELS)}')
    if profile.name != "transformers":
        raise PlanError(f"implementation.kernels {kernels} replaces modules of transformers, not of {profile.name}.")
    return replace(profile, kernels=kernels, **_KERNELS[kernels])


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split(".")[:2]
    if not all(part.isdigit() for part in parts):
        raise UnknownField(f'implementation version "{version}" is not understood; write it as "4.48".')
    return tuple(int(part) for part in parts)
