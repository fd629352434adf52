"""Advantages, log-probabilities, loss and update against slow, obvious calculations by hand."""

import copy
import doctest
import json
import logging
import math
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import TOY, read_jsonl, run_config, run_python, toy_config, write_parquet
from test_rollout import response_lengths, run_rollout, want_pictures
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers.cache_utils import Cache

import observe_r1
import rewards
from observe_r1 import (
    Config,
    Policy,
    Rollouts,
    TrainState,
    encode_prompts,
    group_advantages,
    grpo_loss,
    load_problems,
    pack_group,
    response_log_probs,
    rollout,
    score_rollouts,
    token_log_probs,
    update,
    vision_tokens,
)

# ------------------------------------------------------------------------- rewards and advantages


def test_doctests():
    result = doctest.testmod(observe_r1)
    assert result.failed == 0 and result.attempted > 0


def test_golden_case_of_the_method():
    """Accuracies, formats and lengths of a golden case, through the code that training runs."""
    accurate, formatted = [1, 1, 0, 0, 0, 0, 1, 0], [1, 1, 1, 1, 0, 0, 0, 0]
    lengths = [300, 200, 150, 120, 400, 500, 600, 700]
    texts = []
    for right, well in zip(accurate, formatted):
        blocks = "<observe>o</observe><think>t</think>" if well else ""
        texts.append(f"{blocks}<answer>{3 if right else 4}</answer>")
    mask = (torch.arange(700) < torch.tensor(lengths)[:, None]).long()[None]
    scores = score_rollouts(Rollouts({}, mask, mask, [texts]), [{"answer": "3"}], Config())
    assert scores["accuracy"][0].tolist() == accurate
    assert scores["format"][0].tolist() == [well / 2 for well in formatted]
    assert scores["bonus"][0].tolist() == pytest.approx([0, 0.2, 0, 0, 0, 0, 0, 0])
    assert scores["weight"].tolist() == [1.6875]
    advantages = group_advantages(scores["reward"], scores["weight"])[0]
    expected = [2.102, 2.596, -0.371, -0.371, -1.607, -1.607, 0.865, -1.607]
    assert advantages.tolist() == pytest.approx(expected, abs=5e-4)


def test_correctness_stands_apart_from_the_other_rewards():
    """A wrong, well formatted response is not correct; without the weight w is 1."""
    texts = ["<observe>o</observe><think>t</think><answer>4</answer>", "<answer>3</answer>"]
    mask = torch.ones(1, 2, 200, dtype=torch.long)
    rollouts, problems = Rollouts({}, mask, mask, [texts]), [{"answer": "3"}]
    scores = score_rollouts(rollouts, problems, Config())
    assert scores["reward"][0].tolist() == pytest.approx([0.5, 1.2])
    assert scores["weight"].tolist() == pytest.approx([1.8])
    plain = score_rollouts(rollouts, problems, Config(dynamic_weight=False))
    assert plain["weight"].tolist() == [1.0]
    assert torch.equal(plain["reward"], scores["reward"])


def test_the_switches_of_the_ablations_reach_the_rewards():
    texts = ["<think>t</think><answer>3</answer>", "<answer>4</answer>"]
    mask = torch.ones(1, 2, 200, dtype=torch.long)
    rollouts, problems = Rollouts({}, mask, mask, [texts]), [{"answer": "3"}]
    for options, reward in (
        ({}, [1.2, 0]),
        ({"observe": False}, [1.7, 0]),
        ({"bonus": 0.0}, [1.0, 0]),
        ({"min_length": 200}, [1.0, 0]),
    ):
        scores = score_rollouts(rollouts, problems, Config(**options))
        assert scores["reward"][0].tolist() == pytest.approx(reward), options
    assert score_rollouts(rollouts, problems, Config(sigma=1.0))["weight"].tolist() == [1.0]


@pytest.mark.parametrize("value", [0.0, 0.1, 0.5, 1.7])
def test_equal_rewards_give_no_advantage(value):
    equal = torch.full((1, 8), value)
    assert group_advantages(equal, torch.ones(1)).abs().max() == 0
    unequal = equal + torch.tensor([0.0] * 7 + [0.2])
    assert group_advantages(unequal, torch.ones(1)).abs().max() > 2


def test_group_advantages_in_float64_by_hand():
    """Two groups with different rewards and weights, so that none can borrow from the other."""
    groups = [[1.7, 1.5, 1.0, 0.5, 0.5, 0.0, 0.0, 1.5], [0.0, 0.5, 0.0, 0.0, 1.5, 0.0, 0.0, 0.0]]
    weights = [1.35, 0.7875]
    expected = []
    for group, weight in zip(groups, weights):
        mean = sum(group) / 8
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / 7)
        expected.append([weight * (r - mean) / (std + 1e-6) for r in group])
    found = group_advantages(torch.tensor(groups), torch.tensor(weights))
    assert found.flatten().tolist() == pytest.approx(np.ravel(expected), rel=1e-5)


