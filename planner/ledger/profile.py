"""Implementation profiles: which of the ledger's rows exist depends on whose modules run, and on their version.

A flag says what a named implementation does differently from the plainest one; each carries the place it was read in.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.errors import UnknownField, nearest

__all__ = ["Profile", "profile_named"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What one implementation does.

    fused_norm: norms are one kernel. fused_rope: rotary embedding is one kernel. fused_glu: activation times gate is.
    grouped_attention: the fused attention kernel reads K key/value heads; otherwise they are first repeated to A.
    loss: how logits turn into a loss (see `planner.ledger.loss_head`).
    reentrant: which form of torch's checkpoint recomputes a block.
    repeats_mask: a causal mask tensor (S x S) is materialised for the fused kernel.
    """

    name: str
    version: str
    fused_norm: bool = False
    fused_rope: bool = False
    fused_glu: bool = False
    grouped_attention: bool = True
    loss: str = "float_then_flat"
    reentrant: bool = False
    native_rope_fp32: bool = False
    source: str = ""


_PROFILES: dict[str, tuple[Profile, ...]] = {
    # newest first
    "transformers": (
        Profile(
            name="transformers",
            version="5.23",
            source="transformers 5.23.0: modeling_llama.py, loss/loss_utils.py, integrations/sdpa_attention.py",
        ),
        Profile(
            name="transformers",
            version="4.48",
            grouped_attention=False,
            loss="float_then_shift",
            reentrant=True,
            source="transformers 4.48.1: modeling_llama.py, loss/loss_utils.py, modeling_utils.py",
        ),
    ),
}


def profile_named(name: str, version: str | None = None) -> Profile:
    """The profile of an implementation; the newest one when no version is given, else the newest not after it."""
    known = _PROFILES.get(name)
    if known is None:
        raise UnknownField(f'implementation "{name}" is not known; {nearest(name, _PROFILES)}')
    if version is None:
        return known[0]
    wanted = _numbers(version)
    for profile in known:
        if _numbers(profile.version) <= wanted:
            return profile
    oldest = known[-1].version
    raise UnknownField(f'{name} {version} is older than the oldest version described here, {oldest}.')


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split(".")[:2]
    if not all(part.isdigit() for part in parts):
        raise UnknownField(f'implementation version "{version}" is not understood; write it as "4.48".')
    return tuple(int(part) for part in parts)
