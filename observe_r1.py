"""Observe-R1 (arXiv 2505.12432) in one script: teach a vision-language model to look, then reason.

    python observe_r1.py      # trains the toy: real handwriting, no network, no GPU, minutes
    python observe_r1.py ladder --model Qwen/Qwen2.5-VL-3B-Instruct --data raw.parquet
    python observe_r1.py train --model Qwen/Qwen2.5-VL-3B-Instruct --data runs/ladder/ladder.parquet
    python observe_r1.py eval --model runs/train/final --data held_out.parquet
    torchrun --nproc_per_node 8 observe_r1.py train ...   # ladder and eval as well

The method stands in the order of a run: problems, ladder, rollout, rewards, advantages,
log-probabilities, loss, training. What surrounds it follows below one divider. Where this script
differs from the paper's released code:
1. The KL penalty is part of the loss, not of the reward, and a group whose advantages are all zero
   is skipped, its KL included: it moves nothing.
2. The loss is a mean over each response's tokens, then over responses. How the responses are
   split into backward passes changes memory, never the result.
3. Mini-batches are whole groups, so that a prompt and its pictures are encoded once.
4. No prompt is cut and no problem is dropped in silence. Correctness is kept apart from rewards.

Shapes: B prompts, G responses per prompt, P prompt tokens, T response tokens, N responses or tokens
in a flat list, H hidden size, V vocabulary. `model` is a Qwen2_5_VLForConditionalGeneration.
"""

import base64
import csv
import glob
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import datasets
import filelock
import numpy as np
import torch
import torch.distributed.checkpoint as dcp
import transformers
from PIL import Image
from qwen_vl_utils import process_vision_info, smart_resize
from safetensors import SafetensorError
from torch.distributed import fsdp
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.cache_utils import Cache, DynamicLayer
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints

import rewards

# Types that carry their range, against which Config checks its fields.
Natural = Annotated[int, 0, math.inf]
Count = Annotated[int, 1, math.inf]
Amount = Annotated[float, 0, math.inf]
Positive = Annotated[float, sys.float_info.min, math.inf]
Share = Annotated[float, 0, 1]


@dataclass
class Config:
    """Defaults are the published run; --config FILE overrides them, options given override both.

    The comment beside a field is what --help prints for it.
    """

    model: str = "Qwen/Qwen2.5-VL-3B-Instruct"  # folder or hub id of a Qwen2.5-VL
    data: str = ""  # problems: .parquet, .jsonl, .json, .csv, a folder or a hub id
    split: str = "train"  # split of --data
    subset: str = ""  # configuration of a hub data set that has several
    eval_data: str = ""  # held-out problems, measured before and after training
    eval_split: str = "train"  # split of --eval_data
    output_dir: str = ""  # folder for all that a run writes; default runs/COMMAND
    overwrite: bool = False  # replace the run that --output_dir holds
    config: str = ""  # JSON file of options; its paths may start at its own folder
    seed: Natural = 0  # seed of the order and of sampling
    device: str = ""  # cpu, cuda, mps, xpu ...; default: the accelerator, if there is one
    deterministic: bool = False  # same bits in each run on a GPU too (always on a CPU)
    skip_bad: bool = False  # leave out problems that cannot be used, and count them
    check: bool = False  # decode all pictures before the start and list all bad rows

    order: Literal["ladder", "sorted", "random"] = "ladder"  # ladder: as the file stands
    max_steps: Natural = 0  # thin the ladder evenly to so many steps; 0: all of it
    prompts_per_step: Count = 128  # prompts of a step: one rollout, then its optimiser steps
    num_generations: Count = 8  # G, the responses sampled for each prompt
    temperature: Amount = 1.0  # sampling temperature; 0: the likeliest token
    max_prompt_tokens: Count = 9216  # longer prompts are refused, never cut
    max_new_tokens: Count = 8192  # length cap of a response
    min_pixels: Count = 3136  # smaller pictures are enlarged to this area
    max_pixels: Count = 2560000  # larger pictures are reduced to this area
    cache_gb: Positive = 16.0  # GB that the key/value cache of a rollout may take
    system_prompt: str = ""  # replaces the built-in system prompt

    observe: bool = True  # ask for <observe> and reward it; false: think and answer alone
    min_length: Natural = 100  # tokens that a response must exceed for the bonus
    bonus: Amount = 0.2  # reward of the shortest correct response of a group
    dynamic_weight: bool = True  # weigh a group by 4 sigma p (1 - p) instead of by 1
    sigma: Positive = 1.8  # weight of a half-solved group

    minibatch_prompts: Count = 8  # groups of one optimiser step
    learning_rate: Positive = 1e-6  # peak learning rate
    warmup_ratio: Share = 0.03  # share of the optimiser steps that warm up
    max_grad_norm: Positive = 1.0  # longer gradients are scaled down to this norm
    clip_range: Positive = 0.2  # the ratio is clipped to 1 plus or minus this
    kl_coef: Amount = 0.01  # beta of the KL penalty; 0 needs no reference model
    freeze_vision: bool = False  # do not train the vision tower
    lora_rank: Natural = 0  # train LoRA adapters of this rank (needs peft); 0: all weights
    token_budget: Count = 16384  # tokens of a backward pass: memory, not results
    gradient_checkpointing: bool = True  # recompute activations to save memory
    cpu_offload: bool = False  # keep weights and moments in host memory

    eval_steps: Natural = 0  # measure held-out accuracy every so many steps
    num_samples: Natural = 0  # responses to each held-out problem; 0: one, greedy
    save_steps: Natural = 0  # write a checkpoint every so many steps
    keep_checkpoints: Natural = 2  # newest checkpoints that stay; 0: all
    resume: bool = False  # go on from the newest checkpoint of --output_dir
    save_dtype: Literal["float32", "bfloat16"] = "float32"  # number format of final/
    clean_model: str = ""  # ladder: drops what this model solves without reasoning; default --model

    def __post_init__(self):
        """ValueError for a value of the wrong type or outside its range."""
        for name, hint in get_type_hints(Config, include_extras=True).items():
            value = getattr(self, name)
            if get_origin(hint) is Literal:
                if value not in get_args(hint):
                    raise ValueError(f"--{name} {value!r} is none of {get_args(hint)}")
                continue
            kind, low, high = get_args(hint) or (hint, None, None)
            if kind is float and type(value) is int:
                setattr(self, name, float(value))
            elif type(value) is not kind:
                raise ValueError(f"--{name} {value!r} is no {kind.__name__}")
            if low is not None and not low <= value <= high:  # false for NaN as well
                raise ValueError(f"--{name} {value} is outside the range {low:.3g} to {high:.3g}")


# ---------------------------------------------------------------------------------------- problems
# A problem is a picture (or several, or none), a question and a short answer. The paper's prompt is
# not published, so this one is ours. It asks for three blocks, which the format reward checks.

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
    size = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
    pictures, texts = problem["images"], problem["question"].split(MARK)
    if len(texts) == 1:  # no marks
        texts = [""] * len(pictures) + texts
    content = [{"type": "text", "text": texts[0]}]
    for picture, text in zip(pictures, texts[1:]):
        content += [{"type": "image", "image": picture, **size}, {"type": "text", "text": text}]
    system = config.system_prompt or PROMPTS["observe" if config.observe else "think"]
    return [{"role": "system", "content": system}, {"role": "user", "content": content}]


def encode_prompts(problems, processor, config):
    """The processor's batch of B prompts, left padded: input_ids, attention_mask [B,P] and so on.

    num_images [B] says how many pictures a prompt has; pixel_values and image_grid_thw hold the
    patches and sizes of all pictures end to end.
    """
    chats = []
    for problem in problems:
        pictures = [eight_bit(picture) for picture in problem["images"]]
        chats.append(chat_messages({**problem, "images": pictures}, config))
    texts = processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    images, _ = process_vision_info(chats)  # resizes, so the processor must not do it again
    how = {"do_resize": False, "padding": True, "padding_side": "left", "return_tensors": "pt"}
    batch = processor(text=texts, images=images, **how)
    batch["num_images"] = torch.tensor([len(problem["images"]) for problem in problems])
    return batch


def prompt_length(problem, processor, config):
    """Tokens of a prompt, from the sizes of its pictures alone: nothing is decoded or resized."""
    chat = chat_messages(problem, config)
    text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    length = len(processor.tokenizer(text)["input_ids"])
    side = processor.image_processor.patch_size * processor.image_processor.merge_size
    for picture in problem["images"]:
        width, height = picture.size
        height, width = smart_resize(height, width, side, config.min_pixels, config.max_pixels)
        length += height * width // side**2 - 1  # the text holds one token for each picture
    return length


# ------------------------------------------------------------------------------------------ ladder
# The paper's NeuraLadder. The difficulty of a problem is the share of wrong responses among 8, so
# there are nine levels, and nine stages. Each stage but the first draws about half or more from its
# own level, the rest from the four nearest: training gets harder smoothly instead of in steps.