# -------------------------------------------------------------------------------------------- loss


def random_batch(N=5, T=7):
    torch.manual_seed(3)
    lengths = torch.tensor([7, 1, 4, 5, 2])[:N]
    mask = (torch.arange(T) < lengths[:, None]).double()
    log_probs, old, ref = (-torch.rand(N, T, dtype=torch.float64) * 2 for _ in range(3))
    return log_probs, old, ref, torch.tensor([1.5, -2.0, 0.3, -0.4, 0.0]).double()[:N], mask


def slow_cost(log_probs, old, ref, advantage, config):
    """Cost, KL and clipped share of one response, token by token, as tensors; inputs [T]."""
    cost = kl_sum = clipped = torch.zeros((), dtype=log_probs.dtype)
    for t in range(len(log_probs)):
        ratio = (log_probs[t] - old[t]).exp()
        bounded = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
        kl = 0 * ratio
        if ref is not None:
            q = ref[t] - log_probs[t]
            kl = q.exp() - q - 1
        cost = cost - torch.minimum(ratio * advantage, bounded * advantage) + config.kl_coef * kl
        kl_sum = kl_sum + kl
        clipped = clipped + (bounded * advantage < ratio * advantage)
    return cost / len(log_probs), kl_sum / len(log_probs), clipped / len(log_probs)


@pytest.mark.parametrize("with_ref", [True, False])
@pytest.mark.parametrize("num_responses", [None, 16])
def test_grpo_loss_equals_the_slow_version(with_ref, num_responses):
    log_probs, old, ref, advantages, mask = random_batch()
    ref = ref if with_ref else None
    loss, metrics = grpo_loss(log_probs, old, ref, advantages, mask, 0.2, 0.05, num_responses)
    config, responses = Config(clip_range=0.2, kl_coef=0.05), []
    for n, length in enumerate(mask.sum(-1).int().tolist()):
        one = [values if values is None else values[n, :length] for values in (log_probs, old, ref)]
        responses.append(slow_cost(*one, advantages[n], config))
    costs, kls, clips = zip(*responses)
    assert loss.item() == pytest.approx(sum(costs).item() / (num_responses or 5), rel=1e-12)
    assert metrics["kl"] == pytest.approx(sum(kls).item() / 5, rel=1e-9)
    assert metrics["clip_fraction"] == pytest.approx(sum(clips).item() / 5, rel=1e-9)
    assert metrics["clip_fraction"] > 0 and (metrics["kl"] > 0) == with_ref


def test_grpo_loss_ignores_padding_and_splits_into_micro_batches():
    log_probs, old, ref, advantages, mask = random_batch()
    whole, metrics = grpo_loss(log_probs, old, ref, advantages, mask, num_responses=8)
    noise = torch.randn(5, 3, dtype=torch.float64)
    padded = [torch.cat([x, noise], 1) for x in (log_probs, old, ref)]
    wide = torch.cat([mask, torch.zeros(5, 3)], 1)
    again, same = grpo_loss(*padded, advantages, wide, num_responses=8)
    assert again.item() == pytest.approx(whole.item(), rel=1e-12)
    assert same == pytest.approx(metrics, rel=1e-12)
    parts = []
    for s in (slice(0, 1), slice(1, 4), slice(4, 5)):
        loss, _ = grpo_loss(log_probs[s], old[s], ref[s], advantages[s], mask[s], num_responses=8)
        parts.append(loss)
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-12)


def test_on_policy_gradient_is_the_policy_gradient():
    """At ratio 1 the loss is -mean(A), its gradient -A grad(log p): token mean, response mean."""
    log_probs, _, _, advantages, mask = random_batch()
    log_probs.requires_grad_()
    grpo_loss(log_probs, log_probs.detach(), None, advantages, mask)[0].backward()
    expected = -advantages[:, None] * mask / mask.sum(-1, keepdim=True) / 5
    torch.testing.assert_close(log_probs.grad, expected.to(log_probs.dtype))


# ------------------------------------------------------------------------------- log-probabilities


def slow_log_probs(model, processor, problems, rollouts, config):
    """Each response alone behind its own prompt, with the model's own positions and full logits."""
    result = torch.zeros(rollouts.mask.shape)
    for b, problem in enumerate(problems):
        prompt = encode_prompts([problem], processor, config)
        pictures = {k: prompt[k] for k in ("pixel_values", "image_grid_thw") if k in prompt}
        for g, length in enumerate(response_lengths(rollouts)[b].tolist()):
            ids = rollouts.response_ids[b, g, :length]
            both = torch.cat([prompt["input_ids"][0], ids])[None]
            output = model(
                input_ids=both,
                attention_mask=torch.ones_like(both),
                mm_token_type_ids=torch.nn.functional.pad(prompt["mm_token_type_ids"], (0, length)),
                use_cache=False,
                **pictures,
            )
            logits = output.logits[0, -length - 1 : -1] / config.temperature
            logits[:, vision_tokens(model)] = -torch.inf
            result[b, g, :length] = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    return result


