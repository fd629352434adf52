"""Observe-R1 (arXiv 2505.12432) in one script: teach a vision-language model to look, then reason.

    python observe_r1.py      # trains the toy: real digits, no network, no GPU, minutes
    python observe_r1.py ladder --model Qwen/Qwen2.5-VL-3B-Instruct --data raw.parquet
    python observe_r1.py train --model Qwen/Qwen2.5-VL-3B-Instruct --data ladder.parquet
    python observe_r1.py eval --model runs/3b/final --data AI4Math/MathVista --split testmini
    torchrun --nproc_per_node 8 observe_r1.py train ...   # and ladder, eval

It reads in the order of a run. What differs from the paper's released code:
1. KL is part of the loss, not of the reward, so that a group of weight zero moves nothing.
2. The loss is a mean over a response's tokens, then responses, however memory splits them.
3. Mini-batches are whole groups, so that a prompt and its picture are encoded once.
4. No prompt is cut and no problem dropped; accuracy is kept apart from the other rewards.
Shapes: B prompts, G responses each, P prompt tokens, T response tokens, N responses (or tokens) in
a flat list, H hidden size, V vocabulary.
"""
import json
import random
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import datasets
import numpy as np
import torch
import transformers
from qwen_vl_utils import process_vision_info
from safetensors import SafetensorError
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.cache_utils import Cache
from transformers.hf_argparser import HfArg

from plumbing import (
    RANK, WORLD, RoomyLayer, append_log, check_options, cut_logs, eight_bit, gather, gathered,
    identity, join_processes, last_checkpoint, load_problems, log_step, read_log, restore,
    save_checkpoint, save_model, shard, stop_on_signals, write_review)
from report import write_report
from rewards import (
    accuracy_reward, answers_match, bonus_rewards, dynamic_weight, format_reward)

@dataclass
class Config:
    """Defaults are the published run; --config FILE overrides them, options given override both."""
    model: str = HfArg(default="Qwen/Qwen2.5-VL-3B-Instruct", help="folder or hub id")
    data: str = HfArg(default="", help="problems: hub id, folder, .jsonl, .json, .csv or .parquet")
    eval_data: str = HfArg(default="", help="held-out problems, measured before and after training")
    split: str = HfArg(default="train", help="split of the data")
    output_dir: str = HfArg(default="runs/observe-r1", help="folder for all that a run writes")
    config: str = HfArg(default="", help="JSON file of options; its paths may start at its folder")
    seed: int = HfArg(default=0, help="seed of the order and of sampling")
    order: Literal["ladder", "sorted", "random"] = HfArg(default="ladder", help="order of problems")
    max_steps: int = HfArg(default=0, help="thin the ladder evenly to so many steps; 0: all of it")
    prompts_per_step: int = HfArg(default=128, help="prompts of one rollout, which is one step")
    num_generations: int = HfArg(default=8, help="G, the responses sampled for each prompt")
    temperature: float = HfArg(default=1.0, help="sampling temperature; 0: the likeliest token")
    max_prompt_tokens: int = HfArg(default=9216, help="longer prompts are refused, never cut")
    max_new_tokens: int = HfArg(default=8192, help="length cap of a response")
    min_pixels: int = HfArg(default=3136, help="smaller pictures are enlarged to this area")
    max_pixels: int = HfArg(default=2560000, help="larger pictures are reduced to this area")
    cache_gb: float = HfArg(default=16.0, help="GB that a rollout's key/value cache may take")
    system_prompt: str = HfArg(default="", help="replaces the built-in system prompt")
    observe: bool = HfArg(default=True, help="ask for and reward <observe>; false: think, answer")
    min_length: int = HfArg(default=100, help="tokens that a response must exceed for the bonus")
    bonus: float = HfArg(default=0.2, help="reward of the shortest correct response of a group")
    dynamic_weight: bool = HfArg(default=True, help="weigh a group by 4 sigma d (1 - d), not by 1")
    sigma: float = HfArg(default=1.8, help="weight of a half-solved group")
    minibatch_prompts: int = HfArg(default=8, help="groups of each optimiser step")
    learning_rate: float = HfArg(default=1e-6, help="peak learning rate")
    warmup_ratio: float = HfArg(default=0.03, help="share of the optimiser steps that warm up")
    max_grad_norm: float = HfArg(default=1.0, help="gradients are scaled down to this norm")
    clip_range: float = HfArg(default=0.2, help="the ratio is clipped to 1 +- this")
    kl_coef: float = HfArg(default=0.01, help="beta of the KL penalty; 0 loads no reference model")
    token_budget: int = HfArg(default=16384, help="tokens of a backward pass: memory, not results")
    gradient_checkpointing: bool = HfArg(default=True, help="recompute activations, save memory")
    freeze_vision: bool = HfArg(default=False, help="do not train the vision tower")
    eval_steps: int = HfArg(default=0, help="measure held-out accuracy every so many steps")
    num_samples: int = HfArg(default=0, help="responses sampled a problem in eval; 0: one, greedy")
    save_steps: int = HfArg(default=0, help="write a checkpoint every so many steps")
    keep_checkpoints: int = HfArg(default=2, help="newest checkpoints that stay; 0: all")
    resume: bool = HfArg(default=False, help="go on from the newest checkpoint of --output_dir")
    cpu_offload: bool = HfArg(default=False, help="weights and moments in host memory (torchrun)")
    clean_model: str = HfArg(default="", help="ladder: model that must fail without reasoning")
    drop_easy: bool = HfArg(default=True, help="ladder: drop short problems that are always solved")
    drop_hardest: bool = HfArg(default=False, help="ladder: drop problems that are never solved")
    review: str = HfArg(default="", help="ladder: review.parquet with a person's marks in `keep`")

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

