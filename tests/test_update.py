"""Log-probabilities, attention and updates against slow versions: dense masks, each one alone."""

import copy
import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_loss import slow_cost
from test_rollout import alone
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import observe_r1
from observe_r1 import (
    Config,
    Policy,
    Rollouts,
    encode_prompts,
    minibatches,
    model_inputs,
    pack_group,
    plan_passes,
    response_log_probs,
    token_log_probs,
    update,
    vision_tokens,
)

LENGTHS = [[3, 9, 1, 14], [5, 0, 5, 2], [1, 1, 1, 1], [20, 4, 3, 7], [2, 6, 11, 8]]


def make_rollouts(prompts, lengths, first=7):
    """Responses of random tokens, of these lengths [B,G]; none stands for a picture."""
    lengths = torch.tensor(lengths)
    mask = torch.arange(lengths.max()) < lengths[..., None]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(first, 407, mask.shape, generator=generator)
    return Rollouts(prompts, ids * mask, mask, [])


@pytest.fixture
def rollouts(problems, processor, config):
    """Prompts with no picture, one and two; responses of unequal length, one of them empty."""
    return make_rollouts(encode_prompts(problems, processor, config), LENGTHS)


# ------------------------------------------------------------------------------- log-probabilities


def chosen(logits, ids, temperature):
    return (logits / temperature).log_softmax(-1).gather(-1, ids[:, None])[:, 0]


def slow_log_probs(model, rollouts, config, b):
    """Each response to prompt b alone behind the prompt, a list of G tensors."""
    lengths, prompt = rollouts.mask[b].sum(-1), rollouts.prompts[b]
    ids = [row[:n] for row, n in zip(rollouts.response_ids[b], lengths)]
    return [chosen(alone(model, prompt, x), x, config.temperature) for x in ids]


def dense_log_probs(model, rollouts, config, b):
    """The packed row under a mask that says of each pair of tokens whether one sees the other."""
    mask, ids = rollouts.mask[b], rollouts.response_ids[b][rollouts.mask[b]]
    row, predecessors = pack_group(
        model_inputs(model, rollouts.prompts[b]), *[rollouts.response_ids[b], mask]
    )
    P, L = row["attention_mask"][0], row["input_ids"].shape[1]
    owner = torch.cat([torch.full((P,), -1), mask.nonzero()[:, 0]])  # -1: the prompt
    sees = (owner[:, None] == owner) | (owner == -1)
    row["attention_mask"] = (sees & torch.ones(L, L).tril().bool())[None, None]
    logits = model(**row, use_cache=False).logits[0, predecessors].float()
    logits[:, vision_tokens(model)] = -torch.inf
    return chosen(logits, ids, config.temperature).split(mask.sum(-1).tolist())


def all_log_probs(slow, model, rollouts, config):
    """[B,G,T], by a slow version."""
    groups = [torch.cat(slow(model, rollouts, config, b)) for b in range(len(rollouts.prompts))]
    return torch.zeros(rollouts.mask.shape).masked_scatter(rollouts.mask, torch.cat(groups))


