"""What training needs on a card, before it starts: GB (1e9 bytes) by part, and what would help.

    python tools/memory.py train --model Qwen/Qwen2.5-VL-3B-Instruct --data FILE
    python tools/memory.py train --config runs/3b/config.json --cards 8

The options are those of `observe_r1.py train`; --cards is the number of cards. Of the model the
shapes are read and no weight. The longest prompt is that of --data or, without such a file, the
longest allowed; responses are taken to be as long as they may get. Trained weights are fp32,
arithmetic is in bf16, as on any card.
"""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import observe_r1


def estimate_memory(config, prompt_tokens, cards=1):
    """Bytes that each card needs at most, by part; prompt_tokens: of the longest prompt."""
    shapes = transformers.AutoConfig.from_pretrained(config.model)
    text, tower = shapes.text_config, shapes.vision_config
    with torch.device("meta"):  # shapes without numbers
        model = transformers.Qwen2_5_VLForConditionalGeneration(shapes)
    linear = [part for part in model.model.modules() if isinstance(part, torch.nn.Linear)]
    in_linear = sum(weight.numel() for part in linear for weight in part.parameters())
    size, head = model.num_parameters(), model.lm_head.weight.numel()

    if config.lora_rank:  # two thin matrices beside each linear layer; all else in bf16
        sides = sum(part.in_features + part.out_features for part in linear)
        trained = rounded = config.lora_rank * sides
        weights, reference, logits = 4 * trained + 2 * size, 0, 4 * head
    else:
        trained, rounded = size, in_linear
        weights, reference, logits = 4 * size, 4 * size, 8 * head
    if cards == 1 and reference:  # its linear layers are in bf16
        reference -= 2 * in_linear
    parts = {
        "weights": weights / cards,
        "moments": 8 * trained / cards,
        "gradients": 4 * trained / cards,
        "reference": reference / cards if config.kl_coef else 0,
        # Weights in bf16: put together from all cards, or cast where they are used.
        "copies": 2 * size if cards > 1 else 0,
    }
    casts = 2 * rounded if cards == 1 else 0

    # The update. Of a layer, norms and residuals stay in fp32. With checkpointing only its input
    # does, until the layer is computed again for its own backward pass.
    P, T, G = prompt_tokens, config.max_new_tokens, config.num_generations
    prompts, budget = math.ceil(config.prompts_per_step / cards), config.token_budget
    groups = min(prompts, config.minibatch_prompts)
    tokens = max(P + T, min(budget, groups * (P + G * T)))  # of a pass
    patches = 4 * max(P, min(budget, groups * P))  # four a token; all of it pictures, at worst
    kept = layer = 0
    for part, depth, n, input_bytes in (
        (text, text.num_hidden_layers, tokens, 2 if config.lora_rank else 4),
        (tower, tower.depth, patches, 2),
    ):
        whole = n * (32 * part.hidden_size + 8 * part.intermediate_size)
        made = n * (2 * part.hidden_size + 4 * part.intermediate_size)
        if config.gradient_checkpointing:
            whole, made = n * input_bytes * part.hidden_size, whole + made
        kept, layer = kept + depth * whole, max(layer, made)
    # Beside the head and its gradient, in fp32: logits, their exponentials, both gradients.
    logits += 16 * min(512, G * T) * text.vocab_size
    if config.gradient_checkpointing:  # the forward pass's casts are gone in the backward pass
        parts["activations"] = kept + max(casts, layer, logits)
    else:
        parts["activations"] = kept + casts + max(layer, logits)

    # The rollout, of one group at least, holds no gradients.
    token = 2 * observe_r1.cache_bytes(shapes) / observe_r1.DTYPE.itemsize
    group = token * G * (P + T)
    cache = max(group, min(group * prompts, 1e9 * config.cache_gb))
    update = sum(parts.values())
    rollout = update - parts["activations"] - parts["gradients"] + casts + cache
    return parts | {"cache": cache, "peak": max(update, rollout)}


def report_memory(config, prompt_tokens, cards=1):
    """Print what training needs, and how much less with other options."""
    parts = estimate_memory(config, prompt_tokens, cards)
    told = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
    print(f"GB of each card, prompts of {prompt_tokens} tokens: {told}")
    helps = {
        "lora_rank": 64,
        "kl_coef": 0.0,
        "gradient_checkpointing": True,
        "token_budget": config.token_budget // 2,
        "max_new_tokens": config.max_new_tokens // 2,
    }
    for name, value in helps.items():
        helped = estimate_memory(replace(config, **{name: value}), prompt_tokens, cards)
        saved = (parts["peak"] - helped["peak"]) / 1e9
        if saved > 0.05:
            print(f"  --{name} {value}: {saved:.1f} GB less")


def longest_prompt(config):
    """Tokens of the longest prompt in --data, or as many as there may be."""
    if not Path(config.data).exists():
        return config.max_prompt_tokens
    processor = transformers.AutoProcessor.from_pretrained(config.model)
    longest = 0
    for batch in pyarrow.parquet.ParquetFile(config.data).iter_batches(64):
        for problem in batch.to_pylist():
            longest = max(longest, observe_r1.check_problem(problem, processor, config))
    return longest


def main():
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.add_argument("--cards", type=int, default=1)
    machine, words = parser.parse_known_args()
    _, config = observe_r1.parse_arguments(words)
    report_memory(config, longest_prompt(config), machine.cards)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"memory: {error}") from error
