"""Tests of observe_r1.py against slow, obvious calculations; all of them offline and on a CPU."""

import ast
import copy
import doctest
import importlib.util
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import numpy as np
import pytest
import torch
from datasets import Dataset, Image as Image_, load_dataset
from PIL import Image
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration
from transformers.cache_utils import DynamicLayer
from transformers.trainer_utils import sort_checkpoints

import observe_r1
import plumbing
from observe_r1 import (
    PROMPTS,
    STAGES,
    Config,
    Rollouts,
    encode_prompts,
    group_advantages,
    grpo_loss,
    load_problems,
    mix_ladder,
    pack_group,
    parse_arguments,
    prompt_check,
    response_log_probs,
    rollout,
    score_rollouts,
    select_problems,
    slice_prompts,
    token_log_probs,
    training_order,
    update,
    vision_tokens,
)
from report import rollout_row, write_report
from rewards import accuracy_reward, extract_answer
from test_rewards import readme_block

HERE = Path(__file__).parent
TOY = HERE / "toy"


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(TOY / "model")


@pytest.fixture(scope="module")
def toy_model():
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(TOY / "model", dtype=torch.float32)


@pytest.fixture
def model(toy_model):
    return copy.deepcopy(toy_model)


def sampling():
    return Config(
        num_generations=4,
        max_new_tokens=48,
        min_pixels=784,
        max_pixels=50176,
        gradient_checkpointing=False,
        min_length=20,
        minibatch_prompts=2,
    )


@pytest.fixture
def config():
    return sampling()


def make_problems():
    """One, three and two digits, a question without a picture and one with two."""
    rows = list(load_problems(str(TOY / "heldout.parquet")).select([0, 2, 1]))
    strip, tall = rows[0]["images"][0], Image.linear_gradient("L").resize((84, 56))
    rows.append({"id": "text", "images": [], "question": "What is 3+4?", "answer": "7"})
    # A picture of several rows takes fewer rope positions than tokens: 6 tokens, 3 positions.
    rows.append(
        {"id": "two", "images": [strip, tall], "question": "What is the sum?", "answer": "9"}
    )
    return rows


@pytest.fixture
def problems():
    return make_problems()


def run_rollout(model, processor, problems, config, seed=0):
    torch.manual_seed(seed)
    return rollout(model, processor, problems, config)


def slow_log_probs(model, processor, problems, rollouts, config):
    """Each response alone behind its own prompt, with the model's own positions and full logits."""
    result = torch.zeros(rollouts.mask.shape)
    for b, problem in enumerate(problems):
        prompt = encode_prompts([problem], processor, config)
        pictures = {k: prompt[k] for k in ("pixel_values", "image_grid_thw") if k in prompt}
        for g in range(rollouts.mask.shape[1]):
            ids = rollouts.response_ids[b, g, : int(rollouts.mask[b, g].sum())]
            both = torch.cat([prompt["input_ids"][0], ids])[None]
            types = torch.nn.functional.pad(prompt["mm_token_type_ids"], (0, len(ids)))
            logits = (
                model(
                    input_ids=both,
                    attention_mask=torch.ones_like(both),
                    mm_token_type_ids=types,
                    **pictures,
                    use_cache=False,
                ).logits[0, -len(ids) - 1 : -1]
                / config.temperature
            )
            logits[:, vision_tokens(model)] = -torch.inf
            result[b, g, : len(ids)] = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    return result


# ----------------------------------------------------------------------- rewards and advantages


def test_doctests():
    assert doctest.testmod(observe_r1).failed == 0


def test_golden_case_of_the_method():
    """Accuracies, formats and lengths of a golden case, through the code that training runs."""
    accurate, formatted = [1, 1, 0, 0, 0, 0, 1, 0], [1, 1, 1, 1, 0, 0, 0, 0]
    lengths = [300, 200, 150, 120, 400, 500, 600, 700]
    texts = [
        ("<observe>o</observe><think>t</think>" if f else "") + f"<answer>{3 if a else 4}</answer>"
        for a, f in zip(accurate, formatted)
    ]
    mask = (torch.arange(700) < torch.tensor(lengths)[:, None]).long()[None]
    scores = score_rollouts(Rollouts({}, mask, mask, [texts]), [{"answer": "3"}], Config())
    assert scores["accuracy"][0].tolist() == accurate
    assert scores["format"][0].tolist() == [f / 2 for f in formatted]
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
    assert score_rollouts(rollouts, problems, Config(dynamic_weight=False))["weight"].tolist() == [
        1.0
    ]


@pytest.mark.parametrize("value", [0.0, 0.1, 0.5, 1.7])
def test_equal_rewards_give_no_advantage(value):
    rewards = torch.full((1, 8), value)
    assert group_advantages(rewards, torch.ones(1)).abs().max() == 0
    assert (
        group_advantages(rewards + torch.tensor([0.0] * 7 + [0.2]), torch.ones(1)).abs().max() > 2
    )


def test_group_advantages_in_float64_by_hand():
    rewards = [1.7, 1.5, 1.0, 0.5, 0.5, 0.0, 0.0, 1.5]
    mean = sum(rewards) / 8
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 7)
    expected = [1.35 * (r - mean) / (std + 1e-6) for r in rewards]
    found = group_advantages(torch.tensor([rewards]), torch.tensor([1.35]))
    assert found[0].tolist() == pytest.approx(expected, rel=1e-5)


# --------------------------------------------------------------------------------------- loss


def random_batch(N=5, T=7):
    torch.manual_seed(3)
    lengths = torch.tensor([7, 1, 4, 5, 2])[:N]
    mask = (torch.arange(T) < lengths[:, None]).double()
    log_probs, old, ref = (-torch.rand(N, T, dtype=torch.float64) * 2 for _ in range(3))
    return log_probs, old, ref, torch.tensor([1.5, -2.0, 0.3, -0.4, 0.0]).double()[:N], mask


def slow_loss(log_probs, old, ref, advantages, mask, clip_range, kl_coef, num_responses):
    total, kls, clips = 0.0, [], []
    for n in range(len(mask)):
        tokens = [t for t in range(mask.shape[1]) if mask[n, t] == 1]
        cost = kl_mean = clipped = 0.0
        for t in tokens:
            A, ratio = advantages[n].item(), math.exp(log_probs[n, t] - old[n, t])
            bounded = min(max(ratio, 1 - clip_range), 1 + clip_range)
            kl = 0.0
            if ref is not None:
                q = (ref[n, t] - log_probs[n, t]).item()
                kl = math.exp(q) - q - 1
            cost += -min(ratio * A, bounded * A) + kl_coef * kl
            kl_mean += kl / len(tokens)
            clipped += (bounded * A < ratio * A) / len(tokens)
        total += cost / len(tokens)
        kls.append(kl_mean)
        clips.append(clipped)
    return total / num_responses, sum(kls) / len(kls), sum(clips) / len(clips)


@pytest.mark.parametrize("with_ref", [True, False])
@pytest.mark.parametrize("num_responses", [None, 16])
def test_grpo_loss_equals_the_slow_version(with_ref, num_responses):
    log_probs, old, ref, advantages, mask = random_batch()
    ref = ref if with_ref else None
    loss, metrics = grpo_loss(log_probs, old, ref, advantages, mask, 0.2, 0.05, num_responses)
    slow, kl, clip = slow_loss(log_probs, old, ref, advantages, mask, 0.2, 0.05, num_responses or 5)
    assert loss.item() == pytest.approx(slow, rel=1e-12)
    assert metrics["kl"] == pytest.approx(kl, rel=1e-9)
    assert metrics["clip_fraction"] == pytest.approx(clip, rel=1e-9) and clip > 0


def test_grpo_loss_ignores_padding_and_splits_into_micro_batches():
    log_probs, old, ref, advantages, mask = random_batch()
    whole, _ = grpo_loss(log_probs, old, ref, advantages, mask, num_responses=8)
    noise = torch.randn(5, 3, dtype=torch.float64) * 50
    padded = [torch.cat([x, noise], 1) for x in (log_probs, old, ref)]
    wide = torch.cat([mask, torch.zeros(5, 3)], 1)
    assert grpo_loss(*padded, advantages, wide, num_responses=8)[0].item() == pytest.approx(
        whole.item()
    )
    parts = [
        grpo_loss(log_probs[s], old[s], ref[s], advantages[s], mask[s], num_responses=8)[0]
        for s in (slice(0, 1), slice(1, 4), slice(4, 5))
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-12)


def test_on_policy_gradient_is_the_policy_gradient():
    """At ratio 1 the loss is -mean(A), its gradient -A grad(log p): token mean, response mean."""
    log_probs, _, _, advantages, mask = random_batch()
    log_probs.requires_grad_()
    grpo_loss(log_probs, log_probs.detach(), None, advantages, mask)[0].backward()
    expected = -advantages[:, None] * mask / mask.sum(-1, keepdim=True) / 5
    torch.testing.assert_close(log_probs.grad, expected.to(log_probs.dtype))


# ----------------------------------------------------------------- rollout, log-probabilities


