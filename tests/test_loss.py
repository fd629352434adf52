"""Rewards, advantages, loss and schedule: golden values, and slow versions on random inputs."""

import doctest
import math

import numpy as np
import pytest
import torch

import observe_r1
from observe_r1 import (
    Config,
    Rollouts,
    group_advantages,
    grpo_loss,
    learning_rate_scale,
    score_rollouts,
)


def test_doctests():
    result = doctest.testmod(observe_r1)
    assert result.failed == 0 and result.attempted > 0


# ------------------------------------------------------------------------- rewards and advantages


def score(texts, lengths, golds, **options):
    """Scores and advantages of groups of texts with so many tokens [B,G]."""
    lengths = torch.tensor(lengths)
    mask = torch.arange(lengths.max()) < lengths[..., None]
    problems = [{"answer": gold} for gold in golds]
    scores = score_rollouts(Rollouts([], mask.long(), mask, texts), problems, Config(**options))
    return scores, group_advantages(scores["reward"], scores["weight"])


def test_golden_case_of_the_method():
    accurate, formatted = [1, 1, 0, 0, 0, 0, 1, 0], [1, 1, 1, 1, 0, 0, 0, 0]
    texts = []
    for right, well in zip(accurate, formatted):
        blocks = "<observe>o</observe><think>t</think>" if well else ""
        texts.append(f"{blocks}<answer>{3 if right else 4}</answer>")
    scores, advantages = score([texts], [[300, 200, 150, 120, 400, 500, 600, 700]], ["3"])
    assert scores["accuracy"][0].tolist() == accurate
    assert scores["format"][0].tolist() == [well / 2 for well in formatted]
    assert scores["bonus"][0].tolist() == pytest.approx([0, 0.2, 0, 0, 0, 0, 0, 0])
    assert scores["weight"].tolist() == [1.6875]
    expected = [2.102, 2.596, -0.371, -0.371, -1.607, -1.607, 0.865, -1.607]
    assert advantages[0].tolist() == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("seed", range(40))
def test_scores_and_advantages_equal_the_slow_version(seed):
    random = np.random.default_rng(seed)
    B, G, cap = 4, int(random.integers(2, 17)), 150
    options = {"observe": bool(seed % 2), "dynamic_weight": seed % 3 > 0, "max_new_tokens": cap}
    options |= {"min_length": 60, "bonus": random.choice([0, 0.3]), "sigma": random.uniform(0, 3)}
    starts = ["", "<think>t</think>", "<observe>o</observe><think>t</think>"]
    answers = random.integers(0, 2 + (seed % 4 > 0), (B, G))
    texts = [[f"{random.choice(starts)}<answer>{a}</answer>" for a in group] for group in answers]
    lengths = random.integers(40, cap + 1, (B, G))
    scores, advantages = score(texts, lengths, ["0", "1", "2", "1"], **options)

    for b, gold in enumerate((0, 1, 2, 1)):
        correct = answers[b] == gold
        start = starts[2 if options["observe"] else 1]
        form = [0.5 * (start in text) for text in texts[b]]
        bonus = np.zeros(G)
        right = np.flatnonzero(correct)
        if len(right) and lengths[b, right].min() > 60:
            bonus[right[lengths[b, right].argmin()]] = options["bonus"]
        p = correct.mean()
        weight = 4 * options["sigma"] * p * (1 - p) if options["dynamic_weight"] else 1
        reward = correct + form + bonus
        centred = reward - reward.mean()
        equal = np.ptp(reward) == 0
        expected = {
            "accuracy": correct,
            "format": form,
            "bonus": bonus,
            "reward": reward,
            "response_length": lengths[b],
            "truncated_fraction": lengths[b] == cap,
        }
        for name, values in expected.items():
            assert scores[name][b].tolist() == pytest.approx(list(map(float, values))), name
        assert scores["weight"][b].item() == pytest.approx(weight)
        slow = 0 * reward if equal else weight * centred / (reward.std(ddof=1) + 1e-6)
        assert advantages[b].tolist() == pytest.approx(slow.tolist(), abs=1e-5)
    assert scores.keys() == {*expected, "weight"}


@pytest.mark.parametrize("G", [2, 7, 8, 16])
@pytest.mark.parametrize("value", [0.0, 0.1, 0.7, 1.7])
def test_equal_rewards_give_no_advantage(value, G):
    """Although the computed std of eight times .1 is not 0; the least real difference counts."""
    equal = torch.full((1, G), value)
    assert group_advantages(equal, torch.ones(1)).abs().max() == 0
    equal[0, 1] += 0.01
    expected = (G - 1) / math.sqrt(G)  # how far one may stand from all others
    assert group_advantages(equal, torch.ones(1))[0, 1].item() == pytest.approx(expected, rel=1e-3)


# -------------------------------------------------------------------------------------------- loss


