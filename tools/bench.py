"""How fast and how small: ratios from interleaved repeats in one process, as a Markdown table.

    python toy/bench.py                          # some minutes on two cores
    pip install math-verify                      # not needed by the project
    python toy/bench.py answers                  # our rules and math-verify on the same answers
    pip install trl && python toy/bench.py trl   # a whole training step, of TRL and of ours
    python toy/bench.py --gpu                     # adds 3B shapes with random weights; name the
    python toy/bench.py --gpu --bandwidth 3.35e12 --flops 989e12   # limits of your card (H100)
    torchrun --nproc_per_node 1 toy/bench.py offload              # peak memory of the 24 GB recipe

Each row is median (lowest to highest) of the ratios of neighbouring runs.
"""

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor, Qwen2_5_VLForConditionalGeneration

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import observe_r1  # noqa: E402
import plumbing  # noqa: E402
import rewards  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = observe_r1.parse_arguments(["train", "--config", str(HERE / "config.json")])[1]


def seconds(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compare(ours, theirs, repeats: int = 7) -> tuple[float, str]:
    """How many times as long theirs takes; one warm-up each, then turn and turn about."""
    seconds(ours), seconds(theirs)
    ratios = [seconds(theirs) / seconds(ours) for _ in range(repeats)]
    median = statistics.median(ratios)
    return median, f"{median:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def row(*cells) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def toy():
    processor = AutoProcessor.from_pretrained(CONFIG.model)
    problems = observe_r1.load_problems(CONFIG.data)
    return observe_r1.load_model(CONFIG), processor, problems


def generate(model, prompt, config, shortest=None) -> torch.Tensor:
    """What transformers' own `generate` samples for the same prompts."""
    inputs = {name: values for name, values in prompt.items() if name != "num_images"}
    with torch.no_grad(), observe_r1.autocast(model):
        return model.generate(
            **inputs,
            do_sample=True,
            top_k=0,
            num_return_sequences=config.num_generations,
            min_new_tokens=shortest,
            max_new_tokens=config.max_new_tokens,
        )


def rollout() -> None:
    """16 prompts x 8 responses of 64 tokens, of the toy's and with a picture; and as they end."""
    model, processor, problems = toy()
    model.eval()
    of_toy = list(problems.select(range(400, 416)))
    for tokens in (0, 256, 961):  # of the picture
        rows, config, what = of_toy, CONFIG, "the toy's"
        if tokens:
            large, config = picture(tokens)
            rows, what = [large] * 16, f"a picture of {tokens}"
        prompt = observe_r1.encode_prompts(rows, processor, config)
        config = replace(config, max_new_tokens=64)
        P = prompt["input_ids"].shape[1]
        same = compare(
            lambda: observe_r1.sample(model, prompt, [-1], config),
            lambda: generate(model, prompt, config, shortest=64),
        )[1]
        row(f"rollout, 16 prompts x 8, 64 tokens each, P = {P} ({what})", "`generate`", same, "≥ 2")
    prompt = observe_r1.encode_prompts(of_toy, processor, CONFIG)
    natural = compare(
        lambda: observe_r1.sample(model, prompt, model.generation_config.eos_token_id, CONFIG),
        lambda: generate(model, prompt, CONFIG),
        repeats=15,
    )[1]
    row("rollout, 16 prompts x 8, as long as they come (P = 75)", "`generate`", natural, "≥ 2")


def picture(tokens: int):
    """A problem with a picture of so many tokens, and the configuration that does not shrink it."""
    side = 28 * round(max(1, tokens) ** 0.5)
    config = replace(CONFIG, max_pixels=side * side, max_prompt_tokens=10**5)
    image = Image.effect_noise((side, side), 64)
    return {"images": [image], "question": "What is the sum of the digits?", "answer": "1"}, config


def group(model, processor, P: int, R: int, G: int = 8):
    """One prompt of about P tokens, most of them a picture, and G random responses of R tokens."""
    problem, config = picture(P - 70)
    prompt = observe_r1.encode_prompts([problem], processor, config).to(model.device)
    ids = torch.randint(100, 300, (1, G, R), device=model.device)
    return observe_r1.Rollouts(prompt, ids, torch.ones_like(ids), []), config


def obvious_log_probs(model, rollouts, config):
    """Every response carries its prompt and picture; all logits at once."""
    prompt, ids = rollouts.prompt, rollouts.response_ids[0]
    G, R = ids.shape
    inputs = {name: prompt[name].repeat(G, 1) for name in ("input_ids", "mm_token_type_ids")}
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
    inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, R))
    pictures = {name: prompt[name].repeat(G, 1) for name in ("pixel_values", "image_grid_thw")}
    mask = torch.ones_like(inputs["input_ids"])
    logits = model(**inputs, **pictures, attention_mask=mask, use_cache=False).logits[
        :, -R - 1 : -1
    ]
    logits[..., observe_r1.vision_tokens(model)] = -torch.inf
    return logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)


