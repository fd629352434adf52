# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "transformers>=5.24", "qwen-vl-utils>=0.0.14",
#   "datasets>=5.0", "tqdm>=4.67"]
# ///
"""Observe-R1 (arXiv 2505.12432) in one script: teach a vision-language model to look, then reason.

    python observe_r1.py      # trains the toy: real handwriting, no network, no GPU, minutes
    python observe_r1.py ladder --model Qwen/Qwen2.5-VL-3B-Instruct --data raw.parquet
    python observe_r1.py train --model Qwen/Qwen2.5-VL-3B-Instruct --data runs/ladder/ladder.parquet
    python observe_r1.py eval --model runs/train/final --data held_out.parquet
    torchrun --nproc_per_node 8 observe_r1.py train ...   # ladder and eval as well

The method stands in the order of a run: problems, ladder, rollout, rewards, advantages,
log-probabilities, loss, training. What surrounds it follows below one divider. Where this script
differs from the paper's released code:
1. The KL penalty is part of the loss, not of the reward. A group whose advantages are all zero is
   skipped, its KL included.
2. The loss is a mean over each response's tokens, then over responses. How the responses are
   split into backward passes changes memory, never the result.
3. Mini-batches are whole groups, so that a prompt and its pictures are encoded once a pass.
4. No prompt is cut and no problem is dropped in silence. Correctness is kept apart from rewards.

Words:
policy       the model that is trained: it gives each possible next token a probability
group        the G responses that were sampled from the policy for one prompt
rollout      sampling the groups of a step, and what it returns
advantage    how much better a response is than the others of its group; negative if it is worse
reference    the model before training, from which the policy must not stray far
mini-batch   the groups of one optimiser step
step         one rollout and the optimiser steps on it, one for each of its mini-batches

Shapes: B prompts, G responses per prompt, P prompt tokens, T response tokens, N responses of any
prompts, L tokens in a row or list, H hidden size, V vocabulary.
"""

import argparse
import difflib
import hashlib
import inspect
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import torch
import torch.distributed.checkpoint as dcp
import transformers
from PIL import Image
from qwen_vl_utils import process_vision_info, smart_resize
from safetensors import SafetensorError
from torch.distributed import fsdp
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints

import rewards


@dataclass
class Config:
    """Defaults are the published run. A field's comment is its help, and names its least value."""

    model: str = "Qwen/Qwen2.5-VL-3B-Instruct"  # folder or hub id of a Qwen2.5-VL
    data: str = ""  # Parquet file of problems, as tools/convert.py writes it; without it, the toy
    eval_data: str = ""  # held-out problems, measured before and after training
    output_dir: str = ""  # folder for all that a run writes; default runs/COMMAND
    overwrite: bool = False  # replace what --output_dir holds, which moves to OUTPUT_DIR.old
    resume: bool = False  # go on with the run that --output_dir holds
    config: str = ""  # JSON file of options; those of the command line win
    seed: int = 0  # seed of the order and of sampling, at least 0

    shuffle: bool = False  # problems in random order instead of the file's, which is the ladder's
    max_steps: int = 0  # thin the ladder evenly to so many steps (0: all of it), at least 0
    prompts_per_step: int = 128  # prompts of a step, at least 1
    num_generations: int = 8  # G, the responses sampled for each prompt, at least 2
    temperature: float = 1.0  # sampling temperature, at least 0.01
    max_prompt_tokens: int = 9216  # longer prompts are refused, never cut, at least 1
    max_new_tokens: int = 8192  # length cap of a response, at least 1
    min_pixels: int = 3136  # smaller pictures are enlarged to this area, at least 1
    max_pixels: int = 2560000  # larger pictures are reduced to this area, at least 1
    cache_gb: float = 0.0  # GB of key/value cache (0: 0.6 of a card's free, 8 on a CPU), at least 0
    system_prompt: str = ""  # replaces the built-in system prompt

    observe: bool = True  # ask for <observe> and reward it; false: think and answer alone
    min_length: int = 100  # tokens that a response must exceed for the bonus, at least 0
    bonus: float = 0.2  # reward of the shortest correct response of a group, at least 0
    dynamic_weight: bool = True  # weigh a group by 4 sigma p (1 - p) instead of by 1
    sigma: float = 1.8  # weight of a half-solved group, at least 0

    minibatch_prompts: int = 8  # most groups of an optimiser step, at least 1
    learning_rate: float = 1e-6  # peak learning rate, at least 0
    warmup_ratio: float = 0.03  # share of the optimiser steps that warm up, at least 0
    max_grad_norm: float = 1.0  # longer gradients are scaled down to this norm, at least 1e-9
    clip_range: float = 0.2  # the ratio is clipped to 1 plus or minus this, at least 0
    kl_coef: float = 0.01  # beta of the KL penalty (0: no reference model), at least 0
    lora_rank: int = 0  # rank of LoRA adapters, needs peft (0: train all weights), at least 0
    token_budget: int = 16384  # tokens of a backward pass: memory, not results, at least 1
    gradient_checkpointing: bool = True  # recompute activations to save memory

    eval_steps: int = 0  # measure held-out accuracy every so many steps, at least 0
    num_samples: int = 0  # responses to each held-out problem (0: one, greedy), at least 0
    save_steps: int = 0  # write a checkpoint every so many steps, at least 0


# ---------------------------------------------------------------------------------------- problems
# A problem is a picture (or several, or none), a question and a short answer. The prompt asks for
# the blocks that the format reward checks. The paper's own is not published.

PROMPTS = {
    "observe": "Look at the image carefully before you reason. First describe what matters for the "
    "question inside <observe> </observe>, then reason step by step inside <think> </think>, and "
    "give only the final answer inside <answer> </answer>.",
    "think": "Reason step by step inside <think> </think>, then give only the final answer inside "
    "<answer> </answer>.",
    "answer": "Give only the final answer inside <answer> </answer>, without any reasoning.",
}
MARK = "<image>"  # stands in a question where a picture belongs; without marks, pictures come first


def chat_messages(problem, config):
    """System and user message of a problem, with each picture where its mark stands."""
    question, pictures = problem["question"], problem["images"]
    if MARK not in question:
        question = MARK * len(pictures) + question
    limits = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
    first, *texts = question.split(MARK)
    content = [{"type": "text", "text": first}]
    for picture, text in zip(pictures, texts):
        content.append({"type": "image", "image": picture, **limits})
        content.append({"type": "text", "text": text})
    system = config.system_prompt or PROMPTS["observe" if config.observe else "think"]
    return [{"role": "system", "content": system}, {"role": "user", "content": content}]


def prompt_text(messages, processor):
    """What the model reads, in its own layout; each picture is one token so far."""
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode_prompts(problems, processor, config):
    """What the processor makes of each prompt, encoded alone: input_ids [1,P], pixel_values, ..."""
    prompts = []
    for problem in problems:
        messages = chat_messages(problem, config)
        images, _ = process_vision_info(messages)  # resizes, so the processor must not do it again
        text = prompt_text(messages, processor)
        prompts.append(processor(text=text, images=images, do_resize=False, return_tensors="pt"))
    return prompts


# ------------------------------------------------------------------------------------------ ladder
# The paper's NeuraLadder. The difficulty of a problem is the share of wrong responses among 8: nine
# levels, and nine stages. A stage draws on its own level most and on the four nearest, so that
# training gets harder smoothly instead of in steps.