def slow_cost(log_probs, old, ref, advantage, clip_range, kl_coef):
    """Cost, KL and clipped share of one response, token by token, as tensors; inputs [T]."""
    cost = kl_sum = clipped = 0 * log_probs.sum()
    for t in range(len(log_probs)):
        ratio = (log_probs[t] - old[t]).exp()
        bounded = ratio.clamp(1 - clip_range, 1 + clip_range)
        q = 0 * ratio if ref is None else ref[t] - log_probs[t]
        kl = q.exp() - q - 1
        cost = cost - torch.minimum(ratio * advantage, bounded * advantage) + kl_coef * kl
        kl_sum = kl_sum + kl
        clipped = clipped + (bounded * advantage < ratio * advantage)
    n = max(1, len(log_probs))
    return cost / n, kl_sum / n, clipped / n


@pytest.mark.parametrize("seed", range(30))
def test_grpo_loss_equals_the_slow_version(seed):
    """Values and gradients; in the padding stands what no arithmetic survives."""
    generator = torch.Generator().manual_seed(seed)
    N, T = 1 + seed % 8, 9
    lengths = torch.randint(0, T + 1, (N,), generator=generator)
    mask = torch.arange(T) < lengths[:, None]
    log_probs, old, ref = -2 * torch.rand(3, N, T, generator=generator, dtype=torch.float64)
    advantages = torch.randn(N, generator=generator, dtype=torch.float64)
    ref = ref if seed % 3 else None
    clip_range, kl_coef, total = 0.1 + seed % 4 / 10, 0.3 * (seed % 2), 16 if seed % 5 else None
    for values in (log_probs, old, ref)[: 2 + (ref is not None)]:
        values[~mask] = [-math.inf, math.nan, 7.0][seed % 3]
    padded = log_probs.clone().requires_grad_()
    loss, metrics = grpo_loss(padded, old, ref, advantages, mask, clip_range, kl_coef, total)
    loss.backward()

    log_probs.requires_grad_()
    slow = []
    for n, length in enumerate(lengths):
        one = [None if values is None else values[n, :length] for values in (log_probs, old, ref)]
        slow.append(torch.stack(slow_cost(*one, advantages[n], clip_range, kl_coef)))
    costs, kl, clipped = torch.stack(slow).T
    expected = costs.sum() / (total or N)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert metrics["kl"] == pytest.approx(kl.mean().item(), rel=1e-9)
    assert metrics["clip_fraction"] == pytest.approx(clipped.mean().item())
    torch.testing.assert_close(padded.grad, log_probs.grad)
    assert (padded.grad[~mask] == 0).all()


def test_golden_loss():
    """Defaults, two tokens by hand: a ratio of 1.5 is clipped, one of .5 is not."""
    old = torch.tensor([[0.5, 0.5]]).log()
    log_probs = torch.tensor([[0.75, 0.25]]).log()
    ref = torch.tensor([[0.75, 0.5]]).log()
    loss, metrics = grpo_loss(log_probs, old, ref, torch.ones(1), torch.ones(1, 2))
    kl = (2 - math.log(2) - 1) / 2
    assert loss.item() == pytest.approx(-(1.2 + 0.5) / 2 + 0.01 * kl)
    assert metrics == pytest.approx({"kl": kl, "clip_fraction": 0.5})


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("shift", [100.0, -100.0, math.inf])
def test_extreme_ratios_give_a_finite_loss_and_gradient(shift, advantage):
    """Clipped, times 0, and not clipped; the same distance to the reference."""
    log_probs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    old = log_probs.detach() - torch.tensor([[shift, 0.0]])
    for ref in (None, old):
        advantages = torch.tensor([advantage])
        loss, _ = grpo_loss(log_probs, old, ref, advantages, torch.ones(1, 2), kl_coef=1.0)
        (gradient,) = torch.autograd.grad(loss, log_probs)
        assert loss.isfinite() and gradient.isfinite().all()
        assert gradient[0, 1].item() == pytest.approx(-advantage / 2)


# ---------------------------------------------------------------------------------------- schedule


@pytest.mark.parametrize(
    "updates, warmup, rates",
    [
        (1, 0.03, {0: 1}),
        (2, 0.03, {0: 0.5, 1: 1}),
        (8, 0.03, {0: 0.5, 1: 1, 3: 0.775, 4: 0.55, 7: 0.1}),
        (16, 0, {0: 0.5, 1: 1, 8: 0.55, 15: 0.1}),
        (100, 0.03, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1, 51: 0.55, 99: 0.1}),
        (4, 1, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1}),
    ],
)
def test_learning_rate_of_short_and_long_runs(updates, warmup, rates):
    found = [learning_rate_scale(update, updates, warmup) for update in range(updates)]
    assert {update: found[update] for update in rates} == pytest.approx(rates)