def update() -> None:
    """Forward and backward pass of one group."""
    model, processor, _ = toy()
    model.train()
    for P, R in ((80, 48), (1024, 256)):
        rollouts, config = group(model, processor, P, R)
        P = rollouts.prompt["input_ids"].shape[1]
        slow = obvious_log_probs(model, rollouts, config).detach()
        fast = observe_r1.response_log_probs(model, rollouts, config)[0].detach()
        torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)
        ratio, text = compare(
            lambda: observe_r1.response_log_probs(model, rollouts, config).sum().backward(),
            lambda: obvious_log_probs(model, rollouts, config).sum().backward(),
        )
        limit = 8 * (P + R) / (P + 8 * R)
        row(
            f"update of a group, P = {P}, R = {R}, G = 8",
            "each response carries its prompt",
            f"{text}, {ratio / limit:.2f} of the limit {limit:.2f}",
            "≥ 0.7 of the limit",
        )


def high_water() -> int:
    """Most resident bytes of this process so far (Linux); ru_maxrss would start at its parent's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def peak() -> float:
    """GB that log-probabilities of 8 x 2,048 tokens over 151,936 take at most, with gradients."""
    hidden = torch.randn(8 * 2048, 8, requires_grad=True)
    head, targets = torch.nn.Linear(8, 151936, bias=False), torch.randint(151936, (8 * 2048,))
    head(hidden[:64]).sum().backward()
    before = high_water()
    observe_r1.token_log_probs(hidden, targets, head, [], 1.0).sum().backward()
    return (high_water() - before) * 1e-9


def memory() -> None:
    """In a fresh process, because a process never forgets its peak."""
    full = 8 * 2048 * 151936 * 4e-9
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        ours = pool.apply(peak)
    row(
        "peak memory of log-probabilities, V = 151,936, T = 2,048, G = 8",
        f"one copy of all logits in fp32, {full:.1f} GB",
        f"{ours / full:.3f}",
        "≤ 0.15",
    )


def growth() -> None:
    """Seconds of a forward and backward pass when one length doubles, against its tokens."""
    model, processor, _ = toy()
    model.train()
    base = {"P": 256, "R": 64, "G": 4}
    for name in base:
        small, large = base, {**base, name: 2 * base[name]}
        both = [group(model, processor, **lengths) for lengths in (small, large)]
        _, text = compare(
            *(
                lambda pair=pair: observe_r1.response_log_probs(model, *pair).sum().backward()
                for pair in both
            )
        )
        tokens = [pair[0].prompt["input_ids"].shape[1] + pair[0].mask.sum().item() for pair in both]
        what = f"P, R, G = 256, 64, 4 with {name} doubled"
        row(what, "itself", f"time x {text}", f"tokens x {tokens[1] / tokens[0]:.2f}")


def answers() -> None:
    """Right, wrongly 1, wrongly 0, and microseconds on toy/answers.jsonl (debatable ones apart)."""
    import math_verify

    pairs = [json.loads(line) for line in (HERE / "answers.jsonl").open()]
    pairs = [pair for pair in pairs if not pair.get("debatable")]

    def wrapped(prediction, gold, around="${}$"):
        gold, answer = (around.format(text) for text in (gold, prediction))
        return math_verify.verify(math_verify.parse(gold), math_verify.parse(answer))

    checkers = {
        "rewards.py": rewards.answers_match,
        "math-verify": lambda *pair: wrapped(*pair, around="{}"),
        "math-verify, wrapped in $": wrapped,
    }
    row("checker", "right", "wrongly 1", "wrongly 0", "median", "worst")
    row(*["---"] * 6)
    for name, check in checkers.items():
        said, times = [], []
        for pair in pairs:
            answer = rewards.extract_answer(pair["response"])
            started = time.perf_counter()
            said.append(answer is not None and bool(check(answer, pair["gold"])))
            times.append(1e6 * (time.perf_counter() - started))
        right = [pair["match"] for pair in pairs]
        row(
            name,
            f"{sum(map(int.__eq__, map(int, said), map(int, right)))} of {len(pairs)}",
            sum(s and not r for s, r in zip(said, right)),
            sum(r and not s for s, r in zip(said, right)),
            f"{statistics.median(times):.0f} µs",
            f"{max(times) / 1000:.1f} ms",
        )


def trl() -> None:
    """One whole training step on the same 16 x 8 responses, TRL's and ours in turn."""
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    output = Path("runs/bench")
    config = replace(CONFIG, output_dir=str(output), eval_data="", eval_steps=0)
    state = observe_r1.prepare(config)
    rows = state.problems.select(range(400, 416))
    problems, ratios = list(rows), []

    def our_step():
        rollouts = observe_r1.rollout(state.model, state.processor, problems, config)
        scores = observe_r1.score_rollouts(rollouts, problems, config)
        advantages = observe_r1.group_advantages(scores["reward"], scores["weight"])
        observe_r1.update(state, rollouts, advantages, config)

    class Interleave(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.started = time.perf_counter()

        def on_step_end(self, *_, **__):
            ratios.append((time.perf_counter() - self.started) / seconds(our_step))

    def reward(completions, answer, **_):
        texts = [completion[0]["content"] for completion in completions]
        return [
            rewards.accuracy_reward(text, gold) + rewards.format_reward(text)
            for text, gold in zip(texts, answer)
        ]

    def conversation(problem):
        system = {"role": "system", "content": observe_r1.PROMPTS["observe"]}
        return {"prompt": [system, {"role": "user", "content": problem["question"]}]}

    arguments = GRPOConfig(
        output_dir=str(output),
        per_device_train_batch_size=16 * 8,
        num_generations=8,
        max_completion_length=config.max_new_tokens,
        learning_rate=config.learning_rate,
        beta=config.kl_coef,
        max_steps=20,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=100,
    )
    GRPOTrainer(
        model=observe_r1.load_model(config),
        reward_funcs=reward,
        args=arguments,
        train_dataset=rows.map(conversation),
        processing_class=state.processor,
        callbacks=[Interleave()],
    ).train()
    ratios = sorted(ratios[1:])  # the first warms up
    text = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    row("a whole training step, 16 prompts x 8", "TRL's `GRPOTrainer`", text, "≥ 3")


SHAPES_3B = {  # of Qwen2.5-VL-3B-Instruct
    "text_config": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        },
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}