def test_log_probs_equal_those_of_generation(model, processor, problems, config, monkeypatch):
    """The policy that trains is the one that sampled: left padding, mixed, missing pictures."""
    config.temperature, seen, multinomial = 0.7, [], torch.multinomial

    def record(probabilities, count):
        token = multinomial(probabilities, count)
        seen.append(probabilities.gather(-1, token).log()[:, 0])
        return token

    monkeypatch.setattr(torch, "multinomial", record)
    rollouts = run_rollout(model, processor, problems, config)
    length = rollouts.mask.sum(-1).flatten()
    sampled = torch.zeros(len(length), int(length.max()))
    for t, values in enumerate(seen):
        sampled[length > t, t] = values  # finished responses have left the batch
    found = response_log_probs(model, rollouts, config)
    assert (rollouts.prompt["attention_mask"].sum(-1) < rollouts.prompt["input_ids"].shape[1]).any()
    torch.testing.assert_close(found.flatten(0, 1), sampled, atol=1e-4, rtol=0)


def test_log_probs_and_gradients_equal_the_slow_version(model, processor, problems, config):
    """Packing a prompt once with its G responses is exact, values and gradients."""
    rollouts = run_rollout(model, processor, problems, config)
    found = response_log_probs(model, rollouts, config)
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


def test_a_packed_group_holds_its_prompt_once():
    """1,024 + 8 x 256 tokens, and which of them each sees, counted one by one at a small size."""
    for P, G, R in ((1024, 8, 256), (3, 2, 2)):
        inputs = {"input_ids": torch.zeros(1, P, dtype=int)}
        inputs["position_ids"] = torch.arange(P).expand(3, 1, P)
        ids = torch.ones(G, R, dtype=int)
        packed, before = pack_group(inputs, ids, ids)
        assert packed["input_ids"].shape == (1, P + G * R)
    seen = ["1......", "11.....", "111....", "1111...", "11111..", "111..1.", "111..11"]
    visible = packed["attention_mask"][0, 0]
    assert ["".join(".1"[v] for v in row) for row in visible.int().tolist()] == seen
    assert packed["position_ids"][0, 0].tolist() == [0, 1, 2, 3, 4, 3, 4]
    assert before.tolist() == [2, 3, 2, 5]


def test_gradient_checkpointing_changes_nothing(model, processor, problems, config):
    rollouts = run_rollout(model, processor, problems, config)
    model.train()
    plain = response_log_probs(model, rollouts, config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(response_log_probs(model, rollouts, config), plain)
    again = run_rollout(model, processor, problems, config)  # and a rollout keeps its cache
    assert torch.equal(again.response_ids, rollouts.response_ids)


def test_chunks_of_the_vocabulary_are_exact():
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False).double()
    hidden, targets = (
        torch.randn(23, 8, requires_grad=True, dtype=torch.float64),
        torch.arange(23) + 5,
    )
    logits = head(hidden).float() / 0.5
    logits[:, [1, 2]] = -torch.inf
    expected = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    found = token_log_probs(hidden, targets, head, [1, 2], 0.5, chunk=4)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x.sum(), hidden)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_masks_end_with_the_stop_token(model, processor, problems, config):
    rollouts = run_rollout(model, processor, problems, config)
    stops = set(model.generation_config.eos_token_id)
    finished = 0
    for ids, mask, texts in zip(rollouts.response_ids, rollouts.mask, rollouts.texts):
        for row, on, text in zip(ids.tolist(), mask.tolist(), texts):
            n = sum(on)
            assert on == [1] * n + [0] * (len(on) - n)
            assert not stops & set(row[: n - 1])  # none before the end
            assert row[n - 1] in stops or n == config.max_new_tokens
            assert text == processor.decode(row[:n], skip_special_tokens=True)
            finished += row[n - 1] in stops
    assert finished > 5
    short = run_rollout(model, processor, problems, Config(**{**vars(config), "max_new_tokens": 3}))
    assert (short.mask.sum(-1) <= 3).all() and (short.mask.sum(-1) == 3).any()


def test_every_stop_token_of_the_checkpoint_stops(model, processor, problems, config):
    token = processor.tokenizer.convert_tokens_to_ids("</observe>")
    model.generation_config.eos_token_id = [token]
    rollouts = run_rollout(model, processor, problems[:3], config)
    last = rollouts.response_ids.gather(-1, rollouts.mask.sum(-1, keepdim=True) - 1)
    assert (last == token).any() and (last == processor.tokenizer.eos_token_id).any()


def test_vision_tokens_cannot_be_sampled(model, processor, problems, config):
    """Even from a policy that wants nothing else; and the log-probabilities leave them out, too."""
    head = model.lm_head

    def eager(hidden):
        logits = head(hidden)
        logits[:, vision_tokens(model)] += 1000
        return logits

    plain = run_rollout(model, processor, problems, config)
    before = response_log_probs(model, plain, config)
    model.lm_head = torch.nn.Module()
    model.lm_head.forward = eager
    rollouts = run_rollout(model, processor, problems, config)
    assert torch.equal(plain.response_ids, rollouts.response_ids)
    assert not torch.isin(rollouts.response_ids, torch.tensor(vision_tokens(model))).any()
    torch.testing.assert_close(response_log_probs(model, rollouts, config), before)


def test_sampling_settings_of_the_checkpoint_do_not_leak(model, processor, problems, config):
    plain = run_rollout(model, processor, problems, config)
    model.generation_config.update(
        top_k=1, temperature=0.01, repetition_penalty=9.0, do_sample=False
    )
    changed = run_rollout(model, processor, problems, config)
    assert torch.equal(plain.response_ids, changed.response_ids)


def test_rollout_in_chunks_of_the_cache(model, processor, problems, config, monkeypatch):
    """The longest prompts together: the padding changes, the greedy responses do not."""
    greedy = Config(**{**vars(config), "temperature": 0.0, "num_generations": 2})
    whole = rollout(model, processor, problems, greedy)
    assert (whole.response_ids[:, 0] == whole.response_ids[:, 1]).all()
    lengths = whole.prompt["attention_mask"].sum(-1).tolist()
    widths, sample = [], observe_r1.sample

    def record(model, prompt, *rest):
        widths.append(prompt["attention_mask"].sum(-1).tolist())
        return sample(model, prompt, *rest)

    monkeypatch.setattr(observe_r1, "sample", record)
    for prompts in (1, 2):  # in a cache for so many; a token takes 2 x 4 layers x 2 heads x 32 x 4
        tokens = prompts * 2 * (max(lengths) + greedy.max_new_tokens)
        greedy.cache_gb = 1e-9 * 2 * 4 * 2 * 32 * 4 * tokens
        chunks = rollout(model, processor, problems, greedy)
        assert torch.equal(whole.response_ids, chunks.response_ids) and whole.texts == chunks.texts
        longest = sorted(lengths, reverse=True)
        expected = [longest[i : i + prompts] for i in range(0, 5, prompts)]
        assert widths == expected and widths != [
            lengths[i : i + prompts] for i in range(0, 5, prompts)
        ]
        widths.clear()


def test_the_cache_with_room_holds_what_the_library_s_cache_holds():
    """A prompt of 5, repeated for 3 responses, 300 tokens, responses that finish on the way."""
    torch.manual_seed(0)
    layers = plumbing.RoomyLayer(), DynamicLayer()
    prompt = torch.randn(2, 2, 2, 5, 4)
    for layer in layers:
        layer.update(*prompt)
        layer.batch_repeat_interleave(3)
    for t in range(300):
        new = torch.randn(2, len(layers[0].keys), 2, 1, 4)
        for seen, expected in zip(*(layer.update(*new) for layer in layers)):
            assert torch.equal(seen, expected) and seen.shape[2] == 6 + t
        if t in (0, 40, 122, 123, 250):
            for layer in layers:
                layer.batch_select_indices(torch.arange(len(layer.keys)) != 1)
        assert layers[0].get_seq_length() == 6 + t
    assert len(layers[0].keys) == 1


def test_keys_in_bf16_change_nothing_under_autocast(
    model, processor, problems, config, monkeypatch
):
    """The cache holds them as attention reads them: half the bytes, the same logits."""
    prompt = encode_prompts(problems, processor, config)
    update, seen, logits = plumbing.RoomyLayer.update, [], []

    def keep(layer, keys, values, *rest, **options):
        if cast:
            held = update(layer, keys, values, *rest, **options)
            assert keys.dtype == torch.float32 and held[0].dtype == torch.bfloat16
            return held
        return DynamicLayer.update(layer, keys, values, *rest, **options)

    def record(probabilities, count):
        logits.append(probabilities)
        return probabilities.argmax(-1, keepdim=True)

    monkeypatch.setattr(plumbing.RoomyLayer, "update", keep)
    monkeypatch.setattr(torch, "multinomial", record)
    for cast in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            observe_r1.sample(model.eval(), prompt, [-1], replace(config, max_new_tokens=8))
        seen.append(torch.stack(logits))
        logits.clear()
    assert torch.equal(*seen)


def test_slice_prompts_takes_the_right_pictures(processor, problems, config):
    batch = encode_prompts(problems, processor, config)
    assert batch["num_images"].tolist() == [1, 1, 1, 0, 2]
    for row, problem in enumerate(problems):
        part, alone = (
            slice_prompts(batch, [row]),
            encode_prompts([problem], processor, config),
        )
        assert torch.equal(part["input_ids"], alone["input_ids"])
        assert ("pixel_values" in part) == bool(problem["images"])
        if problem["images"]:
            assert torch.equal(part["pixel_values"], alone["pixel_values"])
            assert torch.equal(part["image_grid_thw"], alone["image_grid_thw"])