def mix_ladder(difficulty, complexity, seed=0):
    """Order problems into nine stages of smoothly rising difficulty (NeuraLadder).

    difficulty: share of wrong responses, 0 to 1; complexity: mean response length in tokens; [n].
    Returns (order, stage): a permutation of range(n), and the stage 0 to 8 of each position.

    Level 0 was always solved, level 8 never; the shares between fall into seven levels of equal
    width. A stage is as large as its level plus the paper's difference between the two. The shares
    of the paper's figure are scaled, by stages and by levels in turn, until each stage is full and
    each level used up. Within a level, problems with short responses come first, because they take
    less reasoning.
    """
    # A line per stage: the shares of nine levels in it, read off the paper's figure to about .01;
    # then how many of 1,000 problems are of that level, and how many in that stage, rounded.
    figure = """
        .29 .18  .19  .19  .17  0    0    0    0     15  42
        .05 .50  .15  .155 .15  0    0    0    0     35  42
        .02 .08  .51  .17  .23  0    0    0    0     50  54
        0   .03  .07  .505 .21  .19  0    0    0     75  80
        0   0    .03  .07  .58  .19  .14  0    0    135 112
        0   0    0    .03  .10  .575 .15  .15  0    150 132
        0   0    0    0    .05  .12  .54  .18  .12  150 155
        0   0    0    0    .02  .055 .10  .685 .14  200 178
        0   0    0    0    .02  .05  .07  .15  .72  190 206"""
    table = np.array(figure.split(), dtype=float).reshape(9, 11)
    share, (paper_level, paper_stage) = table[:, :9], table[:, 9:].T / 1000

    difficulty = np.asarray(difficulty, dtype=float)
    level = np.floor(7 * difficulty).astype(int) + (difficulty > 0)
    level_size, n = np.bincount(level, minlength=9), len(level)
    # The paper's surplus of a stage over its level, less where the level is rarer here.
    surplus = (paper_stage - paper_level) * np.minimum(n, level_size / paper_level)
    stage_size = level_size + surplus
    for _ in range(500):  # iterative proportional fitting
        share *= stage_size[:, None] / share.sum(1, keepdims=True).clip(1e-12)
        share *= level_size / share.sum(0).clip(1e-12)
    ends = np.rint(share.cumsum(0)).astype(int)
    counts = np.diff(ends, axis=0, prepend=0)  # [stage,level], problems

    # In small or odd mixtures a stage may vanish, swell, or be easier than the one before. Then
    # nothing is mixed: each stage is its own level.
    size = counts.sum(1)
    vanishes = (size == 0) & (100 * level_size >= 3 * n)
    swells = size > 1.6 * level_size + n / 20
    mean = counts @ np.arange(9) / 8 / size.clip(1)  # difficulty
    falls = np.diff(mean[100 * size >= 3 * n]) < -0.02
    if (vanishes | swells).any() or falls.any():
        counts = np.diag(level_size)

    # Each level is cut into its parts for the nine stages, and each part spread evenly over its
    # stage, with jitter, lest the stride of --max_steps hit some levels alone.
    by_length = np.lexsort((complexity, level))  # level by level, in each the short ones first
    parts = counts.T.flatten()
    stage = np.tile(np.arange(9), 9).repeat(parts)
    nth = np.concatenate([np.arange(k) for k in parts])  # within the part
    place = (nth + np.random.default_rng(seed).random(n)) / parts.repeat(parts)  # from 0 to 1
    order = np.lexsort((place, stage))
    return by_length[order], stage[order]


def select_problems(difficulty, complexity):
    """Numbers of the problems that stay: of difficulty 0 only the half with the longer responses.

    What was solved eight times out of eight may be missed later, above all if it takes long.
    """
    easy = np.flatnonzero(difficulty == 0)
    by_length = easy[complexity[easy].argsort(kind="stable")]
    return np.setdiff1d(np.arange(len(difficulty)), by_length[: len(easy) // 2])


def ladder(config):
    """Make a NeuraLadder of raw problems: clean, score, select, mix. Returns its summary.json."""
    output, processor, raw, _ = start(config)
    engine = (load_model(config, DTYPE), processor, raw)

    # Clean: drop answers that no rule can check, and what the model answers without reasoning.
    checkable = [row for row, gold in enumerate(raw["answer"]) if rewards.answers_match(gold, gold)]
    blind = replace(config, system_prompt=PROMPTS["answer"], temperature=GREEDY, num_generations=1)
    blind.max_new_tokens = min(256, config.max_new_tokens)  # an answer alone is short
    scored = score_problems(*engine, checkable, blind, output / "clean.jsonl")
    unsolved = np.array([row["row"] for row in scored if row["accuracy"] == [0]], dtype=int)

    # Score: eight responses each.
    scored = score_problems(*engine, unsolved, config, output / "scores.jsonl")
    difficulty = np.array([1 - np.mean(row["accuracy"]) for row in scored])
    complexity = np.array([np.mean(row["response_length"]) for row in scored])

    # Select and mix.
    kept = select_problems(difficulty, complexity)
    order, stage = mix_ladder(difficulty[kept], complexity[kept], config.seed)
    chosen = kept[order]
    mixed = raw.select(unsolved[chosen]).remove_columns(list({*LADDER_COLUMNS} & {*raw.features}))
    for name, values in zip(LADDER_COLUMNS, (difficulty[chosen], complexity[chosen], stage)):
        mixed = mixed.add_column(name, values)
    if RANK == 0:
        mixed.to_parquet(output / "ladder.parquet")
    counts = {
        "raw": len(raw),
        "checkable": len(checkable),
        "not_solved_without_reasoning": len(unsolved),
        "never_solved": list_never_solved(scored, output / "never_solved.jsonl"),
        "ladder": len(kept),
        "stages": np.bincount(stage, minlength=9).tolist(),
    }
    return write_result(output / "summary.json", counts)


def training_steps(problems, config):
    """Row numbers of the prompts of each step, easy to hard: all problems, or thinned evenly."""
    order = np.arange(len(problems))
    if config.shuffle:
        np.random.default_rng(config.seed).shuffle(order)
    wanted = config.max_steps * config.prompts_per_step
    if 0 < wanted < len(order):  # thinned all along: a cut would lose the hard end
        order = order[np.linspace(0, len(order) - 1, wanted).round().astype(int)]
    return np.array_split(order, math.ceil(len(order) / config.prompts_per_step))


# ----------------------------------------------------------------------------------------- rollout
# For each prompt the policy, as it is now, writes G responses, token by token, sampled from
# softmax(logits / temperature). Tokens that stand for pictures are never sampled: the passes of the
# update would look for a picture that is not there.

GREEDY = 0.0  # temperature at which the likeliest token is taken


@dataclass
class Rollouts:
    """Prompts, and responses to them on the policy's device, which hold none of `vision_tokens`."""

    prompts: list  # B prompts of `encode_prompts`; they stay in host memory
    response_ids: torch.Tensor  # [B,G,T]
    mask: torch.Tensor  # [B,G,T], true for each sampled token, the stop token too
    texts: list[list[str]]  # B lists of G, without stop tokens


@torch.no_grad()
def sample(model, prompts, stop, config):
    """G responses to each prompt: tokens [B,G,T], and lengths [B,G] with the stop token.

    stop: tensor of the tokens that end a response.
    """
    hidden, position, mask, cache = read_prompts(model, prompts, config)
    N, T = len(hidden), config.max_new_tokens
    P = mask.shape[-1] - T
    response_ids, lengths = position.new_zeros(N, T), position.new_zeros(N)
    response = torch.arange(N, device=model.device)  # the one that each row of the batch writes
    going = torch.ones_like(lengths, dtype=torch.bool)
    decoder, banned = model.model.language_model, vision_tokens(model)
    for t in range(T):
        logits = model.lm_head(hidden).float()  # [rows,V]
        logits[:, banned] = -math.inf
        if config.temperature == GREEDY:
            token = logits.argmax(-1)
        else:
            probabilities = (logits / config.temperature).softmax(-1)
            token = torch.multinomial(probabilities, 1).squeeze(-1)
        # A finished row keeps writing until it leaves the batch; that lies beyond its length.
        response_ids[response, t] = token
        lengths[response] += going
        going = going & ~torch.isin(token, stop)

        left = int(going.sum())  # once per token, Python waits for the GPU
        if left == 0:
            break
        if left <= 0.75 * len(going):  # copying the cache for fewer does not pay
            cache.batch_select_indices(going)
            rows = (response, token, position, mask, going)
            response, token, position, mask, going = (values[going] for values in rows)
        position = position + 1
        hidden = decoder(
            inputs_embeds=decoder.embed_tokens(token[:, None]),
            attention_mask={"full_attention": mask[..., : P + t + 1]},
            position_ids=position.expand(3, -1)[..., None],
            cache=cache,
        ).last_hidden_state[:, -1]
    return response_ids.view(len(prompts), -1, T), lengths.view(len(prompts), -1)


def rollout(model, processor, problems, config) -> Rollouts:
    """Sample G responses for each problem. `train` takes any function of this signature instead.

    Chunks of prompts are so small that the cache has room even if all responses reach the cap.
    """
    use_fast_attention(model).eval()  # no dropout while sampling
    prompts = encode_prompts(problems, processor, config)
    stop = torch.tensor(model.generation_config.eos_token_id, device=model.device).flatten()
    P = max(prompt["input_ids"].shape[1] for prompt in prompts)
    # Beside a prompt's keys and values, its forward pass takes some six times their memory.
    tokens = max(config.num_generations * (P + config.max_new_tokens), 7 * P)
    size = max(1, int(cache_memory(config) / (tokens * cache_bytes(model.config))))
    parts = []
    for first in range(0, len(prompts), size):
        with AUTOCAST:
            parts.append(sample(model, prompts[first : first + size], stop, config))
    response_ids, lengths = map(torch.cat, zip(*parts))
    T = int(lengths.max())
    mask = torch.arange(T, device=model.device) < lengths[..., None]  # [B,G,T]
    response_ids = response_ids[..., :T] * mask
    # Special tokens stay in the text, because the tags of the format may be special, too.
    kept = mask & ~torch.isin(response_ids, stop)
    texts = []
    for group, kept_of_group in zip(response_ids, kept):
        texts.append([processor.decode(ids[k]) for ids, k in zip(group, kept_of_group)])
    return Rollouts(prompts, response_ids, mask, texts)


# --------------------------------------------------------------------------- rewards and advantages
# reward = accuracy {0, 1} + format {0, .5} + bonus {0, .2}. With p, the share of correct responses,
# the weight of a group is 4 sigma p (1 - p): 0 if every response is right or every one wrong.
# advantage = weight * (reward - mean) / std: how much better a response is than its siblings.
# Subtracting the mean lowers the noise, and the expected direction stays, but for a factor.
# What std and weight do together: for rewards of 0 and 1 the std is about sqrt(p (1 - p)). Divided
# by it, all groups have advantages of the same size (in root mean square), so that one success
# among eight gets 2.5. The weight is 4 sigma std squared, so that A = 4 sigma std (reward - mean):
# most where half is right, and little where luck or a wrong gold decides.


def score_rollouts(rollouts, problems, config):
    """Rewards, their sum `reward`, length and whether it was cut of each response; weights [B]."""
    lengths = rollouts.mask.sum(-1).cpu()  # [B,G]
    groups = []
    for problem, texts, group_lengths in zip(problems, rollouts.texts, lengths.tolist()):
        accuracy = [rewards.accuracy_reward(text, problem["answer"]) for text in texts]
        correct = [value == 1 for value in accuracy]  # for bonus and weight, format does not count
        form = [rewards.format_reward(text, config.observe) for text in texts]
        bonus = rewards.bonus_rewards(correct, group_lengths, config.min_length, config.bonus)
        weight = rewards.dynamic_weight(correct, config.sigma) if config.dynamic_weight else 1.0
        groups.append((accuracy, form, bonus, weight))
    accuracy, form, bonus, weight = map(torch.tensor, zip(*groups))
    return {
        "accuracy": accuracy,
        "format": form,
        "bonus": bonus,
        "reward": accuracy + form + bonus,
        "weight": weight,
        "response_length": lengths,
        "truncated_fraction": lengths >= config.max_new_tokens,
    }


def group_advantages(rewards, weights, eps=1e-6):
    """A = w (r - mean) / (std + eps) in each group: rewards [B,G], weights [B] -> [B,G].

    std is the unbiased one (n - 1). Groups of equal rewards are found by their range, because the
    computed std of eight times 0.1 is rounding noise and not zero.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0], [0.1, 0.1, 0.1]]), torch.tensor([1.6, 1.6]))
    tensor([[ 1.8475, -0.9238, -0.9238],
            [ 0.0000,  0.0000,  0.0000]])
    """
    centred = rewards - rewards.mean(-1, keepdim=True)  # [B,G]
    spread = rewards.amax(-1, keepdim=True) - rewards.amin(-1, keepdim=True)  # [B,1]
    advantages = weights[:, None] * centred / (rewards.std(-1, keepdim=True) + eps)
    return advantages.masked_fill(spread < eps, 0.0)


# ------------------------------------------------------------------------------- log-probabilities
# log p(token) = z - log sum exp z with z = logits / temperature, as in sampling. The responses of a
# group share one row of tokens, in which prompt and pictures stand once. That is exact, because in
# `packed_attention` a response sees the prompt and itself alone.


def pack_group(inputs, response_ids, mask):
    """One row of tokens: a prompt once, then its responses end to end; response_ids, mask [N,T].

    inputs: `model_inputs` of the prompt. Returns the inputs of the row, and for each of the L
    response tokens the place of its predecessor [L], whose hidden state predicts it. The row's
    attention_mask is the list of lengths that `packed_attention` wants: P, then one per response.
    """
    P = inputs["input_ids"].shape[1]
    nth = mask.cumsum(-1)[mask]  # [L]: 1, 2, ... within each response
    # Rotary positions have three axes. Text advances all of them together, from the largest value
    # that any axis reached in the prompt; a picture advances each axis by a different amount.
    positions = (inputs["position_ids"].max() + nth).expand(3, 1, -1)
    previous = torch.arange(len(nth), device=mask.device) + P - 1
    predecessors = previous.where(nth > 1, P - 1)  # a first token follows the prompt
    row = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], response_ids[mask][None]], 1),
        "position_ids": torch.cat([inputs["position_ids"], positions], 2),
        "attention_mask": [P, *mask.sum(-1).tolist()],
    }
    return row, predecessors


