"""The projection and the loss by themselves: published kernel benchmarks, and the laws of the fused forms."""

from __future__ import annotations

import pytest

from planner.errors import UnknownField
from planner.evidence import Comparison, compare_kernels, kernel_runs
from planner.ledger.loss_kernels import cross_entropy_peak, loss_head_peak

MIB = 2**20


@pytest.mark.parametrize("comparison", compare_kernels(kernel_runs()), ids=lambda c: c.run.id)
def test_published_kernel_peaks(comparison: Comparison) -> None:
    """Within 0.1 %, or within 1.1 MiB: CCE's locks, and what benchmarks print rounded."""
    assert comparison.predicted_bytes is not None
    gap = abs(comparison.predicted_bytes - comparison.measured_bytes)
    assert gap < max(0.001 * comparison.measured_bytes, 1.1 * MIB), (
        comparison.predicted_bytes,
        comparison.measured_bytes,
    )


def test_backward_of_the_plain_loss_has_three_copies_of_the_logits() -> None:
    """log-softmax, the gradient of the picked logarithms, the gradient of the logits; then the weight's and input's."""
    tokens, hidden, vocabulary = 4096, 1024, 64_000
    logits = tokens * vocabulary * 2
    assert loss_head_peak(tokens, hidden, vocabulary, "plain") == pytest.approx(3 * logits, rel=1e-3)


@pytest.mark.parametrize("variant", ["liger", "liger-0.4", "cce"])
def test_losses_without_logits_grow_with_the_hidden_states_only(variant: str) -> None:
    small, large = (loss_head_peak(tokens, 1024, 64_000, variant) for tokens in (8192, 65_536))
    assert large - small < 10 * (65_536 - 8192) * 1024 * 2


def test_the_fused_kernel_writes_over_the_logits() -> None:
    assert cross_entropy_peak(4096, 32_000, fused=True) == pytest.approx(4096 * 32_000 * 4, rel=1e-3)
    assert cross_entropy_peak(4096, 32_000, fused=False) == pytest.approx(4 * 4096 * 32_000 * 4, rel=1e-3)


def test_chunks_hold_every_log_softmax_but_one_gradient() -> None:
    plain, chunked = (loss_head_peak(8192, 1024, 64_000, variant) for variant in ("upcast", "chunked"))
    assert chunked < plain


def test_unknown_variant_names_the_nearest() -> None:
    with pytest.raises(UnknownField, match="liger"):
        loss_head_peak(16, 16, 16, "ligre")
