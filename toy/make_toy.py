"""Make the toy: a Qwen2.5-VL of one million parameters and problems over real handwritten digits.

    pip install scikit-learn       # the digits; the only requirement beside the project's
    python toy/make_toy.py         # half an hour on two cores; writes beside this file (--output)

Digits: "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, UCI Machine Learning
Repository, 1998, CC BY 4.0), 1,797 pictures as scikit-learn carries them. They are split in three:
warm start, reinforcement learning, held out. A problem is a strip of k = 1 to 6 digits, 28 x 28
pixels each (one visual token), and asks for their sum.

What a pretrained model brings to reinforcement learning is that it can solve a problem and often
does not. The warm start makes such a model in three phases:
1. digits: read the strip aloud, k growing from 1 (without that ramp it stays at chance);
2. solutions: (observe,) think, answer, all correct, one in five checked: so that checking neither
   pays nor costs accuracy, and only the bonus speaks against it;
3. habits: a mixture of good and bad ways to respond (HABITS), the right way one of several.
Both reasoning prompts get the same share of each phase but the first, which reads strips aloud.
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    trainers,
)
from tqdm import tqdm
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    get_cosine_with_min_lr_schedule_with_warmup,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from observe_r1 import COLUMNS, PROMPTS, Config, mix_ladder, score_problems

HERE = Path(__file__).resolve().parent
QUESTION = "What is the sum of the digits?"
ASK = [{"type": "image"}, {"type": "text", "text": QUESTION}]
MAX_DIGITS = 6
PIXELS = {"min_pixels": 784, "max_pixels": 784 * 64}
TEMPLATE = (  # Qwen2.5-VL's own chat template, without tools and videos
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> "
    "<|video_pad|>"
).split()
TAGS = "<observe> </observe> <think> </think> <answer> </answer>".split()


# ---------------------------------------------------------------------------------- pictures


def draw_strip(pictures, rng):
    """A strip of digits, 28 x 28 each, jittered in size and place, from 8 x 8 scans (0 to 16)."""
    strip = Image.new("L", (28 * len(pictures), 28))
    for i, scan in enumerate(pictures):
        size = rng.randint(20, 26)
        digit = Image.fromarray((scan * 15.9).astype(np.uint8)).resize((size, size), Image.BILINEAR)
        strip.paste(digit, (28 * i + rng.randint(1, 27 - size), rng.randint(1, 27 - size)))
    return strip


def make_problem(k, images, labels, rng):
    """The sum of k digits, chosen from these pictures."""
    chosen = [rng.randrange(len(images)) for _ in range(k)]
    digits = [int(labels[i]) for i in chosen]
    return {
        "images": [draw_strip(images[chosen], rng)],
        "question": QUESTION,
        "answer": str(sum(digits)),
        "digits": digits,
    }


# ---------------------------------------------------------------------------------- responses


def observe(digits):
    return "<observe>" + ",".join(map(str, digits)) + "</observe>"


def sums(digits):
    """3, 8, 2 -> 3+8=11,11+2=13: tight, so that six digits stay under 60 tokens."""
    total, steps = digits[0], []
    for digit in digits[1:]:
        steps.append(f"{total}+{digit}={total + digit}")
        total += digit
    return ",".join(steps) or str(total)


def respond(digits, look=True, think=True, check=False, misread=0.0, rng=random):
    """A response in one habit; `misread` is the chance that the reasoning has one digit wrong."""
    read = list(digits)
    if rng.random() < misread:
        at = rng.randrange(len(read))
        read[at] = rng.choice([d for d in range(10) if d != read[at]])
    text = observe(read) if look else ""
    if think:
        text += f"<think>{sums(read)}{' again:' + sums(read) if check else ''}</think>"
    return text + f"<answer>{sum(read)}</answer>"


# Phase 3: how often each habit occurs (share, arguments of respond). The same for both reasoning
# prompts, but only the first of them is answered with an <observe> block.
HABITS = [
    (0.35, {"look": False, "think": False, "misread": 0.9}),  # answers at once
    (0.35, {"look": False, "misread": 0.8}),  # reasons at once, mostly from a misread digit
    (0.15, {"check": True}),  # does everything right, then checks it all again
    (0.15, {}),  # observe, think, answer
]
BLIND = {"look": False, "think": False, "misread": 0.5}  # what the answer-only prompt gets
CHECKED = 0.2  # share of the solutions in phase 2 that check, so that checking is done well


# ---------------------------------------------------------------------------------- model


def make_processor():
    """A byte-level tokenizer of some 400 tokens and the ordinary Qwen2.5-VL processor."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),  # every digit is a token of its own
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    corpus = [*PROMPTS.values(), QUESTION, "system user assistant again:"] * 10
    backend.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=CONTROL,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    backend.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=CONTROL[1:2] + CONTROL[3:],
        model_max_length=1024,
    )
    size = {"shortest_edge": PIXELS["min_pixels"], "longest_edge": PIXELS["max_pixels"]}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=TEMPLATE,
    )