def encode_prompts(problems: list[dict], processor, config: Config) -> transformers.BatchFeature:
    """The processor's batch of B prompts, left padded: input_ids, attention_mask [B,P] and so on.

    num_images [B] says how many pictures a prompt has; pixel_values and image_grid_thw hold those
    of all prompts end to end.
    """
    system, chats = config.system_prompt or PROMPTS["observe" if config.observe else "think"], []
    for problem in problems:
        pictures = [{"type": "image", "image": eight_bit(image), "min_pixels": config.min_pixels,
                     "max_pixels": config.max_pixels} for image in problem["images"]]
        user = [*pictures, {"type": "text", "text": problem["question"]}]
        chats.append([{"role": "system", "content": system}, {"role": "user", "content": user}])
    texts = processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    images, _ = process_vision_info(chats)  # loads and resizes; the processor must not do it again
    batch = processor(text=texts, images=images, do_resize=False, padding=True,
                      padding_side="left", return_tensors="pt")
    batch["num_images"] = torch.tensor([len(problem["images"]) for problem in problems])
    return batch

def prompt_check(processor, config: Config):
    """A function for load_problems: ValueError for a problem that must not become a prompt."""
    tokens = processor.tokenizer.added_tokens_decoder.values()
    control = [token.content for token in tokens if token.special]

    def check(problem: dict) -> None:
        if found := [token for token in control if token in problem["question"]]:
            raise ValueError(f"the question holds the control tokens {found}")
        length = encode_prompts([problem], processor, config)["input_ids"].shape[1]
        if length > config.max_prompt_tokens:  # cut, a picture could lose some of its tokens
            raise ValueError(f"the prompt has {length} tokens, --max_prompt_tokens is "
                             f"{config.max_prompt_tokens}; --max_pixels makes it shorter")
    return check

# ------------------------------------------------------------------------------------------ ladder
# The paper's NeuraLadder: difficulty d = share of wrong responses among 8, so nine levels, and nine
# stages; each stage draws mostly from its own level and a little from the four nearest ones. As
# each problem comes once, shares and level sizes leave no choice of the stages' sizes.

STAGES = (  # the paper's figure: lowest level of a stage, shares of five levels from there upwards
    (0, (0.29, 0.18, 0.19, 0.19, 0.17)),
    (0, (0.05, 0.50, 0.15, 0.155, 0.15)),
    (0, (0.02, 0.08, 0.51, 0.17, 0.23)),
    (1, (0.03, 0.07, 0.505, 0.21, 0.19)),
    (2, (0.03, 0.07, 0.58, 0.19, 0.14)),
    (3, (0.03, 0.10, 0.575, 0.15, 0.15)),
    (4, (0.05, 0.12, 0.54, 0.18, 0.12)),
    (4, (0.02, 0.055, 0.10, 0.685, 0.14)),
    (4, (0.02, 0.05, 0.07, 0.15, 0.72)),
)

def mix_ladder(difficulty: list, complexity: list, seed: int = 0) -> tuple[list[int], list[int]]:
    """Order problems into nine stages of smoothly rising difficulty (NeuraLadder).

    difficulty: share of wrong responses, 0 to 1; complexity: mean response length in tokens.
    Returns (order, stage): a permutation of range(n), and the stage 0 to 8 of each position.
    Stage sizes must satisfy sum_i size_i share_il = n_l, the problems of level l. From one stage a
    level, each round sends every level to the stages in proportion to what they ask of it (EM for
    mixture weights): at the figure's level sizes this ends in the figure, elsewhere as near to it
    as using each problem once allows, and no stage takes from a level in which it has no share.
    """
    share = np.zeros((9, 9))  # [stage, level]
    for stage, (low, shares) in enumerate(STAGES):
        share[stage, low:low + 5] = np.array(shares) / sum(shares)
    level = np.rint(np.array(difficulty, dtype=float) * 8).astype(int)
    size = counts = np.bincount(level, minlength=9).astype(float)
    for _ in range(200):
        asked = size[:, None] * share
        part = asked / np.maximum(asked.sum(0), 1e-12)  # where each level's problems go
        size = part @ counts
    rng, placed = random.Random(seed), []
    for l in range(9):
        members = sorted(np.flatnonzero(level == l).tolist(), key=lambda i: complexity[i])
        ends = np.rint(part[:, l].cumsum() * len(members)).astype(int)
        for stage, (start, end) in enumerate(zip([0, *ends], ends)):
            shift = rng.random()  # a level is spread evenly over its stage, at a phase of its own
            placed += [(stage, (k - start + shift) / (end - start), members[k])
                       for k in range(start, end)]
    placed.sort()
    return [problem for _, _, problem in placed], [stage for stage, _, _ in placed]

def select_problems(difficulty, complexity, drop_easy=True, drop_hardest=False) -> list[int]:
    """Row numbers that stay: of difficulty 0 only the longer half (complexity)."""
    easy = [c for d, c in zip(difficulty, complexity) if d == 0]
    floor = float(np.median(easy)) if easy and drop_easy else -np.inf
    return [i for i, (d, c) in enumerate(zip(difficulty, complexity))
            if (d > 0 or c >= floor) and (d < 1 or not drop_hardest)]