def random_model(shapes: dict = SHAPES_3B, device: str = DEVICE):
    """A Qwen2.5-VL of these shapes with random weights and the toy's tokens."""
    config = AutoConfig.from_pretrained(CONFIG.model)
    for part, values in shapes.items():
        for name, value in values.items():
            setattr(getattr(config, part), name, value)
    config.text_config.layer_types = ["full_attention"] * config.text_config.num_hidden_layers
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen2_5_VLForConditionalGeneration(config)


def synchronised(work):
    def run():
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def gpu(options, shapes: dict = SHAPES_3B, tokens: int = 256, batches=(64, 256)) -> None:
    """Tokens a second of rollouts and updates, against `generate` and against the card's limits."""
    model, processor = random_model(shapes), AutoProcessor.from_pretrained(CONFIG.model)
    problem, config = picture(4 * tokens)
    config = replace(config, max_new_tokens=tokens)
    size = sum(p.numel() for p in model.parameters())
    text = model.config.text_config
    head = text.hidden_size // text.num_attention_heads
    cached = 4 * text.num_hidden_layers * text.num_key_value_heads * head  # bytes a token in bf16
    for batch in batches:
        rows = [problem] * (batch // 8)
        prompt = observe_r1.encode_prompts(rows, processor, config).to(model.device)

        def ours():
            with observe_r1.autocast(model):
                observe_r1.sample(model, prompt, [-1], config)

        theirs = synchronised(lambda: generate(model, prompt, config, shortest=tokens))
        ratio = compare(synchronised(ours), theirs, repeats=3)[1]
        rate = batch * tokens / seconds(synchronised(ours))
        length = prompt["input_ids"].shape[1] + tokens / 2
        limit = batch * options.bandwidth / (2 * size + cached * batch * length)
        what = f"rollout, {batch} responses of {tokens} tokens: {rate:,.0f} tokens/s"
        row(
            what, f"`generate`; bandwidth limit {limit:,.0f}", f"{ratio}, {rate / limit:.2f}", "≥ 2"
        )
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    rollouts, config = group(model, processor, 4 * tokens, tokens)

    def backward():
        observe_r1.response_log_probs(model, rollouts, config).sum().backward()

    seconds(synchronised(backward))
    count = rollouts.prompt["input_ids"].shape[1] + rollouts.mask.sum().item()
    rate = count / statistics.median(seconds(synchronised(backward)) for _ in range(5))
    used = 6 * size * rate / options.flops  # what is computed again does not count
    row(f"update: {rate:,.0f} tokens/s", "FLOP/s of the card", f"{used:.2f} used", "≥ 0.40")


def offload(options, shapes: dict = SHAPES_3B, tokens: int = 256) -> None:
    """One optimiser step of a group with --cpu_offload; what the card held at most."""
    plumbing.join_processes()
    config = replace(CONFIG, cpu_offload=True)
    model = plumbing.shard(random_model(shapes, "cpu"), config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    state = SimpleNamespace(
        model=model, reference=None, optimizer=optimizer, scheduler=scheduler, optimizer_step=0
    )
    processor = AutoProcessor.from_pretrained(CONFIG.model)
    rollouts, config = group(SimpleNamespace(device=DEVICE), processor, 4 * tokens, tokens)
    advantages = torch.linspace(-1, 1, 8)[None]
    observe_r1.update(state, rollouts, advantages, config)
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else math.nan
    row("the 24 GB recipe: peak memory of an optimiser step", "GiB", f"{peak:.1f}", "≤ 22")


def main() -> None:
    rows = {f.__name__: f for f in (rollout, update, memory, growth, answers, trl, gpu, offload)}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("rows", nargs="*", default=["rollout", "update", "memory", "growth"])
    parser.add_argument("--gpu", action="store_true", help="Qwen2.5-VL-3B's shapes, on the GPU")
    parser.add_argument("--bandwidth", type=float, default=math.nan, help="of the card, bytes/s")
    parser.add_argument("--flops", type=float, default=math.nan, help="of the card in bf16, FLOP/s")
    options = parser.parse_args()
    if options.rows != ["answers"]:
        row("what", "against", "ratio", "goal")
        row(*["---"] * 4)
    for name in options.rows + ["gpu"] * options.gpu:
        rows[name](*[options] * (name in ("gpu", "offload")))


if __name__ == "__main__":
    main()