def token_log_probs(hidden, targets, head, banned, temperature, chunk=512):
    """log p(target) from hidden states [L,H] and targets [L] -> [L]; head: weights [V,H].

    Logits over a vocabulary of 152,000 tokens are the memory peak of training. They are made for
    `chunk` tokens at a time, reduced to one number each, and made again in the backward pass, in
    fp32, because bf16 would round logits of 20 to multiples of 1/8.
    banned: tokens that are never sampled; they have no probability here either. To be called
    outside autocast, which would round again.
    """
    head = head.float()

    def log_probs_of(hidden, targets):
        logits = hidden.float() @ head.T / temperature  # [chunk,V]
        logits[:, banned] = float("-inf")
        return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)

    if len(targets) <= chunk:  # one chunk would be made again at once: nothing to gain
        return log_probs_of(hidden, targets)
    recomputed = torch.utils.checkpoint.checkpoint
    chunks = zip(hidden.split(chunk), targets.split(chunk))
    return torch.cat([recomputed(log_probs_of, *part, use_reentrant=False) for part in chunks])


class Policy(torch.nn.Module):
    """A Qwen2.5-VL whose forward pass returns log-probabilities of responses."""

    def __init__(self, model):
        super().__init__()
        self.model = use_fast_attention(model)

    def forward(self, rollouts=None, responses=None, temperature=1.0):
        """Log-probabilities [N,T] of N responses; 0 in the padding.

        responses: numbers b of their prompts [N], and g in their groups [N], prompt by prompt.
        """
        if rollouts is None:  # see `shard`
            return None
        model, packed = self.model, []
        for b in dict.fromkeys(responses[0]) or [0]:  # an empty pass runs a prompt, too
            own = [g for a, g in zip(*responses) if a == b]
            inputs = model_inputs(model, rollouts.prompts[b])
            packed.append(pack_group(inputs, rollouts.response_ids[b, own], rollouts.mask[b, own]))
        row, predecessors = join_rows(packed)
        with AUTOCAST:
            hidden = model.model(**row, use_cache=False).last_hidden_state[0, predecessors]  # [L,H]
        mask, banned = rollouts.mask[responses], vision_tokens(model)
        targets = rollouts.response_ids[responses][mask]
        log_probs = token_log_probs(hidden, targets, model.lm_head.weight, banned, temperature)
        log_probs = log_probs + zero_of_vision(model)  # for passes without pictures
        return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, log_probs)


def response_log_probs(policy, rollouts, config, prompts=None):
    """Log-probability of each response token at the sampling temperature, [B,G,T]; 0 in padding.

    policy: a Policy, or its model. prompts: only the responses to these, 0 elsewhere.
    """
    policy = policy if isinstance(policy, Policy) else Policy(policy)
    prompts = range(len(rollouts.prompts)) if prompts is None else prompts
    log_probs = torch.zeros(rollouts.mask.shape, device=rollouts.mask.device)
    for responses in plan_passes(rollouts, prompts, config):
        log_probs[responses] = policy(rollouts, responses, config.temperature)
    return log_probs


# -------------------------------------------------------------------------------------------- loss
# The policy's probability of a token may have moved since it was sampled: ratio = p / p_old. As
# d ratio = ratio * d log p, the gradient of ratio * A is that of log p times A where the ratio is
# 1: this is the policy gradient. It makes the tokens of good responses likelier and those of bad
# ones less likely; its mean over sampled responses is, but for positive factors of groups and
# lengths, the direction in which the expected reward rises fastest. Clipping ends the push once a
# token has moved by 20 % in the direction that its advantage asks for. The KL penalty keeps the
# policy near the model it started from.