def mix_ladder(difficulty, complexity, seed=0):
    """Order problems into nine stages of smoothly rising difficulty (NeuraLadder).

    difficulty: share of wrong responses, 0 to 1; complexity: mean response length in tokens. Within
    a level, problems with short responses come first, because they take less reasoning.
    Returns (order, stage): a permutation of range(n), and the stage 0 to 8 of each position.

    Each problem is used once, so the sizes of the stages must satisfy, for every level l,
    sum over stages s of size[s] * share[s, l] = problems of level l. The loop solves this by
    expectation maximisation for mixture weights: each round sends the problems of a level to the
    stages in proportion to what they ask of it. With as many problems in each level as in the
    paper's figure this ends in the shares of that figure, elsewhere as near to them as possible,
    and never beyond the four nearest levels.
    """
    figure = """
        .29  .18  .19  .19  .17
        .05  .50  .15  .155 .15
        .02  .08  .51  .17  .23
        .03  .07  .505 .21  .19
        .03  .07  .58  .19  .14
        .03  .10  .575 .15  .15
        .05  .12  .54  .18  .12
        .02  .055 .10  .685 .14
        .02  .05  .07  .15  .72"""
    # A line per stage: the shares of the five levels that it draws from, read off the paper's
    # figure to about .01, which is why a line may sum to 1.02.
    shares = np.array(figure.split(), dtype=float).reshape(9, 5)
    share = np.zeros((9, 9))  # [stage, level]
    for stage in range(9):
        lowest = min(max(stage - 2, 0), 4)  # two levels on each side; at the ends those there are
        share[stage, lowest : lowest + 5] = shares[stage] / shares[stage].sum()
    level = np.rint(np.array(difficulty, dtype=float) * 8).astype(int)
    level_size = np.bincount(level, minlength=9).astype(float)
    stage_size = level_size
    for _ in range(200):
        asked = stage_size[:, None] * share
        sent = asked / np.maximum(asked.sum(0), 1e-12)  # [stage, level], each column sums to 1
        stage_size = sent @ level_size

    generator = np.random.default_rng(seed)
    placed = []  # (stage, position within the stage from 0 to 1, problem)
    for l in range(9):
        members = sorted(np.flatnonzero(level == l).tolist(), key=lambda i: complexity[i])
        ends = np.rint(sent[:, l].cumsum() * len(members)).astype(int)
        for stage, part in enumerate(np.split(np.array(members, dtype=int), ends[:-1])):
            # Evenly over the stage; the random shift keeps the levels from all starting together.
            positions = (np.arange(len(part)) + generator.random()) / max(1, len(part))
            placed += zip([stage] * len(part), positions.tolist(), part.tolist())
    placed.sort()
    return [problem for _, _, problem in placed], [stage for stage, _, _ in placed]


def select_problems(difficulty, complexity):
    """Numbers of the problems that stay: of difficulty 0 only those with the longer responses.

    A problem that was solved eight times out of eight may be missed later, especially if its
    solutions are long. The threshold is the median complexity of difficulty 0.
    """
    easy = [c for d, c in zip(difficulty, complexity) if d == 0]
    threshold = np.median(easy) if easy else 0
    scores = enumerate(zip(difficulty, complexity))
    return [i for i, (d, c) in scores if d > 0 or c >= threshold]


def training_order(problems, config):
    """Row numbers in the order in which training reads them: all of them, or thinned evenly."""
    order = list(range(len(problems)))
    if config.order == "random":
        random.Random(config.seed).shuffle(order)
    if config.order == "sorted":
        if None in problems["difficulty"]:
            raise ValueError("--order sorted needs the columns that the ladder command writes")
        order = np.lexsort((problems["complexity"], problems["difficulty"])).tolist()
    wanted = config.max_steps * config.prompts_per_step or len(order)
    stride = max(1, len(order) / wanted)  # thinned all along: a cut would lose the hard end
    return [order[int((k + 0.5) * stride)] for k in range(min(wanted, len(order)))]


# ----------------------------------------------------------------------------------------- rollout
# For each prompt the policy, as it is now, writes G responses, token by token, sampled from
# softmax(logits / temperature). Tokens that stand for pictures are never sampled: the next forward
# pass would look for a picture that is not there.

TEXT_TENSORS = ("input_ids", "attention_mask", "mm_token_type_ids")


@dataclass
class Rollouts:
    """Prompts and their sampled responses."""

    prompt: dict  # the processor's batch of B prompts, left padded; it stays in host memory
    response_ids: torch.Tensor  # [B,G,T]
    mask: torch.Tensor  # [B,G,T], 1 for each sampled token, the stop token too; built from lengths
    texts: list[list[str]]  # B lists of G


def slice_prompts(prompt, chosen):
    """Some prompts of an encoded batch: their pictures, and only the padding that they need."""
    P = prompt["attention_mask"][chosen].sum(-1).max()
    part = {name: prompt[name][chosen, -P:] for name in TEXT_TENSORS}
    if any(prompt["num_images"][chosen]):
        grids = prompt["image_grid_thw"].split(prompt["num_images"].tolist())  # B x [pictures,3]
        patches = prompt["pixel_values"].split([int(grid.prod(-1).sum()) for grid in grids])
        part["image_grid_thw"] = torch.cat([grids[b] for b in chosen])
        part["pixel_values"] = torch.cat([patches[b] for b in chosen])
    return part


def model_inputs(model, prompt, device=None):
    """Inputs of a forward pass over prompts, with rope positions [3,B,P] (time, height, width).

    Positions are always explicit: left to itself, the model reuses offsets of an earlier batch.
    """
    device = device or model.device  # with --cpu_offload, weights wait in host memory
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
    inputs = {name: prompt[name].to(device) for name in names if name in prompt}
    kinds = prompt["mm_token_type_ids"].to(device)
    inputs["position_ids"], _ = model.model.get_rope_index(mm_token_type_ids=kinds, **inputs)
    return inputs


