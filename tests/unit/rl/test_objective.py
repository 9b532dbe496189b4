"""K2's objective against k1.5's form, a slow twin, and a bandit whose optimum is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_k2.rl.objective import advantages, importance_weights, losses, segment_sums


def gradients(form: str, tau: float) -> Tensor:
    """Gradient of the mean loss over a group in logits of 5 tokens, fp64."""
    torch.manual_seed(0)
    logits = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(5, (12,))
    segments = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, -1, -1])
    old = torch.randn(4, dtype=torch.float64) - 4
    rewards = torch.tensor([1.0, 0.0, 0.25, 1.0], dtype=torch.float64)
    log_probs = torch.log_softmax(logits, -1)[torch.arange(12), tokens]
    ratios = segment_sums(log_probs, segments, 4) - old
    losses(ratios, advantages(rewards), tau, form).mean().backward()  # type: ignore[arg-type]
    assert logits.grad is not None
    return logits.grad


@pytest.mark.parametrize("tau", [0.01, 0.1, 1.0])
def test_both_forms_have_the_same_gradient_up_to_two_tau(tau: float) -> None:
    k2, k15 = gradients("k2", tau), gradients("k1.5", tau)
    torch.testing.assert_close(k2, 2 * tau * k15, rtol=1e-12, atol=1e-15)
    assert k2[:10].abs().min() > 0
    assert (k2[10:] == 0).all(), "tokens of no segment have no gradient"


def test_k2_is_the_square_of_the_sequence_and_not_of_tokens() -> None:
    values = torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64)
    ratio = segment_sums(values, torch.tensor([0, 0, 0]), 1)
    loss = losses(ratio, torch.tensor([0.3], dtype=torch.float64), 0.1)
    assert float(loss) == pytest.approx((0.3 - 0.1 * 0.4) ** 2, abs=1e-15)


def test_a_bandit_reaches_the_known_optimum() -> None:
    """pi* is proportional to pi_old exp(r / tau), where the mean reward stands for tau log Z.

    With all actions as the group, every one equally often, the minimum has residual 0 for
    l_i = (r_i - mean) / tau + c; the policy is normalised, so c follows and pi* with it.
    """
    torch.manual_seed(1)
    tau, rewards = 0.5, torch.tensor([1.0, 0.0, 0.3, 0.7, -0.2], dtype=torch.float64)
    old = torch.log_softmax(torch.randn(5, dtype=torch.float64), -1)
    logits = old.clone().requires_grad_()
    # tau log Z itself as baseline: the derivation's; K responses have its mean-reward estimate.
    log_z = torch.logsumexp(old + rewards / tau, 0)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        ratios = torch.log_softmax(logits, -1) - old
        losses(ratios, rewards - tau * log_z, tau).mean().backward()
        optimizer.step()
    found = torch.softmax(logits.detach(), -1)
    wanted = torch.softmax(old + rewards / tau, -1)
    assert (found - wanted).abs().max() < 1e-3


@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_answers_of_the_current_policy_lead_to_the_optimum_with_the_mean_as_baseline(
    tau: float,
) -> None:
    """The expectation over pi itself: a baseline, whichever, adds nothing to the gradient."""
    torch.manual_seed(0)
    rewards = torch.tensor([1.0, 0.0, 0.3, 0.7, -0.2], dtype=torch.float64)
    old = torch.log_softmax(torch.randn(5, dtype=torch.float64), -1)
    logits = old.clone().requires_grad_()
    for _ in range(3000):
        log_probs = torch.log_softmax(logits, -1)
        weights = log_probs.detach().exp()
        advantage = rewards - (weights * rewards).sum()
        loss = (weights * losses(log_probs - old, advantage, tau)).sum()
        (slope,) = torch.autograd.grad(loss, logits)
        with torch.no_grad():
            logits -= slope / (2 * tau**2)
    wanted = torch.softmax(old + rewards / tau, -1)
    assert (wanted - old.exp()).abs().max() > 0.1
    assert (torch.softmax(logits.detach(), -1) - wanted).abs().max() < 1e-3


def test_answers_of_the_old_policy_lead_near_the_optimum_where_tau_is_large() -> None:
    """Groups from a fixed pi_old, in expectation, with their mean as baseline: K2's iteration.

    It ends at pi_old exp(r / tau) up to the baseline's error, which falls with tau: 0.06 at 0.1.
    """
    torch.manual_seed(2)
    tau, actions = 4.0, 4  # r / tau is small: mean r and tau log Z differ by var(r) / (2 tau)
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.25], dtype=torch.float64)
    old = torch.log_softmax(torch.randn(actions, dtype=torch.float64), -1)
    weights = old.exp()  # the expectation over groups, exactly
    baseline = (weights * rewards).sum()
    logits = old.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        ratios = torch.log_softmax(logits, -1) - old
        loss = (weights * losses(ratios, rewards - baseline, tau)).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)
    wanted = torch.softmax(old + rewards / tau, -1)
    assert (torch.softmax(logits.detach(), -1) - wanted).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("correction", "wanted"),
    [("none", [1, 1, 1]), ("truncate", [2, 0.25, 1.5]), ("mask", [0, 0, 1])],
)
def test_importance_weights(correction: str, wanted: list[float]) -> None:
    gaps = torch.tensor([5.0, 0.25, 1.5], dtype=torch.float64).log()
    found = importance_weights(gaps, correction, 2.0)  # type: ignore[arg-type]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))


def test_an_engine_far_off_gives_no_infinite_weight() -> None:
    gaps = torch.tensor([1e4, -1e4])
    assert torch.isfinite(importance_weights(gaps, "truncate", 2.0)).all()