def grpo_loss(
    log_probs,
    old_log_probs,
    ref_log_probs,
    advantages,
    mask,
    clip_range=0.2,
    kl_coef=0.01,
    num_responses=None,
):
    """GRPO (arXiv 2402.03300): log-probabilities and mask [N,T], advantages [N] -> loss, metrics.

    A token costs -min(ratio A, clip(ratio) A) + kl_coef * KL, a response the mean over its tokens.
    Their sum is divided by num_responses, those of the whole mini-batch, skipped groups included
    (default N). ref_log_probs may be None: no KL. The metrics are means over the N responses.

    KL(policy || reference) is estimated from the sampled token by exp(q) - q - 1, q = log p_ref -
    log p: never negative, of low variance, and unbiased while the policy is the one that sampled
    (k3 in joschu.net/blog/kl-approx.html).
    """
    mask = mask.bool()

    def log_ratio(above, below):  # [N,T]
        # 0 in the padding, whatever stands there. The limit keeps exp finite, for infinity times an
        # advantage of 0 is not a number; exp(20) is half a billion, and no update comes near it.
        return (above - below).masked_fill(~mask, 0).clamp(-20, 20)

    def token_mean(values):  # [N,T] -> [N]
        return (values * mask).sum(-1) / mask.sum(-1).clamp(min=1)

    ratio = log_ratio(log_probs, old_log_probs).exp()  # 1 in the first mini-batch of a rollout
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)
    gain = ratio * advantages[:, None]
    objective = gain.minimum(clipped_ratio * advantages[:, None])

    q = 0 * ratio if ref_log_probs is None else log_ratio(ref_log_probs, log_probs)
    kl = q.exp() - q - 1

    cost = token_mean(kl_coef * kl - objective)  # [N]
    loss = cost.sum() / (num_responses or len(cost))
    clipped = token_mean(objective < gain)
    return loss, {"kl": token_mean(kl).mean().item(), "clip_fraction": clipped.mean().item()}


# ---------------------------------------------------------------------------------------- training
# A step samples, scores, weighs, compares and updates, on the next problems of the ladder. Groups
# whose advantages are all 0 are not passed through the model, but stay in the denominator of the
# loss: the fewer groups are left, the smaller the gradient.


def train(config, rollout=rollout):
    """Observe-R1. Returns the content of summary.json; `rollout` may be an engine of your own."""
    state = prepare(config, rollout)
    for problems in next_problems(state, config):  # of the ladder, a step's at a time
        with unsharded(state.policy) as policy:
            rollouts = rollout(policy.model, state.processor, problems, config)
        scores = score_rollouts(rollouts, problems, config)  # rewards [B,G], weights [B]
        scores["advantage"] = group_advantages(scores["reward"], scores["weight"])  # [B,G]
        metrics = update(state, rollouts, scores["advantage"], config)  # GRPO
        finish_step(state, problems, rollouts, scores, metrics, config, rollout)
    return finish_run(state, config, rollout)


def update(state, rollouts, advantages, config):
    """Take an optimiser step for each mini-batch of whole groups of a rollout. Returns metrics."""
    policy, mask = state.policy, rollouts.mask
    advantages = advantages.to(mask.device)
    trained = [b for b, group in enumerate(advantages) if group.any()]  # the others are skipped

    if config.kl_coef:  # first: while adapters are off, FSDP would note that nothing trains
        with reference_policy(state) as base:
            reference = fixed_log_probs(base, rollouts, trained, config)  # [B,G,T]
    # Not the sampler's own numbers: those are rounded differently, and a ratio should start at 1.
    old = fixed_log_probs(policy, rollouts, trained, config)  # [B,G,T]
    if not config.kl_coef:
        reference = old  # a placeholder: without a KL penalty it is multiplied by 0

    policy.train()
    norms, sums = [], np.zeros(3)  # sums: of responses, their KL, their clipped share
    for num_groups, passes in minibatches(rollouts, trained, config):
        options = (config.clip_range, config.kl_coef, num_groups * config.num_generations)
        for responses in passes:  # numbers of their prompts, and in their groups
            log_probs = policy(rollouts, responses, config.temperature)  # [N,T]
            given = (old[responses], reference[responses], advantages[responses], mask[responses])
            loss, metrics = grpo_loss(log_probs, *given, *options)
            backward(loss)
            if N := len(log_probs):
                sums += [N, N * metrics["kl"], N * metrics["clip_fraction"]]
        norms.append(optimizer_step(state, config))  # moves nothing where no group is trained
        state.updates += 1

    count, kl, clipped = sum(gather([sums]))
    finite = [norm for norm in norms if math.isfinite(norm)]
    return {
        "kl": kl / max(1, count) if config.kl_coef else math.nan,
        "clip_fraction": clipped / max(1, count),
        "grad_norm": np.mean(finite) if finite else math.nan,
        "learning_rate": state.optimizer.param_groups[0]["lr"],
        "optimizer_step": state.updates,
        "skipped_updates": len(state.skipped),
    }


def learning_rate_scale(update, num_updates, warmup_ratio):
    """Share of the peak learning rate in update 0, 1, ...: it rises evenly, then falls to a tenth.

    Of several, one at least warms up and one runs at the peak; the fall is half a cosine.
    """
    warmup = min(max(1, round(warmup_ratio * num_updates)), num_updates - 1)
    if update <= warmup:
        return (update + 1) / (warmup + 1)
    progress = (update - warmup) / (num_updates - 1 - warmup)  # from 0 to 1
    return 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2


def make_optimizer(policy, config):
    """AdamW with betas 0.9 and 0.95 on what is trained."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, config.learning_rate, (0.9, 0.95), weight_decay=0, fused=True)


@contextmanager
def reference_policy(state):
    """The policy before training: a copy of it, or the policy with its adapters off."""
    if state.adapters:
        with state.adapters.disable_adapter():
            yield state.policy
    else:
        yield state.reference


# ==================================================================================================
# The method ends here. What surrounds it: evaluation, start and end of a run, data, devices and
# processes, checkpoints, logs, the command line.
# ==================================================================================================


# -------------------------------------------------------------------------------------- evaluation
# Scoring a ladder and evaluating are one pass: sample responses to each problem and see which are
# right. A difficulty belongs to the model that sampled, and so does a ladder.


def response_rows(problems, rollouts, scores):
    """One row for each problem: what it is, its responses, and lists of all their scores."""
    rows = []
    for b, problem in enumerate(problems):
        row = {**problem, "responses": rollouts.texts[b]}
        del row["images"]
        rows.append(row | {name: values[b].tolist() for name, values in scores.items()})
    return rows


def list_never_solved(scored, file):
    """Write the problems without a right response, each with the commonest answer; how many.

    They stay in the ladder, but the gold of some may be wrong.
    """
    never_solved = [row for row in scored if not any(row["accuracy"])]
    for row in never_solved:
        answers = [rewards.extract_answer(text) for text in row["responses"]]
        row["commonest"] = max(answers, key=answers.count)
    if RANK == 0:
        file.unlink(missing_ok=True)  # of a run that was resumed
    append_log(file, never_solved)
    return len(never_solved)


def mean_scores(rows, names):
    """Means over rows and responses."""
    return {name: np.mean([row[name] for row in rows]) for name in names}


def score_problems(model, processor, problems, numbers, config, file, rollout=rollout):
    """The row of `response_rows` of each problem with one of these row numbers.

    Rows are kept in a file as they come, and a run that is resumed goes on behind the last of them.
    """
    rows = read_log(file)
    firsts = range(len(rows), len(numbers), config.prompts_per_step)
    for first in tqdm(firsts, file.stem, leave=False, disable=RANK > 0):
        set_seed(config.seed, first, RANK)
        own = numbers[first : first + config.prompts_per_step][RANK::WORLD]
        scored = []
        if len(own):
            batch = read_problems(problems, own)
            rollouts = rollout(model, processor, batch, config)
            scored = response_rows(batch, rollouts, score_rollouts(rollouts, batch, config))
        scored = sorted(gather(scored), key=lambda row: row["row"])
        append_log(file, scored)
        rows += scored
    return rows


def accuracy_interval(accuracy, n):
    """Wilson's 95 % interval of an accuracy over n problems; with several samples, rather wide."""
    z2 = 1.96**2
    middle = accuracy + z2 / (2 * n)
    half = math.sqrt(z2 * (accuracy * (1 - accuracy) / n + z2 / (4 * n**2)))
    return [(middle + side) / (1 + z2 / n) for side in (-half, half)]


def pass_at_k(num_correct, num_samples, k):
    """Mean chance that k responses to a problem hold a right one (unbiased, arXiv 2107.03374).

    num_correct: how many of num_samples responses were right, for each problem.
    """
    ways = math.comb(num_samples, k)
    return np.mean([1 - math.comb(num_samples - c, k) / ways for c in num_correct])


def evaluate(model, processor, problems, config, file, rollout=rollout):
    """Accuracy with its 95 % interval, pass@k, format, length; all responses go to the file."""
    samples, numbers = config.num_samples or 1, range(len(problems))
    config = replace(config, num_generations=samples)
    if config.num_samples == 0:
        config.temperature = GREEDY
    rows = score_problems(model, processor, problems, numbers, config, file, rollout)
    result = mean_scores(rows, ("accuracy", "format", "response_length"))
    result["interval"] = accuracy_interval(result["accuracy"], len(rows))
    correct = [int(sum(row["accuracy"])) for row in rows]
    result["pass_at_k"] = {k: pass_at_k(correct, samples, k) for k in range(1, samples + 1)}
    return {**result, "n": len(rows)}