def vision_tokens(model):
    """Tokens that stand for pictures and videos, or enclose them."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return [getattr(model.config, name) for name in names]


class RoomyLayer(DynamicLayer):
    """Keys and values [N,heads,T,size] of one layer, in buffers with room for tokens to come.

    The library's cache copies all of them for each new token. This one gives attention the same
    values in the same shapes; only the strides differ.
    """

    buffers = None

    def update(self, keys, values, *args, **kwargs):
        keys = keys.to(values.dtype)  # under autocast, rope returns fp32 and attention wants bf16
        T = self.get_seq_length()
        if T == 0:  # the prompt
            return super().update(keys, values)
        if self.buffers is None or T == self.buffers[0].shape[2]:
            room = (0, 0, 0, 128)
            self.buffers = [pad(self.keys, room), pad(self.values, room)]
        for buffer, new in zip(self.buffers, (keys, values)):
            buffer[:, :, T : T + 1] = new
        self.keys, self.values = (buffer[:, :, : T + 1] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self.buffers = None


@torch.no_grad()
def sample(model, prompt, stop, config):
    """B*G responses [T], with the stop token if one came; a prompt is read once for all G."""
    inputs = model_inputs(model, prompt)
    G, P = config.num_generations, inputs["input_ids"].shape[1]
    cache = Cache(layer_class_to_replicate=RoomyLayer)
    hidden = model.model(**inputs, cache=cache, use_cache=True).last_hidden_state[:, -1]  # [B,H]
    cache.batch_repeat_interleave(G)
    hidden = hidden.repeat_interleave(G, 0)  # [N,H], N = B*G
    position = inputs["position_ids"].amax((0, 2)).repeat_interleave(G)  # of the last token, [N]
    visible = inputs["attention_mask"].bool().repeat_interleave(G, 0)  # [N,P]
    padded = not visible.all()
    visible = pad(visible, (0, config.max_new_tokens), value=True)[:, None, None]  # [N,1,1,P+T]

    response_ids = position.new_zeros(len(position), config.max_new_tokens)
    length = torch.zeros_like(position)
    alive = torch.arange(len(position), device=position.device)  # the response in each batch row
    done = alive < 0
    stop, never = position.new_tensor(stop), position.new_tensor(vision_tokens(model))
    decoder = model.model.language_model
    for t in range(config.max_new_tokens):
        logits = model.lm_head(hidden).float()  # [rows,V]
        logits[:, never] = -math.inf
        token = logits.argmax(-1)
        if config.temperature > 0:
            probabilities = (logits / config.temperature).softmax(-1)
            token = torch.multinomial(probabilities, 1).squeeze(-1)
        response_ids[alive, t] = token
        length[alive] += ~done
        done = done | torch.isin(token, stop)
        left = int((~done).sum())  # once per token, Python waits for the GPU
        if left == 0 or t + 1 == config.max_new_tokens:
            break
        if left <= 0.75 * len(done):  # copying the cache for less does not pay
            keep = (~done).nonzero().squeeze(-1)
            cache.batch_select_indices(keep)
            rows = (alive, done, token, position, visible)
            alive, done, token, position, visible = (values[keep] for values in rows)
        position = position + 1
        mask = visible[..., : P + t + 1] if padded else None  # without one, attention is faster
        hidden = decoder(
            inputs_embeds=decoder.embed_tokens(token[:, None]),
            attention_mask={"full_attention": mask},  # ready-made: not built again for each token
            position_ids=position[:, None].expand(3, -1, 1),
            cache=cache,
        ).last_hidden_state[:, -1]
    return [ids[:n] for ids, n in zip(response_ids, length.tolist())]


def rollout(model, processor, problems, config) -> Rollouts:
    """Sample G responses for each problem. `train` takes any function of this signature instead.

    Prompts are sampled in chunks whose key/value cache fits --cache_gb even if all responses reach
    the cap. Prompts of similar length share a chunk, to save padding.
    """
    model.eval()  # no dropout while sampling
    B, G = len(problems), config.num_generations
    if B == 0:
        raise ValueError("--skip_bad has left no problem of this step")
    token_bytes = cache_bytes(model.config, compute_dtype(model.device))
    limit = config.cache_gb * 1e9 / (token_bytes * G)  # tokens that fit, if all G have them
    eos = model.generation_config.eos_token_id  # one or several; its other settings are not used
    stop = {processor.tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    prompt = encode_prompts(problems, processor, config)
    length = prompt["attention_mask"].sum(-1)  # [B]
    waiting = length.argsort(descending=True, stable=True).tolist()
    groups = [None] * B
    while waiting:
        size = max(1, int(limit / (length[waiting[0]] + config.max_new_tokens)))
        chunk, waiting = waiting[:size], waiting[size:]
        with autocast(model):
            sampled = sample(model, slice_prompts(prompt, chunk), sorted(stop), config)
        for k, b in enumerate(chunk):
            groups[b] = sampled[k * G : (k + 1) * G]

    responses = [response for group in groups for response in group]
    mask = pad_sequence([torch.ones_like(ids) for ids in responses], batch_first=True)
    return Rollouts(
        prompt=prompt,
        response_ids=pad_sequence(responses, batch_first=True).view(B, G, -1),
        mask=mask.view(B, G, -1),
        texts=[processor.batch_decode(group, skip_special_tokens=True) for group in groups],
    )


# --------------------------------------------------------------------------- rewards and advantages
# reward = accuracy {0, 1} + format {0, .5} + bonus {0, .2}. With p, the share of correct responses,
# the weight of a group is 4 sigma p (1 - p): 0 if every response is right or every one wrong.
# advantage = weight * (reward - mean) / std: how much better a response is than its siblings.


def score_rollouts(rollouts, problems, config):
    """The three rewards and their sum `reward`, each [B,G], and the weight of each group [B]."""
    groups = []
    for problem, texts, mask in zip(problems, rollouts.texts, rollouts.mask):
        accuracy = [rewards.accuracy_reward(text, problem["answer"]) for text in texts]
        correct = [value == 1 for value in accuracy]  # for bonus and weight, format does not count
        lengths = mask.sum(-1).tolist()
        group = {
            "accuracy": accuracy,
            "format": [rewards.format_reward(text, config.observe) for text in texts],
            "bonus": rewards.bonus_rewards(correct, lengths, config.min_length, config.bonus),
            "weight": rewards.dynamic_weight(correct, config.sigma),
        }
        groups.append(group)
    scores = {name: torch.tensor([group[name] for group in groups]) for name in groups[0]}
    scores["reward"] = scores["accuracy"] + scores["format"] + scores["bonus"]
    if not config.dynamic_weight:
        scores["weight"].fill_(1)
    return scores


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
# group share one row of tokens, in which prompt and pictures stand once: less work, still exact.


def pack_group(inputs, response_ids, mask):
    """One row of tokens: a prompt once, then its responses end to end; response_ids, mask [G,T].

    A response token sees the prompt and its own response so far, and its position goes on where the
    prompt ends. That is just what it would see alone, but the prompt is computed once, not G times,
    and nothing is padded. inputs: `model_inputs` of the one prompt, without padding. Returns the
    inputs of the row, and for each of the N response tokens the place of its predecessor [N], whose
    hidden state predicts it.
    """
    mask = mask.bool()
    P = inputs["input_ids"].shape[1]
    lengths = mask.sum(-1)  # [G]
    nth = mask.cumsum(-1)[mask]  # [N]: 1, 2, ... within each response
    # Rope has three axes. Text advances all of them together, from the largest value that any axis
    # reached in the prompt, because a picture advances each axis by a different amount.
    positions = (inputs["position_ids"].max() + nth).expand(3, 1, -1)
    owner = torch.arange(len(lengths), device=mask.device).repeat_interleave(lengths)  # [N]
    owner = torch.nn.functional.pad(owner, (P, 0), value=-1)  # [P+N], -1: the prompt
    same_response = owner == owner[:, None]
    visible = ((owner == -1) | same_response).tril()  # [query,key]
    previous = torch.arange(P - 1, P - 1 + len(nth), device=mask.device)
    predecessors = previous.where(nth > 1, P - 1)  # a first token follows the prompt
    row = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], response_ids[mask][None]], 1),
        "position_ids": torch.cat([inputs["position_ids"], positions], 2),
        "attention_mask": visible[None, None],
    }
    return row, predecessors


def token_log_probs(hidden, targets, head, banned, temperature, chunk=512):
    """log p(target) from hidden states [N,H] and targets [N] -> [N]; head: [N,H] -> logits [N,V].

    Logits over a vocabulary of 152,000 tokens are the memory peak of training. They are made for
    `chunk` tokens at a time, reduced to one number each, and made again in the backward pass.
    banned: tokens that are never sampled; they have no probability here either.
    """

    def log_probs_of(hidden, targets):
        logits = head(hidden).float() / temperature  # [chunk,V]
        logits[:, banned] = float("-inf")
        return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)

    if len(targets) <= chunk:  # its backward pass follows at once: nothing to gain
        return log_probs_of(hidden, targets)
    parts = []
    for part in zip(hidden.split(chunk), targets.split(chunk)):
        parts.append(torch.utils.checkpoint.checkpoint(log_probs_of, *part, use_reentrant=False))
    return torch.cat(parts)


class Policy(torch.nn.Module):
    """A Qwen2.5-VL whose forward pass returns the log-probabilities of a packed group."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, row=None, predecessors=None, targets=None, temperature=1.0):
        """Row and predecessors [N] of `pack_group`, targets [N] -> log-probabilities [N]."""
        if row is None:  # see `shard`
            return None
        model = self.model
        with autocast(model):
            hidden = model.model(**row, use_cache=False).last_hidden_state[0]  # [P+N,H]
            hidden = hidden[predecessors]  # [N,H]
            banned = vision_tokens(model)
            log_probs = token_log_probs(hidden, targets, model.lm_head, banned, temperature)
        # A group without pictures must still give the vision tower a gradient, of 0: with several
        # processes FSDP waits for it, and one process must compute the same as several.
        vision = [p.flatten()[0] for p in model.model.visual.parameters() if p.requires_grad]
        return log_probs + 0 * sum(vision)


def policy_log_probs(policy, rollouts, b, part, config):
    """Log-probabilities of the responses `part` to prompt b, [responses,T]; 0 in the padding."""
    response_ids, mask = rollouts.response_ids[b, part], rollouts.mask[b, part].bool()
    inputs = model_inputs(policy.model, slice_prompts(rollouts.prompt, [b]), mask.device)
    row, predecessors = pack_group(inputs, response_ids, mask)
    log_probs = policy(row, predecessors, response_ids[mask], config.temperature)  # [N]
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, log_probs)