@pytest.mark.parametrize(
    "size, budget, grid",
    [
        ((280, 140), (784, 10**6), [1, 10, 20]),
        ((20, 20), (3136, 10**6), [1, 4, 4]),  # enlarged to the floor of 56 x 56
        ((560, 560), (784, 10**6), [1, 40, 40]),  # above the processor's own ceiling of 50,176
        ((1120, 1120), (3136, 50176), [1, 16, 16]),  # reduced to the ceiling of 224 x 224
    ],
)
def test_one_pixel_budget(processor, size, budget, grid):
    config = Config(min_pixels=budget[0], max_pixels=budget[1])
    problem = {"images": [Image.new("RGB", size)], "question": "q"}
    batch = encode_prompts([problem], processor, config)
    assert batch["image_grid_thw"].tolist() == [grid]
    pads = (batch["input_ids"] == processor.image_token_id).sum()
    assert pads == grid[1] * grid[2] // 4


def test_prompts(processor, config):
    problem = {"images": [], "question": "How many?"}
    texts = [
        processor.decode(encode_prompts([problem], processor, c)["input_ids"][0])
        for c in (Config(), Config(observe=False), Config(system_prompt="Look."))
    ]
    for text, system in zip(texts, (PROMPTS["observe"], PROMPTS["think"], "Look.")):
        assert text == (
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n"
            "<|im_start|>assistant\n"
        )


# ------------------------------------------------------------------------------------- update


def make_state(model, reference=None, rate=1e-3, distributed=False):
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    return SimpleNamespace(
        model=model if distributed else observe_r1.shard(model, Config()),
        reference=reference,
        processor=AutoProcessor.from_pretrained(TOY / "model"),
        optimizer=optimizer,
        scheduler=scheduler,
        optimizer_step=0,
        skipped=0,
    )


def test_update_does_not_depend_on_the_token_budget(model, processor, problems, config):
    """One pass a group, or one a response: the same gradient, so the same weights, metrics."""
    rollouts = run_rollout(model, processor, problems, config)
    advantages = torch.randn(5, 4)
    advantages[1] = 0
    results = []
    for budget in (10**6, 1):
        config.token_budget, learner = budget, copy.deepcopy(model)
        state = make_state(learner, copy.deepcopy(model), 1e-2)
        state.optimizer = torch.optim.SGD(learner.parameters(), 0.01)
        results.append((update(state, rollouts, advantages, config), learner.state_dict()))
    for name, value in results[0][0].items():
        assert value == pytest.approx(results[1][0][name], rel=1e-3, abs=1e-6), name
    for name, value in results[0][1].items():
        torch.testing.assert_close(value, results[1][1][name], atol=1e-5, rtol=1e-4, msg=name)
    assert results[0][0]["optimizer_step"] == 3  # 5 groups, 2 a mini-batch


def test_skipped_groups_count_in_the_denominator(model, processor, problems, config):
    """The first gradient is that of the loss over all sampled responses, by hand."""
    rollouts = run_rollout(model, processor, problems[:2], config)
    advantages = torch.tensor([[1.0, -1.0, 0.5, -0.5], [0.0, 0.0, 0.0, 0.0]])
    expected = copy.deepcopy(model)
    log_probs = slow_log_probs(expected, processor, problems[:2], rollouts, config)
    mask = rollouts.mask
    (-(advantages[..., None] * log_probs * mask).sum(-1) / mask.sum(-1)).sum().div(8).backward()
    state = make_state(model)
    state.optimizer = torch.optim.SGD(model.parameters(), 1.0)
    config.max_grad_norm, before = 1e9, copy.deepcopy(model.state_dict())
    update(state, rollouts, advantages, config)
    for name, p in expected.named_parameters():
        torch.testing.assert_close(
            before[name] - model.state_dict()[name], p.grad, atol=2e-4, rtol=1e-3
        )


def test_groups_without_advantage_move_nothing(model, processor, problems, config):
    """Not by the KL and not by the momentum of an earlier step."""
    rollouts, reference = run_rollout(model, processor, problems, config), copy.deepcopy(model)
    for p in reference.parameters():
        p.data += 0.01 * torch.randn_like(p)
    state = make_state(model, reference)
    update(state, rollouts, torch.randn(5, 4), config)
    before, steps = copy.deepcopy(model.state_dict()), state.optimizer_step
    metrics = update(state, rollouts, torch.zeros(5, 4), config)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert state.optimizer_step == steps and metrics["grad_norm"] == 0


def test_several_optimiser_steps_clip_against_the_policy_that_sampled(
    model, processor, problems, config
):
    """Twice the same group: in the second mini-batch the ratio has left 1, and is clipped."""
    config.minibatch_prompts, config.kl_coef = 1, 0.0
    rollouts = run_rollout(model, processor, [problems[0]] * 6, config)
    state = make_state(model, rate=3e-3)
    metrics = update(state, rollouts, torch.tensor([[1.0, -1.0, 0.5, -0.5]] * 6), config)
    assert metrics["clip_fraction"] > 0 and metrics["kl"] == 0


# ------------------------------------------------------------------------------------- ladder

FIGURE = [0.015, 0.035, 0.05, 0.075, 0.135, 0.15, 0.15, 0.2, 0.19]
FIGURE_STAGES = [42, 42, 54, 80, 112, 132, 155, 178, 206]  # per 1,000, by the paper's figure


def levels(counts):
    return [level / 8 for level, count in enumerate(counts) for _ in range(count)]


def check_ladder(difficulty, complexity, order, stage):
    assert sorted(order) == list(range(len(difficulty)))
    assert stage == sorted(stage) and set(stage) <= set(range(9))
    for i, s in zip(order, stage):  # nothing from a level in which the stage has no share
        low = STAGES[s][0]
        assert low <= round(8 * difficulty[i]) <= low + 4
    for s in set(stage):
        for level in range(9):
            lengths = [
                complexity[i]
                for i, t in zip(order, stage)
                if t == s and round(8 * difficulty[i]) == level
            ]
            assert lengths == sorted(lengths)


def test_mix_ladder_reproduces_the_figure():
    counts = [round(share * 10_000) for share in FIGURE]
    difficulty = levels(counts)
    complexity = torch.rand(len(difficulty), generator=torch.Generator().manual_seed(0)).tolist()
    order, stage = mix_ladder(difficulty, complexity, seed=1)
    check_ladder(difficulty, complexity, order, stage)
    for s, (low, shares) in enumerate(STAGES):
        mine = [round(8 * difficulty[i]) for i, t in zip(order, stage) if t == s]
        assert len(mine) / 10 == pytest.approx(FIGURE_STAGES[s], abs=2)
        for level, share in enumerate(shares, start=low):
            assert mine.count(level) / len(mine) == pytest.approx(share / sum(shares), abs=0.02)


@pytest.mark.parametrize(
    "counts",
    [
        [100] * 9,
        [0, 0, 300, 0, 0, 100, 0, 0, 600],
        [900, 0, 0, 0, 0, 0, 0, 0, 90],
        [10, 20, 40, 80, 160, 160, 210, 150, 130],
    ],
)
def test_mix_ladder_elsewhere(counts):
    difficulty = levels(counts)
    complexity = [float(i % 17) for i in range(len(difficulty))]
    order, stage = mix_ladder(difficulty, complexity)
    check_ladder(difficulty, complexity, order, stage)
    tenths = torch.tensor([difficulty[i] for i in order]).chunk(10)
    means = [tenth.mean().item() for tenth in tenths]
    assert all(b >= a - 0.03 for a, b in zip(means, means[1:])) and means[-1] > means[0]


def test_mix_ladder_of_tiny_sets():
    assert mix_ladder([], []) == ([], [])
    assert mix_ladder([0.5], [3.0])[0] == [0]
    order, _ = mix_ladder([1.0, 0.0], [1.0, 1.0])
    assert order == [1, 0]


def test_training_order():
    ladder = load_problems(str(TOY / "ladder.parquet"))
    n = len(ladder)
    assert training_order(ladder, Config()) == list(range(n))
    shuffled = training_order(ladder, Config(order="random", seed=3))
    assert sorted(shuffled) == list(range(n)) != shuffled
    ranked = [ladder["difficulty"][i] for i in training_order(ladder, Config(order="sorted"))]
    assert ranked == sorted(ranked)
    thin = training_order(ladder, Config(max_steps=4, prompts_per_step=16))
    assert len(thin) == 64 and thin == sorted(set(thin)) and thin[-1] >= n - n // 64
    gaps = {b - a for a, b in zip(thin, thin[1:])}
    assert max(gaps) - min(gaps) <= 1  # even, so the hard end is kept
    bare = ladder.remove_columns(["stage"])
    scores = list(ladder["difficulty"]), list(ladder["complexity"])
    assert training_order(bare, Config(seed=5)) == mix_ladder(*scores, 5)[0]
    with pytest.raises(ValueError, match="difficulty"):
        training_order(bare.remove_columns(["difficulty"]), Config(order="sorted"))


def test_the_toy_keeps_its_promises():
    ladder, held_out = (
        load_problems(str(TOY / f"{name}.parquet")) for name in ("ladder", "heldout")
    )
    shown = [
        {image.tobytes() for row in data for image in row["images"]} for data in (ladder, held_out)
    ]
    assert not shown[0] & shown[1]
    quarters = torch.tensor(list(ladder["difficulty"])).chunk(4)
    means = [quarter.mean().item() for quarter in quarters]
    assert means == sorted(means) and len({round(8 * d) for d in ladder["difficulty"]}) >= 6
    size = {
        path.name: path.stat().st_size for path in [*TOY.glob("*.parquet"), *TOY.glob("model/*")]
    }
    assert (
        size["model.safetensors"] < 5e6 and size["ladder.parquet"] + size["heldout.parquet"] < 3e6
    )