def evaluate_model(config):
    """The `eval` command: writes eval.json, and all responses into responses.jsonl."""
    output, processor, problems, _ = start(config)
    model, file = load_model(config, DTYPE), output / "responses.jsonl"
    return write_result(output / "eval.json", evaluate(model, processor, problems, config, file))


def measure(state, step, config, rollout):
    """`evaluate` on the held-out problems after a step; empty without them.

    What held_out-STEP.jsonl holds already, the measure before training above all, is read there.
    """
    if not state.held_out:
        return {}
    file = state.output / f"held_out-{step}.jsonl"
    with unsharded(state.policy) as policy:
        return evaluate(policy.model, state.processor, state.held_out, config, file, rollout)


# --------------------------------------------------------------------------- start and end of a run

MAY_CHANGE = {"data", "eval_data", "save_steps", "eval_steps", "cache_gb", "token_budget"}
MAY_CHANGE |= {"output_dir", "gradient_checkpointing"}


@dataclass
class TrainState:
    """All that training holds and changes."""

    output: Path
    processor: object
    problems: datasets.Dataset
    held_out: datasets.Dataset | None
    steps: list  # row numbers of the prompts of each step
    num_updates: int  # optimiser steps of the whole run
    policy: Policy
    adapters: object | None  # peft's view of the model, with --lora_rank
    reference: Policy | None  # None with --kl_coef 0, and with adapters, which can be switched off
    optimizer: torch.optim.Optimizer
    skipped: list  # updates whose gradient was NaN or infinite
    step: int = 0
    updates: int = 0
    stopping: bool = False  # Ctrl-C or SIGTERM came
    clock: float = 0.0  # when the step began


def start(config):
    """(folder, processor, problems, held-out problems). A run that is replaced is moved aside."""
    output, options = Path(config.output_dir), asdict(config)
    for name in ("resume", "overwrite", "config"):  # these belong to one start alone
        del options[name]
    options["content"] = []  # of the problems
    for file in filter(None, (config.data, config.eval_data)):
        with open(file, "rb") as opened:
            options["content"].append(hashlib.file_digest(opened, "sha256").hexdigest())
    taken = {path.name for path in output.glob("*")} - {"data", "config.json"}
    if config.resume:
        before = read_json(output / "config.json")
        changed = {name for name in options if options[name] != before.get(name)} - MAY_CHANGE
        if changed:
            raise ValueError(f"{output} cannot go on: {sorted(changed)} changed since")
    elif taken and not config.overwrite:
        raise ValueError(f"{output} is taken: --resume true goes on, --overwrite true replaces it")
    if WORLD > 1:  # processes may end a long rollout hours apart
        torch.distributed.init_process_group(BACKENDS, timeout=timedelta(days=1))
    torch.use_deterministic_algorithms(DEVICE.type == "cpu")
    if RANK == 0 and taken and not config.resume:
        aside = Path(f"{output}.old")
        shutil.rmtree(aside, ignore_errors=True)
        output.rename(aside)
    gather([])  # the others wait for it

    size = {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}  # areas
    processor = transformers.AutoProcessor.from_pretrained(config.model, size=size)
    if type(processor) is not transformers.Qwen2_5_VLProcessor:
        raise ValueError(f"--model {config.model} is not a Qwen2.5-VL")
    problems = load_problems(config.data, processor, config)
    held_out = load_problems(config.eval_data, processor, config) if config.eval_data else None
    write_json(output / "config.json", options)
    return output, processor, problems, held_out


def load_model(config, dtype, device=None):
    """The checkpoint, on this process's device if no other is named."""
    model_class = transformers.Qwen2_5_VLForConditionalGeneration
    model = model_class.from_pretrained(config.model, dtype=dtype)
    return model.to(device or DEVICE)


def add_adapters(model, config):
    """peft's view of the model, in which only LoRA adapters (fp32) train."""
    try:
        import peft
    except ImportError as error:
        raise ValueError("--lora_rank needs peft: pip install peft") from error
    rank = config.lora_rank
    lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    # Without a gradient at its input, FSDP would reduce the first layer in another order in passes
    # without pictures, and the processes would wait for each other forever.
    model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_(True))
    return peft.get_peft_model(model, lora)


def prepare(config, rollout):
    """Everything that training needs; says what is going to happen."""
    run = start(config)
    _, _, problems, held_out = run
    steps = training_steps(problems, config)
    updates = sum(math.ceil(len(step) / config.minibatch_prompts) for step in steps)
    if len(steps[-1]) < WORLD:
        raise ValueError(f"a step of {len(steps[-1])} problems for {WORLD} processes")
    if dead := [gold for gold in problems["answer"] if not rewards.answers_match(gold, gold)]:
        say(f"warning: {len(dead)} answers can never be matched, for example {dead[0]!r}")
    if held_out and (common := contents(held_out) & contents(problems)):
        say(f"warning: {len(common)} held-out problems are training problems as well")
    if config.bonus and config.min_length >= config.max_new_tokens:
        say("warning: with --min_length >= --max_new_tokens, no response can get the bonus")

    set_seed(config.seed)  # adapters start at random
    model = load_model(config, DTYPE if config.lora_rank else torch.float32, HOME)
    adapters = add_adapters(model, config) if config.lora_rank else None
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    policy, reference = shard(Policy(model)), None
    if config.kl_coef and not adapters:
        model = load_model(config, torch.float32, HOME).eval().requires_grad_(False)
        for part in model.model.modules():
            if isinstance(part, torch.nn.Linear) and WORLD == 1:  # FSDP wants one dtype in a layer
                part.to(DTYPE)  # autocast rounds these weights anyway
        reference = shard(Policy(model))
    optimizer = make_optimizer(policy, config)
    state = TrainState(*run, steps, updates, policy, adapters, reference, optimizer, skipped=[])
    say(
        f"{len(steps)} steps x {len(steps[0])} of {len(problems)} problems x "
        f"{config.num_generations} responses, {updates} optimiser steps, {WORLD} x {DEVICE.type}"
    )
    if config.resume:
        restore(state)
    else:
        measure(state, 0, config, rollout)
    stop_on_signals(state)
    return state


def next_problems(state, config):
    """The problems of this process in each step that is left."""
    for step in tqdm(range(state.step, len(state.steps)), "training", disable=RANK > 0):
        state.clock = time.time()
        set_seed(config.seed, step, RANK)  # all that is random in a step follows from it
        yield read_problems(state.problems, state.steps[step][RANK::WORLD])


def look_at_first_step(problems, rollouts, scores):
    """Warn if nothing was earned: something is wrong with prompt, tags or answers then."""
    text, gold = rollouts.texts[0][0], problems[0]["answer"]
    for name in ("accuracy", "format"):
        if not any(gather([scores[name].any().item()])):
            say(
                f"warning: no response of the first step earned anything for {name}. One of them:\n"
                f"{text[-500:]}\nThe checker reads {rewards.extract_answer(text)!r}, the answer is "
                f"{gold!r}. Usual causes: problems too hard, --max_new_tokens too small, a model "
                "that does not follow the prompt, answers in another form. See\n"
                f"python tools/walkthrough.py --problem {problems[0]['row']} and the run's options"
            )


def finish_step(state, problems, rollouts, scores, metrics, config, rollout):
    """Evaluate if it is time, log, save if it is time; end a run that was told to stop."""
    state.step += 1
    if state.step == 1:
        look_at_first_step(problems, rollouts, scores)
    if config.eval_steps and state.step % config.eval_steps == 0:
        metrics["eval_accuracy"] = measure(state, state.step, config, rollout)["accuracy"]
    metrics["seconds"] = time.time() - state.clock
    log_step(state, response_rows(problems, rollouts, scores), scores, metrics)
    if state.skipped[-3:-2] == [state.updates - 3]:  # and so the two after it
        raise ValueError(f"NaN or infinite gradients in three updates up to step {state.step}")
    stopping = any(gather([state.stopping]))  # a signal may reach one process alone
    if stopping or config.save_steps and state.step % config.save_steps == 0:
        save_checkpoint(state)
    if stopping:
        raise SystemExit(f"stopped after step {state.step}; --resume true goes on from it")


def finish_run(state, config, rollout):
    """Save the model, measure it, write the summary."""
    save_final(state, config)
    summary = {"steps": state.step, "skipped_updates": len(state.skipped)}
    for when, step in (("before", 0), ("after", state.step)):
        for name, value in measure(state, step, config, rollout).items():
            summary[f"{name}_{when}"] = value
    summary["seconds"] = sum(row["seconds"] for row in read_log(state.output / "metrics.jsonl"))
    return write_result(state.output / "summary.json", summary)