def test_log_probs_equal_those_of_generation(model, processor, problems, config, monkeypatch):
    """The policy that trains is the one that sampled: left padding, mixed, missing pictures."""
    config.temperature = 0.7
    drawn, multinomial, select = [], torch.multinomial, Cache.batch_select_indices
    alive = torch.arange(5 * config.num_generations)  # the response in each row of the batch

    def record(probabilities, count):
        token = multinomial(probabilities, count)
        drawn.append((alive, probabilities.gather(-1, token).log()[:, 0]))
        return token

    def shrink(cache, indices):
        nonlocal alive
        alive = alive[indices]
        return select(cache, indices)

    monkeypatch.setattr(torch, "multinomial", record)
    monkeypatch.setattr(Cache, "batch_select_indices", shrink)
    rollouts = run_rollout(model, processor, problems, config)
    sampled = torch.zeros(rollouts.mask.shape).flatten(0, 1)  # longest prompt first, as in a chunk
    for t, (responses, values) in enumerate(drawn):
        sampled[responses, t] = values
    prompt_lengths = rollouts.prompt["attention_mask"].sum(-1).tolist()
    order = sorted(range(5), key=lambda b: -prompt_lengths[b])
    found = response_log_probs(model, rollouts, config)
    assert len(set(prompt_lengths)) > 2 and len(alive) < 20
    expected = torch.zeros_like(found)
    expected[order] = sampled.view(found.shape)
    torch.testing.assert_close(found, expected * rollouts.mask, atol=1e-4, rtol=0)


def test_log_probs_and_gradients_equal_the_slow_version(model, processor, problems, config):
    """Packing a prompt once with its G responses is exact, values and gradients."""
    config.temperature = 0.8
    rollouts = run_rollout(model, processor, problems, config)
    found = response_log_probs(Policy(model), rollouts, config)
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    slow = slow_log_probs(model, processor, problems, rollouts, config)
    (slow * weights).sum().backward()
    torch.testing.assert_close(found, slow, atol=2e-5, rtol=0)
    assert (found[rollouts.mask == 0] == 0).all()
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, atol=2e-4, rtol=1e-3, msg=name)


def test_log_probs_of_chosen_prompts(model, processor, problems, config):
    rollouts = run_rollout(model, processor, problems, config)
    with torch.no_grad():
        whole = response_log_probs(model, rollouts, config)
        some = response_log_probs(model, rollouts, config, prompts=[1, 4])
    assert torch.equal(some[[1, 4]], whole[[1, 4]])
    assert some[[0, 2, 3]].abs().sum() == 0


def test_a_packed_group_holds_its_prompt_once():
    """1,024 + 8 x 256 tokens, and which of them each sees, counted one by one at a small size."""
    for P, G, T in ((1024, 8, 256), (3, 2, 2)):
        inputs = {"input_ids": torch.zeros(1, P, dtype=int)}
        inputs["position_ids"] = torch.arange(P).expand(3, 1, P)
        ids = torch.ones(G, T, dtype=int)
        row, predecessors = pack_group(inputs, ids, ids)
        assert row["input_ids"].shape == (1, P + G * T)
    seen = ["1......", "11.....", "111....", "1111...", "11111..", "111..1.", "111..11"]
    visible = row["attention_mask"][0, 0]
    assert ["".join(".1"[v] for v in line) for line in visible.int().tolist()] == seen
    assert row["position_ids"][0, 0].tolist() == [0, 1, 2, 3, 4, 3, 4]
    assert predecessors.tolist() == [2, 3, 2, 5]