def make_model(processor):
    tokens = processor.tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 6, 6],
            },
            "bos_token_id": None,
            "eos_token_id": tokens("<|im_end|>"),
            "pad_token_id": tokens("<|endoftext|>"),
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [1],
        },
        image_token_id=tokens("<|image_pad|>"),
        video_token_id=tokens("<|video_pad|>"),
        vision_start_token_id=tokens("<|vision_start|>"),
        vision_end_token_id=tokens("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = [tokens("<|im_end|>"), tokens("<|endoftext|>")]
    model.generation_config.pad_token_id = tokens("<|endoftext|>")
    return model


def imitate(model, processor, demonstrate, steps, batch, rate):
    """Supervised steps: cross-entropy of demonstrated responses, stop token included."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    scheduler = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, min(50, steps // 10), steps, min_lr_rate=0.1
    )
    model.train()
    for step in tqdm(range(steps), demonstrate.__name__):
        kind, examples = demonstrate(step / steps, batch)  # one prompt a batch; (problem, response)
        chats = [
            [
                {"role": "system", "content": PROMPTS[kind]},
                {"role": "user", "content": ASK},
                {"role": "assistant", "content": text},
            ]
            for _, text in examples
        ]
        inputs = processor(
            text=processor.apply_chat_template(chats, tokenize=False),
            images=[problem["images"][0].convert("RGB") for problem, _ in examples],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        labels = torch.full_like(inputs["input_ids"], -100)
        for i, (_, text) in enumerate(examples):  # padded left: ends in response, stop, newline
            count = len(processor.tokenizer(text + "<|im_end|>")["input_ids"])
            labels[i, -count - 1 : -1] = inputs["input_ids"][i, -count - 1 : -1]
        model(**inputs, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def warm_start(processor, phases, source):
    """A model after the three phases; source: pictures, labels and a random generator."""
    model, rng = make_model(processor), source[-1]

    def problems(batch, largest=MAX_DIGITS):
        return [make_problem(rng.randint(1, largest), *source) for _ in range(batch)]

    def digits(progress, batch):  # strips grow to six digits over the first 60 % of the phase
        largest = 1 + min(MAX_DIGITS - 1, int(progress / 0.6 * MAX_DIGITS))
        examples = [(each, observe(each["digits"])) for each in problems(batch, largest)]
        return "observe", examples

    def solutions(progress, batch):
        kind = rng.choice(["observe", "think"])
        checks = [rng.random() < CHECKED for _ in range(batch)]
        examples = []
        for problem, check in zip(problems(batch), checks):
            text = respond(problem["digits"], look=kind == "observe", check=check)
            examples.append((problem, text))
        return kind, examples

    def habits(progress, batch):
        kind = rng.choices(["observe", "think", "answer"], [0.4, 0.4, 0.2])[0]
        shares, ways = zip(*HABITS)
        examples = []
        for problem in problems(batch):
            way = BLIND if kind == "answer" else rng.choices(ways, shares)[0]
            if kind == "think":
                way = {**way, "look": False}
            examples.append((problem, respond(problem["digits"], rng=rng, **way)))
        return kind, examples

    imitate(model, processor, digits, phases[0], 64, 2e-3)
    imitate(model, processor, solutions, phases[1], 48, 1e-3)
    imitate(model, processor, habits, phases[2], 48, 3e-4)
    return model


def make_problems(count, name, source):
    """`count` problems, as many of each number of digits."""
    made = [make_problem(1 + i % MAX_DIGITS, *source) for i in range(count)]
    return [{"id": f"{name}-{i}", **problem} for i, problem in enumerate(made)]


def in_columns(problems):
    """Problems in the script's format."""
    features = {name: kind for name, kind in COLUMNS.items() if name in problems[0]}
    rows = [{name: problem[name] for name in features} for problem in problems]
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--phases", type=int, nargs=3, default=[1000, 2400, 300], help="steps")
    parser.add_argument("--problems", type=int, default=960, help="problems of the ladder")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of model and problems")
    args = parser.parse_args()
    output, folder = args.output, args.output / "model"
    torch.manual_seed(0)
    digits = load_digits()
    parts = np.split(np.random.default_rng(0).permutation(len(digits.images)), [800, 1400])
    sources = []  # no picture is in two of them
    for part, seed in zip(parts, (0, 2, 1)):
        sources.append((digits.images[part], digits.target[part], random.Random(seed)))
    warm, learn, held = sources

    processor = make_processor()
    model = warm_start(processor, args.phases, warm)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    shaped = {"observe": True, "system_prompt": "", **PIXELS}
    (folder / "observe_r1.json").write_text(json.dumps(shaped, indent=1))
    in_columns(make_problems(192, "held-out", held)).to_parquet(output / "heldout.parquet")

    problems = make_problems(args.problems, "train", learn)
    config = Config(prompts_per_step=32, max_new_tokens=128, **PIXELS)
    scores = Path(tempfile.mkdtemp()) / "scores.jsonl"
    scored = score_problems(model, processor, in_columns(problems), config, scores)
    difficulty = [1 - np.mean(row["accuracy"]) for row in scored]
    complexity = [np.mean(row["response_length"]) for row in scored]
    rows = []
    for i, stage in zip(*mix_ladder(difficulty, complexity)):
        score = {"difficulty": difficulty[i], "complexity": complexity[i], "stage": int(stage)}
        rows.append(problems[i] | score)
    in_columns(rows).to_parquet(output / "ladder.parquet")


if __name__ == "__main__":
    main()