def training_order(problems: datasets.Dataset, config: Config) -> list[int]:
    """Row numbers in the order in which training reads them: all of them, or thinned evenly."""
    order, columns = list(range(len(problems))), problems.column_names
    scored = "difficulty" in columns and "complexity" in columns
    if config.order == "sorted" and not scored:
        raise ValueError(f"--order sorted needs difficulty and complexity, not just {columns}")
    if config.order == "random":
        random.Random(config.seed).shuffle(order)
    elif config.order == "sorted":
        order = np.lexsort((problems["complexity"], problems["difficulty"])).tolist()
    elif scored and "stage" not in columns:  # with stages it is a ladder already, in its order
        order, _ = mix_ladder(problems["difficulty"], problems["complexity"], config.seed)
    count = config.max_steps * config.prompts_per_step or len(order)
    stride = max(1, len(order) / count)  # thinned evenly: a cut would lose the hard end
    return [order[int((k + 0.5) * stride)] for k in range(min(count, len(order)))]

# ----------------------------------------------------------------------------------------- rollout
# For each prompt the policy, as it is now, writes G responses, by softmax(logits / temperature).
# Tokens that stand for pictures are never sampled: the next pass would look for their picture.

@dataclass
class Rollouts:
    """Prompts and their sampled responses; the mask, not a token's value, says what is padding."""
    prompt: dict  # the processor's batch, left padded
    response_ids: torch.Tensor  # [B,G,T]
    mask: torch.Tensor  # [B,G,T], 1 up to and with the stop token
    texts: list[list[str]]  # B lists of G

def slice_prompts(prompt: dict, rows: list[int]) -> dict:
    """Some prompts of an encoded batch, with the patches of just their pictures."""
    width = int(prompt["attention_mask"][rows].sum(-1).max())
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    part = {name: prompt[name][rows, -width:] for name in names}
    first = [0, *prompt["num_images"].cumsum(0).tolist()]
    which = [picture for row in rows for picture in range(first[row], first[row + 1])]
    if which:
        patches = prompt["pixel_values"].split(prompt["image_grid_thw"].prod(-1).tolist())
        part["image_grid_thw"] = prompt["image_grid_thw"][which]
        part["pixel_values"] = torch.cat([patches[picture] for picture in which])
    return part

def model_inputs(model, prompt: dict) -> dict:
    """Inputs of a forward pass over prompts, with rope positions [3,B,P] (time, height, width).

    Positions are always explicit: left to itself, the model reuses offsets of an earlier batch.
    """
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
    inputs = {name: prompt[name] for name in names if name in prompt}
    inputs["position_ids"], _ = model.model.get_rope_index(
        mm_token_type_ids=prompt["mm_token_type_ids"], **inputs)
    return inputs

def vision_tokens(model) -> list[int]:
    """Tokens that stand for pictures: once sampled, a later pass looks for a picture and fails."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return [getattr(model.config, name) for name in names]

def autocast(model):
    """bf16 arithmetic on a GPU. Weights stay fp32: bf16 would swallow updates of 1e-6 whole."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda")

@torch.no_grad()
def sample(model, prompt: dict, stop: list[int], config: Config) -> list[torch.Tensor]:
    """B*G responses, each [T] with its stop token; a prompt is read once and its cache serves G."""
    inputs, G = model_inputs(model, prompt), config.num_generations
    cache = Cache(layer_class_to_replicate=RoomyLayer)
    hidden = model.model(**inputs, past_key_values=cache).last_hidden_state[:, -1]  # [B,H]
    cache.batch_repeat_interleave(G)
    hidden, attention = (x.repeat_interleave(G, 0) for x in (hidden, inputs["attention_mask"]))
    position = inputs["position_ids"].amax((0, 2)).repeat_interleave(G)  # of the last token, [B*G]
    ids, stop = position.new_zeros(len(position), config.max_new_tokens), position.new_tensor(stop)
    length, alive = torch.zeros_like(position), torch.arange(len(ids), device=ids.device)
    banned = position.new_tensor(vision_tokens(model))
    for t in range(config.max_new_tokens):
        logits = model.lm_head(hidden).float()  # [responses still being written, V]
        logits[:, banned] = -torch.inf
        if config.temperature == 0:
            token = logits.argmax(-1)
        else:
            token = torch.multinomial((logits / config.temperature).softmax(-1), 1).squeeze(-1)
        ids[alive, t], length[alive] = token, t + 1
        going = ~torch.isin(token, stop)
        left = int(going.sum())  # the one time in a step that Python waits for the GPU
        if left == 0 or t + 1 == config.max_new_tokens:
            break
        if left < len(going):  # finished responses leave the batch
            cache.batch_select_indices(going.nonzero().squeeze(-1))
            alive, token, position, attention = (
                x[going] for x in (alive, token, position, attention))
        position, attention = position + 1, pad(attention, (0, 1), value=1)
        hidden = model.model(
            input_ids=token[:, None], attention_mask=attention, past_key_values=cache,
            position_ids=position[:, None].expand(3, -1, 1)).last_hidden_state[:, -1]
    return [response[:n] for response, n in zip(ids, length)]