def plan_passes(rollouts, prompts, config):
    """(prompt, responses) of each pass: a group, or as much of it as --token_budget allows."""
    G = rollouts.mask.shape[1]
    passes = []
    for b in prompts:
        P, T = rollouts.prompt["attention_mask"][b].sum(), rollouts.mask[b].sum(-1).max()
        size = max(1, int(config.token_budget - P) // int(T))
        passes += [(b, slice(g, g + size)) for g in range(0, G, size)]
    return passes


def response_log_probs(policy, rollouts, config, prompts=None):
    """Log-probability of each response token at the sampling temperature, [B,G,T]; 0 in padding.

    policy: a Policy, or its model. prompts: only the responses to these, 0 elsewhere.
    """
    policy = policy if isinstance(policy, Policy) else Policy(policy)
    prompts = range(len(rollouts.mask)) if prompts is None else prompts
    log_probs = torch.zeros(rollouts.mask.shape, device=rollouts.mask.device)
    for b, part in plan_passes(rollouts, prompts, config):
        log_probs[b, part] = policy_log_probs(policy, rollouts, b, part, config)
    return log_probs


# -------------------------------------------------------------------------------------------- loss
# The policy's probability of a token may have moved since it was sampled: ratio = p / p_old. The
# objective ratio * A pushes good responses up and bad ones down; clipping the ratio ends the push
# once a token has moved by 20 % in the direction that its advantage asks for. The KL penalty keeps
# the policy near the model it started from.


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
    (default N).
    ref_log_probs may be None: no KL. The metrics are means over the N responses.

    KL(policy || reference) is estimated from the sampled token by exp(q) - q - 1, q = log p_ref -
    log p: never negative, of low variance, unbiased for tokens that the policy itself sampled (k3
    in joschu.net/blog/kl-approx.html).
    """
    mask = mask.to(log_probs.dtype)
    lengths = mask.sum(-1).clamp(min=1)  # [N]

    ratio = (log_probs - old_log_probs).exp()  # [N,T]; 1 in the first optimiser step of a rollout
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)
    gain = ratio * advantages[:, None]
    clipped_gain = clipped_ratio * advantages[:, None]
    objective = gain.minimum(clipped_gain)  # [N,T]

    q = 0 * log_probs if ref_log_probs is None else ref_log_probs - log_probs
    kl = q.exp() - q - 1  # [N,T]

    cost = ((kl_coef * kl - objective) * mask).sum(-1) / lengths  # [N]
    loss = cost.sum() / (num_responses or len(cost))

    metrics = {"kl": kl, "clip_fraction": (clipped_gain < gain).to(mask.dtype)}
    for name, values in metrics.items():
        per_response = (values * mask).sum(-1) / lengths  # [N]
        metrics[name] = per_response.sum().item() / max(1, len(cost))
    return loss, metrics


# ---------------------------------------------------------------------------------------- training
# A step samples, scores, weighs, compares and updates, on the next problems of the ladder. Groups
# whose advantages are all 0 are not passed through the model, but stay in the denominator of the
# loss: the fewer groups are left, the smaller the gradient.


@dataclass
class TrainState:
    """All that training holds and changes."""

    policy: Policy
    reference: Policy | None  # None with --kl_coef 0, and with adapters, which can be switched off
    adapters: object | None  # peft's view of the model, with --lora_rank
    processor: object
    problems: datasets.Dataset
    held_out: datasets.Dataset | None
    steps: list[list[int]]  # row numbers of the prompts of each step
    optimizer: torch.optim.Optimizer
    scheduler: object
    step: int = 0
    optimizer_step: int = 0
    skipped_updates: int = 0  # optimiser steps in a row whose gradients were NaN or infinite
    before: dict = field(default_factory=dict)  # held-out results before training


def train(config, rollout=rollout):
    """Observe-R1. Returns the content of summary.json; `rollout` may be an engine of your own."""
    with run_folder(config) as output:
        started = time.time()
        state = prepare(config, output, rollout)
        stop, after = stop_on_signals(), None
        progress = tqdm(state.steps, "training", unit="step", initial=state.step, disable=RANK > 0)
        for numbers in state.steps[state.step :]:  # of rows of the data, easy to hard
            clock = time.time()
            set_seed(config.seed, state.step, RANK)  # all that is random in a step follows from it
            problems = read_problems(state.problems, numbers[RANK::WORLD], config)

            with unsharded(state.policy):
                rollouts = rollout(state.policy.model, state.processor, problems, config)
            scores = score_rollouts(rollouts, problems, config)  # rewards [B,G], weight [B]
            scores["advantage"] = group_advantages(scores["reward"], scores["weight"])  # [B,G]
            metrics = update(state, rollouts, scores["advantage"], config)  # GRPO

            state.step += 1
            after = None
            if config.eval_steps and state.step % config.eval_steps == 0:
                after = measure(state, config, rollout)
                metrics["eval_accuracy"] = after["accuracy"]
            metrics["seconds"] = round(time.time() - clock, 3)
            progress.update()
            log_step(progress, output, state, problems, rollouts, scores, metrics, config)
            if state.skipped_updates >= 3:
                progress.close()
                raise ValueError(
                    "three updates in a row had NaN or infinite gradients, the last in step "
                    f"{state.step}; its responses end {output}/rollouts.jsonl"
                )
            stopping = any(gather(bool(stop)))  # a signal may reach one process alone
            if stopping or config.save_steps and state.step % config.save_steps == 0:
                save_checkpoint(state, output, config)
            if stopping:
                progress.close()
                raise SystemExit(f"stopped after step {state.step}; --resume true goes on from it")
        progress.close()
        save_final(state, output / "final", config)
        after = after or measure(state, config, rollout)
        summary = {"steps": state.step, "seconds": round(time.time() - started, 1)}
        for name in ("accuracy", "format", "response_length") if after else ():
            summary[f"{name}_before"] = round(state.before[name], 4)
            summary[f"{name}_after"] = round(after[name], 4)
        say(f"the model is {output}/final; `python tools/report.py {output}` draws the run")
        return write_summary(output / "summary.json", summary)


def update(state, rollouts, advantages, config):
    """Take an optimiser step for each mini-batch of whole groups of a rollout. Returns metrics.

    With several processes, prompt b of process r is number b * WORLD + r of the step.
    """
    policy, mask = state.policy, rollouts.mask
    advantages = advantages.to(mask.device)
    B, G, _ = mask.shape
    trained = [b for b in range(B) if advantages[b].any()]  # the others are left out, KL included
    reference = None
    with torch.no_grad(), unsharded(policy):  # not the sampler's own numbers: those round otherwise
        # One pass at least: if the last forward pass was the sampler's on one process alone, FSDP
        # would prefetch another layer there than elsewhere, and all would wait for ever.
        old = response_log_probs(policy, rollouts, config, trained or [0])  # [B,G,T]
    if config.kl_coef:
        with torch.no_grad(), reference_policy(state) as fixed:
            reference = response_log_probs(fixed, rollouts, config, trained)

    policy.train()
    seen, norms = [], []
    numbers = sorted(itertools.chain(*gather([b * WORLD + RANK for b in range(B)])))
    firsts = range(0, len(numbers), config.minibatch_prompts)
    for first in firsts:
        minibatch = numbers[first : first + config.minibatch_prompts]
        mine = [b for b in trained if b * WORLD + RANK in minibatch]
        passes = plan_passes(rollouts, mine, config)
        # All processes must run the model equally often. A pass without responses fills up: its
        # loss and its gradient are 0.
        most = max(gather(len(passes)))
        for b, part in passes + [(0, slice(0))] * (most - len(passes)):
            log_probs = policy_log_probs(policy, rollouts, b, part, config)
            loss, metrics = grpo_loss(
                log_probs,
                old[b, part],
                None if reference is None else reference[b, part],
                advantages[b, part],
                mask[b, part],
                config.clip_range,
                config.kl_coef,
                len(minibatch) * G,
            )
            (WORLD * loss).backward()  # FSDP averages over the processes; we want the sum
            seen.append((len(log_probs), loss.item(), *metrics.values()))
        if most:  # without a gradient, the optimiser would still move the weights by its momentum
            norms.append(scale_and_step(state, config))
        learning_rate = state.scheduler.get_last_lr()[0]
        state.scheduler.step()

    seen = np.concatenate(gather(np.array(seen).reshape(-1, 4)))  # of all processes
    responses, losses, kl, clip_fraction = seen.T
    count = max(1, responses.sum())
    return {
        "loss": losses.sum() / len(firsts),
        "kl": kl @ responses / count,
        "clip_fraction": clip_fraction @ responses / count,
        "grad_norm": sum(norms) / max(1, len(norms)),
        "learning_rate": learning_rate,
        "optimizer_step": state.optimizer_step,
        "skipped_updates": state.skipped_updates,
    }


def scale_and_step(state, config):
    """Scale a long gradient down and step, unless it is NaN or infinite. Returns its norm."""
    norm = torch.nn.utils.clip_grad_norm_(state.policy.parameters(), config.max_grad_norm)
    if hasattr(norm, "full_tensor"):  # from the shards of all processes
        norm = norm.full_tensor()
    if torch.isfinite(norm):
        state.optimizer.step()
        state.optimizer_step += 1
        state.skipped_updates = 0
    else:
        state.skipped_updates += 1
    state.optimizer.zero_grad()
    return norm.item()


# ==================================================================================================
# The method ends here. What surrounds it: evaluation and the ladder command, the start of a run,
# data, devices and processes, checkpoints, logs, the command line.
# ==================================================================================================


# ---------------------------------------------------------------------------- evaluation and ladder
# Scoring a ladder and evaluating are one pass: sample responses to each problem and see which are
# right. A difficulty belongs to the model that sampled, and so does a ladder.


def response_rows(problems, rollouts, scores):
    """One row for each problem: what it is, and its responses with all that was measured of them."""
    rows = []
    for b, problem in enumerate(problems):
        row = {name: problem.get(name) for name in ("id", "question", "answer", "difficulty")}
        values = {name: scored[b].tolist() for name, scored in scores.items()}
        row["weight"] = values.pop("weight")
        values |= {"text": rollouts.texts[b], "length": rollouts.mask[b].sum(-1).tolist()}
        row["responses"] = [dict(zip(values, each)) for each in zip(*values.values())]
        rows.append(row)
    return rows


def mean(rows, name):
    """Mean of one value over some rows."""
    return float(np.mean([row[name] for row in rows]))


def score_problems(model, processor, problems, config, rollout=rollout, file=None):
    """A row of `response_rows` for each problem, with its difficulty and complexity.

    Each batch has a seed of its own, so that several processes sample what one would. With a file,
    rows are kept as they come, and a run that was killed goes on with those whose model, options,
    question, answer and pictures are the same.
    """
    names = """model system_prompt observe temperature num_generations max_new_tokens
    min_pixels max_pixels seed"""
    options = "/".join(str(getattr(config, name)) for name in names.split())
    keys = [f"{digest}/{options}" for digest in problems["digest"]]
    known = {}
    for log in file.parent.glob(f"{file.name}.*.jsonl") if file else ():
        known |= {row["key"]: row for row in read_log(log)}
    gather(None)  # before anyone adds to the files
    if foreign := len(known.keys() - set(keys)):
        say(f"{file}: ignores {foreign} scores of other problems or options")
    firsts = range(0, len(keys), config.prompts_per_step)[RANK::WORLD]
    for first in tqdm(firsts, file and file.name or "evaluating", leave=False, disable=RANK > 0):
        numbers = range(len(keys))[first : first + config.prompts_per_step]
        if known.keys() >= {keys[number] for number in numbers}:
            continue
        batch = read_problems(problems, numbers, config)  # whole: half would sample otherwise
        if not batch:
            continue
        set_seed(config.seed, first)
        rollouts = rollout(model, processor, batch, config)
        rows = response_rows(batch, rollouts, score_rollouts(rollouts, batch, config))
        for row, problem in zip(rows, batch):
            row["key"] = f"{problem['digest']}/{options}"
            row["difficulty"] = 1 - mean(row["responses"], "accuracy")
            row["complexity"] = mean(row["responses"], "length")
        rows = [row for row in rows if row["key"] not in known]
        known |= {row["key"]: row for row in rows}
        if file:
            append_log(file.with_name(f"{file.name}.{RANK}.jsonl"), rows)
    for part in gather(known):
        known |= part
    return [{**known[key], "row": row} for row, key in enumerate(keys) if key in known]


def evaluate(model, processor, problems, config, rollout=rollout):
    """Accuracy with its 95 % interval over problems, format and length; and the rows behind them."""
    sampling = replace(config, num_generations=max(1, config.num_samples))
    if config.num_samples == 0:
        sampling.temperature = 0.0
    rows = score_problems(model, processor, problems, sampling, rollout)
    accuracy = np.array([1 - row["difficulty"] for row in rows])
    half = 1.96 * accuracy.std() / max(1, len(rows) - 1) ** 0.5
    result = {
        "accuracy": accuracy.mean(),
        "interval": np.clip(accuracy.mean() + np.array([-half, half]), 0, 1).tolist(),
        "format": np.mean([mean(row["responses"], "format") for row in rows]),
        "response_length": mean(rows, "complexity"),
        "n": len(rows),
    }
    return result, rows


def evaluate_model(config):
    """The `eval` command: writes what `evaluate` returns into eval.json and responses.jsonl."""
    with run_folder(config, EVAL_RESULTS) as output:
        processor, problems, _ = start(config, output, EVAL_RESULTS)
        result, rows = evaluate(load_model(config, trained=False), processor, problems, config)
        if RANK == 0:
            append_log(output / "responses.jsonl", rows, "w")
        return write_summary(output / "eval.json", result)


def ladder(config):
    """Build a NeuraLadder from raw problems: clean, score, select, mix. Returns its summary.json."""
    with run_folder(config) as output:
        if config.temperature == 0 or config.num_generations == 1:
            raise ValueError("a ladder needs --temperature above 0 and several --num_generations")
        processor, raw, _ = start(config, output)
        checkable = raw.select([i for i, gold in enumerate(raw["answer"]) if is_readable(gold)])
        blind = replace(config, system_prompt=PROMPTS["answer"], temperature=0.0, num_generations=1)
        blind.model = config.clean_model or config.model
        model = load_model(blind, trained=False)
        rows = score_problems(model, processor, checkable, blind, file=output / "clean")
        problems = checkable.select([row["row"] for row in rows if row["difficulty"] == 1])
        del model  # before the next one is loaded
        model = load_model(config, trained=False)
        rows = score_problems(model, processor, problems, config, file=output / "scores")
        if RANK:
            return {}  # the first process writes the rest

        never_solved = [row for row in rows if row["difficulty"] == 1]  # perhaps a wrong answer
        for row in never_solved:
            answers = [rewards.extract_answer(one["text"]) for one in row["responses"]]
            row["commonest"] = max(answers, key=answers.count)
        append_log(output / "never_solved.jsonl", never_solved, "w")
        scores = np.array([(row["difficulty"], row["complexity"]) for row in rows]).reshape(-1, 2)
        kept = np.array(select_problems(*scores.T), dtype=int)
        order, stage = mix_ladder(*scores[kept].T, config.seed)
        chosen = kept[order]
        mixed = problems.select([rows[i]["row"] for i in chosen])
        mixed = mixed.select_columns(["id", "images", "question", "answer", "category"])
        for name, values in zip(LADDER, (*scores[chosen].T, np.array(stage))):
            mixed = mixed.add_column(name, values)
        mixed.to_parquet(output / "ladder.parquet")
        summary = {
            "raw": len(raw),
            "uncheckable": len(raw) - len(checkable),
            "solved_without_reasoning": len(checkable) - len(problems),
            "not_selected": len(problems) - len(kept),
            "ladder": len(kept),
            "never_solved": len(never_solved),
            "levels": np.bincount(np.rint(8 * scores[kept, 0]).astype(int), minlength=9).tolist(),
            "stages": np.bincount(stage, minlength=9).tolist(),
        }
        return write_summary(output / "summary.json", summary)


# ---------------------------------------------------------------------------------- start of a run

RESULTS = """metrics.jsonl rollouts.jsonl responses.jsonl never_solved.jsonl clean.*.jsonl
scores.*.jsonl summary.json eval.json ladder.parquet final checkpoint-*"""
EVAL_RESULTS = "eval.json responses.jsonl"


def start(config, output, results=RESULTS, eval_data=""):
    """(processor, problems, held-out problems); refuses bad input before anything is replaced."""
    if not config.data:
        raise ValueError("--data is missing: a file, a folder or a hub id")
    if config.min_pixels > config.max_pixels:
        raise ValueError(f"--min_pixels {config.min_pixels} > --max_pixels {config.max_pixels}")
    device = pick_device(config)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    if not torch.distributed.is_initialized():
        how = {"timeout": timedelta(days=1)}  # processes may end a long evaluation hours apart
        if "RANK" not in os.environ:
            how |= {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
        torch.distributed.init_process_group(**how)
    if config.deterministic or device.type == "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
        torch.use_deterministic_algorithms(True)
    try:
        kind = transformers.AutoConfig.from_pretrained(config.model).model_type
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {config.model}: {error}") from error
    if kind != "qwen2_5_vl":
        raise ValueError(f"--model {config.model} is a {kind}; only Qwen2.5-VL is supported")
    processor = transformers.AutoProcessor.from_pretrained(config.model)
    problems = load_problems(config.data, config.split, config, processor, output / "data")
    held_out = None
    if eval_data:
        folder = output / "eval_data"
        held_out = load_problems(eval_data, config.eval_split, config, processor, folder)
    if RANK == 0:
        for path in () if config.resume else old_results(output, results):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (output / "config.json").write_text(json.dumps(asdict(config), indent=1))
    return processor, problems, held_out


def load_model(config, trained=True):
    """The checkpoint on its device: weights to be trained in fp32, others in compute_dtype."""
    device = pick_device(config)
    dtype = torch.float32 if trained else compute_dtype(device)
    model_class = transformers.Qwen2_5_VLForConditionalGeneration
    model = model_class.from_pretrained(config.model, dtype=dtype)
    return model if config.cpu_offload else model.to(device)


def add_adapters(model, config):
    """peft's view of the model, in which only LoRA adapters (fp32) train."""
    try:
        import peft
    except ImportError as error:
        raise ValueError("--lora_rank needs peft: pip install peft") from error
    rank, frozen = config.lora_rank, ".*visual.*" if config.freeze_vision else None
    lora = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", exclude_modules=frozen
    )
    with warnings.catch_warnings(category=FutureWarning, action="ignore"):
        return peft.get_peft_model(model, lora)  # asks transformers for a name of old