# ------------------------------------------------------------------------------------ problems


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (56, 56), (255, 0, 0)).save(tmp_path / "pictures/a.png")
    Image.new("L", (28, 84)).save(tmp_path / "pictures/b.jpg")
    data = (tmp_path / "pictures/a.png").read_bytes()
    (tmp_path / "pictures/cut.png").write_bytes(data[: len(data) - 40])
    return tmp_path


def write(folder, rows, name="data.jsonl"):
    text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
    (folder / name).write_text(text)
    return str(folder / name)


CHAT = [
    {"role": "system", "content": "Be good."},
    {
        "role": "user",
        "content": [
            {"type": "image", "image": "pictures/a.png"},
            {"type": "text", "text": "How many?"},
        ],
    },
]


@pytest.mark.parametrize(
    "row, question, answer, pictures",
    [
        ({"image": "pictures/a.png", "question": "How many?", "answer": 3}, "How many?", "3", 1),
        (
            {
                "images": ["pictures/a.png", "file://pictures/b.jpg"],
                "problem": "<image><image>Sum?",
                "solution": "4",
            },
            "Sum?",
            "4",
            2,
        ),
        (
            {
                "decoded_image": "pictures/a.png",
                "image": "gone.png",
                "question": "q",
                "query": "Hint: q",
                "answer": "1",
            },
            "q",
            "1",
            1,
        ),
        ({"message": json.dumps(CHAT), "answer": "$5$"}, "How many?", "$5$", 1),
        ({"messages": CHAT, "ground_truth": 0.5}, "How many?", "0.5", 1),
        (
            {
                "image_1": "pictures/a.png",
                "image_2": "pictures/b.jpg",
                "image_3": None,
                "question": "Is <image 2> like <image 1>?",
                "answer": "no",
            },
            "Is picture 2 like picture 1?",
            "no",
            2,
        ),
        ({"question": "2 + 2?", "answer": "4"}, "2 + 2?", "4", 0),
        (
            {"image": None, "question": "Which?", "choices": ["x", "y"], "answer": "y"},
            "Which?\n(A) x\n(B) y",
            "B",
            0,
        ),
        (
            {"question": "Which?", "options": {"A": "x", "B": "y"}, "answer": "(b)"},
            "Which?\n(A) x\n(B) y",
            "B",
            0,
        ),
        (
            {"question": "Which?", "options": '["x", "y"]', "answer": "A"},
            "Which?\n(A) x\n(B) y",
            "A",
            0,
        ),
    ],
)
@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_layouts(folder, row, question, answer, pictures, name):
    problems = load_problems(write(folder, [row, row], name))
    assert set(problems.column_names) == {"id", "images", "question", "answer", "category"}
    assert (problems[0]["question"], problems[0]["answer"]) == (question, answer)
    assert [image.size for image in problems[1]["images"]] == [(56, 56), (28, 84)][:pictures]


def test_parquet_folder_and_mixed_types(folder):
    rows = [
        {"id": "r", "image": "pictures/a.png", "question": "q", "answer": 3},
        {"id": "s", "image": "pictures/b.jpg", "question": "q", "answer": "three"},
    ]
    problems = load_problems(write(folder, rows))
    assert problems["answer"][:] == ["3", "three"] and problems["id"][:] == ["r", "s"]
    problems.to_parquet(folder / "data.parquet")
    again = load_problems(str(folder / "data.parquet"))
    assert again[1]["images"][0].size == (28, 84) and again["answer"][:] == ["3", "three"]
    lines = "\n".join(
        json.dumps({"file_name": name, "question": "q", "answer": "1"})
        for name in ("a.png", "b.jpg")
    )
    (folder / "pictures" / "metadata.jsonl").write_text(lines)
    (folder / "pictures" / "cut.png").unlink()
    assert load_problems(str(folder / "pictures"))[1]["images"][0].size == (28, 84)


def test_bad_rows_are_named(folder, processor, config):
    good = {"image": "pictures/a.png", "question": "q", "answer": "1"}
    for bad, why in (
        ({"image": "pictures/none.png"}, "none.png"),
        ({"image": "pictures/cut.png"}, "truncated"),
        ({"answer": " "}, "answer is empty"),
        ({"question": ""}, "question or the answer"),
    ):
        with pytest.raises(ValueError, match=rf"row 1 \(id 1\) cannot be used: .*{why}"):
            load_problems(write(folder, [good, good | bad]))
    with pytest.raises(ValueError, match="none of the options"):
        load_problems(write(folder, [{**good, "options": ["x", "y"], "answer": "z"}]))
    with pytest.raises(ValueError, match="no column .*'answer'"):
        load_problems(write(folder, [{"question": "q"}], "other.jsonl"))
    with pytest.raises(ValueError, match="cannot be read"):
        load_problems(str(folder / "nothing.jsonl"))
    (folder / "broken.jsonl").write_text('{"question": ')
    with pytest.raises(ValueError, match="cannot be read"):
        load_problems(str(folder / "broken.jsonl"))
    config.max_prompt_tokens = 20
    with pytest.raises(ValueError, match="row 0 .*tokens, --max_prompt_tokens is 20"):
        load_problems(write(folder, [good], "long.jsonl"), "train", prompt_check(processor, config))


def test_a_mended_picture_is_looked_at_again(folder):
    file = write(folder, [{"image": "pictures/late.png", "question": "q", "answer": "1"}])
    with pytest.raises(ValueError, match="late.png"):
        load_problems(file)
    Image.new("RGB", (30, 30)).save(folder / "pictures/late.png")
    assert len(load_problems(file)) == 1


# --------------------------------------------------------------------------------- command line


def test_options_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "c.json"
    (tmp_path / "m").mkdir()
    file.write_text(json.dumps({"model": "m", "sigma": 2.5, "seed": 4, "observe": False}))
    command, config = parse_arguments(["train", "--config", str(file), "--seed", "9"])
    assert (command, config.sigma, config.seed, config.observe) == ("train", 2.5, 9, False)
    assert config.model == str(tmp_path / "m") and config.kl_coef == 0.01 and config.eval_data == ""
    assert parse_arguments([])[1].data == str(TOY / "ladder.parquet")
    file.write_text('{"sigmas": 1}')
    with pytest.raises(ValueError, match="sigmas"):
        parse_arguments(["train", "--config", str(file)])
    with pytest.raises(ValueError, match="usage"):
        parse_arguments(["fly"])


def run_script(*options, cwd):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, str(HERE / "observe_r1.py"), *options],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=environment,
        timeout=170,
    )