def rollout(model, processor, problems: list[dict], config: Config) -> Rollouts:
    """Sample G responses for each problem. `train` takes any function of this signature instead.

    Prompts go in chunks whose key/value cache fits --cache_gb even if all responses reach the cap,
    the longest prompts together, so that little of it is padding.
    """
    model.eval()  # in training mode, gradient checkpointing drops the cache without an error
    prompt, G = encode_prompts(problems, processor, config).to(model.device), config.num_generations
    eos = model.generation_config.eos_token_id  # one or several; its other settings are not used
    stop = {processor.tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    text, gpu = model.config.get_text_config(), model.device.type == "cuda"
    per_token = (4 if gpu else 8) * text.num_hidden_layers * text.num_key_value_heads * (
        text.hidden_size // text.num_attention_heads)  # bytes of keys and values, bf16 or fp32
    length, order, responses = prompt["attention_mask"].sum(-1).tolist(), range(len(problems)), []
    limit = config.cache_gb * 1e9 / (per_token * G)  # tokens of a chunk, its G counted as one
    if len(order) * (max(length) + config.max_new_tokens) > limit:
        order = sorted(order, key=lambda row: -length[row])
    while len(responses) < len(order):
        left = order[len(responses):]
        chunk = left[:max(1, int(limit / (length[left[0]] + config.max_new_tokens)))]
        with autocast(model):
            flat = sample(model, slice_prompts(prompt, list(chunk)), sorted(stop), config)
        responses += [flat[i:i + G] for i in range(0, len(flat), G)]
    responses = [one for _, group in sorted(zip(order, responses)) for one in group]
    texts = processor.batch_decode(responses, skip_special_tokens=True)
    ids, mask = (pad_sequence(rows, batch_first=True).view(len(problems), G, -1)
                 for rows in (responses, [torch.ones_like(row) for row in responses]))
    return Rollouts(prompt, ids, mask, [texts[i:i + G] for i in range(0, len(texts), G)])

# --------------------------------------------------------------------------- rewards and advantages
# r = accuracy {0, 1} + format {0, .5} + bonus {0, .2};  d = share correct;  w = 4 sigma d (1 - d);
# A = w (r - mean r) / std r.  A group that is all right or all wrong has w = 0 and teaches nothing.
def score_rollouts(rollouts: Rollouts, problems: list[dict], config: Config) -> dict:
    """The three rewards and their sum r, each [B,G], and the weight w of each group [B]."""
    groups = []
    for problem, texts, lengths in zip(problems, rollouts.texts, rollouts.mask.sum(-1).tolist()):
        accuracy = [accuracy_reward(text, problem["answer"]) for text in texts]
        correct = [value == 1 for value in accuracy]  # bonus and weight depend on this alone
        groups.append({
            "accuracy": accuracy,
            "format": [format_reward(text, config.observe) for text in texts],
            "bonus": bonus_rewards(correct, lengths, config.min_length, config.bonus),
            "weight": dynamic_weight(correct, config.sigma) if config.dynamic_weight else 1.0})
    scores = {name: torch.tensor([group[name] for group in groups]) for name in groups[0]}
    return {"reward": scores["accuracy"] + scores["format"] + scores["bonus"], **scores}

def group_advantages(rewards: torch.Tensor, weights: torch.Tensor, eps=1e-6) -> torch.Tensor:
    """A = w (r - mean) / (std + eps) in each group: rewards [B,G], weights [B] -> [B,G].

    The std is the unbiased one (n - 1). Equal rewards are told by their range, because the std of
    eight times 0.1 is rounding noise and not zero.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0], [0.1, 0.1, 0.1]]), torch.tensor([1.6, 1.6]))
    tensor([[ 1.8475, -0.9238, -0.9238],
            [ 0.0000,  0.0000,  0.0000]])
    """
    centred = rewards - rewards.mean(-1, keepdim=True)
    equal = rewards.amax(-1, keepdim=True) - rewards.amin(-1, keepdim=True) < eps
    advantages = weights[:, None] * centred / (rewards.std(-1, keepdim=True) + eps)
    return advantages.masked_fill(equal, 0.0)

# ------------------------------------------------------------------------------- log-probabilities
# log p(token) = z - log sum exp z, z = logits / temperature, as sampled. The G responses of a group
# share one row, in which prompt and picture stand once: less work, and still exact.
def pack_group(inputs: dict, ids: torch.Tensor, mask: torch.Tensor) -> tuple[dict, torch.Tensor]:
    """One row of tokens: a prompt once, then its G responses end to end; ids and mask [G,T].

    A response token sees the prompt and its own response so far, and its position goes on where the
    prompt ends: just what it would see alone, but prompt and picture are encoded once, not G times,
    and nothing is padded. Also returns, for each response token, the place of its predecessor.
    """
    P, lengths, mask = inputs["input_ids"].shape[1], mask.sum(-1), mask.bool()
    t = mask.cumsum(-1)[mask]  # 1, 2, ... within each response
    after = (inputs["position_ids"].max() + t).expand(3, 1, -1)
    owner = torch.arange(len(lengths), device=ids.device).repeat_interleave(lengths)
    owner = pad(owner, (P, 0), value=-1)  # -1 is the prompt, which all may see
    visible = ((owner == -1) | (owner == owner[:, None])).tril()  # [query,key]
    before = torch.arange(P - 1, P - 1 + len(t), device=ids.device).where(t > 1, P - 1)
    return {**inputs, "input_ids": torch.cat([inputs["input_ids"], ids[mask][None]], 1),
            "position_ids": torch.cat([inputs["position_ids"], after], 2),
            "attention_mask": visible[None, None]}, before

def token_log_probs(hidden, targets, head, banned: list[int], temperature: float, chunk=512):
    """log p(target) from hidden states [N,H] and targets [N] -> [N].

    Logits over 152k tokens are the memory peak of training: they are made for `chunk` tokens at a
    time, reduced to one number each, and made again in the backward pass.
    """
    def of_chunk(hidden, targets):
        logits = head(hidden).float() / temperature
        logits[:, banned] = -torch.inf  # what cannot be sampled has no probability here either
        return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)

    pairs = list(zip(hidden.split(chunk), targets.split(chunk)))
    if len(pairs) == 1:  # its backward pass follows at once: making logits again saves nothing
        return of_chunk(hidden, targets)
    return torch.cat([checkpoint(of_chunk, *pair, use_reentrant=False) for pair in pairs])

def group_log_probs(model, rollouts: Rollouts, row: int, part: slice, config) -> torch.Tensor:
    """Log-probabilities of responses to one prompt, [G,T], 0 in the padding, with gradients."""
    ids, mask = rollouts.response_ids[row, part], rollouts.mask[row, part].bool()
    inputs = model_inputs(model, slice_prompts(rollouts.prompt, [row]))
    inputs, before = pack_group(inputs, ids, mask)
    with autocast(model):
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[0, before]  # [N,H]
        log_probs = token_log_probs(hidden, ids[mask], model.lm_head, vision_tokens(model),
                                    config.temperature)
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, log_probs)