def test_a_packed_group_holds_no_padding():
    """Responses of 2 and 1 tokens in a matrix of 3 columns."""
    inputs = {"input_ids": torch.tensor([[7, 8]]), "position_ids": torch.arange(2).expand(3, 1, 2)}
    ids, mask = torch.tensor([[1, 2, 9], [3, 9, 9]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    row, predecessors = pack_group(inputs, ids, mask)
    assert row["input_ids"].tolist() == [[7, 8, 1, 2, 3]]
    assert row["position_ids"][2, 0].tolist() == [0, 1, 2, 3, 2]
    assert predecessors.tolist() == [1, 2, 1]


def test_gradient_checkpointing_changes_nothing(model, processor, problems, config):
    """Neither the values nor the gradients."""
    rollouts = run_rollout(model, processor, problems, config)
    model.train()
    results = []
    for _ in range(2):
        log_probs = response_log_probs(model, rollouts, config)
        log_probs.sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        results.append((log_probs.detach(), gradients))
        model.zero_grad()
        model.activation_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(*results)


def test_chunks_of_the_vocabulary_are_exact():
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False).double()
    hidden = torch.randn(23, 8, requires_grad=True, dtype=torch.float64)
    targets = torch.arange(23) + 5
    logits = head(hidden).float() / 0.5
    logits[:, [1, 2]] = -torch.inf
    expected = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    for chunk in (4, 512):
        found = token_log_probs(hidden, targets, head, [1, 2], 0.5, chunk=chunk)
        torch.testing.assert_close(found, expected)
        for inputs in (hidden, head.weight):
            pair = [
                torch.autograd.grad(x.sum(), inputs, retain_graph=True)[0]
                for x in (found, expected)
            ]
            torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5)  # logits are fp32


def test_banned_tokens_have_no_probability(model, processor, problems, config):
    """Neither as a target nor in the sum over the vocabulary."""
    head = torch.nn.Linear(8, 50, bias=False)
    log_probs = token_log_probs(torch.randn(3, 8), torch.tensor([1, 2, 3]), head, [1, 2], 1.0)
    assert log_probs[:2].tolist() == [-math.inf, -math.inf] and log_probs[2].isfinite()
    rollouts = run_rollout(model, processor, problems, config)
    plain = response_log_probs(model, rollouts, config)
    want_pictures(model)
    torch.testing.assert_close(response_log_probs(model, rollouts, config), plain)


PEAK = """
import re, sys, torch
sys.path[:0] = [sys.argv[1]]
from observe_r1 import token_log_probs

def high_water():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

head = torch.nn.Linear(8, 50_000, bias=False)
head(torch.ones(64, 8)).sum().backward()
before = high_water()
for tokens in (1024, 1536):
    hidden, targets = torch.randn(tokens, 8, requires_grad=True), torch.randint(50_000, (tokens,))
    token_log_probs(hidden, targets, head, [], 1.0).sum().backward()
    print(high_water() - before)
"""


def test_log_probabilities_take_little_memory(tmp_path):
    """At most 15 % of full fp32 logits at G = 8, T = 2,048; three chunks take what two take."""
    (tmp_path / "peak.py").write_text(PEAK)
    result = run_python("peak.py", TOY.parent, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    two, three = map(int, result.stdout.split())
    assert 512 * 50_000 * 4 < two <= three < 0.15 * 8 * 2048 * 50_000 * 4
    assert three < 1.15 * two


def test_a_group_without_pictures_gives_the_vision_tower_a_gradient_of_zero(
    model, processor, problems, config
):
    """With several processes FSDP waits for it; and one process must compute the same."""
    rollouts = run_rollout(model, processor, problems[3:4], config)
    response_log_probs(model, rollouts, config).sum().backward()
    for name, p in model.model.visual.named_parameters():
        assert p.grad is None or p.grad.abs().max() == 0, name
    assert any(p.grad is not None for p in model.model.visual.parameters())


# ------------------------------------------------------------------------------------------ update


def make_state(model, reference=None, rate=1e-3, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), rate, weight_decay=0)
    return TrainState(
        policy=Policy(model),
        reference=reference and Policy(reference),
        adapters=None,
        processor=None,
        problems=None,
        held_out=None,
        steps=[],
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
    )


def plain_descent(model, rate):
    """Weights that move by the gradient itself, so that a step shows it."""
    return torch.optim.SGD(model.parameters(), rate)


def moved_away(model, amount=0.01):
    torch.manual_seed(9)
    moved = copy.deepcopy(model)
    for p in moved.parameters():
        p.data += amount * torch.randn_like(p)
    return moved