def gradients_of(model, values):
    """Those of a random sum of the values."""
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    (values * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("slow", [slow_log_probs, dense_log_probs])
@pytest.mark.parametrize("temperature, budget", [(1.0, 16384), (0.3, 90), (3.0, 1)])
def test_packed_groups_are_exact(toy_model, model, rollouts, config, slow, temperature, budget):
    """Whole and split groups, with and without checkpointing, equal those of generation."""
    config.temperature, config.token_budget = temperature, budget
    twin = copy.deepcopy(toy_model)
    expected = all_log_probs(slow, twin, rollouts, config)
    if budget == 90:
        model.train().activation_checkpointing_enable({"use_reentrant": False})
    found = response_log_probs(model, rollouts, config)
    # Where a log-probability is -29, fp32 itself is exact to 2e-6.
    torch.testing.assert_close(found, expected, atol=1e-5 / min(1, temperature), rtol=5e-7)
    gradients, exact = gradients_of(model, found), gradients_of(twin, expected)
    for name, gradient in exact.items():  # of the bias of keys it is 0, but for rounding
        error = (gradients[name] - gradient).norm()
        assert error <= 1e-4 * gradient.norm() or gradient.norm() < 1e-4, name


def test_packed_groups_in_bf16(toy_model, model, rollouts, config, monkeypatch):
    """As near to fp32 as a dense mask is."""
    twin = copy.deepcopy(toy_model)
    exact = all_log_probs(slow_log_probs, twin, rollouts, config)
    autocast = torch.autocast("cpu", torch.bfloat16)
    with autocast:
        dense = all_log_probs(dense_log_probs, twin, rollouts, config)
    monkeypatch.setattr(observe_r1, "AUTOCAST", autocast)
    found = response_log_probs(model, rollouts, config)
    assert 0 < (found - exact).norm() < 1.2 * (dense - exact).norm()
    assert all(gradient.isfinite().all() for gradient in gradients_of(model, found).values())


class Sizes(TorchDispatchMode):
    """Counts the tensors that any operation makes with two dimensions of L or more."""

    def __init__(self, L):
        super().__init__()
        self.L, self.large = L, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for x in output if isinstance(output, (tuple, list)) else [output]:
            self.large += isinstance(x, torch.Tensor) and sum(n >= self.L for n in x.shape) > 1
        return output


def test_no_pass_looks_at_all_pairs_of_tokens(toy_model, model, rollouts, config, monkeypatch):
    """No tensor of L x L, forwards or backwards, for a row that is longer than any weight."""

    # The library's own mask, which a CPU makes as well, cannot be made in a dispatch mode.
    def lower_right(q, k):
        return torch.ones(q, k, dtype=torch.bool).tril(k - q)

    monkeypatch.setattr(observe_r1, "causal_lower_right", lower_right)
    rollouts = make_rollouts(rollouts.prompts[:1], [[90] * 4])
    L = rollouts.prompts[0]["input_ids"].shape[1] + 360
    assert L > 407  # tokens of the vocabulary
    with Sizes(L) as sizes:
        response_log_probs(model, rollouts, config).sum().backward()
    assert sizes.large == 0
    with Sizes(L) as sizes:
        dense_log_probs(copy.deepcopy(toy_model), rollouts, config, 0)
    assert sizes.large > 0


def test_chosen_prompts_empty_passes_and_rows_without_pictures(model, rollouts, config):
    """0 for other prompts; the vision tower gets a gradient, of 0, for which FSDP waits."""
    with torch.no_grad():
        whole = response_log_probs(model, rollouts, config)
        some = response_log_probs(model, rollouts, config, prompts=[1, 4])
    torch.testing.assert_close(some[[1, 4]], whole[[1, 4]], atol=1e-5, rtol=1e-6)
    assert some[[0, 2, 3]].abs().sum() == 0
    policy = Policy(model)
    for responses in (([], []), ([3] * 4, [0, 1, 2, 3])):  # no response; no picture
        values = policy(rollouts, responses, 1.0)
        assert values.shape == (len(responses[0]), 20)
        model.zero_grad()
        values.sum().backward()
        vision = [p.grad for p in model.model.visual.parameters() if p.grad is not None]
        assert vision and all((gradient == 0).all() for gradient in vision)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("n", [1, 20, 21, 63])
def test_chunks_of_the_vocabulary_are_exact(n, dtype, tolerance):
    """Against float64, values and gradients; no logits are kept, and those of bf16 not rounded."""
    random = torch.Generator().manual_seed(n)
    hidden, head = (torch.randn(size, 64, generator=random).requires_grad_() for size in (n, 500))
    targets = torch.randint(3, 500, (n,), generator=random)
    kept, rough, words = [], hidden.to(dtype), head.to(dtype)
    with saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        found = token_log_probs(rough, targets, words, [1, 2], 0.7, chunk=20)
    assert n <= 20 or max(kept) <= 64 * n
    logits = rough.double() @ words.double().T  # the largest are 20 to 30
    logits[:, [1, 2]] = -torch.inf
    expected = chosen(logits, targets, 0.7)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-5)
    pair = [torch.autograd.grad(values.sum(), (hidden, head)) for values in (found, expected)]
    torch.testing.assert_close(*pair, atol=tolerance, rtol=tolerance)
    assert token_log_probs(rough[:1], targets[:1], head, targets[:1], 1.0).tolist() == [-math.inf]