# -------------------------------------------------------------------------------------------- data
# One format, which tools/convert.py makes of all others: a Parquet file with these columns, of
# which the first three must be there.

LADDER_COLUMNS = ("difficulty", "complexity", "stage")  # the columns that the ladder command adds
COLUMNS = {"images": datasets.List(datasets.Image(decode=False))}
TEXTS = {"question", "answer", "id", "category"}
COLUMNS |= dict.fromkeys(TEXTS, datasets.Value("string"))
COLUMNS |= dict.fromkeys(LADDER_COLUMNS, datasets.Value("float64"))


def load_problems(file, processor, config):
    """The rows of a Parquet file, looked at one by one. Pictures stay encoded."""
    try:
        kinds = {field.name: str(field.type) for field in pyarrow.parquet.read_schema(file)}
        wrong = {"images", "question", "answer"} - kinds.keys() | kinds.keys() - COLUMNS.keys()
        # A number is not text: would it be 1.1, or 1.100000023?
        wrong |= {name for name in TEXTS & kinds.keys() if "string" not in kinds[name]}
        if wrong:
            raise ValueError(f"the columns {sorted(wrong)} are missing, unknown or not text")
        features = datasets.Features({name: COLUMNS[name] for name in kinds})
        folder = f"{config.output_dir}/data"  # shared by all processes
        problems = datasets.Dataset.from_parquet(file, features=features, cache_dir=folder)
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        mend = "`python tools/convert.py` makes a file that fits"
        raise ValueError(f"{file}: {error.__cause__ or error}; {mend}") from error
    faults = []
    for row in range(RANK, len(problems), WORLD):
        try:
            check_problem(problems[row], processor, config)
        except (ValueError, TypeError, OSError, Image.DecompressionBombError) as error:
            faults.append(f"row {row}: {error}")
    faults = gather(faults)
    if faults:
        raise ValueError("\n  ".join([f"{file}: {len(faults)} unusable rows", *faults[:20]]))
    return problems


def check_problem(problem, processor, config):
    """Tokens of its prompt; ValueError for a problem that would train silently wrong.

    No picture is decoded.
    """
    question, pictures = problem["question"], problem["images"]
    needed = [problem[name] for name in problem.keys() - {"id", "category"}]
    if None in needed or not question.strip() or not problem["answer"].strip():
        raise ValueError("question, answer, list of pictures or a score of the ladder is empty")
    if question.count(MARK) not in (0, len(pictures)):
        raise ValueError(f"{question.count(MARK)} marks {MARK} for {len(pictures)} pictures")
    special = processor.tokenizer.added_tokens_decoder.values()
    if found := [token.content for token in special if token.special and token.content in question]:
        raise ValueError(f"the question holds the control tokens {found}")
    text = prompt_text(chat_messages(problem, config), processor)
    if text.rstrip().endswith(("<observe>", "<think>", "<answer>")):
        raise ValueError("the chat template begins the response: take its tag out")
    length = len(processor.tokenizer(text)["input_ids"])
    side = processor.image_processor.patch_size * processor.image_processor.merge_size
    for stored in pictures:  # the text holds one token for each
        picture = Image.open(io.BytesIO(stored["bytes"]))  # reads the header alone
        if picture.mode not in ("L", "RGB"):  # 16 bits or transparent parts would be shown wrong
            raise ValueError(f"a picture in {picture.mode}, not RGB or L; run tools/convert.py")
        # A token is a square of the picture as process_vision_info resizes it.
        area = math.prod(smart_resize(*picture.size, side, config.min_pixels, config.max_pixels))
        if area == 0:
            raise ValueError("a picture is so thin that --max_pixels leaves nothing of it")
        length += area // side**2 - 1
    if length > config.max_prompt_tokens:  # cut, a picture could lose some of its tokens
        raise ValueError(f"the prompt has {length} tokens; a smaller --max_pixels makes it shorter")
    return length


def read_problems(problems, rows):
    """Rows as dictionaries with decoded pictures."""
    read = []
    for row in map(int, rows):
        problem = {**problems[row], "row": row}
        try:
            problem["images"] = [datasets.Image().decode_example(x) for x in problem["images"]]
        except (ValueError, OSError, SyntaxError) as error:
            raise ValueError(f"row {row}: a picture cannot be decoded: {error}") from error
        read.append(problem)
    return read


def contents(problems):
    """Question and pictures of each problem, the pictures by their hash."""
    return {(row["question"], *(hash(x["bytes"]) for x in row["images"])) for row in problems}


# --------------------------------------------------------------------------- devices and processes
# Under torchrun each process takes every WORLD-th prompt of a step and keeps 1 / WORLD of weights,
# gradients and moments (FSDP2). One process runs the same code with WORLD = 1.

RANK = int(os.environ.get("RANK", "0"))  # torchrun sets these
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
ACCELERATOR = torch.accelerator.current_accelerator(check_available=True)
DEVICE = torch.device("cpu")
BACKENDS = "cpu:gloo"  # on a card `gather` and the norm of gradients go different ways
if ACCELERATOR:
    DEVICE = torch.device(ACCELERATOR.type, int(os.environ.get("LOCAL_RANK", "0")))
    torch.accelerator.set_device_index(DEVICE.index)
    BACKENDS += f",{DEVICE.type}:{torch.distributed.get_default_backend_for_device(DEVICE)}"
HOME = DEVICE if WORLD == 1 else torch.device("cpu")  # of what FSDP will shard, and move
# Arithmetic in bf16 where the device has it: fp16 would need a scaler, and its range is small.
# Trained weights stay fp32: bf16 would swallow updates of 1e-6 whole.
has_bf16 = getattr(torch.get_device_module(DEVICE), "is_bf16_supported", None)
DTYPE = torch.bfloat16 if has_bf16 and has_bf16(including_emulation=False) else torch.float32
AUTOCAST = torch.autocast(DEVICE.type, torch.bfloat16, enabled=DTYPE == torch.bfloat16)
# cuDNN's attention gives NaN gradients under some masks (pytorch issue 196678), and it plans each
# length of a decoding anew.
torch.backends.cuda.enable_cudnn_sdp(False)


def say(text):
    """Print once, not once per process, and above a progress bar."""
    if RANK == 0:
        tqdm.write(text)


def gather(values):
    """The lists of all processes, end to end in the order of their ranks, on each of them."""
    lists = [values] * WORLD
    if WORLD > 1:
        torch.distributed.all_gather_object(lists, values)
    return [value for part in lists for value in part]


def set_seed(*numbers):
    """Seed all random generators; the hash of numbers, unlike a string's, is always the same."""
    transformers.set_seed(hash(numbers) % 2**32)


def vision_tokens(model):
    """Tokens that stand for pictures and videos, or enclose them."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return [getattr(model.config, name) for name in names]


def fixed_log_probs(policy, rollouts, prompts, config):
    """`response_log_probs` without gradients."""
    with torch.no_grad(), unsharded(policy):
        # At least one pass, of prompt 0 if none is trained: FSDP fetches layers ahead in the order
        # of the last pass. A process that made none here would follow the sampler's order and ask
        # for another layer than the rest, and all would wait forever.
        return response_log_probs(policy, rollouts, config, prompts or [0])


def plan_passes(rollouts, prompts, config):
    """The responses of each pass: as many groups as --token_budget holds, or a part of one.

    A pass is two lists, the numbers b of the prompts and g in their groups, one of each a response.
    """
    passes, room = [], 0
    for b in prompts:
        P = cost = rollouts.prompts[b]["input_ids"].shape[1]  # once in a pass
        lengths = rollouts.mask[b].sum(-1).tolist()
        if P + sum(lengths) > room:  # a group that would be torn begins a pass
            room = 0
        for g, length in enumerate(lengths):
            if cost + length > room:
                passes.append(([], []))
                room, cost = config.token_budget, P
            room -= cost + length
            cost = 0
            for numbers, number in zip(passes[-1], (b, g)):
                numbers.append(number)
    return passes


def minibatches(rollouts, trained, config):
    """(number of groups, passes of this process) of each optimiser step.

    All are of nearly the same size: a rest of one group would count as much as eight elsewhere.
    Prompt b of process r is number b * WORLD + r of the step. All processes must run the model
    equally often, or FSDP waits forever: who has fewer passes makes some of no responses, whose
    gradient is 0.
    """
    total = sum(gather([len(rollouts.prompts)]))
    for numbers in np.array_split(np.arange(total), math.ceil(total / config.minibatch_prompts)):
        mine = [b for b in trained if b * WORLD + RANK in numbers]
        passes = plan_passes(rollouts, mine, config)
        missing = max(gather([len(passes)])) - len(passes)
        yield len(numbers), passes + [([], [])] * missing


def backward(loss):
    """Add the gradient of this process's part of the loss."""
    (WORLD * loss).backward()  # FSDP averages over the processes; we want the sum