def test_an_update_equals_the_slow_version(model, processor, problems, config):
    """Three mini-batches by hand: old policy, reference, skipped group, clipping, all metrics."""
    config = replace(config, kl_coef=0.5, max_grad_norm=3.0, max_new_tokens=24)
    rate, reference = 0.02, moved_away(model)
    rollouts = run_rollout(model, processor, problems, config)
    advantages = torch.randn(5, 4)
    advantages[1] = 0
    slow, lengths = copy.deepcopy(model), response_lengths(rollouts)

    with torch.no_grad():
        old = slow_log_probs(slow, processor, problems, rollouts, config)
        ref = slow_log_probs(reference, processor, problems, rollouts, config)
    losses, norms, kls, clips = [], [], [], []
    for groups in ([0, 1], [2, 3], [4]):
        now = slow_log_probs(slow, processor, problems, rollouts, config)
        total = 0
        for b in groups:
            for g in range(4) if b != 1 else ():
                one = [x[b, g, : lengths[b, g]] for x in (now, old, ref)]
                cost, kl, clip = slow_cost(*one, advantages[b, g], config)
                total = total + cost
                kls.append(kl.item())
                clips.append(clip.item())
        loss = total / (4 * len(groups))  # all that were sampled, the skipped group as well
        slow.zero_grad()
        loss.backward()
        norm = sum(p.grad.square().sum() for p in slow.parameters() if p.grad is not None).sqrt()
        for p in slow.parameters():
            p.data -= rate * min(1, 3.0 / norm) * p.grad
        losses.append(loss.item())
        norms.append(norm.item())

    state = make_state(model, reference, optimizer=plain_descent(model, rate))
    metrics = update(state, rollouts, advantages, config)
    assert max(norms) > 3.0 and max(clips) > 0 and len(kls) == 16
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=2e-3, abs=1e-5)
    assert metrics["kl"] == pytest.approx(np.mean(kls), rel=2e-3)
    assert metrics["clip_fraction"] == pytest.approx(np.mean(clips), abs=2e-3)
    assert metrics["grad_norm"] == pytest.approx(np.mean(norms), rel=2e-3)
    assert metrics["learning_rate"] == rate and metrics["optimizer_step"] == 3
    assert metrics["skipped_updates"] == 0
    for (name, p), expected in zip(model.named_parameters(), slow.parameters()):
        torch.testing.assert_close(p, expected, atol=2e-5, rtol=1e-3, msg=name)


def test_update_does_not_depend_on_the_token_budget(model, processor, problems, config):
    """One pass a group, or one a response: the same gradient, so the same weights, metrics."""
    rollouts = run_rollout(model, processor, problems, config)
    advantages = torch.randn(5, 4)
    advantages[1] = 0
    P, T = rollouts.prompt["attention_mask"].sum(1), rollouts.mask.sum(2).amax(1)  # of each group
    middle = int((P + 3 * T).min())
    expected = 0  # passes at the middle budget: four responses, as many at a time as fit
    for b in (0, 2, 3, 4):
        fit = [n for n in (1, 2, 3, 4) if P[b] + n * T[b] <= middle]
        expected += math.ceil(4 / max(fit, default=1))
    assert 4 < expected < 16
    results = []
    for budget, passes in ((10**6, 4), (middle, expected), (1, 16)):
        config.token_budget = budget
        assert len(observe_r1.plan_passes(rollouts, [0, 2, 3, 4], config)) == passes
        learner = copy.deepcopy(model)
        state = make_state(learner, moved_away(model), optimizer=plain_descent(learner, 0.01))
        results.append((update(state, rollouts, advantages, config), learner.state_dict()))
    for metrics, weights in results[1:]:
        assert metrics == pytest.approx(results[0][0], rel=1e-3, abs=1e-6)
        for name, value in weights.items():
            torch.testing.assert_close(value, results[0][1][name], atol=1e-5, rtol=1e-4, msg=name)


def test_skipped_groups_count_in_the_denominator(model, processor, problems, config):
    """The first gradient is that of the loss over all sampled responses, by hand."""
    rollouts = run_rollout(model, processor, problems[:2], config)
    advantages = torch.tensor([[1.0, -1.0, 0.5, -0.5], [0.0, 0.0, 0.0, 0.0]])
    expected = copy.deepcopy(model)
    log_probs = slow_log_probs(expected, processor, problems[:2], rollouts, config)
    mask = rollouts.mask
    per_response = (advantages[..., None] * log_probs * mask).sum(-1) / mask.sum(-1)
    (-per_response.sum() / 8).backward()
    config.max_grad_norm, config.kl_coef, before = 1e9, 0.0, copy.deepcopy(model.state_dict())
    update(
        make_state(model, optimizer=plain_descent(model, 1.0)),
        rollouts,
        advantages,
        config,
    )
    for name, p in expected.named_parameters():
        change = before[name] - model.state_dict()[name]
        torch.testing.assert_close(change, p.grad, atol=2e-4, rtol=1e-3, msg=name)


def test_groups_without_advantage_move_nothing(model, processor, problems, config):
    """Not by the KL and not by the momentum of an earlier step."""
    rollouts = run_rollout(model, processor, problems, config)
    state = make_state(model, moved_away(model))
    update(state, rollouts, torch.randn(5, 4), config)
    before, steps = copy.deepcopy(model.state_dict()), state.optimizer_step
    moments = copy.deepcopy(state.optimizer.state_dict())
    metrics = update(state, rollouts, torch.zeros(5, 4), config)
    assert steps == 3
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for index, moment in state.optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, moments["state"][index][k]) for k, value in moment.items())
    assert state.optimizer_step == steps and metrics["grad_norm"] == 0