def test_the_command_end_to_end(tmp_path, processor, problems):
    """Three steps in a process of its own; its files; final/ loads and samples the same twice."""
    result = run_script(
        "train",
        "--config",
        str(TOY / "config.json"),
        "--max_steps",
        "3",
        "--prompts_per_step",
        "4",
        "--minibatch_prompts",
        "2",
        "--num_samples",
        "1",
        "--save_steps",
        "2",
        "--eval_steps",
        "2",
        "--output_dir",
        "out",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    output = tmp_path / "out"
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert set(metrics[0]) >= {
        "step",
        "optimizer_step",
        "reward",
        "accuracy",
        "format",
        "bonus",
        "response_length",
        "truncated_fraction",
        "weight",
        "kl",
        "clip_fraction",
        "grad_norm",
        "learning_rate",
        "zero_weight_fraction",
        "seconds",
    }
    assert [("eval_accuracy" in row) for row in metrics] == [False, True, False]
    ladder = load_problems(str(TOY / "ladder.parquet"))
    order = training_order(ladder, Config(max_steps=3, prompts_per_step=4))
    steps = torch.tensor(list(ladder["difficulty"]))[order].view(3, 4).mean(1)
    assert [row["difficulty"] for row in metrics] == pytest.approx(steps.tolist())
    assert metrics[-1]["optimizer_step"] <= 6
    summary = json.loads((output / "summary.json").read_text())
    assert 0 <= summary["accuracy_before"] <= 1 and summary["seconds"] > 0
    assert summary["format_after"] <= 0.5 and summary["response_length_after"] > 5
    rollouts = [json.loads(line) for line in (output / "rollouts.jsonl").read_text().splitlines()]
    assert len(rollouts) == 6 and len(rollouts[0]["responses"]) == 8
    assert (output / "checkpoint-2" / "model.safetensors").exists()
    page = (output / "report.html").read_text()
    assert "&lt;answer&gt;" in page and "<answer>" not in page
    assert f"step 0: {summary['accuracy_before']:.4g}<" in page
    config = Config(**json.loads((output / "config.json").read_text()))
    loaded = [
        (
            Qwen2_5_VLForConditionalGeneration.from_pretrained(
                output / "final", dtype=torch.float32
            ),
            AutoProcessor.from_pretrained(output / "final"),
        )
        for _ in range(2)
    ]
    first, second = (run_rollout(*pair, problems, config) for pair in loaded)
    assert first.texts == second.texts
    before = Qwen2_5_VLForConditionalGeneration.from_pretrained(TOY / "model", dtype=torch.float32)
    changed = [
        not torch.equal(a, b) for a, b in zip(before.parameters(), loaded[0][0].parameters())
    ]
    assert sum(changed) > len(changed) * 0.9


def test_errors_are_one_line(tmp_path):
    result = run_script("train", cwd=tmp_path)
    assert result.returncode == 1 and result.stderr.strip().splitlines()[-1].startswith(
        "observe_r1: --data is missing"
    )


# -------------------------------------------------------------------------------- ladder and eval


def test_select_problems():
    difficulty, complexity = [0, 0, 0, 0.5, 1, 1], [2.0, 23.0, 56.0, 1.0, 9.0, 1.0]
    assert select_problems(difficulty, complexity) == [
        1,
        2,
        3,
        4,
        5,
    ]  # the shortest solved one goes
    assert select_problems(difficulty, complexity, drop_easy=False) == [0, 1, 2, 3, 4, 5]
    assert select_problems(difficulty, complexity, drop_hardest=True) == [1, 2, 3]
    assert select_problems([], []) == []


@pytest.fixture
def few(tmp_path):
    """24 toy problems with scores of old, one of them with a gold that no rule can check."""
    rows = load_problems(str(TOY / "ladder.parquet")).select(range(0, 960, 40))
    rows = rows.map(
        lambda row, i: {"answer": "N/A" if i == 3 else row["answer"]}, with_indices=True
    )
    rows.to_parquet(tmp_path / "raw.parquet")
    return str(tmp_path / "raw.parquet")


def ladder_config(data, output, **options):
    base = parse_arguments(["train", "--config", str(TOY / "config.json")])[1]
    return replace(base, data=data, output_dir=str(output), prompts_per_step=4, **options)


def test_ladder(few, tmp_path):
    summary = observe_r1.ladder(ladder_config(few, tmp_path / "a"))
    assert summary["raw"] == 24 and summary["uncheckable"] == 1
    assert summary["ladder"] == sum(summary["levels"]) == sum(summary["stages"])
    assert 24 == sum(
        summary[name]
        for name in ("uncheckable", "solved_without_reasoning", "not_selected", "ladder")
    )
    built = load_problems(str(tmp_path / "a" / "ladder.parquet"))
    assert (
        len(built) == summary["ladder"] == len(set(built["id"]))
        and built[0]["images"][0].height == 28
    )
    assert list(built["stage"]) == sorted(built["stage"])
    scores = {row["id"]: row for row in map(json.loads, open(tmp_path / "a" / "scores.jsonl"))}
    for row in built:  # difficulty and complexity are those of the recorded responses
        scored = scores[row["id"]]
        right = [accuracy_reward(text, row["answer"]) for text in scored["responses"]]
        assert row["difficulty"] == 1 - sum(right) / 8 and len(right) == 8
        assert row["complexity"] == sum(scored["length"]) / 8
    review = load_dataset(
        "parquet", data_files=str(tmp_path / "a" / "review.parquet"), split="train"
    )
    assert set(review["id"]) == {key for key, row in scores.items() if not any(row["accuracy"])}
    assert len(review) >= 1 and all(review["keep"])
    for row in review:
        answers = [extract_answer(text) or "" for text in scores[row["id"]]["responses"]]
        assert answers.count(row["most_common"]) == max(map(answers.count, answers))

    marked = review.map(lambda row, i: {"keep": i > 0}, with_indices=True)
    marked.to_parquet(tmp_path / "marks.parquet")
    fewer = observe_r1.ladder(
        ladder_config(few, tmp_path / "a", review=str(tmp_path / "marks.parquet"))
    )
    assert fewer["ladder"] == summary["ladder"] - 1  # from the scores that were there
    gone = observe_r1.ladder(ladder_config(few, tmp_path / "a", drop_hardest=True))
    assert gone["ladder"] == summary["ladder"] - len(review)
    with pytest.raises(ValueError, match="--seed"):
        observe_r1.ladder(ladder_config(few, tmp_path / "a", seed=7))


def test_a_killed_ladder_ends_in_the_same_file(few, tmp_path, monkeypatch):
    observe_r1.ladder(ladder_config(few, tmp_path / "a"))
    scored, calls = observe_r1.score_rollouts, []

    def fail(*arguments):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return scored(*arguments)

    monkeypatch.setattr(observe_r1, "score_rollouts", fail)
    with pytest.raises(KeyboardInterrupt):
        observe_r1.ladder(ladder_config(few, tmp_path / "b"))
    scores = tmp_path / "b" / "scores.jsonl"
    before = scores.read_text().splitlines(keepends=True)
    assert len(before) > 4  # a batch is four rows: one and a half of them and half a line are left
    scores.write_text("".join(before[:6]) + before[6][:20])
    observe_r1.ladder(ladder_config(few, tmp_path / "b"))
    for name in ("clean.jsonl", "scores.jsonl", "ladder.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def torchrun(*command, cwd, processes=2):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        + ["--nproc_per_node", str(processes), *map(str, command)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=170,
    )


def test_ladder_under_torchrun(few, tmp_path):
    """Two processes score a share each; together they score every problem once."""
    options = ["--config", TOY / "config.json", "--data", few, "--output_dir", "two"]
    options += ["--prompts_per_step", 4, "--eval_data", ""]
    result = torchrun(HERE / "observe_r1.py", "ladder", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-9000:]
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    rows = [
        json.loads(line)
        for rank in range(2)
        for line in open(tmp_path / f"two/scores.{rank}.jsonl")
    ]
    cleaned = [json.loads(n) for r in range(2) for n in open(tmp_path / f"two/clean.{r}.jsonl")]
    assert len(cleaned) == 23 and sum(row["difficulty"] for row in cleaned) == len(rows)
    raw = load_problems(few)
    assert (
        len(rows) == summary["raw"] - summary["uncheckable"] - summary["solved_without_reasoning"]
    )
    assert [row["id"] for row in rows] == [i for i in raw["id"] if i in {row["id"] for row in rows}]
    built = load_problems(str(tmp_path / "two" / "ladder.parquet"))
    assert len(built) == summary["ladder"] and len({row["responses"][0] for row in rows}) > 3


def test_eval(few, tmp_path, monkeypatch):
    config = ladder_config(few, tmp_path / "e", num_samples=0)
    greedy = observe_r1.evaluate_model(config)
    assert greedy == {**json.loads((tmp_path / "e" / "eval.json").read_text())}
    rows = [json.loads(line) for line in open(tmp_path / "e" / "responses.jsonl")]
    assert len(rows) == greedy["n"] == 24 and all(len(row["responses"]) == 1 for row in rows)
    sampled = observe_r1.evaluate_model(replace(config, num_samples=4))
    rows = [json.loads(line) for line in open(tmp_path / "e" / "responses.jsonl")]
    scores = [[accuracy_reward(text, row["answer"]) for text in row["responses"]] for row in rows]
    assert sampled["accuracy"] == pytest.approx(torch.tensor(scores).mean().item())
    assert sampled["response_length"] == pytest.approx(sum(sum(row["length"]) for row in rows) / 96)


def test_interval_of_eval_agrees_with_a_bootstrap(tmp_path, monkeypatch):
    """Problems are resampled, not responses: samples of one problem are no independent evidence."""
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(300, generator=generator)
    scores = torch.bernoulli(share[:, None].expand(-1, 4), generator=generator)
    rows = [
        {"accuracy": row.tolist(), "format": row.tolist(), "length": row.tolist()} for row in scores
    ]
    monkeypatch.setattr(observe_r1, "score_problems", lambda *_: rows)
    monkeypatch.setattr(
        observe_r1,
        "start",
        lambda _: (tmp_path, None, Dataset.from_dict({"category": ["x", "y"] * 150})),
    )
    monkeypatch.setattr(observe_r1, "load_model", lambda _: torch.nn.Module())
    result = observe_r1.evaluate_model(Config(num_samples=4))
    means = scores.mean(1)
    drawn = means[torch.randint(300, (4000, 300), generator=generator)].mean(1)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975])).tolist()
    assert result["interval"] == pytest.approx([low, high], abs=0.006)
    assert result["categories"] == {
        "x": [pytest.approx(means[::2].mean().item()), 150],
        "y": [pytest.approx(means[1::2].mean().item()), 150],
    }