def optimizer_step(state, config):
    """Scale a long gradient down and step, unless it is NaN or infinite. Returns its norm."""
    scale = learning_rate_scale(state.updates, state.num_updates, config.warmup_ratio)
    state.optimizer.param_groups[0]["lr"] = config.learning_rate * scale
    norm = torch.nn.utils.clip_grad_norm_(state.policy.parameters(), config.max_grad_norm)
    if hasattr(norm, "full_tensor"):  # from the shards of all processes
        norm = norm.full_tensor()
    if torch.isfinite(norm):
        state.optimizer.step()
    else:
        state.skipped.append(state.updates)
    state.optimizer.zero_grad()
    return norm.item()


def shard(policy):
    """Share the weights out over the processes."""
    if WORLD == 1:
        return policy
    precision = fsdp.MixedPrecisionPolicy(DTYPE, torch.float32)
    for part in (*policy.model.model.language_model.layers, policy):
        fsdp.fully_shard(part, mp_policy=precision)
    policy()  # FSDP takes the first module that runs for its root, and a rollout runs a layer
    policy.reshard()  # the optimiser must be given the shards
    return policy


def zero_of_vision(model):
    """0, with a gradient of 0 for each weight of the vision tower.

    With several processes FSDP waits for a gradient, also in a pass without pictures, and one
    process must compute the same as several.
    """
    return 0 * sum(parameter.flatten()[0] for parameter in model.model.visual.parameters())