def test_several_optimiser_steps_clip_against_the_policy_that_sampled(
    model, processor, problems, config
):
    """Six times the same group: after the first mini-batch the ratio leaves 1, and is clipped."""
    config = replace(config, minibatch_prompts=1, kl_coef=0.0)
    rollouts = run_rollout(model, processor, [problems[0]] * 6, config)
    state = make_state(model, rate=3e-3)
    metrics = update(state, rollouts, torch.tensor([[1.0, -1.0, 0.5, -0.5]] * 6), config)
    assert metrics["clip_fraction"] > 0 and metrics["kl"] == 0
    one_step = make_state(model, rate=3e-3)
    config.minibatch_prompts = 6  # one optimiser step: the policy that learns has just sampled
    metrics = update(one_step, rollouts, torch.tensor([[1.0, -1.0, 0.5, -0.5]] * 6), config)
    assert metrics["clip_fraction"] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_with_bad_gradients_is_left_out(model, processor, problems, config, value):
    """Weights and moments stay; the next good update counts from 0 again."""
    rollouts = run_rollout(model, processor, problems[:2], config)
    config.kl_coef, advantages = 0.0, torch.randn(2, 4)
    state = make_state(model)
    update(state, rollouts, advantages, config)
    before = copy.deepcopy(model.state_dict())
    moments = copy.deepcopy(state.optimizer.state_dict()["state"])
    for count in (1, 2):
        metrics = update(state, rollouts, advantages * value, config)
        assert metrics["skipped_updates"] == state.skipped_updates == count
        assert not math.isfinite(metrics["grad_norm"])
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    for index, moment in state.optimizer.state_dict()["state"].items():
        assert all(torch.equal(tensor, moments[index][k]) for k, tensor in moment.items())
    metrics = update(state, rollouts, advantages, config)
    assert metrics["skipped_updates"] == 0 and metrics["optimizer_step"] == 2
    assert all(weight.isfinite().all() for weight in model.state_dict().values())


# ---------------------------------------------------------------------------------------- training


class Warnings(logging.Handler):
    """Keeps what a logger says from warnings on."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three steps in the toy's own configuration, with everything recorded that was sampled."""
    folder = tmp_path_factory.mktemp("run")
    rows = load_problems(str(TOY / "heldout.parquet")).select(range(7, 192, 16))
    rows = rows.select_columns(["id", "images", "question", "answer"]).to_list()
    held_out = write_parquet(folder / "held_out.parquet", rows)
    config = toy_config(
        max_steps=3,
        num_generations=8,
        minibatch_prompts=8,
        max_new_tokens=128,
        eval_data=held_out,
        num_samples=0,
        eval_steps=2,
        output_dir=str(folder / "out"),
    )
    assert (config.prompts_per_step, config.learning_rate) == (16, 1e-4)
    calls, rates, said = [], [], Warnings()

    def recorded(model, processor, problems, config):
        rollouts = rollout(model, processor, problems, config)
        how = (config.temperature, config.num_generations)
        calls.append(SimpleNamespace(problems=problems, rollouts=rollouts, how=how))
        return rollouts

    scale_and_step = observe_r1.scale_and_step

    def stepped(state, config):
        rates.append(state.optimizer.param_groups[0]["lr"])
        return scale_and_step(state, config)

    transformers.utils.logging.get_logger().warning_once.cache_clear()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", ResourceWarning)
        patch.setattr(observe_r1, "scale_and_step", stepped)
        for name in ("transformers", "torch"):
            logging.getLogger(name).addHandler(said)
        summary = observe_r1.train(config, recorded)
        for name in ("transformers", "torch"):
            logging.getLogger(name).removeHandler(said)
    output = folder / "out"
    return SimpleNamespace(
        config=config,
        output=output,
        summary=summary,
        metrics=read_jsonl(output / "metrics.jsonl"),
        logged=read_jsonl(output / "rollouts.jsonl"),
        training=[call for call in calls if call.how[1] == 8],
        evaluations=[call for call in calls if call.how[1] != 8],
        calls=calls,
        rates=rates,
        warnings=[str(warning.message) for warning in caught] + said.messages,
    )


def scored_by_hand(call, config):
    """Each group of a rollout: dictionaries of the numbers of its responses, and its weight."""
    groups = []
    for problem, texts, mask in zip(call.problems, call.rollouts.texts, call.rollouts.mask):
        responses = []
        for text, length in zip(texts, mask.sum(-1).tolist()):
            accuracy = rewards.accuracy_reward(text, problem["answer"])
            well = rewards.format_reward(text)
            responses.append({"accuracy": accuracy, "format": well, "bonus": 0.0, "length": length})
        right = [one for one in responses if one["accuracy"]]
        if right:
            shortest = min(right, key=lambda one: one["length"])
            shortest["bonus"] = 0.2 if shortest["length"] > config.min_length else 0.0
        for one in responses:
            one["reward"] = one["accuracy"] + one["format"] + one["bonus"]
        share = len(right) / len(responses)
        groups.append((responses, 4 * 1.8 * share * (1 - share)))
    return groups