PICTURE = {"bytes": None, "path": "pictures/a.png"}
BENCHMARKS = {  # one row in the columns that lmms-eval 0.7.3 reads, and what it must become
    "MathVista": (
        {
            "pid": "1",
            "question": "How tall?",
            "image": "images/1.jpg",
            "decoded_image": PICTURE,
            "choices": ["10 cm", "12 cm"],
            "unit": "cm",
            "precision": 1.0,
            "answer": "12 cm",
            "question_type": "multi_choice",
            "answer_type": "text",
            "metadata": {"category": "math"},
            "query": "Hint: Please answer.",
        },
        "How tall?\n(A) 10 cm\n(B) 12 cm",
        "B",
        "",
    ),
    "MathVision": (
        {
            "id": "4",
            "question": "Which?\n<image1>",
            "options": ["A", "B", "C"],
            "image": "images/4.jpg",
            "decoded_image": PICTURE,
            "answer": "C",
            "solution": None,
            "level": 2,
            "subject": "topology",
        },
        "Which?\npicture 1\n(A) A\n(B) B\n(C) C",
        "C",
        "topology",
    ),
    "MathVerse": (
        {
            "sample_index": "1",
            "problem_index": "1",
            "problem_version": "Text Dominant",
            "question": "Find x.\nChoices:\nA:1\nB:2",
            "image": PICTURE,
            "answer": "A",
            "question_type": "multi-choice",
            "metadata": {"source": "G"},
            "query_wo": "w",
            "query_cot": "c",
        },
        "Find x.\nChoices:\nA:1\nB:2",
        "A",
        "",
    ),
    "We-Math": (
        {
            "ID": "3steps_1",
            "split": "testmini",
            "knowledge concept": "Area",
            "question": "How large?",
            "option": "A. 3; B. 12 cm; C. No correct answer",
            "answer": "B",
            "image_path": PICTURE,
            "key": "1",
            "question number": 1,
            "knowledge concept description": "d",
        },
        "How large?\n(A) 3\n(B) 12 cm\n(C) No correct answer",
        "B",
        "Area",
    ),
    "MMMU": (
        {
            "id": "validation_Math_1",
            "question": "<image 1> Which?",
            "options": "['it\\'s 5', \"6\"]",
            "explanation": "",
            "image_1": PICTURE,
            "image_2": None,
            "img_type": "['Plots']",
            "answer": "A",
            "topic_difficulty": "Easy",
            "question_type": "multiple-choice",
            "subfield": "Calculus",
        },
        "picture 1 Which?\n(A) it's 5\n(B) 6",
        "A",
        "Calculus",
    ),
    "MMStar": (
        {
            "index": 0,
            "question": "Which?\nOptions: A: red, B: blue",
            "image": PICTURE,
            "answer": "A",
            "category": "logic",
            "l2_category": "code",
            "meta_info": {"source": "M"},
        },
        "Which?\nOptions: A: red, B: blue",
        "A",
        "logic",
    ),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_columns(folder, name):
    row, question, answer, category = BENCHMARKS[name]
    features = {key: Image_() for key, value in row.items() if value is PICTURE}
    embedded = {"bytes": (folder / "pictures/a.png").read_bytes(), "path": None}
    data = Dataset.from_list([{k: embedded if v is PICTURE else v for k, v in row.items()}])
    for key, feature in features.items():
        data = data.cast_column(key, feature)
    data.to_parquet(folder / "bench.parquet")
    (problem,) = load_problems(str(folder / "bench.parquet"))
    assert (problem["question"], problem["answer"]) == (question, answer)
    assert problem["category"] == category and [i.size for i in problem["images"]] == [(56, 56)]


def load_toy_script(name):
    spec = importlib.util.spec_from_file_location(name, TOY / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ablation_table_pairs_runs_by_seed():
    """Mean and t interval (two degrees of freedom: 4.303) of the differences, by hand."""
    ablate = load_toy_script("ablate")

    def run(after, length):
        return {
            "accuracy_before": 0.2,
            "accuracy_after": after,
            "response_length_after": length,
            "seconds": 60.0,
        }

    table = ablate.make_table(
        {
            "full": [run(0.70, 30), run(0.72, 31), run(0.71, 32)],
            "no bonus": [run(0.69, 40), run(0.73, 41), run(0.72, 42)],
        }
    )
    # differences -.01, +.01, +.01: mean .0033, standard deviation .011547, half width .0287
    row = next(line for line in table.splitlines() if line.startswith("| no bonus"))
    assert row == "| no bonus | 0.200 | 0.713 ± 0.021 | +0.003 ± 0.029 | 41.0 ± 1.0 | 0.51 |"
    curve = [{**run(0.7, 30), "metrics": [{"step": 10, "eval_accuracy": 0.5}, {"step": 20}]}]
    assert ablate.make_figure({"full": curve}).count("<polyline") == 2
    problem = {"images": [{"bytes": b"x"}], "question": "a < b?", "answer": "1"}
    rows = [{"responses": ["<think>", "y" * 200], "accuracy": [1.0, 0.0]}]
    picture = ablate.make_rollouts([problem], rows, rows)
    assert "a &lt; b? (1)" in picture and "&lt;think&gt;" in picture and "y" * 99 not in picture
    assert picture.count("✓") == picture.count("✗") == 2


# ------------------------------------------------------------- resume, several processes, faults

slow = pytest.mark.skipif("slow" not in sys.argv, reason="pytest -m slow")


def checkpoints(run):
    return [Path(folder) for folder in reversed(sort_checkpoints(run))]


def train_config(few, output, **options):
    """Six steps of four prompts, saved every second step."""
    small = {"minibatch_prompts": 2, "num_generations": 4, "eval_data": "", "eval_steps": 0}
    saved = {"save_steps": 2, "keep_checkpoints": 0}
    return replace(ladder_config(few, output), **{**small, **saved, **options})


def train(config, rollout=rollout):
    """One thread: sums over several do not always round alike."""
    torch.set_num_threads(1)
    return observe_r1.train(config, rollout)


def files_of(run):
    """Weights, moments and metrics of a finished run; seconds differ from run to run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [json.loads(line)["responses"] for line in (run / "rollouts.jsonl").open()]
    return (
        (run / "final" / "model.safetensors").read_bytes(),
        (run / "checkpoint-6" / "optimizer.safetensors").read_bytes(),
        [{name: value for name, value in line.items() if name != "seconds"} for line in lines],
        rows,
    )


@pytest.fixture
def undisturbed(few, tmp_path):
    train(train_config(few, tmp_path / "undisturbed"))
    return files_of(tmp_path / "undisturbed")


def interrupt_at(step, interrupt):
    """A rollout function that does something to the run in the middle of a step."""
    calls = []

    def disturbed(*arguments):
        calls.append(0)
        if len(calls) == step:
            interrupt()
        return rollout(*arguments)

    return disturbed


def test_resume_is_exact(few, tmp_path, undisturbed, capsys):
    """A crash in step 4, then a stop by Ctrl-C in step 5: the same bits as undisturbed."""

    def crash():
        raise RuntimeError("power cut")

    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    config = train_config(few, tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text('{"accuracy_after": 1.0}')  # of an earlier run
    with pytest.raises(RuntimeError, match="power cut"):
        train(config, interrupt_at(4, crash))
    assert not (tmp_path / "run" / "summary.json").exists()
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    with pytest.raises(ValueError, match="--resume true"):
        train(config)
    config.resume = True
    for option in ({"sigma": 1.0}, {"learning_rate": 1e-3}, {"seed": 1}):
        with pytest.raises(ValueError, match=f"--{next(iter(option))} "):
            train(replace(config, **option))
    with pytest.raises(SystemExit, match="after step 5"):
        train(config, interrupt_at(3, lambda: os.kill(os.getpid(), signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):  # two of them do not wait for the step
        train(config, interrupt_at(1, twice))
    train(config)
    assert files_of(tmp_path / "run") == undisturbed


def test_damaged_checkpoints_are_passed_over(few, tmp_path, undisturbed, capsys):
    run = tmp_path / "undisturbed"
    newest = run / "checkpoint-6" / "optimizer.safetensors"
    os.truncate(newest, newest.stat().st_size // 2)
    (run / "checkpoint-4" / "state.json").write_text('{"step"')
    (run / "unfinished").mkdir()
    train(train_config(few, run, resume=True))
    assert "checkpoint-6 is damaged" in (errors := capsys.readouterr().err)
    assert "checkpoint-4 is damaged" in errors
    assert files_of(run) == undisturbed


def test_a_full_disk_keeps_the_last_checkpoint(few, tmp_path, monkeypatch):
    def full(tensors, file):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plumbing, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        train(train_config(few, tmp_path / "run"))
    assert checkpoints(tmp_path / "run") == []
    monkeypatch.undo()
    train(train_config(few, tmp_path / "run", resume=True, keep_checkpoints=1))
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["checkpoint-6"]


def test_changed_data_stops_a_resume(few, tmp_path):
    train(train_config(few, tmp_path / "run"))
    rows = load_problems(few)
    changed = rows.map(
        lambda row, i: {"answer": "1" if i == 5 else row["answer"]}, with_indices=True
    )
    changed.to_parquet(few)
    with pytest.raises(ValueError, match="--data "):
        train(train_config(few, tmp_path / "run", resume=True))


@slow
@pytest.mark.slow
def test_killed_at_random_moments(few, tmp_path, undisturbed):
    """kill -9 at 20 moments, each time resumed; the last one may finish."""
    moments = random.Random(0)
    config = train_config(few, tmp_path / "run", resume=True)
    options = [f"--{name}={value}" for name, value in vars(config).items()]
    for _ in range(20):
        process = subprocess.Popen(
            [sys.executable, str(HERE / "observe_r1.py"), "train", *options],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(timeout=moments.uniform(4, 12))
        except subprocess.TimeoutExpired:
            process.kill()
    train(config)
    assert files_of(tmp_path / "run") == undisturbed


def test_nan_gradients_are_skipped_and_end_the_run(few, tmp_path, monkeypatch):
    calls = []

    def poisoned(*arguments, **options):
        calls.append(0)
        loss, metrics = grpo_loss(*arguments, **options)
        return loss * (float("nan") if len(calls) > 4 else 1), metrics

    monkeypatch.setattr(observe_r1, "grpo_loss", poisoned)
    with pytest.raises(ValueError, match="three updates in a row"):
        train(train_config(few, tmp_path / "run", save_steps=1, minibatch_prompts=4))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [line["skipped_updates"] for line in lines][-3:] == [1, 2, 3]
    shown = [json.loads(line)["step"] for line in (tmp_path / "run" / "rollouts.jsonl").open()]
    assert shown.count(lines[-1]["step"]) == 4  # the whole batch
    folders = checkpoints(tmp_path / "run")[:2]
    saved = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert saved[0] == saved[1]


TWO_PROCESSES = """
import sys, torch
sys.path[:0] = [sys.argv[1]]
import test_observe_r1 as t
import observe_r1 as o

torch.distributed.init_process_group()
config = o.Config(num_generations=4, minibatch_prompts=3, gradient_checkpointing=True,
                  max_grad_norm=0.5)
whole = torch.load("rollouts.pt", weights_only=True)
rows = slice(o.RANK, None, o.WORLD)
processor = o.transformers.AutoProcessor.from_pretrained(t.TOY / "model")
problems = [t.make_problems()[i] for i in range(5)][rows]
rollouts = o.Rollouts(o.encode_prompts(problems, processor, t.sampling()), whole["ids"][rows],
                      whole["mask"][rows], [])
config.model = str(t.TOY / "model")
learner, reference = (o.shard(o.load_model(config), config) for _ in range(2))
learner.gradient_checkpointing_enable({"use_reentrant": False})
state = t.make_state(learner, reference, distributed=True)
state.optimizer = torch.optim.SGD(learner.parameters(), 0.05)
metrics = o.update(state, rollouts, whole["advantages"][rows], config)
o.save_model(state, t.Path("learned"))
if o.RANK == 0:
    t.Path("metrics.json").write_text(t.json.dumps(metrics))
"""


def test_two_processes_learn_what_one_learns(tmp_path, model, processor, problems):
    """Five prompts on two processes, one without weight, one without a picture: equal weights.

    Mini-batches of three: 2 + 1 and 1 + 1 groups, so the processes make unequal numbers of passes.
    SGD moves the weights in proportion to the gradient: 0.05 x the norm of 0.5.
    """
    config = replace(sampling(), minibatch_prompts=3, max_grad_norm=0.5)
    rollouts = run_rollout(model, processor, problems, config)
    advantages = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    advantages[2] = 0
    before = copy.deepcopy(model.state_dict())
    saved = {"ids": rollouts.response_ids, "mask": rollouts.mask, "advantages": advantages}
    torch.save(saved, tmp_path / "rollouts.pt")
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    result = torchrun(tmp_path / "two.py", HERE, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    state = make_state(model, copy.deepcopy(model))
    state.optimizer = torch.optim.SGD(model.parameters(), 0.05)
    metrics = update(state, rollouts, advantages, config)
    two = json.loads((tmp_path / "metrics.json").read_text())
    assert two == {
        name: pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in metrics.items()
    }
    learned = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path / "learned", dtype=torch.float32
    )
    for name, value in model.state_dict().items():
        other = learned.state_dict()[name]
        torch.testing.assert_close(other, value, atol=1e-6, rtol=1e-5, msg=name)
    assert any(
        (value - before[name]).abs().max() > 1e-3 for name, value in model.state_dict().items()
    )


def test_one_failing_process_ends_all(few, tmp_path):
    script = f"""
import sys
sys.path[:0] = [{str(HERE)!r}]
import test_observe_r1 as t
import observe_r1 as o

def failing(*arguments):
    if o.RANK == 1:
        raise RuntimeError("rank 1 has lost its disk")
    return o.rollout(*arguments)

o.train(t.train_config({few!r}, "run"), failing)
"""
    (tmp_path / "fail.py").write_text(script)
    started = time.time()
    result = torchrun(tmp_path / "fail.py", cwd=tmp_path)
    assert result.returncode != 0 and "rank 1 has lost its disk" in result.stderr
    assert time.time() - started < 90


def test_training_under_torchrun_and_resume_in_it(few, tmp_path):
    """More steps than one, uneven shares; what two processes wrote goes on to the same bits."""
    options = {**vars(train_config(few, "run")), "prompts_per_step": 5, "minibatch_prompts": 5}
    options = [f"--{name}={value}" for name, value in options.items()]
    assert torchrun(HERE / "observe_r1.py", "train", *options, cwd=tmp_path).returncode == 0
    first = (tmp_path / "run/final/model.safetensors").read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    result = torchrun(HERE / "observe_r1.py", "train", *options, "--resume=true", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "run/final/model.safetensors").read_bytes() == first
    with pytest.raises(ValueError, match="--nproc_per_node"):
        train(
            train_config(
                few, tmp_path / "run", prompts_per_step=5, minibatch_prompts=5, resume=True
            )
        )


@pytest.mark.parametrize(
    "options, why",
    [
        ({"num_generations": 1}, "2 or more"),
        ({"temperature": 0.0}, "equal"),
        ({"prompts_per_step": 10, "minibatch_prompts": 4}, "2 would be left over"),
        ({"min_pixels": 10, "max_pixels": 9}, "--min_pixels 10 > --max_pixels 9"),
        ({"min_length": 128}, "--bonus 0"),
        ({"eval_steps": 3}, "needs --eval_data"),
        ({"cpu_offload": True}, "torchrun"),
        ({"data": ""}, "--data is missing"),
        ({"model": "toy"}, "model"),
    ],
)
def test_bad_options_are_told_before_the_model_loads(few, tmp_path, options, why, monkeypatch):
    monkeypatch.setattr(observe_r1, "load_model", None)
    with pytest.raises((ValueError, OSError), match=why):
        train(replace(train_config(few, tmp_path / "run"), **options))


def test_other_models_are_refused_by_name(few, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "qwen2_vl"}')
    with pytest.raises(ValueError, match="is a qwen2_vl; only Qwen2.5-VL"):
        train(train_config(few, tmp_path / "run", model=str(tmp_path / "other")))


def test_an_output_folder_that_cannot_be_written(few, tmp_path):
    (tmp_path / "file").write_text("")
    options = [f"--{n}={v}" for n, v in vars(train_config(few, tmp_path / "file/run")).items() if v]
    result = run_script("train", *options, cwd=tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "Not a directory" in result.stderr.splitlines()[-1]


def test_out_of_memory_names_what_helps(monkeypatch):
    def full(config):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(observe_r1.COMMANDS, "train", full)
    monkeypatch.setattr(sys, "argv", ["observe_r1.py", "train"])
    with pytest.raises(SystemExit, match=r"(?s)out of memory.*--token_budget, --max_pixels"):
        observe_r1.main()


def test_control_tokens_in_a_question_are_refused(folder, processor, config):
    for token in ("<|im_end|>", "<|image_pad|>"):
        row = {"question": f"What {token} is it?", "answer": "1"}
        with pytest.raises(ValueError, match="control tokens"):
            load_problems(write(folder, [row]), check=prompt_check(processor, config))
    row = {"question": "Is <observe> a tag, and <|this|> none?", "answer": "1"}
    assert len(load_problems(write(folder, [row]), check=prompt_check(processor, config))) == 1


def shown(image, processor, config):
    """What the model sees of a picture: its mean brightness, 0 to 1, and its patches."""
    batch = encode_prompts([{"images": [image], "question": "q"}], processor, config)
    mean = torch.tensor(processor.image_processor.image_mean).mean()
    std = torch.tensor(processor.image_processor.image_std).mean()
    return (batch["pixel_values"].mean() * std + mean).item(), batch["image_grid_thw"].tolist()


def test_pictures_of_every_kind(folder, processor, config):
    """Grey of half brightness stays so in every mode; transparent is white; the rest is named."""
    grey = Image.new("L", (56, 56), 128)
    sixteen = Image.fromarray(np.full((56, 56), 128 * 257, np.uint16))
    palette = Image.new("P", (56, 56), 0)
    palette.putpalette([0, 0, 0] * 256)
    palette.info["transparency"] = 0
    for image, brightness in (
        (grey, 0.5),
        (grey.convert("RGB").convert("CMYK"), 0.5),
        (sixteen, 0.5),
        (Image.new("1", (56, 56), 1), 1),
        (Image.new("RGBA", (56, 56), (0, 0, 0, 0)), 1),
        (palette, 1),
        (Image.new("LA", (56, 56), (0, 0)), 1),
    ):
        assert shown(image, processor, config)[0] == pytest.approx(brightness, abs=0.02), image.mode
    assert shown(Image.new("L", (1, 1)), processor, config)[1] == [[1, 2, 2]]
    assert shown(Image.new("L", (3000, 3000)), processor, config)[1][0][1] <= 16
    turned = Image.new("L", (56, 28))
    exif = turned.getexif()
    exif[0x0112] = 6  # taken with the camera on its side
    turned.save(folder / "turned.jpg", exif=exif)
    frames = [Image.new("L", (56, 28), value) for value in (0, 255)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("L", (2000, 8)).save(folder / "thin.png")
    bomb = Image.new("1", (20000, 20000))
    bomb.save(folder / "bomb.png")

    def load(name):
        row = {"image": name, "question": "q", "answer": "1"}
        return load_problems(write(folder, [row]), check=prompt_check(processor, config))[0][
            "images"
        ][0]

    assert load("turned.jpg").size == (28, 56)
    assert shown(load("moving.gif"), processor, config)[0] == pytest.approx(0, abs=0.02)
    with pytest.raises(ValueError, match="row 0 .* aspect ratio"):
        load("thin.png")
    with pytest.raises(ValueError, match="row 0 .* decompression bomb"):
        load("bomb.png")


PEAK = """
import sys, torch
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/toy"]
from bench import high_water
from observe_r1 import token_log_probs
hidden = torch.randn(int(sys.argv[2]), 8, requires_grad=True)
head, targets = torch.nn.Linear(8, 151936, bias=False), torch.randint(151936, (len(hidden),))
head(hidden[:64]).sum().backward()
before = high_water()
token_log_probs(hidden, targets, head, [], 1.0).sum().backward()
print(high_water() - before)
"""


def test_log_probabilities_take_little_memory(tmp_path):
    """At most 15 % of full fp32 logits at G = 8, T = 2,048; three chunks take what two take."""
    (tmp_path / "peak.py").write_text(PEAK)
    peaks = []
    for tokens in ("1024", "1536"):
        command = [sys.executable, str(tmp_path / "peak.py"), str(HERE), tokens]
        result = subprocess.run(command, capture_output=True, text=True, timeout=170)
        peaks.append(int(result.stdout))
    assert 512 * 151936 * 4 < min(peaks) and max(peaks) < 0.15 * 8 * 2048 * 151936 * 4
    assert peaks[1] == pytest.approx(peaks[0], rel=0.15)


def test_report_escapes_what_a_model_or_a_file_wrote(tmp_path):
    evil = "<script>x</script><observe>a<think>b</observe></think><answer>&</answer>"
    numbers = {"accuracy": [1.0], "format": [0.0], "bonus": [0.2], "reward": [1.2]}
    numbers |= {"weight": 1.0, "advantage": [0.5], "length": [9]}
    problem = {"id": "<b>", "images": [], "question": "<script>q", "answer": "<i>"}
    (tmp_path / "config.json").write_text(json.dumps({"model": "<script>m"}))
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "reward": 1.2}\n{"step": 2, "reward": 3}\n'
    )
    (tmp_path / "rollouts.jsonl").write_text("")
    write_report(tmp_path)  # before the first rollout is written, and after
    rows = [rollout_row(step, problem, [evil], numbers) for step in (1, 2)]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "<i>" not in page and "http" not in page
    assert page.count("&lt;script&gt;x&lt;/script&gt;") == 2 and "step 2: 3<" in page
    assert '<span class="answer">&lt;answer&gt;&amp;&lt;/answer&gt;</span>' in page
    assert "bonus 0.2 ★" in page and "advantage +0.50" in page


def test_gpu_rows_of_the_bench(capsys):
    """The parameters of Qwen2.5-VL-3B; the rows themselves run here at the toy's shapes."""
    bench = load_toy_script("bench")
    count = sum(p.numel() for p in bench.random_model(device="meta").parameters())
    assert count == 3_754_622_976
    bench.gpu(SimpleNamespace(bandwidth=1e10, flops=1e11), {}, tokens=8, batches=(8,))
    rows = capsys.readouterr().out.splitlines()
    assert "rollout, 8 responses of 8 tokens" in rows[0] and "FLOP/s of the card" in rows[1]


# ------------------------------------------------------------------------------------- snippets

PASTED = {  # what each needs beside itself, and a call
    "group_advantages": "torch.tensor([[1.0, 0.0]]), torch.tensor([1.0])",
    "grpo_loss": "*[torch.zeros(2, 3)] * 3, torch.ones(2), torch.ones(2, 3)",
    "mix_ladder": "[0, 0.5, 1], [3, 4, 5]",
    "token_log_probs": "torch.ones(2, 4), torch.tensor([0, 1]), torch.nn.Linear(4, 5), [], 1.0",
    "pack_group": "{'input_ids': torch.ones(1, 3, dtype=int), 'position_ids': torch.arange(3)"
    ".expand(3, 1, 3)}, torch.ones(2, 2, dtype=int), torch.ones(2, 2, dtype=int)",
}


@pytest.mark.parametrize("name", PASTED)
def test_each_equation_runs_when_pasted_alone(name):
    """With the constants that it names, numpy, torch and the standard library; nothing else."""
    tree = ast.parse(Path(observe_r1.__file__).read_text())
    imports = [
        node
        for node in tree.body
        if isinstance(node, ast.ImportFrom | ast.Import)
        and getattr(node, "module", "") not in ("rewards", "report", "plumbing")
    ]
    (function,) = [node for node in tree.body if getattr(node, "name", None) == name]
    used = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    constants = [
        node
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in used
    ]
    scope = {}
    exec("\n".join(map(ast.unparse, [*imports, *constants, function])), scope)
    results = []
    for place in (scope, vars(observe_r1)):
        torch.manual_seed(0)
        results.append(eval(f"{name}({PASTED[name]})", place))
    torch.testing.assert_close(*results)


def test_commands_of_the_readme_name_options_that_exist():
    """Every `observe_r1.py` line of the README parses; … stands for more options."""
    text = (HERE / "README.md").read_text()
    lines = re.findall(r"observe_r1\.py ((?:train|ladder|eval)[^`\n#]*)", text)
    assert len(lines) > 8
    for line in lines:
        words = [word for word in line.split() if word not in ("…", "...")]
        if "--help" not in words:
            command, config = parse_arguments(words)
            assert command in observe_r1.COMMANDS


def test_links_of_the_readme_lead_to_the_functions_they_name():
    text = (HERE / "README.md").read_text()
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", text)
    assert len(links) > 15
    for name, file, line in links:
        assert f"def {name}(" in (HERE / file).read_text().splitlines()[int(line) - 1], name
    for target in re.findall(r"\]\(([\w/.]+?)\)", text):
        assert (HERE / target).exists(), target


def test_the_rollout_engine_of_the_readme(model, processor, problems, config, monkeypatch):
    """The block for vLLM, with a stand-in of the calls that it makes: same rollouts as ours."""
    ours = run_rollout(model, processor, problems, config)
    outputs = [
        SimpleNamespace(
            outputs=[
                SimpleNamespace(token_ids=ids[on.bool()].tolist(), text=text)
                for ids, on, text in zip(*group)
            ]
        )
        for group in zip(ours.response_ids, ours.mask, ours.texts)
    ]
    seen = {}

    class LLM:
        def __init__(self, model, **options):
            seen.update(options)

        def apply_model(self, function):
            function(SimpleNamespace(load_weights=lambda named: seen.update(weights=dict(named))))

        def generate(self, requests, settings, use_tqdm):
            seen.update(requests=requests, settings=settings)
            return outputs

    fake = SimpleNamespace(LLM=LLM, SamplingParams=lambda **options: options)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setattr(observe_r1, "train", lambda *arguments: seen.update(trained=arguments))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    scope = readme_block("from vllm")
    assert seen["trained"] == (scope["config"], scope["vllm_rollout"])
    theirs = scope["vllm_rollout"](model, processor, problems, config)
    assert torch.equal(theirs.response_ids, ours.response_ids) and theirs.texts == ours.texts
    assert torch.equal(theirs.mask, ours.mask) and seen["settings"]["n"] == config.num_generations
    assert set(seen["settings"]["logit_bias"]) == set(vision_tokens(model))
    assert seen["weights"].keys() == dict(model.named_parameters()).keys()
    assert len(seen["requests"]) == len(problems)
    for request, problem in zip(seen["requests"], problems):
        assert request["prompt"].count("<|image_pad|>") == len(problem["images"])
        assert len(request["multi_modal_data"].get("image", [])) == len(problem["images"])
        assert request["prompt"].count(problem["question"]) == 1
    torch.testing.assert_close(
        response_log_probs(model, theirs, config), response_log_probs(model, ours, config)
    )


def run_block(sign, folder):
    """Run the README's shell block that holds `sign` as it is written."""
    blocks = re.findall(r"```(\w*)\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    (block,) = [block for kind, block in blocks if not kind and sign in block]
    for file in (*HERE.glob("*.py"), HERE / "requirements.txt", HERE / "toy"):
        (folder / file.name).symlink_to(file)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    shell = ["bash", "-e", "-c", block]
    return subprocess.run(
        shell, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


def test_the_habits_block_of_the_readme_runs(tmp_path):
    result = run_block("runs/habits", tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    shares = [line.split() for line in result.stdout.splitlines()[-2:]]
    assert [words[0] for words in shares] == ["True", "False"]
    assert 0 < float(shares[0][1]) < float(shares[1][1]) < 1


@slow
@pytest.mark.slow
@pytest.mark.parametrize("sign", ["python observe_r1.py\n", "toy/config.json --output_dir runs/l"])
def test_the_slow_blocks_of_the_readme_run(sign, tmp_path):
    """The first command of all, with its installation, and the toy's ladder."""
    result = run_block(sign, tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    if "runs/l" in sign:
        summary = json.loads((tmp_path / "runs/ladder/summary.json").read_text())
        assert summary["raw"] == 960 and all(summary["levels"])
        text = (HERE / "README.md").read_text()
        told = re.search(r"drops? .*?; ((?:\d+ ){8}\d+) problems of difficulty 0 to 1", text, re.S)
        told = [int(count) for count in told[1].split()]
        assert sum(abs(a - b) for a, b in zip(summary["levels"], told)) <= 20  # two threads round
    else:
        summary = json.loads((tmp_path / "runs/toy/summary.json").read_text())
        assert summary["accuracy_after"] - summary["accuracy_before"] > 0.3


def test_the_readme_links_every_file_it_names():
    text = (HERE / "README.md").read_text()
    for name in re.findall(r"`((?:toy/)?[\w.]+\.(?:py|svg|jsonl))`|\]\((toy/[\w.]+)\)", text):
        file = name[0] or name[1]
        if "/" in file or file in ("rewards.py", "report.py", "plumbing.py", "observe_r1.py"):
            assert (HERE / file).exists(), file