def make_optimizer(policy, config):
    """AdamW on what is trained, with its moments, so that no checkpoint lacks one."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    how = {"betas": (0.9, 0.95), "weight_decay": 0, "foreach": False}  # True: 4 bytes a weight more
    optimizer = torch.optim.AdamW(trained, config.learning_rate, **how)
    for parameter in trained:
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
    return optimizer


def estimate_memory(config, prompt_tokens):
    """Bytes of one device that training takes at most, by part, from the shapes of the model alone.

    prompt_tokens: of the longest prompt. Responses are taken to be as long as they may get.
    """
    shapes = transformers.AutoConfig.from_pretrained(config.model)
    text, tower = shapes.get_text_config(), shapes.vision_config
    with torch.device("meta"):  # shapes without numbers
        model = transformers.Qwen2_5_VLForConditionalGeneration(shapes)
    size = sum(parameter.numel() for parameter in model.parameters())
    largest = max(parameter.numel() for parameter in model.parameters())
    trained, dtype = size, compute_dtype(pick_device(config))
    if config.freeze_vision:
        trained -= sum(parameter.numel() for parameter in model.model.visual.parameters())
        del model.model.visual  # nor does it get adapters
    weights = 4 * size
    if config.lora_rank:  # two thin matrices beside each linear layer but the head
        linear = [part for part in model.model.modules() if isinstance(part, torch.nn.Linear)]
        trained = config.lora_rank * sum(part.in_features + part.out_features for part in linear)
        weights = 4 * trained + dtype.itemsize * size
        largest = config.lora_rank * max(part.out_features for part in linear)

    P, T, G = prompt_tokens, config.max_new_tokens, config.num_generations
    tokens = max(P + T, min(config.token_budget, P + G * T))  # of a pass
    patches = 4 * P  # of the pictures; the tower merges four into a token
    towers = tower.depth * (not config.freeze_vision)
    kept = made = 0
    for count, n, part in ((text.num_hidden_layers, tokens, text), (towers, patches, tower)):
        layer = n * (8 * part.hidden_size + 4 * part.intermediate_size)  # for its backward pass
        made_backward = n * (part.hidden_size + 2 * part.intermediate_size)
        if config.gradient_checkpointing:  # of all layers but one, only the input stays
            made_backward += layer
            layer = n * part.hidden_size
        kept += count * layer
        made = max(made, made_backward)
    logits = 16 * min(512, G * T) * text.vocab_size
    activations = kept * dtype.itemsize + max(made * dtype.itemsize, logits)
    prompts = math.ceil(config.prompts_per_step / WORLD)
    prompt_cache = cache_bytes(shapes, dtype) * G * (P + T)
    parts = {
        "weights": weights / WORLD,
        "moments": 8 * trained / WORLD,
        "reference": 4 * size / WORLD if config.kl_coef and not config.lora_rank else 0,
        "gradients": 4 * trained / WORLD,
    }
    if config.cpu_offload:
        parts = dict.fromkeys(parts, 0)
    # Weights as they are computed with: put together from the shards, or cast by autocast.
    copied = WORLD > 1 or config.cpu_offload or dtype.itemsize < 4 and not config.lora_rank
    parts["copies"] = dtype.itemsize * size * copied
    held = sum(parts.values()) - parts["gradients"]
    parts["activations"] = activations
    parts["optimizer"] = 8 * largest / WORLD * (not config.cpu_offload)  # AdamW's intermediates
    parts["cache"] = max(prompt_cache, min(prompt_cache * prompts, config.cache_gb * 1e9))
    trains = parts["gradients"] + max(activations, parts["optimizer"])
    return parts | {"peak": held + max(trains, parts["cache"])}


def report_memory(config, prompt_tokens):
    """Say how much memory training needs, and if there is less, what would help and how much."""
    parts, there = estimate_memory(config, prompt_tokens), device_memory(pick_device(config))
    told = [f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size >= 1e8]
    say(f"memory of a process at most, in GB: {', '.join(told) or 'less than 0.1'}")
    if parts["peak"] < there:
        return
    say(f"warning: the peak exceeds the {there / 1e9:.1f} GB that there are. What would help:")
    helps = {
        "lora_rank": 64,
        "freeze_vision": True,
        "kl_coef": 0.0,
        "gradient_checkpointing": True,
        "cache_gb": config.cache_gb / 4,
        "cpu_offload": True,
        "token_budget": max(1, config.token_budget // 2),
        "max_new_tokens": max(1, config.max_new_tokens // 2),
    }
    for name, value in helps.items():
        less = estimate_memory(replace(config, **{name: value}), prompt_tokens)
        saved = (parts["peak"] - less["peak"]) / 1e9
        if saved > 0.1:
            say(f"  --{name} {value}: {saved:.1f} GB less")


def prepare(config, output, rollout):
    """Everything that training needs; says what is going to happen."""
    check_options(config)
    processor, problems, held_out = start(config, output, eval_data=config.eval_data)
    if held_out and (common := set(held_out["digest"]) & set(problems["digest"])):
        say(f"warning: {len(common)} held-out problems are training problems as well")
    order = training_order(problems, config)
    steps = np.array_split(order, math.ceil(len(order) / config.prompts_per_step))
    steps = [step.tolist() for step in steps]
    if len(steps[-1]) < WORLD:
        raise ValueError(f"a step of {len(steps[-1])} problems for {WORLD} processes")

    report_memory(config, max(problems["prompt_tokens"]))
    set_seed(config.seed)  # adapters start at random
    model = load_model(config, trained=not config.lora_rank)
    model.model.visual.requires_grad_(not config.freeze_vision)
    adapters = add_adapters(model, config) if config.lora_rank else None
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    policy, reference = shard(Policy(model), config), None
    if config.kl_coef and not adapters:
        reference = shard(Policy(load_model(config).eval().requires_grad_(False)), config)
    optimizer = make_optimizer(policy, config)
    updates = sum(math.ceil(len(step) / config.minibatch_prompts) for step in steps)
    scheduler = transformers.get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
        optimizer, round(config.warmup_ratio * updates), updates, min_lr_rate=0.1
    )
    optimizer.step()  # moves nothing yet; without it, torch warns if the first update is skipped
    state = TrainState(
        policy, reference, adapters, processor, problems, held_out, steps, optimizer, scheduler
    )
    told = config.order
    if told == "ladder" and None in problems["difficulty"]:
        told = "the file's"
    say(
        f"{sum(p.numel() for p in optimizer.state):,} trained parameters on {WORLD} x {model.device.type}, "
        f"computing in {compute_dtype(model.device)}\n{len(order)} problems in {told} "
        f"order: {len(steps)} steps x {len(steps[0])} prompts x {config.num_generations} "
        f"responses, {updates} optimiser steps"
    )
    if config.resume:
        restore(state, output, config)
    if RANK == 0:
        for name in ("metrics.jsonl", "rollouts.jsonl"):  # without what came after the checkpoint
            rows = [row for row in read_log(output / name) if row["step"] <= state.step > 0]
            append_log(output / name, rows, "w")
    state.before = state.before or measure(state, config, rollout)
    return state


@contextmanager
def reference_policy(state):
    """The policy before training: a copy of it, or the policy with its adapters off."""
    policy = state.reference or state.policy
    adapters_off = state.adapters.disable_adapter() if state.adapters else nullcontext()
    with unsharded(policy), adapters_off:
        yield policy


def measure(state, config, rollout):
    """`evaluate` on the held-out problems, always with the same seeds; empty without them."""
    if state.held_out is None:
        return {}
    with unsharded(state.policy):
        model = state.policy.model
        result, rows = evaluate(model, state.processor, state.held_out, config, rollout)
    if RANK == 0:  # always the same two problems, to compare responses before and after
        for row in rows[:2]:
            images = state.held_out[row["row"]]["images"]
            row |= {"step": state.step, "held_out": True, "pictures": list(map(data_uri, images))}
        append_log(Path(config.output_dir) / "rollouts.jsonl", rows[:2])
    return result


# -------------------------------------------------------------------------------------------- data
# One schema: `images` or `image`, `question` or `problem`, `answer` or `solution`, optionally id,
# category and the three columns of a ladder. tools/convert.py turns other layouts into it.

READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
LADDER = ("difficulty", "complexity", "stage")
OURS = {"images", "image", "question", "problem", "answer", "solution", "id", "category"}
SUSPECT = re.compile(  # columns that hold pictures or options, by name, type or content
    r"^\S*(ima?ge?|picture|photo|figure|diagram|video|option|choice)|^[a-f] |'binary'|Image\("
    r"|\.(png|jpe?g|gif|webp|bmp|tiff?)\b|data:image",
    re.IGNORECASE,
)
MARKS = re.compile(r"<(?:image|img|picture|video|audio)[^<>]*>|!\[[^]]*\]\([^)]*\)", re.IGNORECASE)
WRAPPED = re.compile(
    r"</?(answer|think|solution)>|\\boxed|####|^[\[{]\s*['\"]|\banswer( is\b|\W*:)", re.IGNORECASE
)
CONVERT = "`python tools/convert.py` reads other layouts"
UNUSABLE = (ValueError, TypeError, KeyError, OSError, SyntaxError, Image.DecompressionBombError)


def read_table(source, split, subset, folder):
    """The rows of a file, a folder or a hub data set, with pictures undecoded."""
    path = Path(source)
    reader = READERS.get(path.suffix.lower())
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not path.parent.is_dir()
    if not path.exists() and (reader or not is_hub_id):
        raise ValueError(f"{source}: there is no such file or folder")
    if path.is_file() and not reader:
        raise ValueError(f"{source}: none of {', '.join(READERS)}; {CONVERT}")
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError(f"{source}: is empty")
    if path.is_file() and subset:
        say(f"{source}: --subset is for hub data sets and ignored")
    file = glob.escape(source) if path.is_file() else None  # brackets in its name are no pattern
    how = {"split": split, "data_files": file, "cache_dir": folder}
    try:
        if file and reader == "csv":  # as text: 05 and 3.50 are not 5 and 3.5
            with open(source, newline="", encoding="utf-8-sig") as lines:
                names = next(csv.reader(lines), [])
            how["features"] = datasets.Features(dict.fromkeys(names, datasets.Value("string")))
            how |= {"keep_default_na": False, "encoding": "utf-8-sig"}
        table = datasets.load_dataset(reader if file else source, subset or None, **how)
    except Exception as error:  # whatever the library meets in a file that is not ours
        raise ValueError(f"{source}: cannot be read: {error.__cause__ or error}") from error
    undecoded = datasets.Image(decode=False)
    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, undecoded)
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            table = table.cast_column(name, datasets.List(undecoded))
    return table


def load_problems(source, split="train", config=None, processor=None, folder=None):
    """A datasets.Dataset: id, images, question, answer, category, a ladder's columns, and digest.

    ValueError names what cannot be used: columns, or rows with a missing picture, marks without
    pictures, an empty question or answer, and, with a processor, prompts that are too long. Headers
    of pictures are read here, pixels later. The rows are written to `folder`, by one process.
    """
    config = config or Config()
    scratch = tempfile.TemporaryDirectory(dir=folder and Path(folder).parent)
    folder = Path(folder or scratch.name) / "problems"
    if RANK == 0:
        table = read_table(source, split, config.subset, scratch.name)
        names = set(table.column_names)
        used = OURS | set(LADDER) if names >= set(LADDER) else OURS
        for one, other in (("question", "problem"), ("answer", "solution")):
            if not names & {one, other}:
                raise ValueError(f"{source}: no column {one!r} among {sorted(names)}; {CONVERT}")
        ignored = sorted(names - used)
        first = table.select_columns(ignored)[:20] if ignored else {}
        shown = {name: f"{name} {table.features[name]} {first[name]}" for name in ignored}
        if suspect := [name for name in ignored if SUSPECT.search(shown[name])]:
            raise ValueError(f"{source}: columns {suspect} would be ignored; {CONVERT}")
        if ignored:
            say(f"{source}: ignores the columns {', '.join(ignored)}")
        path = Path(source)
        how = {"config": config, "processor": processor, "ladder": used >= set(LADDER)}
        how |= {"source": source, "folder": path.parent if path.is_file() else path}
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        features = dict.fromkeys(
            ("id", "question", "answer", "category", "digest", "place", "fault"),
            datasets.Value("string"),
        )
        features |= dict.fromkeys(LADDER, datasets.Value("float64"))
        features |= dict.fromkeys(("pictures", "prompt_tokens"), datasets.Value("int64"))
        features["images"] = datasets.List(datasets.Image())
        table.map(
            read_row,
            with_indices=True,
            fn_kwargs=how,
            remove_columns=list(names),
            features=datasets.Features(features),
            cache_file_name=str(folder / "rows.arrow"),
            load_from_cache_file=False,
            writer_batch_size=50,  # rows that are held in memory at a time
            num_proc=os.cpu_count() if config.check else None,
        )
    gather(None)  # the others wait for the files, of which each process of `map` writes one
    files = sorted(folder.glob("*.arrow"))
    problems = datasets.concatenate_datasets([datasets.Dataset.from_file(str(f)) for f in files])
    faults = problems["fault"][:]
    report_faults([fault for fault in faults if fault], config, say)
    problems = problems.select([row for row, fault in enumerate(faults) if not fault])
    if not len(problems):
        raise ValueError(f"{source}: holds no problems")
    say(f"{source}: {len(problems)} problems with {sum(problems['pictures'])} pictures")
    unreadable = [gold for gold in problems["answer"] if not is_readable(gold)]
    if unreadable:
        say(f"  {len(unreadable)} answers can never be matched, for example {unreadable[0]!r}")
    return problems


def read_row(row, number, source, folder, ladder, config, processor):
    """One row in our columns. `fault` says why it cannot be used, if it cannot."""
    name = row.get("id")
    problem = {
        "id": str(number if name is None else name),
        "fault": "",
        "pictures": 0,
        "prompt_tokens": 0,
        "images": [],
    }
    problem["place"] = f"{source}: row {number} (id {problem['id']})"
    problem["category"] = str(row.get("category") or "")
    question = row.get("question") or row.get("problem") or ""
    problem["question"] = str(question)
    gold = row.get("answer", row.get("solution"))
    problem["answer"] = "" if gold is None else str(gold).strip()
    digest = hashlib.sha256(f"{problem['question']}\0{problem['answer']}".encode())
    problem |= dict.fromkeys(LADDER)
    try:
        for value in (question, gold):
            if isinstance(value, list | dict | bytes):
                raise TypeError(f"{str(value)[:60]} is no text; {CONVERT}")
        if ladder:
            problem |= {name: float(row[name]) for name in LADDER}
            if not 0 <= problem["difficulty"] <= 1 <= problem["complexity"]:
                raise ValueError("difficulty is no share from 0 to 1, or complexity no length")
        if row.get("images") and row.get("image"):
            raise ValueError("both `image` and `images` hold pictures")
        pictures = row.get("images") or row.get("image") or []
        opened = []
        for picture in pictures if isinstance(pictures, list) else [pictures]:
            stored = picture if isinstance(picture, dict) else {"path": picture}
            content, file = stored.get("bytes"), stored.get("path")
            if not content and not isinstance(file, str):
                raise ValueError(f"{str(picture)[:60]} is no path of a picture; {CONVERT}")
            content = content or (folder / file).read_bytes()
            opened.append(Image.open(io.BytesIO(content)))  # reads the header alone
            if config.check:
                opened[-1].load()
            problem["images"].append({"bytes": content, "path": None})
            digest.update(content)
        problem["prompt_tokens"] = check_problem({**problem, "images": opened}, config, processor)
    except UNUSABLE as error:
        problem |= {"fault": f"{problem['place']}: {str(error)[:300]}", "images": []}
    return problem | {"digest": digest.hexdigest(), "pictures": len(problem["images"])}


def is_readable(gold):
    """Whether the checker can match this answer at all."""
    return rewards.answers_match(gold, gold)


def check_problem(problem, config, processor):
    """Tokens of its prompt, 0 without a processor; pictures need not be decoded.

    ValueError for a problem that would train silently wrong.
    """
    question, gold, pictures = problem["question"], problem["answer"], problem["images"]
    if not question.strip() or not gold:
        raise ValueError("the question or the answer is empty")
    if WRAPPED.search(gold):
        raise ValueError(f"the answer {gold[:60]!r} holds more than an answer; {CONVERT}")
    if any(picture.mode in ("F", "I") and picture.format != "PNG" for picture in pictures):
        raise ValueError(f"nothing says which number is white in its picture; {CONVERT}")
    marks = MARKS.findall(question)
    if foreign := set(marks) - {MARK}:
        raise ValueError(f"{foreign} in the question is no {MARK}; {CONVERT}")
    if len(marks) not in (0, len(pictures)):
        raise ValueError(f"{len(marks)} marks {MARK} in the question for {len(pictures)} pictures")
    if not processor:
        return 0
    tokens = processor.tokenizer.added_tokens_decoder.values()
    if found := [str(token) for token in tokens if token.special and str(token) in question]:
        raise ValueError(f"the question holds the control tokens {found}")
    length = prompt_length(problem, processor, config)
    if length > config.max_prompt_tokens:  # cut, a picture could lose some of its tokens
        raise ValueError(
            f"the prompt has {length} tokens, --max_prompt_tokens is {config.max_prompt_tokens}; "
            "a smaller --max_pixels makes it shorter"
        )
    return length


def report_faults(faults, config, show):
    """ValueError that lists the rows that cannot be used; with --skip_bad they are only shown."""
    text = f"{len(faults)} rows cannot be used:\n  " + "\n  ".join(faults[:20])
    if faults and not config.skip_bad:
        raise ValueError(f"{text}\n--skip_bad true leaves them out")
    if faults:
        show(text)


def read_problems(problems, numbers, config):
    """Rows as dictionaries with decoded pictures. A damaged picture is named, or left out."""
    read, faults = [], []
    for number in numbers:
        try:
            read.append(problems[number])
        except UNUSABLE as error:
            faults.append(f"{problems['place'][number]}: {error}")
    report_faults(faults, config, print)  # of this process: the others read other rows
    return read


def eight_bit(image):
    """A picture that qwen-vl-utils shows right: 16 bits scaled down, transparency made explicit."""
    if image.mode.startswith("I"):
        return image.convert("I").point(lambda value: value / 257).convert("L")
    return image.convert("RGBA") if image.has_transparency_data else image


# --------------------------------------------------------------------------- devices and processes
# Under torchrun each process takes every WORLD-th prompt of a step and keeps 1 / WORLD of weights,
# gradients and moments (FSDP2). One process runs the same code with WORLD = 1.

RANK = int(os.environ.get("RANK", "0"))  # torchrun sets both
WORLD = int(os.environ.get("WORLD_SIZE", "1"))


def say(text):
    """Print once, not once per process."""
    if RANK == 0:
        print(text, flush=True)


def gather(value):
    """The values of all processes, in the order of their ranks, on each of them."""
    values = [value] * WORLD
    if WORLD > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def set_seed(*numbers):
    """Seed all random generators."""
    transformers.set_seed(hash(numbers) % 2**32)


def pick_device(config):
    """--device, else this process's accelerator, else the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    best = found.type if found else "cpu"
    kind = config.device or best
    if kind not in (best, "cpu"):
        raise ValueError(f"--device {kind}: this machine has none, or by another name than {best}")
    return torch.device(kind, 0 if kind == "cpu" else int(os.environ.get("LOCAL_RANK", "0")))