def response_log_probs(model, rollouts: Rollouts, config: Config) -> torch.Tensor:
    """Log-probability of each response token at the sampling temperature, [B,G,T]; 0 in padding."""
    rows = range(len(rollouts.mask))
    return torch.stack([group_log_probs(model, rollouts, row, slice(None), config) for row in rows])

# -------------------------------------------------------------------------------------------- loss
# -min(ratio A, clip(ratio, 1 - .2, 1 + .2) A) + beta (exp(q) - q - 1), ratio = p / p_old and
# q = log p_ref - log p. On the first optimiser step ratio = 1: the loss is 0, its gradient is not.
def grpo_loss(log_probs, old_log_probs, ref_log_probs, advantages, mask, clip_range=0.2,
              kl_coef=0.01, num_responses=None) -> tuple[torch.Tensor, dict[str, float]]:
    """GRPO (arXiv 2402.03300): log-probabilities, mask [N,T] and advantages [N] -> loss, metrics.

    A token costs -min(ratio A, clip(ratio) A) + beta KL, a response the mean over its tokens; their
    sum over responses is divided by `num_responses`, all that this optimiser step sampled (or N).
    `ref_log_probs` may be None: no KL. The metrics are means over the N responses.
    """
    mask = mask.to(log_probs.dtype)

    def per_response(values):  # [N,T] -> [N], the mean over each response's own tokens
        return (values * mask).sum(-1) / mask.sum(-1).clamp(min=1)

    ratio = (log_probs - old_log_probs).exp()
    gain = ratio * advantages[:, None]
    clipped_gain = ratio.clamp(1 - clip_range, 1 + clip_range) * advantages[:, None]
    q = torch.zeros_like(log_probs) if ref_log_probs is None else ref_log_probs - log_probs
    kl = q.exp() - q - 1  # unbiased and never negative
    cost = per_response(kl_coef * kl - torch.min(gain, clipped_gain))
    metrics = {"kl": kl, "clip_fraction": (clipped_gain < gain).to(mask.dtype)}
    return (cost.sum() / (num_responses or len(cost)),
            {name: per_response(values).mean().item() for name, values in metrics.items()})

# ---------------------------------------------------------------------------------------- training
# The algorithm box: sample, reward, weigh, compare, update, in the order of the ladder. Groups with
# A = 0 cost no pass, but stay in the denominator: the fewer groups are left, the smaller the step.
def train(config: Config, rollout=rollout) -> dict:
    """Observe-R1. Returns the content of summary.json; `rollout` may be an engine of your own."""
    started, state, output = time.time(), prepare(config, rollout), Path(config.output_dir)
    progress = tqdm(state.steps, "training", unit="step", initial=state.step, disable=RANK > 0)
    for rows in state.steps[state.step:]:  # easy to hard
        clock = time.time()
        transformers.set_seed(hash((config.seed, state.step, RANK)) % 2**32)  # resume needs no more
        problems = list(state.problems.select(rows[RANK::WORLD]))
        with gathered(state.model):
            rollouts = rollout(state.model, state.processor, problems, config)  # B x G responses
        scores = score_rollouts(rollouts, problems, config)  # accuracy + format + bonus, and w(d)
        advantages = group_advantages(scores["reward"], scores["weight"])  # w (r - mean) / std
        metrics = update(state, rollouts, advantages, config)  # GRPO
        state.step += 1
        if state.held_out and config.eval_steps and state.step % config.eval_steps == 0:
            metrics["eval_accuracy"] = measure(state, config, rollout)["accuracy"]
        metrics["seconds"] = round(time.time() - clock, 3)
        log_step(progress, state, problems, rollouts, scores, advantages, metrics, config)
        stop = any(gather(state.stop))  # Ctrl-C may reach one process alone
        if stop or config.save_steps and state.step % config.save_steps == 0:
            save_checkpoint(state, config)
        if stop:
            raise SystemExit(f"stopped after step {state.step}; --resume true goes on from there")
    save_model(state, output / "final")
    after = measure(state, config, rollout)
    summary = {"seconds": round(time.time() - started, 1), "steps": state.step}
    for when, found in (("before", state.before), ("after", after)):
        names = ("accuracy", "format", "response_length") if found else ()
        summary |= {f"{name}_{when}": round(found[name], 4) for name in names}
    if RANK == 0:
        (output / "summary.json").write_text(json.dumps(summary, indent=1))
        write_report(output)
        print(f"{json.dumps(summary)}\nthe model is {output}/final; see {output}/report.html")
    return summary