@pytest.mark.parametrize("seed", range(50))
def test_plan_passes(seed):
    """Each response once, in order; a group is torn only if no pass holds it whole."""
    random = np.random.default_rng(seed)
    B, G = int(random.integers(1, 5)), int(random.integers(1, 17))
    lengths = np.minimum(random.lognormal(5, 1, (B, G)).astype(int) + 1, 2000)
    sizes = random.integers(1, 1500, B)
    prompts = [{"input_ids": torch.zeros(1, P)} for P in sizes]
    mask = torch.arange(2000) < torch.tensor(lengths)[..., None]
    budget = int(random.integers(1, 8000))
    wanted = random.permutation(B)[: random.integers(0, B + 1)].tolist()
    passes = plan_passes(Rollouts(prompts, mask, mask, []), wanted, Config(token_budget=budget))
    passes = [list(zip(*numbers, strict=True)) for numbers in passes]
    assert [x for one in passes for x in one] == [(b, g) for b in wanted for g in range(G)]

    def tokens(responses):
        return sum(sizes[b] for b in {b for b, _ in responses}) + sum(lengths[x] for x in responses)

    for responses, following in zip(passes, [*passes[1:], None]):
        assert tokens(responses) <= budget or len(responses) == 1
        if following:
            b, g = following[0]
            group = [(b, response) for response in range(G)]
            torn = tokens(group) > budget  # else it begins a pass because the rest is too small
            assert tokens([*responses, *(group if g == 0 else following[:1])]) > budget
            assert g == 0 or torn


def test_a_group_of_just_the_budget_is_one_pass():
    mask, prompts = torch.ones(1, 4, 5, dtype=torch.bool), [{"input_ids": torch.zeros(1, 10)}]
    for budget, passes in ((30, 1), (29, 2)):
        config = Config(token_budget=budget)
        assert len(plan_passes(Rollouts(prompts, mask, mask, []), [0], config)) == passes


# -------------------------------------------------------------------------------- the vision tower


def run_tower(tower, grids):
    """The tower's output for pictures of so many patches."""
    patches = sum(h * w for _, h, w in grids)
    shapes = tower.config
    size = shapes.in_channels * shapes.temporal_patch_size * shapes.patch_size**2
    pixels = torch.randn(patches, size, generator=torch.Generator().manual_seed(0))
    places = {"grid_thw": torch.tensor(grids, device=tower.device)}
    return tower(pixels.to(tower.device), **places).last_hidden_state


def test_windows_at_once_are_those_of_the_library(model):
    """Bit for bit, for pictures with windows of many lengths; gradients to 1e-6."""
    fast = model.model.visual
    plain = copy.deepcopy(fast)
    fast.config._attn_implementation = "flash_windows"
    grids = [[1, 10, 20], [1, 2, 2], [1, 4, 6], [1, 16, 8], [1, 12, 26]]
    outputs = [run_tower(tower, grids) for tower in (plain, fast)]
    assert torch.equal(*outputs)
    gradients = [gradients_of(*pair) for pair in zip((plain, fast), outputs)]
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-6, rtol=1e-6, msg=name)


# ------------------------------------------------------------------------------------------ update


def make_state(model, config, reference=None, optimizer=torch.optim.SGD, num_updates=4):
    """What `update` needs of a run after its first update; plain descent shows the gradient."""
    return SimpleNamespace(
        policy=Policy(model),
        reference=reference and Policy(reference),
        adapters=None,
        optimizer=optimizer(model.parameters(), config.learning_rate),
        num_updates=num_updates,
        updates=1,
        skipped=[],
    )


@pytest.fixture
def advantages():
    """Of five groups, the second of which is skipped, and not the fourth, with a single 0."""
    values = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    values[1] = values[3, 0] = 0
    return values


