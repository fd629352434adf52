"""What training needs on a card, before it starts: GB (1e9 bytes) by part, and what would help.

    python tools/memory.py train --model Qwen/Qwen2.5-VL-3B-Instruct --data FILE --card_gb 80
    python tools/memory.py train --config runs/3b/config.json --card_gb 24 --cards 8

The options are those of `observe_r1.py train`; --card_gb is the memory of one card (default: of the
one that is here), --cards their number. Of the model the shapes are read and no weight. The longest
prompt is that of --data or, without such a file, the longest allowed; responses are taken to
be as long as they may get. Trained weights are fp32, arithmetic is in bf16, as on any card.
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
    text, tower = shapes.get_text_config(), shapes.vision_config
    with torch.device("meta"):  # shapes without numbers
        model = transformers.Qwen2_5_VLForConditionalGeneration(shapes)

    def weights_of(*modules):
        return sum(weight.numel() for module in modules for weight in module.parameters())

    def linear_layers(module):
        return [part for part in module.modules() if isinstance(part, torch.nn.Linear)]

    size, head = weights_of(model), text.vocab_size * text.hidden_size
    rounded = weights_of(*linear_layers(model.model)) if cards == 1 else 0  # to bf16
    reference = 4 * size - 2 * rounded
    trainable = model.model.language_model if config.freeze_vision else model.model
    linear, towers = linear_layers(trainable), 0 if config.freeze_vision else tower.depth
    if config.lora_rank:  # two thin matrices beside each linear layer; all else in bf16
        trained = sum(part.in_features + part.out_features for part in linear) * config.lora_rank
        weights, reference, cast, logits = 4 * trained + 2 * size, 0, trained, 4 * head
    else:
        trained, weights, cast, logits = (
            weights_of(trainable),
            4 * size,
            weights_of(*linear),
            8 * head,
        )
    parts = {
        "weights": weights / cards,
        "moments": 8 * trained / cards,
        "gradients": 4 * trained / cards,
        "reference": reference / cards if config.kl_coef else 0,
    }
    # Weights in bf16: put together from all cards, or cast where they are used.
    parts["copies"] = 2 * size if cards > 1 else 0
    casts = 0 if cards > 1 else 2 * cast

    # The update. Of a layer, norms and residuals stay in fp32. With checkpointing only its input
    # does, until the layer is computed again for its own backward pass.
    P, T, G = prompt_tokens, config.max_new_tokens, config.num_generations
    tokens = max(P + T, min(config.token_budget, P + G * T))  # of a pass
    kept = layer = 0
    for part, depth, n, input_bytes in (
        (text, text.num_hidden_layers, tokens, 2 if config.lora_rank else 4),
        (tower, towers, 4 * P, 2),  # it merges four patches into a token
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
    token = observe_r1.cache_bytes(shapes) / observe_r1.DTYPE.itemsize * 2
    group, prompts = token * G * (P + T), math.ceil(config.prompts_per_step / cards)
    cache = max(group, min(group * prompts, 1e9 * config.cache_gb))
    update = sum(parts.values())
    rollout = update - parts["activations"] - parts["gradients"] + casts + cache
    return parts | {"cache": cache, "peak": max(update, rollout)}


def report_memory(config, prompt_tokens, cards=1, there=0.0):
    """Print what training needs and, if there is less, what would help and how much."""
    parts = estimate_memory(config, prompt_tokens, cards)
    told = [f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size >= 5e7]
    print(f"GB of each card, prompts of {prompt_tokens} tokens: {', '.join(told) or 'below 0.1'}")
    if parts["peak"] < (there or math.inf):
        return
    print(
        f"The peak exceeds the {there / 1e9:.1f} GB that there are. What would help, and how much:"
    )
    helps = {
        "lora_rank": 64,
        "freeze_vision": True,
        "kl_coef": 0.0,
        "gradient_checkpointing": True,
        "token_budget": max(1, config.token_budget // 2),
        "max_new_tokens": max(1, config.max_new_tokens // 2),
        "cache_gb": config.cache_gb / 4,
    }
    for name, value in helps.items():
        less = estimate_memory(replace(config, **{name: value}), prompt_tokens, cards)["peak"]
        if parts["peak"] - less > 5e7:
            print(f"  --{name} {value}: {(parts['peak'] - less) / 1e9:.1f} GB less")


def longest_prompt(config):
    """Tokens of the longest prompt in --data, or as many as there may be."""
    if not Path(config.data).exists():
        return config.max_prompt_tokens
    size = {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}
    processor = transformers.AutoProcessor.from_pretrained(config.model, size=size)
    lengths = []
    for batch in pyarrow.parquet.ParquetFile(config.data).iter_batches(64):
        for problem in batch.to_pylist():
            lengths.append(observe_r1.check_problem(problem, processor, config))
    return max(lengths)


def main():
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.add_argument("--card_gb", type=float, default=0.0)
    parser.add_argument("--cards", type=int, default=1)
    machine, words = parser.parse_known_args()
    _, config = observe_r1.parse_arguments(words)
    there = 1e9 * machine.card_gb
    if observe_r1.ACCELERATOR and not there:
        there = torch.accelerator.get_memory_info()[1]
    report_memory(config, longest_prompt(config), machine.cards, there)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"memory: {error}") from error