def test_metrics_are_those_of_the_rollouts(run):
    """Every field that comes from the responses, computed again from their texts and lengths."""
    assert len(run.metrics) == len(run.training) == 3
    lines = zip(run.metrics, run.training)
    for step, (line, call) in enumerate(lines, start=1):
        groups = scored_by_hand(call, run.config)
        responses = [one for group, _ in groups for one in group]
        assert len(responses) == 16 * 8
        expected = {}
        for name in ("reward", "accuracy", "format", "bonus"):
            expected[name] = np.mean([one[name] for one in responses])
        expected["response_length"] = np.mean([one["length"] for one in responses])
        expected["truncated_fraction"] = np.mean([one["length"] == 128 for one in responses])
        expected["weight"] = np.mean([weight for _, weight in groups])
        expected["zero_weight_fraction"] = np.mean([weight == 0 for _, weight in groups])
        expected["skipped_fraction"] = expected["zero_weight_fraction"]
        expected["difficulty"] = np.mean([problem["difficulty"] for problem in call.problems])
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=1e-6), name
        assert line["step"] == step and line["total_steps"] == 3
        assert line["seconds"] > 0 and line["skipped_updates"] == 0
        assert line["grad_norm"] > 0 and math.isfinite(line["loss"])
        assert line["optimizer_step"] == 2 * step
    spread = [line["accuracy"] for line in run.metrics]
    assert 0 < min(spread) < max(spread) < 1
    assert any(line["zero_weight_fraction"] > 0 for line in run.metrics)
    assert run.metrics[-1]["difficulty"] > run.metrics[0]["difficulty"]


def test_logged_rollouts_are_those_that_were_scored(run):
    """Two groups a step, those that teach most, with every number of each response."""
    logged = [row for row in run.logged if not row.get("held_out")]
    assert [row["step"] for row in logged] == [1, 1, 2, 2, 3, 3]
    for row in logged:
        call = run.training[row["step"] - 1]
        groups = scored_by_hand(call, run.config)
        b = [problem["id"] for problem in call.problems].index(row["id"])
        responses, weight = groups[b]
        assert row["weight"] == pytest.approx(weight)
        assert sum(other > weight + 1e-6 for _, other in groups) < 2
        assert [one["text"] for one in row["responses"]] == call.rollouts.texts[b]
        gains = np.array([one["reward"] for one in responses])
        advantages = weight * (gains - gains.mean()) / (gains.std(ddof=1) + 1e-6)
        for one, expected, advantage in zip(row["responses"], responses, advantages):
            for name, value in expected.items():
                assert one[name] == pytest.approx(value), name
            assert one["advantage"] == pytest.approx(advantage, abs=1e-4)
        assert row["answer"] == call.problems[b]["answer"] and len(row["pictures"]) == 1


def test_clipping_and_kl_begin_with_the_second_optimiser_step(run):
    """The toy takes two a rollout: a share of tokens is clipped, and the KL grows from 0."""
    assert [line["optimizer_step"] for line in run.metrics] == [2, 4, 6]
    assert all(0 < line["clip_fraction"] < 0.5 for line in run.metrics[:2])
    assert all(0 < line["kl"] < 1 for line in run.metrics)


def test_the_learning_rate_by_hand(run):
    """One step of warm-up out of six, then half a cosine down to a tenth; never 0."""
    expected = [1e-4]
    for k in range(1, 6):
        falling = (1 + math.cos(math.pi * k / 5)) / 2
        expected.append(1e-4 * (0.1 + 0.9 * falling))
    assert run.rates == pytest.approx(expected)
    assert [line["learning_rate"] for line in run.metrics] == pytest.approx(expected[1::2])
    assert expected[-1] == pytest.approx(1e-5)


def test_held_out_problems_are_measured_greedily(run):
    """With num_samples 0: before, every second step, and after; always the same problems."""
    assert [call.how for call in run.evaluations] == [(0.0, 1)] * 3
    kinds = ["held out" if call.how[1] == 1 else "step" for call in run.calls]
    assert kinds == ["held out", "step", "step", "held out", "step", "held out"]
    measured = []
    for call in run.evaluations:
        assert len(call.problems) == 12
        groups = scored_by_hand(call, run.config)
        measured.append(np.mean([group[0]["accuracy"] for group, _ in groups]))
    assert [line.get("eval_accuracy") for line in run.metrics] == [
        None,
        pytest.approx(measured[1]),
        None,
    ]
    assert 0 < measured[0] < 1
    assert run.summary["accuracy_before"] == round(measured[0], 4)
    assert run.summary["accuracy_after"] == round(measured[2], 4)
    groups = scored_by_hand(run.evaluations[2], run.config)
    lengths = [group[0]["length"] for group, _ in groups]
    assert run.summary["response_length_after"] == round(np.mean(lengths), 4)
    formats = [group[0]["format"] for group, _ in groups]
    assert run.summary["format_after"] == round(np.mean(formats), 4)
    assert json.loads((run.output / "summary.json").read_text()) == run.summary