@torch.no_grad()
def constant_log_probs(model, rollouts: Rollouts, passes: list, config: Config) -> list:
    """Old or reference log-probabilities. The sampler's own would not do: it rounds otherwise."""
    with gathered(model):
        return [group_log_probs(model, rollouts, *which, config) for which in passes]

def update(state, rollouts: Rollouts, advantages: torch.Tensor, config: Config) -> dict:
    """The optimiser steps of one rollout: mini-batches of whole groups, one group a backward pass.

    A group whose advantages are all zero is skipped, its KL too; it counts in the denominator.
    Under torchrun rollouts holds every WORLD-th prompt of the step, from number RANK on.
    """
    advantages = advantages.to(rollouts.mask.device)  # [B,G]
    trained = advantages.any(1).nonzero().flatten().tolist()
    P, (_, G, T) = rollouts.prompt["input_ids"].shape[1], rollouts.mask.shape
    size = max(1, (config.token_budget - P) // T)  # responses that share a backward pass
    passes = [(row, slice(start, start + size)) for row in trained for start in range(0, G, size)]
    prompts = sum(gather(len(advantages)))  # of all processes
    minibatches = torch.arange(prompts).split(config.minibatch_prompts)
    old = ref = [None] * len(passes)
    if len(minibatches) > 1:  # with one, the policy that learns is the one that sampled
        old = constant_log_probs(state.model, rollouts, passes, config)
    if state.reference is not None:
        ref = constant_log_probs(state.reference, rollouts, passes, config)
    totals, norms = {"loss": 0.0, "kl": 0.0, "clip_fraction": 0.0, "trained": len(trained)}, []
    state.model.train()
    for rows in minibatches:
        mine = [i for i, (row, _) in enumerate(passes) if RANK + WORLD * row in rows]
        most = max(gather(len(mine)))  # all processes make as many passes, or they would wait
        for i in mine + [None] * (most - len(mine)):
            row, part = (0, slice(0, 1)) if i is None else passes[i]
            log_probs = state.model.run(group_log_probs, state.model, rollouts, row, part, config)
            if i is None:
                (0 * log_probs.sum()).backward()
                continue
            loss, metrics = grpo_loss(
                log_probs, log_probs.detach() if old[i] is None else old[i], ref[i],
                advantages[row, part], rollouts.mask[row, part], config.clip_range, config.kl_coef,
                num_responses=len(rows) * G)
            (WORLD * loss).backward()  # gradients are averaged over the processes
            totals["loss"] += loss.item() / len(minibatches)
            for name, value in metrics.items():
                totals[name] += value * len(log_probs) / G
        if most:  # without any, not even momentum may move the weights
            norms.append(optimizer_step(state, config))
        rate = state.scheduler.get_last_lr()[0]
        state.scheduler.step()
    totals = {name: sum(process[name] for process in gather(totals)) for name in totals}
    groups = max(1, totals.pop("trained"))
    return {"optimizer_step": state.optimizer_step, "loss": totals["loss"],
            "kl": totals["kl"] / groups, "clip_fraction": totals["clip_fraction"] / groups,
            "learning_rate": rate, "grad_norm": sum(norms) / max(1, len(norms)),
            "skipped_updates": state.skipped}

def optimizer_step(state, config: Config) -> float:
    """Clip, step, return the gradient norm; without a step if it is NaN or infinite."""
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.max_grad_norm)
    norm = getattr(norm, "full_tensor", lambda: norm)().item()  # of the shards of all processes
    if np.isfinite(norm):
        state.optimizer.step()
        state.optimizer_step += 1
    state.skipped = 0 if np.isfinite(norm) else state.skipped + 1
    state.optimizer.zero_grad()
    return norm

# ------------------------------------------------------------------------------- around a training
# What is loaded, checked and said before the first step, and held-out accuracy. Scoring a ladder is
# the same pass as evaluating: sample G responses to each problem and see what share is right.
def load_model(config: Config) -> transformers.PreTrainedModel:
    """The checkpoint in fp32, whatever its own dtype, on the GPU, or on the CPU without one."""
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        config.model, dtype=torch.float32)
    return model if config.cpu_offload else model.to("cuda" if torch.cuda.is_available() else "cpu")

def start(config: Config) -> tuple:
    """(output folder, processor, problems) of a run; refuses bad input before anything else."""
    if not config.data:
        raise ValueError("--data is missing: hub id, folder, .jsonl, .json, .csv or .parquet file")
    transformers.set_seed(config.seed)
    join_processes()
    kind = transformers.AutoConfig.from_pretrained(config.model).model_type
    if kind != "qwen2_5_vl":
        raise ValueError(f"--model {config.model} is a {kind}; only Qwen2.5-VL is supported")
    processor = transformers.AutoProcessor.from_pretrained(config.model)
    problems = load_problems(config.data, config.split, prompt_check(processor, config))
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    gather(None)  # by now all have read what an earlier run left there
    if RANK == 0:
        (output / "config.json").write_text(json.dumps(asdict(config), indent=1))
    return output, processor, problems