def compute_dtype(device):
    """bf16 where the device has it, else fp32: fp16 would need a scaler, and its range is small."""
    has_bf16 = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    return torch.bfloat16 if has_bf16 and has_bf16(including_emulation=False) else torch.float32


def device_memory(device):
    """Bytes that a process has on its device; of the machine where the device has none."""
    if memory := getattr(torch.get_device_module(device), "mem_get_info", None):
        return memory()[1]
    if not hasattr(os, "sysconf"):  # Windows
        return math.inf
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes on this machine
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / here


def autocast(model):
    """Arithmetic in compute_dtype. Weights stay fp32: bf16 would swallow updates of 1e-6 whole."""
    dtype = compute_dtype(model.device)
    return torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def cache_bytes(shapes, dtype):
    """Bytes of the keys and values of one token in all layers; shapes: a model's configuration."""
    text = shapes.get_text_config()
    head_size = text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * text.num_key_value_heads * head_size * dtype.itemsize


def shard(policy, config):
    """Share the weights out over the processes, or into host memory with --cpu_offload."""
    if WORLD == 1 and not config.cpu_offload:
        return policy
    options = {}
    if compute_dtype(pick_device(config)) == torch.bfloat16:
        options["mp_policy"] = fsdp.MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    if config.cpu_offload:
        options["offload_policy"] = fsdp.CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    for part in (*policy.model.model.language_model.layers, policy):
        fsdp.fully_shard(part, **options)
    policy()  # FSDP takes the first module that runs for its root, and a rollout runs a layer
    policy.reshard()  # the optimiser must be given the shards
    return policy