@contextmanager
def unsharded(policy):
    """Inside, each process has all weights, so that it can sample as many tokens as it likes."""
    parts = [part for part in policy.modules() if isinstance(part, fsdp.FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    yield policy
    for part in parts:
        part.set_reshard_after_forward(True, recurse=False)
        part.reshard()


# ----------------------------------------------------------------------------- attention and cache
# What makes rollout and passes fast; the numbers are those of the library's attention and cache.


def model_inputs(model, prompt):
    """Inputs of a forward pass over one prompt, with rope positions [3,1,P] (time, height, width).

    Positions are always explicit: left to itself, the model reuses offsets of an earlier batch.
    """
    inputs = {name: values.to(model.device) for name, values in prompt.items()}
    inputs["position_ids"], _ = model.model.get_rope_index(**inputs)
    del inputs["mm_token_type_ids"]
    return inputs


def join_rows(packed):
    """Several results of `pack_group` as one: their rows end to end, blind to each other."""
    rows, predecessors = zip(*packed)
    starts = np.cumsum([0] + [row["input_ids"].shape[1] for row in rows])
    joined = {"attention_mask": {"full_attention": [row.pop("attention_mask") for row in rows]}}
    for name in set().union(*rows):  # pictures are not in all
        values = [row[name] for row in rows if name in row]
        joined[name] = torch.cat(values, -1 if name.endswith("ids") else 0)
    return joined, torch.cat([places + start for places, start in zip(predecessors, starts)])


def read_prompts(model, prompts, config):
    """The forward pass over all prompts, and room for G responses to each: N rows.

    Returns the hidden state that predicts the first response token [N,H]; the position of the last
    prompt token [N]; what attention adds to its scores [N,1,1,P+T], which is minus infinity for the
    padding on the left of shorter prompts, else 0; and the cache of keys and values.
    """
    lengths = [prompt["input_ids"].shape[1] for prompt in prompts]
    P, T, G = max(lengths), config.max_new_tokens, config.num_generations
    none = torch.zeros((0, 0), dtype=torch.bool, device=model.device)  # no responses yet
    row, _ = join_rows([pack_group(model_inputs(model, one), none, none) for one in prompts])
    cache = DynamicCache()
    hidden = model.model(**row, cache=cache).last_hidden_state[0]  # [L,H]
    last = np.cumsum(lengths) - 1  # of each prompt
    layers = []
    for layer in cache.layers:
        # Under autocast, rope makes keys of fp32, and attention wants them as the values are.
        both = torch.cat((layer.keys, layer.values)).to(DTYPE)  # [2,heads,L,size]
        parts = [pad(part, (0, 0, P - part.shape[2], T)) for part in both.split(lengths, 2)]
        layers.append(FixedLayer(torch.stack(parts).repeat_interleave(G, 0), P))
    seen = [hidden.new_zeros(n + T, dtype=DTYPE) for n in lengths]
    mask = pad_sequence(seen, True, -math.inf, "left")[:, None, None]
    once = (hidden[last], row["position_ids"][0, 0, last], mask)
    return *(values.repeat_interleave(G, 0) for values in once), Cache(layers)


def packed_attention(module, query, key, value, groups, **options):
    """Attention of packed rows: a prompt on itself, each of its responses on it and on itself.

    groups: a list of lengths for each row of `pack_group`. query [1,heads,L,size], key and value
    with perhaps fewer heads -> [1,L,heads,size]. Each token sees what it would see if its response
    alone stood behind the prompt: the result is the same, and no mask of L x L is made. What is no
    packed row goes the library's way.
    """
    if not isinstance(groups, list):
        return sdpa_attention_forward(module, query, key, value, groups, **options)
    lengths = [length for group in groups for length in group]
    # Under autocast, rope returns queries and keys of fp32.
    parts = iter(zip(*(x.to(value.dtype).split(lengths, 2) for x in (query, key, value))))
    outputs = []
    for group in groups:
        prompt = None  # its keys and values, once it is done
        for _ in group:
            q, *own = next(parts)
            k, v = (torch.cat(pair, 2) for pair in zip(prompt, own)) if prompt else own
            prompt = prompt or own
            causal = causal_lower_right(q.shape[2], k.shape[2])
            output = scaled_dot_product_attention(
                q, k, v, causal, scale=options["scaling"], enable_gqa=True
            )
            outputs.append(output)
    return torch.cat(outputs, 2).transpose(1, 2), None


def window_attention(module, query, key, value, cu_seq_lens_q, scaling, **options):
    """Attention of the vision tower, [1,heads,patches,size]: all windows of one length in one call.

    The library makes a call for each window, up to 225 a picture in each layer.
    """
    lengths, output = cu_seq_lens_q.diff(), torch.empty_like(value)
    for n in lengths.unique().tolist():
        own = (lengths == n).repeat_interleave(lengths)  # the patches in windows of this length
        q, k, v = (x[0, :, own].unflatten(1, (-1, n)) for x in (query, key, value))
        attended = scaled_dot_product_attention(q, k, v, scale=scaling)  # [heads,windows,n,size]
        output[0, :, own] = attended.flatten(1, 2)
    return output.transpose(1, 2), None


transformers.AttentionInterface.register("packed", packed_attention)
transformers.AttentionMaskInterface.register("packed", sdpa_mask)
transformers.AttentionInterface.register("flash_windows", window_attention)


def use_fast_attention(model):
    """Let the model attend by `packed_attention` and `window_attention`."""
    model.model.language_model.config._attn_implementation = "packed"
    # To a name with "flash" the tower hands all its windows at once.
    model.model.visual.config._attn_implementation = "flash_windows"
    return model


class FixedLayer(DynamicLayer):
    """Keys and values of one layer in one tensor [N,2,heads,P+T,size], with room for T tokens.

    The library's own cache copies all of them for each new token.
    """

    def __init__(self, buffer, length):
        super().__init__()
        self.buffer, self.length = buffer, length

    def update(self, keys, values, *args, **kwargs):
        self.buffer[..., self.length, :] = torch.stack((keys, values), 1)[..., 0, :]
        self.length += 1
        return self.buffer[..., : self.length, :].unbind(1)

    def batch_select_indices(self, indices):
        self.buffer = self.buffer[indices]


def cache_bytes(shapes):
    """Bytes of the keys and values of one token in all layers; shapes: a model's configuration."""
    text = shapes.get_text_config()
    head_size = text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * text.num_key_value_heads * head_size * DTYPE.itemsize


def cache_memory(config):
    """Bytes for a rollout's cache; what else is free holds autocast's bf16 weights and logits."""
    if config.cache_gb or not ACCELERATOR:
        return 1e9 * (config.cache_gb or 8)
    unused = torch.accelerator.memory_reserved() - torch.accelerator.memory_allocated()
    return 0.6 * (torch.accelerator.get_memory_info()[0] + unused)


# ------------------------------------------------------------------------------------- checkpoints
# A checkpoint holds what is trained, its moments and the position in the run. Random states are no
# part of it: each step seeds its own.

TRAINED = dcp_state.StateDictOptions(ignore_frozen_params=True, strict=False)


def tensors_of(state):
    """Trained weights and their moments, as torch.distributed.checkpoint wants them."""
    model, optimizer = dcp_state.get_state_dict(state.policy, state.optimizer, options=TRAINED)
    return {"model_state_dict": model, "optim_state_dict": optimizer}


def save_checkpoint(state):
    """Write checkpoint-N. Its file .metadata comes last and says that the rest is whole."""
    folder = state.output / f"checkpoint-{state.step}"
    position = {"step": state.step, "updates": state.updates, "skipped": state.skipped}
    position["logs"] = {log.name: log.stat().st_size for log in state.output.glob("*.jsonl")}
    folder.mkdir(exist_ok=True)
    write_json(folder / "position.json", position)
    dcp.save(tensors_of(state), checkpoint_id=folder)
    if RANK == 0:
        rotate_checkpoints(state.output, 2)


def restore(state):
    """Go on from the newest whole checkpoint, whatever the number of processes that wrote it."""
    folders = map(Path, sort_checkpoints(state.output))
    whole = [folder for folder in folders if (folder / ".metadata").exists()]
    if not whole:
        raise ValueError(f"{state.output} holds no whole checkpoint; --overwrite true starts anew")
    tensors = tensors_of(state)
    dcp.load(tensors, checkpoint_id=whole[-1])
    dcp_state.set_state_dict(state.policy, state.optimizer, **tensors, options=TRAINED)
    position = read_json(whole[-1] / "position.json")
    logs = position.pop("logs")
    vars(state).update(position)  # step, updates, skipped
    gather([])  # all have read
    if RANK == 0:
        for log in state.output.glob("*.jsonl"):  # what came after the checkpoint comes again
            os.truncate(log, logs.get(log.name, 0))
    say(f"goes on after step {state.step}, from {whole[-1]}")


def save_final(state, config):
    """Write a folder that from_pretrained and AutoProcessor load, with adapters merged.

    observe_r1.json holds what shaped the prompts, so that the model is measured as it was trained.
    """
    options = replace(TRAINED, full_state_dict=True, cpu_offload=True)
    weights = dcp_state.get_model_state_dict(state.policy, options=options)
    if RANK > 0:
        return
    folder, model = state.output / "final", load_model(config, torch.float32, "cpu")
    adapters = add_adapters(model, config) if config.lora_rank else None
    Policy(model).load_state_dict(weights, strict=False)  # frozen weights are not among them
    if adapters:
        adapters.save_pretrained(folder / "adapter")
        model = adapters.merge_and_unload()
    model.save_pretrained(folder)
    state.processor.save_pretrained(folder)
    shaped = {name: getattr(config, name) for name in SHAPES_PROMPTS}
    write_json(folder / "observe_r1.json", shaped)


# -------------------------------------------------------------------------------- logs and signals


def stop_on_signals(state):
    """Ctrl-C or SIGTERM: finish the step, save, leave. A second one: at once.

    torchrun kills its processes 30 seconds after a signal; its --shutdown-timeout gives them more.
    """

    def note(number, frame):
        if state.stopping:
            raise KeyboardInterrupt
        state.stopping = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)


def read_json(file):
    """The object that a JSON file holds."""
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is not a JSON object: {error}") from error


def write_json(file, content):
    """Write a JSON file, once, not once per process."""
    if RANK == 0:
        file.write_text(json.dumps(content, indent=1))


def read_log(file):
    """The rows of a .jsonl file, none if there is no file; half a line, left by a kill, is cut."""
    text = file.read_bytes() if file.exists() else b""
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        os.truncate(file, whole)
    return [json.loads(line) for line in text[:whole].splitlines()]


def append_log(file, rows):
    """Add rows to a .jsonl file, once, not once per process."""
    if RANK == 0:
        with open(file, "a") as log:
            log.writelines(json.dumps(row) + "\n" for row in rows)


def write_result(file, content):
    """Write and print the result of a command, to four digits."""
    content = json.loads(json.dumps(content), parse_float=lambda number: round(float(number), 4))
    write_json(file, content)
    say(f"{file}: {json.dumps(content)}")
    return content


def log_step(state, own, scores, metrics):
    """A line on the screen, a line in metrics.jsonl, two groups in rollouts.jsonl."""
    rows = gather(own)
    names = [name for name in (*scores, "difficulty") if name in rows[0]]
    metrics |= mean_scores(rows, names)
    metrics["zero_weight_fraction"] = np.mean([row["weight"] == 0 for row in rows])
    say(
        f"step {state.step}  reward {metrics['reward']:.3f}  accuracy {metrics['accuracy']:.3f}  "
        f"format {metrics['format']:.3f} of 0.5  length {metrics['response_length']:.0f}  "
        f"clipped {metrics['clip_fraction']:.3f}  kl {metrics['kl']:.2g}"
    )
    if "eval_accuracy" in metrics:
        say(f"  held-out accuracy {metrics['eval_accuracy']:.3f}")
    for name, value in metrics.items():  # JSON has no NaN
        metrics[name] = value if math.isfinite(value) else None
    append_log(state.output / "metrics.jsonl", [{"step": state.step, **metrics}])
    shown = sorted(own, key=lambda row: -row["weight"])[:2]  # of those that teach most
    append_log(state.output / "rollouts.jsonl", [{"step": state.step, **row} for row in shown])


# ------------------------------------------------------------------------------------ command line

COMMANDS = {"train": train, "ladder": ladder, "eval": evaluate_model}
USAGE = f"python observe_r1.py [{' | '.join(COMMANDS)}] [--OPTION VALUE] ..."
TOY = Path(__file__).resolve().parent / "toy" / "config.json"
HELP = dict(re.findall(r"^    (\w+): .*  # (.*)$", inspect.getsource(Config), re.MULTILINE))
SHAPES_PROMPTS = ("observe", "system_prompt", "min_pixels", "max_pixels")


def check_config(config):
    """ValueError for an option of the wrong type or below its least value."""
    for name, kind in Config.__annotations__.items():
        value, least = getattr(config, name), HELP[name].partition("at least ")[2]
        fits = type(value) is kind or kind is float and type(value) is int
        if not fits or least and not float(least) <= value < math.inf:  # false for NaN as well
            raise ValueError(f"--{name} {value!r}: {HELP[name]} ({kind.__name__})")
    if config.min_pixels > config.max_pixels:
        raise ValueError(f"--min_pixels {config.min_pixels} > --max_pixels {config.max_pixels}")
    if config.eval_steps and not config.eval_data:
        raise ValueError("--eval_steps needs --eval_data")


def parse_arguments(words):
    """(command, Config); options need no command, and without --data they are for the toy."""
    parser = transformers.HfArgumentParser(Config, usage=USAGE, allow_abbrev=False)
    for action in parser._actions:
        if action.dest in HELP:
            action.help = f"{HELP[action.dest]} (default: {action.default!r})"
        action.default = argparse.SUPPRESS  # so that parsing returns what was given, and no more
    parser.add_argument("command", nargs="?", default="train", help=", ".join(COMMANDS))
    parsed, unknown = parser.parse_known_args(words)
    given = vars(parsed)
    command = given.pop("command")
    if unknown or command not in COMMANDS:
        word, *_ = [*unknown, command]
        nearest = difflib.get_close_matches(word, [*COMMANDS, *parser._option_string_actions])
        raise ValueError(f"{word} is unknown; the nearest are {nearest}. {USAGE}")

    if "config" in given or "data" not in given:
        given = read_options(Path(given.get("config", TOY))) | given
    trained = Path(f"{given.get('model', Config.model)}/observe_r1.json")
    if trained.exists():  # what shaped the prompts of its training
        brought = read_json(trained)
        say(f"{trained}: {brought}, where no option says otherwise")
        given = brought | given
    config = Config(**{"output_dir": f"runs/{command}", **given})
    check_config(config)
    return command, config


def read_options(file):
    """The options of a JSON file; a path in it may start at the file's own folder."""
    options = read_json(file)
    options.pop("content", None)  # a run adds it to its own
    if wrong := options.keys() - HELP.keys():
        raise ValueError(f"{file}: unknown options {sorted(wrong)}")
    for name in options.keys() & {"model", "data", "eval_data"}:
        near = file.parent / str(options[name])
        if options[name] and near.exists():
            options[name] = str(near)
    return options


def main():
    """Run one command; a mistake that a user can mend ends in one line instead of a traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends in one line, as Ctrl-C does
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "torch.distributed is disabled|`is_gradient_checkpointing`")
    mistakes = (ValueError, OSError, SafetensorError, dcp.api.CheckpointException)
    try:
        command, config = parse_arguments(sys.argv[1:])
        COMMANDS[command](config)
    except KeyboardInterrupt:
        raise SystemExit("observe_r1: stopped; what was written so far is kept") from None
    except mistakes as error:
        raise SystemExit(f"observe_r1: {error}") from error
    except torch.OutOfMemoryError as error:
        what = "`python tools/memory.py` with the same options says what a run needs and what helps"
        raise SystemExit(f"observe_r1: {error}\n{what}") from error
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