def test_update_does_not_depend_on_the_token_budget(toy_model, rollouts, config, advantages):
    """Three mini-batches by hand: old policy, reference, skipped group, clipping, all metrics."""
    rollouts.mask[1, 1, 0] = True  # an empty response has no mean
    config = replace(config, kl_coef=0.5, max_grad_norm=3.0, learning_rate=0.04)
    reference, slow = copy.deepcopy(toy_model), copy.deepcopy(toy_model)
    torch.manual_seed(0)
    for p in reference.parameters():
        p.data += 0.01 * torch.randn_like(p)

    trained, numbers = [0, 2, 3, 4], []
    with torch.no_grad():
        old, ref = (
            {b: slow_log_probs(policy, rollouts, config, b) for b in trained}
            for policy in (slow, reference)
        )
    norms = []
    for rate, size, groups in ((0.04, 2, [0]), (0.022, 2, [2, 3]), (0.004, 1, [4])):
        loss = 0
        for b in groups:
            now = slow_log_probs(slow, rollouts, config, b)
            for one in zip(now, old[b], ref[b], advantages[b]):
                cost, *others = slow_cost(*one, config.clip_range, config.kl_coef)
                loss = loss + cost / (4 * size)  # all that were sampled, the skipped group as well
                numbers.append(torch.stack(others).tolist())
        slow.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(slow.parameters(), 3.0)
        torch.optim.SGD(slow.parameters(), rate).step()
        norms.append(norm.item())
    expected = dict(zip(("kl", "clip_fraction"), np.mean(numbers, 0)))
    expected |= {"grad_norm": np.mean(norms), "learning_rate": 0.004, "optimizer_step": 4}
    expected |= {"skipped_updates": 0}
    assert max(norms) > 3 and expected["clip_fraction"] > 0 and len(numbers) == 16

    for budget, passes in ((10**6, 1), (250, 2), (90, 8), (1, 16)):
        config.token_budget = budget
        assert len(plan_passes(rollouts, trained, config)) == passes
        learner = copy.deepcopy(toy_model)
        metrics = update(make_state(learner, config, reference), rollouts, advantages, config)
        assert metrics == pytest.approx(expected, rel=2e-3, abs=1e-5)
        assert learner.training
        for (name, p), other in zip(learner.named_parameters(), slow.parameters()):
            torch.testing.assert_close(p, other, atol=2e-5, rtol=1e-3, msg=name)


def snapshot(state):
    moments = state.optimizer.state_dict()["state"].values()
    moments = [value for moment in moments for value in moment.values()]
    return copy.deepcopy([*state.policy.parameters(), *moments])


@pytest.mark.filterwarnings("error")
def test_what_gives_no_finite_gradient_moves_nothing(model, rollouts, config, advantages):
    """Neither the KL of skipped groups nor momentum; NaN or infinite gradients are counted."""
    state = make_state(model, config, copy.deepcopy(model), torch.optim.AdamW, num_updates=20)
    update(state, rollouts, advantages, config)
    before = snapshot(state)
    metrics = update(state, rollouts, 0 * advantages, config)
    assert metrics["grad_norm"] == 0 and state.updates == 7
    for value in (math.nan, math.inf):
        advantages[0, 0] = value
        metrics = update(state, rollouts, advantages[:2], config)
    assert state.skipped == [7, 10] and metrics["skipped_updates"] == 2
    assert all(torch.equal(*pair) for pair in zip(before, snapshot(state)))
    advantages[0, 0] = 1
    metrics = update(state, rollouts, advantages, replace(config, kl_coef=0.0))
    assert math.isfinite(metrics["grad_norm"]) and math.isnan(metrics["kl"])
    assert not torch.equal(before[0], snapshot(state)[0])


def test_mini_batches_are_of_even_size():
    """For 1 to 200 prompts: as few as fit, in order, and only what is trained is passed on."""
    prompts = [{"input_ids": torch.zeros(1, 5)}] * 200
    for n, most in itertools.product(range(1, 201), (8, 50)):
        mask, trained = torch.ones(n, 2, 3, dtype=torch.bool), range(0, n, 5)
        rollouts = Rollouts(prompts[:n], None, mask, [])
        parts = list(minibatches(rollouts, trained, Config(minibatch_prompts=most)))
        sizes = [size for size, _ in parts]
        assert sum(sizes) == n and max(sizes) - min(sizes) <= 1 and len(parts) == -(-n // most)
        for end, (size, passes) in zip(np.cumsum(sizes), parts):
            own = [b for b in trained if end - size <= b < end]
            assert all(numbers for numbers, _ in passes)  # one process waits for no other
            assert [b for numbers, _ in passes for b in numbers[::2]] == own


def test_the_optimizer_is_that_of_the_paper(model):
    (group,) = observe_r1.make_optimizer(model, Config()).param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-6, (0.9, 0.95), 0)