@contextmanager
def unsharded(policy):
    """Inside, each process has all weights, so that it can sample as many tokens as it likes."""
    parts = [part for part in policy.modules() if isinstance(part, fsdp.FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    yield
    for part in parts:
        part.set_reshard_after_forward(True, recurse=False)
        part.reshard()


# ------------------------------------------------------------------------------------- checkpoints
# A checkpoint holds what is trained, its moments and the position in the run. Random states are no
# part of it: each step seeds its own.

MAY_CHANGE = """resume overwrite config output_dir save_steps keep_checkpoints eval_steps check
cache_gb token_budget gradient_checkpointing save_dtype"""
PROGRESS = ("step", "optimizer_step", "skipped_updates", "before")
TRAINED = dcp_state.StateDictOptions(ignore_frozen_params=True, strict=False)


def identity(state, config):
    """What must be the same when a run goes on: the options and the content of the data."""
    options = {
        name: value for name, value in asdict(config).items() if name not in MAY_CHANGE.split()
    }
    content = hashlib.sha256("".join(state.problems["digest"]).encode())
    return options | {"data": content.hexdigest()}


def tensors_of(state):
    """Trained weights and their moments, as torch.distributed.checkpoint wants them."""
    model, optimizer = dcp_state.get_state_dict(state.policy, state.optimizer, options=TRAINED)
    once = dict(state.policy.named_parameters())  # without the second name of a tied weight
    model = {name: weight for name, weight in model.items() if name in once}
    return {"model": model, "optimizer": optimizer}


def save_checkpoint(state, output, config):
    """Write checkpoint-N. Its file .metadata comes last and says that the rest is whole."""
    folder = output / f"checkpoint-{state.step}"
    if RANK == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        progress = {name: getattr(state, name) for name in PROGRESS}
        progress |= {"scheduler": state.scheduler.state_dict(), "identity": identity(state, config)}
        progress["processes"] = WORLD
        (folder / "state.json").write_text(json.dumps(progress))
    gather(None)  # the others wait for the folder
    dcp.save(tensors_of(state), checkpoint_id=folder)
    if RANK == 0:
        rotate_checkpoints(output, config.keep_checkpoints)


def restore(state, output, config):
    """Go on from the newest whole checkpoint, whatever the number of processes that wrote it."""
    damaged = []
    for folder in map(Path, reversed(sort_checkpoints(output))):
        tensors = tensors_of(state)
        try:
            saved = json.loads((folder / "state.json").read_text())
            old, new = saved["identity"], identity(state, config)
            changed = [f"--{name}" for name in new if new[name] != old.get(name)]
            if not changed:
                dcp.load(tensors, checkpoint_id=folder)
        except (OSError, ValueError, dcp.api.CheckpointException) as error:
            say(f"warning: {folder} is damaged and passed over: {last_line(error)}")
            damaged.append(folder)
            continue
        if changed:
            raise ValueError(
                f"{folder} cannot go on: {', '.join(changed)} (or the content of the file) changed "
                "since; put it back, or name another --output_dir"
            )
        dcp_state.set_state_dict(
            state.policy,
            state.optimizer,
            model_state_dict=tensors["model"],
            optim_state_dict=tensors["optimizer"],
            options=TRAINED,
        )
        state.scheduler.load_state_dict(saved["scheduler"])
        for name in PROGRESS:
            setattr(state, name, saved[name])
        if saved["processes"] != WORLD:
            say(f"warning: {WORLD} processes instead of {saved['processes']}: other samples")
        for newer in damaged if RANK == 0 else ():
            shutil.rmtree(newer)  # or it would be kept instead of whole ones
        return say(f"goes on after step {state.step}, from {folder}")
    if list(output.glob("checkpoint-*/.metadata")):  # weights may be half loaded
        raise ValueError(f"{output}: no checkpoint can be read; --overwrite true starts anew")
    if (output / "summary.json").exists():
        raise ValueError(f"{output} is finished, and without a checkpoint; --overwrite true")
    say(f"{output} holds no whole checkpoint: starts from the beginning")


def last_line(error):
    """The message of an error; that of a CheckpointException ends a printed traceback."""
    return str(error).strip().splitlines()[-1]


def save_final(state, folder, config):
    """Write a folder that from_pretrained and AutoProcessor load, with adapters merged."""
    options = replace(TRAINED, full_state_dict=True, cpu_offload=True)
    weights = dcp_state.get_model_state_dict(state.policy, options=options)
    if RANK:
        return
    model = load_model(replace(config, device="cpu"), trained=False)
    adapters = add_adapters(model, config) if config.lora_rank else None
    unknown = Policy(model).load_state_dict(weights, strict=False).unexpected_keys
    if unknown:
        raise RuntimeError(f"trained weights that the model lacks: {unknown}")
    if adapters:
        adapters.save_pretrained(folder / "adapter")
        model = adapters.merge_and_unload()
    model.to(getattr(torch, config.save_dtype)).save_pretrained(folder)
    state.processor.save_pretrained(folder)


# -------------------------------------------------------------------------------- logs and signals


@contextmanager
def run_folder(config, results=RESULTS):
    """The output folder, locked. A run that it holds goes on, is replaced, or stays as it is."""
    if not config.output_dir:
        raise ValueError("--output_dir is missing")
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(output / f".lock{RANK}", blocking=False)
    try:
        held = lock.acquire()
    except filelock.Timeout as error:
        raise ValueError(f"{output} is in use by another run") from error
    with held:
        found = old_results(output, results)
        if found and RANK == 0 and not config.resume and not config.overwrite:
            raise ValueError(
                f"{output} holds a run: --resume true goes on with it, --overwrite true "
                "replaces it, another --output_dir keeps it"
            )
        for name in ("model", "data", "eval_data", "clean_model") if config.overwrite else ():
            needed = Path(getattr(config, name)).resolve()
            if any(needed.is_relative_to(path.resolve()) for path in found):
                raise ValueError(f"--overwrite true would delete --{name} {getattr(config, name)}")
        yield output


def old_results(output, results):
    """What an earlier run left in the folder."""
    return [path for name in results.split() for path in output.glob(name)]


def stop_on_signals():
    """An empty list that Ctrl-C or SIGTERM fills: finish the step, save, leave. Twice: at once."""
    received = []

    def note(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)

    signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, note)
    return received


def read_log(file):
    """The rows of a .jsonl file, none if there is no file; half a line, left by a kill, is cut."""
    text = file.read_text() if file.exists() else ""
    whole = text.rfind("\n") + 1
    if whole < len(text):
        os.truncate(file, whole)
    return [json.loads(line) for line in text[:whole].splitlines()]


def append_log(file, rows, mode="a"):
    """Add rows to a .jsonl file, or with mode "w" replace it."""
    with open(file, mode) as log:
        log.writelines(json.dumps(row) + "\n" for row in rows)


def write_summary(file, content):
    """Write and print the result of a command."""
    if RANK == 0:
        file.write_text(json.dumps(content, indent=1))
    say(json.dumps(content))
    return content


def data_uri(image):
    """A small PNG of a picture as text, for an HTML page."""
    image = image.convert("RGB")
    image.thumbnail((256, 256))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def log_step(progress, output, state, problems, rollouts, scores, metrics, config):
    """A line on the screen, a line in metrics.jsonl, two groups in rollouts.jsonl."""
    lengths = rollouts.mask.sum(-1)
    values = {
        **scores,
        "response_length": lengths,
        "truncated_fraction": lengths >= config.max_new_tokens,
        "zero_weight_fraction": scores["weight"] == 0,
        "skipped_fraction": (scores["advantage"] == 0).all(-1),
    }
    difficulty = [problem["difficulty"] for problem in problems]
    if None not in difficulty:  # measured when the ladder was made
        values["difficulty"] = torch.tensor(difficulty)
    parts = gather({name: value.cpu().double() for name, value in values.items()})
    if RANK:
        return
    means = {name: torch.cat([part[name] for part in parts]).mean().item() for name in values}
    del means["advantage"]  # 0 in every group
    metrics = {"step": state.step, "total_steps": len(state.steps), **means, **metrics}
    append_log(output / "metrics.jsonl", [metrics])
    rows = response_rows(problems, rollouts, scores)
    order = sorted(range(len(rows)), key=lambda b: -rows[b]["weight"])  # those that teach, first
    for b in order if state.skipped_updates else order[:2]:
        rows[b]["pictures"] = [data_uri(image) for image in problems[b]["images"]]
        append_log(output / "rollouts.jsonl", [{"step": state.step, **rows[b]}])
    line = "step {step}  reward {reward:.3f}  accuracy {accuracy:.3f}  format {format:.3f} of 0.5  "
    line += "length {response_length:.0f}  clipped {clip_fraction:.3f}  kl {kl:.2g}"
    progress.write(line.format(**metrics))
    if "eval_accuracy" in metrics:
        progress.write(f"  held-out accuracy {metrics['eval_accuracy']:.3f}")


# ------------------------------------------------------------------------------------ command line

COMMANDS = {"train": train, "ladder": ladder, "eval": evaluate_model}
TOY = Path(__file__).resolve().parent / "toy" / "config.json"


def check_options(config):
    """ValueError for options of `train` that contradict each other, with the arithmetic."""
    c = config
    groups = f"--prompts_per_step {c.prompts_per_step}"
    wrong = {
        "--num_generations 1: a response is compared with its group": c.num_generations == 1,
        "--temperature 0 makes all responses of a group equal": c.temperature == 0,
        f"{groups} is no multiple of --minibatch_prompts {c.minibatch_prompts}": (
            c.prompts_per_step % c.minibatch_prompts
        ),
        f"{groups} for {WORLD} processes": c.prompts_per_step < WORLD,
        f"--min_length {c.min_length} >= --max_new_tokens {c.max_new_tokens}: no response can get "
        "the bonus (--bonus 0)": c.bonus and c.min_length >= c.max_new_tokens,
        "--eval_steps needs --eval_data": c.eval_steps and not c.eval_data,
    }
    for why, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(why)


def parse_arguments(arguments):
    """(command, Config); no arguments at all train the toy."""
    command, *options = arguments or ["train", "--config", str(TOY)]
    if command not in COMMANDS:
        raise ValueError(f"usage: python observe_r1.py [{' | '.join(COMMANDS)}] [--help]")
    title = f"observe_r1.py {command}"
    usage = f"{title} [--OPTION VALUE] ...; --help lists the options"
    parser = transformers.HfArgumentParser(Config, prog=title, usage=usage, allow_abbrev=False)
    comments = dict(re.findall(r"^    (\w+): .*  # (.*)$", inspect.getsource(Config), re.MULTILINE))
    for action in parser._actions:
        action.help = comments.get(action.dest, action.help)
    (config,) = parser.parse_args_into_dataclasses(options)
    if config.config:
        try:
            (base,) = parser.parse_json_file(config.config)  # refuses options that do not exist
        except (ValueError, AttributeError) as error:
            raise ValueError(f"--config {config.config}: {error}") from error
        for name in ("model", "data", "eval_data"):  # a path may start at the file's own folder
            path = Path(config.config).parent / getattr(base, name)
            if getattr(base, name) and path.exists():
                setattr(base, name, str(path))
        parser.set_defaults(**asdict(base))  # options that were given win over these
        (config,) = parser.parse_args_into_dataclasses(options)
    if config.cpu_offload and command != "train":
        raise ValueError(f"--cpu_offload is for train alone: {command} would run on the CPU")
    config.output_dir = config.output_dir or f"runs/{command}"
    return command, config


def main():
    """Run one command; a mistake that a user can mend ends in one line instead of a traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends in one line, as Ctrl-C does
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors end in ours
    transformers.utils.logging.disable_progress_bar()
    try:
        command, config = parse_arguments(sys.argv[1:])
        COMMANDS[command](config)
    except KeyboardInterrupt:
        raise SystemExit("observe_r1: stopped; what was written so far is kept") from None
    except (ValueError, OSError, SafetensorError) as error:
        raise SystemExit(f"observe_r1: {error}") from error
    except dcp.api.CheckpointException as error:
        raise SystemExit(f"observe_r1: no checkpoint written: {last_line(error)}") from error
    except torch.OutOfMemoryError as error:
        raise SystemExit(
            f"observe_r1: {error}\nWhat helps, the most effective first: --lora_rank 64, a smaller "
            "--token_budget, --max_pixels, --cache_gb"
        ) from error


if __name__ == "__main__":
    main()