def prepare(config: Config, rollout=rollout) -> SimpleNamespace:
    """All that training holds and changes; says what is going to happen."""
    check_options(config)
    folder = last_checkpoint(config)
    output, processor, problems = start(config)
    held_out = config.eval_data and load_problems(
        config.eval_data, check=prompt_check(processor, config))
    order, size = training_order(problems, config), config.prompts_per_step
    steps = [rows.tolist() for rows in np.array_split(order, -(-len(order) // size))]
    model = shard(load_model(replace(config, model=str(folder or config.model))), config)
    reference = None
    if config.kl_coef:
        reference = shard(load_model(config).eval().requires_grad_(False), config)
    model.model.visual.requires_grad_(not config.freeze_vision)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, config.learning_rate, betas=(0.9, 0.95), weight_decay=0)
    updates = sum(-(-len(step) // config.minibatch_prompts) for step in steps)
    scheduler = transformers.get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, round(config.warmup_ratio * updates), updates, min_lr_rate=0.1)
    weights, learned = (sum(p.numel() for p in some) for some in (model.parameters(), trained))
    memory = 4e-9 * (weights + 3 * learned + weights * bool(reference)) / WORLD
    gpu = torch.cuda.is_available()
    if RANK == 0:
        print(f"{config.model} on {WORLD} x {'GPU' if gpu else 'CPU'}: {weights:,} parameters, "
              f"{learned:,} trained\n{memory:.3g} GB each of fp32 weights, gradients, moments; "
              f"{'bf16' if gpu else 'fp32'} activations on top\n{len(problems)} problems, "
              f"{len(order)} in {config.order} order: {len(steps)} steps x {len(steps[0])} prompts "
              f"x {config.num_generations} responses, {updates} optimiser steps")
    state = SimpleNamespace(
        model=model, reference=reference, processor=processor, problems=problems, held_out=held_out,
        optimizer=optimizer, scheduler=scheduler, steps=steps, step=0, optimizer_step=0, skipped=0,
        stop=False, before={}, identity=identity(config, problems))
    if folder:
        restore(state, folder)
    if RANK == 0:
        cut_logs(output, state.step)
    state.before = state.before or measure(state, config, rollout)
    stop_on_signals(state)
    return state

def score_problems(model, processor, problems, config: Config, rollout=rollout, file=None) -> list:
    """A row a problem: responses, rewards and lengths [G], difficulty (share wrong), complexity.

    With a file, rows are kept in it as they come, and a run that was killed goes on after its last
    whole batch: each batch has a seed of its own. Under torchrun each process takes a share.
    """
    share, size, rows = problems.shard(WORLD, RANK), config.prompts_per_step, []
    if file:
        file = file.with_suffix(f".{RANK}.jsonl" if WORLD > 1 else ".jsonl")
        rows = read_log(file, lambda old: len(old) - len(old) % size * (len(old) < len(share)))
    progress = tqdm(desc=file.stem if file else "evaluating", initial=len(rows), total=len(share),
                    leave=False, disable=RANK > 0)
    with gathered(model), progress:
        for first in range(len(rows), len(share), size):
            torch.manual_seed(hash((config.seed, first, RANK)) % 2**32)
            batch = list(share.select(range(first, min(first + size, len(share)))))
            rollouts = rollout(model, processor, batch, config)
            scores = score_rollouts(rollouts, batch, config) | {"length": rollouts.mask.sum(-1)}
            for i, (problem, texts) in enumerate(zip(batch, rollouts.texts)):
                row = {name: scores[name][i].tolist() for name in ("accuracy", "format", "length")}
                rows.append({"id": problem["id"], "answer": problem["answer"], "responses": texts,
                             **row, "difficulty": 1 - float(np.mean(row["accuracy"])),
                             "complexity": float(np.mean(row["length"]))})
            if file:
                append_log(file, rows[first:])
            progress.update(len(batch))
    return sum(gather(rows), [])

def evaluate(model, processor, problems, config: Config, rollout=rollout) -> tuple[dict, list]:
    """Accuracy, its 95 % interval over problems, by category, format, length; and the rows."""
    rows = score_problems(model, processor, problems, config, rollout)
    accuracy, form, length = (np.array([np.mean(row[name]) for row in rows])
                              for name in ("accuracy", "format", "length"))
    half = 1.96 * accuracy.std(ddof=1) / len(rows) ** 0.5 if len(rows) > 1 else np.nan
    category = np.array(problems["category"])
    return {"accuracy": accuracy.mean(), "format": form.mean(), "n": len(rows),
            "interval": [accuracy.mean() - half, accuracy.mean() + half],
            "response_length": length.mean(),
            "categories": {name: [accuracy[category == name].mean(), int(sum(category == name))]
                           for name in sorted(set(category) - {""})}}, rows

def measure(state, config: Config, rollout=rollout) -> dict:
    """`evaluate` on the held-out problems: --num_samples responses each, always the same seed."""
    if not state.held_out:
        return {}
    samples = max(1, config.num_samples)
    size = max(1, config.prompts_per_step * config.num_generations // samples)
    sampling = replace(config, num_generations=samples, prompts_per_step=size)
    return evaluate(state.model, state.processor, state.held_out, sampling, rollout)[0]

# ------------------------------------------------------------------------------- ladder and eval
# d = 1 - correct / 8 is the difficulty for the model that sampled: a ladder belongs to its model.
def ladder(config: Config) -> dict:
    """Build a NeuraLadder from raw problems: clean, score, select, mix. Returns its summary.json.

    Writes ladder.parquet (in order), review.parquet (never solved: the gold may be wrong) and, as
    they come, clean.jsonl and scores.jsonl, from which a run that was killed goes on.
    """
    before = time.time()
    file, later = Path(config.output_dir) / "config.json", {"drop_easy", "drop_hardest", "review"}
    old, new = json.loads(file.read_text()) if file.exists() else {}, asdict(config)
    if changed := [f"--{k}" for k in old if k not in later and old[k] != new.get(k)]:
        raise ValueError(f"{file.parent} holds scores of other {changed}: use another --output_dir")
    output, processor, raw = start(config)
    raw = raw.select_columns(["id", "images", "question", "answer", "category"])  # no old scores
    checkable = raw.select([i for i, gold in enumerate(raw["answer"]) if answers_match(gold, gold)])
    blind = replace(config, model=config.clean_model or config.model, temperature=0.0,
                    system_prompt=PROMPTS["answer"], num_generations=1)  # needs no reasoning: drop
    rows = score_problems(load_model(blind), processor, checkable, blind, file=output / "clean")
    problems = checkable.select([i for i, row in enumerate(rows) if row["difficulty"] == 1])
    rows = score_problems(load_model(config), processor, problems, config, file=output / "scores")
    if RANK:
        return {}  # the first process writes the rest
    scores = {name: [row[name] for row in rows] for name in ("difficulty", "complexity")}
    write_review(output / "review.parquet", problems, rows)
    kept = select_problems(*scores.values(), config.drop_easy, config.drop_hardest)
    if config.review:
        marks = datasets.Dataset.from_parquet(config.review).select_columns(["id", "keep"])
        refused = {row["id"] for row in marks if not row["keep"]}
        kept = [i for i in kept if rows[i]["id"] not in refused]
    difficulty, complexity = ([values[i] for i in kept] for values in scores.values())
    order, stage = mix_ladder(difficulty, complexity, config.seed)
    mixed = problems.select([kept[i] for i in order]).add_column("stage", stage)
    for name, values in scores.items():
        mixed = mixed.add_column(name, [values[kept[i]] for i in order])
    mixed.to_parquet(output / "ladder.parquet")
    counts, _, ends = np.histogram2d(
        difficulty, complexity, (9, 5), ((-1 / 16, 17 / 16), (0, max(complexity, default=1))))
    print("difficulty  problems by length up to" + "".join(f"{end:6.0f}" for end in ends[1:]))
    for level, row in enumerate(counts):
        print(f"{level / 8:10.3f}" + " " * 26 + "".join(f"{count:6.0f}" for count in row))
    summary = {"raw": len(raw), "uncheckable": len(raw) - len(checkable),
               "solved_without_reasoning": len(checkable) - len(problems),
               "not_selected": len(problems) - len(kept), "ladder": len(kept),
               "levels": counts.sum(1).astype(int).tolist(),
               "stages": np.bincount(stage, minlength=9).tolist(),
               "seconds": round(time.time() - before, 1)}
    (output / "summary.json").write_text(json.dumps(summary, indent=1))
    print(json.dumps(summary))
    return summary

def evaluate_model(config: Config) -> dict:
    """`eval`: writes what `evaluate` returns into eval.json and responses.jsonl."""
    before, (output, processor, problems) = time.time(), start(config)
    sampling = replace(config, num_generations=max(1, config.num_samples),
                       temperature=config.temperature if config.num_samples else 0.0)
    result, rows = evaluate(load_model(config), processor, problems, sampling)
    result["seconds"] = round(time.time() - before, 1)
    if RANK == 0:
        (output / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (output / "eval.json").write_text(json.dumps(result, indent=1))
        print(json.dumps(result, indent=1))
    return result

# ------------------------------------------------------------------------------------ command line
# Defaults < --config FILE < options given.
COMMANDS = {"train": train, "ladder": ladder, "eval": evaluate_model}
TOY = Path(__file__).resolve().parent / "toy" / "config.json"

def parse_arguments(arguments: list[str]) -> tuple[str, Config]:
    """Command and Config; no arguments at all train the toy."""
    command, *options = arguments or ["train", "--config", str(TOY)]
    if command not in COMMANDS:
        raise ValueError(f"usage: python observe_r1.py [{' | '.join(COMMANDS)}] [--help]")
    parser = transformers.HfArgumentParser(Config, prog=f"observe_r1.py {command}")
    (config,) = parser.parse_args_into_dataclasses(options)
    if config.config:
        (base,) = parser.parse_json_file(config.config)  # refuses options that do not exist
        for name in ("model", "data", "eval_data"):  # a path may start at the file's own folder
            own = Path(config.config).parent / getattr(base, name)
            if getattr(base, name) and own.exists():
                setattr(base, name, str(own))
        parser.set_defaults(**asdict(base))  # options that were given win over these
        (config,) = parser.parse_args_into_dataclasses(options)
    return command, config

def main() -> None:
    """Run one command; what a user can mend ends in one line instead of a traceback."""
    try:
        command, config = parse_arguments(sys.argv[1:])
        COMMANDS[command](config)
    except (ValueError, OSError, SafetensorError) as error:
        raise SystemExit(f"observe_r1: {error}") from error
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"observe_r1: {error}\nWhat helps, the most effective first: a smaller "
                         "--token_budget, --max_pixels, --cache_gb") from error

if __name__ == "__main__":
    main()