def test_a_run_causes_no_warning(run):
    assert run.warnings == []


def test_the_toy_s_problems_are_read_in_the_order_of_the_ladder(run):
    order = [problem["id"] for call in run.training for problem in call.problems]
    ids = load_problems(str(TOY / "ladder.parquet"))["id"][:]
    assert order == [ids[int((k + 0.5) * 960 / 48)] for k in range(48)]


@pytest.mark.parametrize("ratio, warming", [(0.5, 6), (0.0, 0)])
def test_warm_up_and_fall_of_the_learning_rate(few, tmp_path, ratio, warming):
    """Twelve optimiser steps; the first rate is not 0, the last is a tenth of the highest."""
    config = run_config(few, tmp_path, warmup_ratio=ratio, learning_rate=2e-3)
    state = observe_r1.prepare(config, tmp_path, rollout)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a mini-batch that is skipped moves the schedule on as well
        for _ in range(12):
            rates += state.scheduler.get_last_lr()
            state.scheduler.step()
    falling = 12 - warming
    expected = [2e-3 * (k + 1) / warming for k in range(warming)]
    for k in range(1, falling + 1):
        expected.append(2e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * k / falling)) / 2))
    assert rates == pytest.approx(expected)
    assert rates[0] > 0 and rates[-1] == pytest.approx(2e-4)


@pytest.mark.parametrize("dynamic_weight", [True, False])
def test_groups_of_weight_zero_and_groups_without_update(tmp_path, dynamic_weight):
    """Equal rewards are no update whatever the weight; all right but of unequal format is one."""
    well = "<observe>o</observe><think>t</think><answer>3</answer>"
    texts = [[well, "<answer>3</answer>"], [well, well], ["4", "5"], [well, "4"]]
    mask = torch.ones(4, 2, 5, dtype=torch.long)
    rollouts = Rollouts({}, mask, mask, texts)
    problem = {"id": "a", "question": "q", "answer": "3", "difficulty": 0.5, "images": []}
    config = Config(dynamic_weight=dynamic_weight, max_new_tokens=5, output_dir=str(tmp_path))
    scores = score_rollouts(rollouts, [problem] * 4, config)
    scores["advantage"] = group_advantages(scores["reward"], scores["weight"])
    scores["advantage"][3, 0] = 0  # a single one of 0 does not make its group skipped
    state = SimpleNamespace(step=1, steps=[0], skipped_updates=0)
    progress = SimpleNamespace(write=lambda text: None)
    made = {"clip_fraction": 0.0, "kl": 0.0}
    observe_r1.log_step(progress, tmp_path, state, [problem] * 4, rollouts, scores, made, config)
    (line,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert line["zero_weight_fraction"] == (0.75 if dynamic_weight else 0)
    assert line["skipped_fraction"] == (0.75 if dynamic_weight else 0.5)
    assert line["format"] == pytest.approx(0.5 * 4 / 8)
    assert line["truncated_fraction"] == 1


def test_three_bad_updates_in_a_row_end_a_run(few, tmp_path, monkeypatch):
    calls = []

    def poisoned(*arguments, **options):
        calls.append(0)
        loss, metrics = grpo_loss(*arguments, **options)
        return loss * (math.nan if len(calls) > 4 else 1), metrics

    monkeypatch.setattr(observe_r1, "grpo_loss", poisoned)
    with pytest.raises(ValueError, match="three updates in a row"):
        observe_r1.train(run_config(few, tmp_path / "run", save_steps=1, minibatch_prompts=4))
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [line["skipped_updates"] for line in lines][-3:] == [1, 2, 3]
    shown = [row["step"] for row in read_jsonl(tmp_path / "run" / "rollouts.jsonl")]
    assert shown.count(lines[-1]["step"]) == 4  # the whole batch
    saved = []
    for step in (lines[-1]["step"] - 1, lines[-1]["step"] - 2):
        dcp_to_torch_save(tmp_path / "run" / f"checkpoint-{step}", tmp_path / "weights.pt")
        saved.append(torch.load(tmp_path / "weights.pt", weights_only=False))
    for name, value in saved[0]["model"].items():
        assert torch.equal(value, saved[1]["model"][name]) and value.isfinite().all(), name
