"""How fast and how small: ratios from interleaved repeats in one process, as a Markdown table.

    python tools/bench.py                          # rollout, update, logits and growth: minutes
    python tools/bench.py rollout                  # or one of them
    python tools/bench.py memory                   # a step with LoRA at 3B shapes on a CPU, in GiB
    python tools/bench.py memory --model 7b --lora_rank 16 --products none
    python tools/bench.py estimate                 # the memory estimate against measured peaks
    python tools/bench.py answers                  # our rules and math-verify (needs math-verify)
    python tools/bench.py trl                      # a whole training step of TRL (needs trl)
    python tools/bench.py --gpu                    # 3B shapes with random weights, on a GPU
    python tools/bench.py --gpu --bandwidth 3.35e12 --flops 989e12    # limits of an H100
    torchrun --nproc_per_node 1 tools/bench.py offload   # an optimiser step with --cpu_offload

A ratio is the median (lowest to highest) of neighbouring runs. `memory` and `estimate` need peft.
"""

import argparse
import copy
import ctypes
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

if {"memory", "measure"} & set(sys.argv):
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # large pages: most of the time went into faults

import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from transformers.initialization import no_init_weights

HERE = Path(__file__).resolve().parent
TOY = HERE.parent / "toy"
sys.path.insert(0, str(HERE.parent))
import observe_r1
import rewards

CONFIG = observe_r1.parse_arguments(["train", "--config", str(TOY / "config.json")])[1]
DEVICE = observe_r1.pick_device(CONFIG)
GIB = 2**30


def synchronise():
    """Wait for the accelerator, if there is one."""
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()


def seconds(work):
    synchronise()
    started = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - started


def compare(ours, theirs, repeats=7):
    """How many times as long theirs takes: (median, text). One warm-up each, then turn by turn."""
    seconds(ours)
    seconds(theirs)
    ratios = [seconds(theirs) / seconds(ours) for _ in range(repeats)]
    median = statistics.median(ratios)
    return median, f"{median:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def header(*cells):
    row(*cells)
    row(*["---"] * len(cells))


# ------------------------------------------------------------------------------------------- speed


def toy():
    processor = transformers.AutoProcessor.from_pretrained(CONFIG.model)
    return observe_r1.load_model(CONFIG), processor, observe_r1.load_problems(CONFIG.data)


def picture(tokens):
    """A problem with a picture of so many tokens, and options that leave its size alone."""
    side = 28 * round(max(1, tokens) ** 0.5)
    config = replace(CONFIG, max_pixels=side * side, max_prompt_tokens=10**5)
    image = Image.effect_noise((side, side), 64)
    return {"images": [image], "question": "What is the sum of the digits?", "answer": "1"}, config


def generate(model, prompt, config, shortest=None):
    """What transformers' own `generate` samples for the same prompts."""
    inputs = {name: values for name, values in prompt.items() if name != "num_images"}
    inputs = {name: values.to(model.device) for name, values in inputs.items()}
    with torch.no_grad(), observe_r1.autocast(model):
        return model.generate(
            **inputs,
            do_sample=True,
            top_k=0,
            num_return_sequences=config.num_generations,
            min_new_tokens=shortest,
            max_new_tokens=config.max_new_tokens,
        )


def sample(model, prompt, stop, config):
    with observe_r1.autocast(model):
        return observe_r1.sample(model, prompt, stop, config)


def against_generate(model, prompt, stop, config, shortest=None, repeats=7):
    """How many times as long `generate` takes for the same prompts, as text."""

    def ours():
        sample(model, prompt, stop, config)

    def theirs():
        generate(model, prompt, config, shortest)

    return compare(ours, theirs, repeats)[1]


def rollout(options):
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
        ratio = against_generate(model, prompt, [-1], config, shortest=64)
        row(
            f"rollout, 16 prompts x 8, 64 tokens each, P = {P} ({what})", "`generate`", ratio, "≥ 2"
        )
    prompt = observe_r1.encode_prompts(of_toy, processor, CONFIG)
    stop = model.generation_config.eos_token_id
    ratio = against_generate(model, prompt, stop, CONFIG, repeats=15)
    row("rollout, 16 prompts x 8, as long as they come (P = 75)", "`generate`", ratio, "≥ 2")


def forced_rollouts(processor, device, P, T, B=1, G=8):
    """B prompts of about P tokens, most of them a picture, and G random responses of T tokens."""
    problem, config = picture(P - 70)
    prompt = observe_r1.encode_prompts([problem] * B, processor, config)
    ids = torch.randint(100, 300, (B, G, T), device=device)
    return observe_r1.Rollouts(prompt, ids, torch.ones_like(ids), []), config


def obvious_log_probs(model, rollouts, config):
    """Every response carries its prompt and picture; all logits at once."""
    prompt, ids = rollouts.prompt, rollouts.response_ids[0]
    G, T = ids.shape
    inputs = {name: prompt[name].repeat(G, 1) for name in ("input_ids", "mm_token_type_ids")}
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
    inputs["mm_token_type_ids"] = F.pad(inputs["mm_token_type_ids"], (0, T))
    pictures = {name: prompt[name].repeat(G, 1) for name in ("pixel_values", "image_grid_thw")}
    mask = torch.ones_like(inputs["input_ids"])
    output = model(**inputs, **pictures, attention_mask=mask, use_cache=False)
    logits = output.logits[:, -T - 1 : -1]
    logits[..., observe_r1.vision_tokens(model)] = -torch.inf
    return logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)


def backward(log_probs_of, *what):
    """A forward and a backward pass, to be timed."""
    return lambda: log_probs_of(*what).sum().backward()


def update(options):
    """Forward and backward pass of one group."""
    model, processor, _ = toy()
    model.train()
    for P, T in ((80, 48), (1024, 256)):
        rollouts, config = forced_rollouts(processor, model.device, P, T)
        P = rollouts.prompt["input_ids"].shape[1]
        slow = obvious_log_probs(model, rollouts, config).detach()
        fast = observe_r1.response_log_probs(model, rollouts, config)[0].detach()
        torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)
        ratio, text = compare(
            backward(observe_r1.response_log_probs, model, rollouts, config),
            backward(obvious_log_probs, model, rollouts, config),
        )
        limit = 8 * (P + T) / (P + 8 * T)
        row(
            f"update of a group, P = {P}, T = {T}, G = 8",
            "each response carries its prompt",
            f"{text}, {ratio / limit:.2f} of the limit {limit:.2f}",
            "≥ 0.7 of the limit",
        )


def growth(options):
    """Seconds of a forward and backward pass when one length doubles, against its tokens."""
    model, processor, _ = toy()
    model.train()
    base = {"P": 256, "T": 64, "G": 4}
    for name, length in base.items():
        works, tokens = [], []
        for lengths in (base, {**base, name: 2 * length}):
            rollouts, config = forced_rollouts(processor, model.device, **lengths)
            works.append(backward(observe_r1.response_log_probs, model, rollouts, config))
            tokens.append(rollouts.prompt["input_ids"].shape[1] + rollouts.mask.sum().item())
        _, text = compare(*works)
        what = f"P, T, G = 256, 64, 4 with {name} doubled"
        row(what, "itself", f"time x {text}", f"tokens x {tokens[1] / tokens[0]:.2f}")


def answers() -> None:
    """Our rules and math-verify on toy/answers.jsonl and tests/answer_faults.jsonl, a row each."""
    import math_verify

    root = Path(rewards.__file__).parent
    faults = [json.loads(line) for line in (root / "tests" / "answer_faults.jsonl").open()]
    toys = [json.loads(line) for line in (root / "toy" / "answers.jsonl").open()]
    toys = [pair for pair in toys if not pair.get("debatable")]
    for pair in toys:
        pair["answer"] = rewards.extract_answer(pair["response"])

    def verify(answer, gold, around):
        # Its own time limit is 5 s a step; 1 s here, or prose would hold up the table.
        parse = math_verify.parse
        gold = parse(around.format(gold), parsing_timeout=1)
        answer = parse(around.format(answer), parsing_timeout=1)
        return math_verify.verify(gold, answer, timeout_seconds=1)

    checkers = {
        "rewards.py": rewards.answers_match,
        "math-verify": lambda answer, gold: verify(answer, gold, "{}"),
        "math-verify, wrapped in $": lambda answer, gold: verify(answer, gold, "${}$"),
    }
    row("pairs", "checker", "right", "false 1", "false 0", "median", "worst")
    row(*["---"] * 7)
    for source, pairs in (("toy/answers.jsonl", toys), ("tests/answer_faults.jsonl", faults)):
        for name, check in checkers.items():
            false_ones = 0
            false_zeros = 0
            times = []
            for pair in pairs:
                started = time.perf_counter()
                said = pair["answer"] is not None and bool(check(pair["answer"], pair["gold"]))
                times.append(time.perf_counter() - started)
                false_ones += said and not pair["match"]
                false_zeros += pair["match"] and not said
            row(
                source,
                name,
                f"{len(pairs) - false_ones - false_zeros} of {len(pairs)}",
                false_ones,
                false_zeros,
                f"{1e6 * statistics.median(times):.0f} µs",
                f"{1e3 * max(times):.1f} ms",
            )


def trl(options):
    """One whole training step on the same 16 x 8 responses, TRL's and ours in turn."""
    from trl import GRPOConfig, GRPOTrainer

    output = Path("runs/bench")
    output.mkdir(parents=True, exist_ok=True)
    config = replace(CONFIG, output_dir=str(output), eval_data="", eval_steps=0)
    state = observe_r1.prepare(config, output, observe_r1.rollout)
    rows = state.problems.select(range(400, 416))
    problems, ratios = observe_r1.read_problems(state.problems, range(400, 416), config), []

    def our_step():
        model = state.policy.model
        rollouts = observe_r1.rollout(model, state.processor, problems, config)
        scores = observe_r1.score_rollouts(rollouts, problems, config)
        advantages = observe_r1.group_advantages(scores["reward"], scores["weight"])
        observe_r1.update(state, rollouts, advantages, config)

    class Interleave(transformers.TrainerCallback):
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


# ------------------------------------------------------------------------------------------ shapes

SHAPES = {  # of Qwen2.5-VL-Instruct; "small" is for trying out
    "3b": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "small": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 32768,
    },
}
VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
SMALL_VISION = {
    "depth": 4,
    "hidden_size": 512,
    "intermediate_size": 1368,
    "num_heads": 8,
    "fullatt_block_indexes": [1, 3],
}


def model_config(name, layers=None):
    """Configuration of a Qwen2.5-VL of these shapes with the toy's special tokens."""
    config = transformers.AutoConfig.from_pretrained(CONFIG.model)
    text, vision = config.text_config, config.vision_config
    for part, values in (
        (text, SHAPES[name]),
        (vision, SMALL_VISION if name == "small" else VISION),
    ):
        for key, value in values.items():
            setattr(part, key, value)
    if layers:
        text.num_hidden_layers = layers
        vision.depth, vision.fullatt_block_indexes = layers, [layers - 1]
    vision.out_hidden_size = text.hidden_size
    text.max_position_embeddings = 32768
    text.rope_parameters = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [16, 24, 24],
    }
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    config.tie_word_embeddings = text.tie_word_embeddings = name != "7b"
    return config


def random_model(name, device=DEVICE, dtype=torch.float32, layers=None, zeros=False):
    """A Qwen2.5-VL with random weights (or zeros), made in `dtype` without a copy in another."""
    model_class = transformers.Qwen2_5_VLForConditionalGeneration
    config = model_config(name, layers)
    with torch.device(device), no_init_weights():
        model = model_class._from_config(config, dtype=dtype)
    model.tie_weights()
    if torch.device(device).type == "meta":
        return model
    torch.manual_seed(0)
    for weight, parameter in model.named_parameters():
        if zeros or weight.endswith("bias"):
            parameter.data.zero_()
        elif parameter.ndim == 1:  # a norm
            parameter.data.fill_(1)
        else:
            parameter.data.normal_(0, 0.02)
    return model


# ------------------------------------------------------------------------------------------ memory


def resident(name="VmRSS"):
    """Resident bytes of this process: now, or with VmHWM at most (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{name}:")[2].split()[0])


def forget_peak():
    """Let VmHWM start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


HEAPS = {"coarse": (2**25, 2**28), "fine": (2**22, 2**26), "finest": (2**18, 2**22)}


def return_freed_memory(heap):
    """Let the allocator give back what is freed, so that resident memory is what is in use.

    Pieces under the first number of HEAPS[heap] bytes come from a heap, which can have holes, and of
    whose free end the second number of bytes is not given back: the smaller they are, the truer is
    the figure, and the slower the run.
    """
    piece, kept = HEAPS[heap]
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(M_MMAP_THRESHOLD, piece)
    libc.mallopt(M_TRIM_THRESHOLD, kept)


@contextmanager
def phase(name, peaks):
    """Note the peak and the remaining resident memory of a block in peaks[name], in GiB."""
    forget_peak()
    started = time.perf_counter()
    yield
    took = time.perf_counter() - started
    peaks[name] = (resident("VmHWM") / GIB, resident() / GIB, took)
    row(name, *(f"{value:.2f}" for value in peaks[name][:2]), f"{took:.0f}")


def log_prob_peak():
    """GB that log-probabilities of 8 x 2,048 tokens over 151,936 take at most, with gradients."""
    hidden = torch.randn(8 * 2048, 8, requires_grad=True)
    head, targets = torch.nn.Linear(8, 151936, bias=False), torch.randint(151936, (8 * 2048,))
    head(hidden[:64]).sum().backward()
    before = resident("VmHWM")
    observe_r1.token_log_probs(hidden, targets, head, [], 1.0).sum().backward()
    return (resident("VmHWM") - before) * 1e-9


def logits(options):
    """In a fresh process, because a process that grew may reuse what it freed."""
    full = 8 * 2048 * 151936 * 4e-9
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        ours = pool.apply(log_prob_peak)
    row(
        "peak memory of log-probabilities, V = 151,936, T = 2,048, G = 8",
        f"one copy of all logits in fp32, {full:.1f} GB",
        f"{ours / full:.3f}",
        "≤ 0.15",
    )


class Product(torch.autograd.Function):
    """x @ weight.T + bias as a card computes it under autocast: bf16 in, bf16 kept, bf16 out.

    A CPU without matrix units multiplies bf16 300 times slower in a backward pass than fp32, so the
    factors of one product are fp32 for as long as it lasts. With `real` off nothing is multiplied:
    results are zeros, but the same tensors are made, written, kept and freed.
    """

    real = True

    @staticmethod
    def multiply(a, b):
        rows = a.flatten(0, -2).float()
        result = torch.empty(len(rows), b.shape[-1], dtype=torch.bfloat16)
        width = max(128, 2**22 // len(b))  # 16 MiB of the weight at a time
        for first in range(0, b.shape[-1], width):
            columns = slice(first, first + width)
            part = b[:, columns].float()
            product = rows @ part if Product.real else rows.new_zeros(len(rows), part.shape[1])
            result[:, columns] = product
        return result.view(*a.shape[:-1], -1)

    @staticmethod
    def forward(ctx, x, weight, bias):
        x = x.to(torch.bfloat16)
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        product = Product.multiply(x, weight.T)
        return product + bias.to(torch.bfloat16) if ctx.has_bias else product

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        for_x = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            for_x = Product.multiply(grad, weight)
        if ctx.needs_input_grad[1]:
            for_weight = Product.multiply(grad.flatten(0, -2).T, x.flatten(0, -2)).to(weight.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            for_bias = grad.flatten(0, -2).sum(0)
        return for_x, for_weight, for_bias


@contextmanager
def like_a_card(real=True):
    """On a CPU, compute in bf16 as the script does on a card, with products by `Product`."""
    kept = F.linear, F.scaled_dot_product_attention, observe_r1.compute_dtype

    def attention(query, key, value, attn_mask=None, **how):
        with torch.autocast("cpu", enabled=False):
            parts = [part.float() for part in (query, key, value)]
            if not real:
                return (parts[0] + 0 * parts[1].sum() + 0 * parts[2].sum()).to(torch.bfloat16)
            return kept[1](*parts, attn_mask=attn_mask, **how).to(torch.bfloat16)

    Product.real = real
    F.linear = lambda x, weight, bias=None: Product.apply(x, weight, bias)
    F.scaled_dot_product_attention = attention
    observe_r1.compute_dtype = lambda device: torch.bfloat16
    yield
    F.linear, F.scaled_dot_product_attention, observe_r1.compute_dtype = kept


def training_state(model, config):
    """What `prepare` makes, of a model that is there already; its reference is a copy."""
    adapters = observe_r1.add_adapters(model, config) if config.lora_rank else None
    reference = None
    if config.kl_coef and not adapters:
        reference = copy.deepcopy(model).eval().requires_grad_(False)
        reference = observe_r1.shard(observe_r1.Policy(reference), config)
    model.activation_checkpointing_enable({"use_reentrant": False})
    policy = observe_r1.shard(observe_r1.Policy(model), config)
    optimizer = observe_r1.make_optimizer(policy, config)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    return observe_r1.TrainState(
        policy, reference, adapters, None, None, None, [], optimizer, scheduler
    )


def memory(options):
    """One step with LoRA at real shapes: a sampled token, then the update on forced responses."""
    if DEVICE.type != "cpu":
        raise SystemExit("bench: `memory` measures resident memory on a CPU; see --gpu for a card")
    return_freed_memory(options.heap)
    processor, peaks = transformers.AutoProcessor.from_pretrained(CONFIG.model), {}
    B, G, T = options.prompts, options.responses, options.tokens
    print(
        f"{options.model}, LoRA of rank {options.lora_rank}, {B} prompts x {G} responses of {T} "
        f"tokens behind {options.picture} picture tokens, products: {options.products}\n"
    )
    header("phase", "peak GiB", "afterwards GiB", "seconds")
    with like_a_card(options.products == "real"):
        with phase("weights in bf16", peaks):
            real = options.products == "real"
            model = random_model(options.model, "cpu", torch.bfloat16, options.layers, not real)
        size = sum(parameter.numel() for parameter in model.parameters())
        rollouts, config = forced_rollouts(processor, "cpu", options.picture + 70, T, B, G)
        config = replace(config, lora_rank=options.lora_rank, num_generations=G, max_new_tokens=1)
        with phase("adapters in fp32 and their moments", peaks):
            state = training_state(model, config)
        with phase("prompts and first tokens of a rollout", peaks):
            model.eval()
            sample(model, rollouts.prompt, [-1], config)
        with phase("update", peaks):
            advantages = torch.linspace(-1, 1, G).expand(B, G)
            metrics = observe_r1.update(state, rollouts, advantages, config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    P = rollouts.prompt["input_ids"].shape[1]
    print(f"\n{size:,} weights, {trained:,} of adapters, P = {P}; {metrics}")
    print(f"peak {max(peak for peak, _, _ in peaks.values()):.2f} GiB")
    return peaks


CASES = {  # name: layers, processes, picture tokens, options
    "all weights": (8, 1, 144, {}),
    "all weights, --gradient_checkpointing false --kl_coef 0": (
        8,
        1,
        576,
        {"kl_coef": 0.0, "gradient_checkpointing": False},
    ),
    "--lora_rank 64": (16, 1, 144, {"lora_rank": 64}),
    "--freeze_vision true": (8, 1, 144, {"freeze_vision": True}),
    "all weights, 2 processes": (8, 2, 144, {}),
}


def warm_up(config):
    """A pass of the toy, so that libraries and their buffers do not count as training's memory."""
    model = observe_r1.load_model(CONFIG)
    processor = transformers.AutoProcessor.from_pretrained(CONFIG.model)
    rollouts, _ = forced_rollouts(processor, "cpu", 80, 4)
    backward(observe_r1.response_log_probs, model, rollouts, config)()
    if config.lora_rank:
        observe_r1.add_adapters(model, config)


def measure(options):
    """One rollout and one update of a case through `prepare`: its peak and its estimate, as JSON."""
    return_freed_memory("finest")  # what is kept would count as in use
    layers, processes, pixels, changes = CASES[options.case]
    folder = Path(options.folder)
    _, config = picture(pixels)
    config = replace(config, **{"gradient_checkpointing": True, **changes})
    config = replace(
        config,
        model=str(folder / "model"),
        data=str(TOY / "heldout.parquet"),
        eval_data="",
        eval_steps=0,
        output_dir=str(folder),
        prompts_per_step=processes,
        minibatch_prompts=processes,
        max_new_tokens=options.tokens,
        num_generations=options.responses,
        bonus=0.0,
    )
    warm_up(config)
    before = resident()
    state = observe_r1.prepare(config, folder, observe_r1.rollout)
    problems = [picture(pixels)[0]]
    forget_peak()
    with observe_r1.unsharded(state.policy):
        rollouts = observe_r1.rollout(state.policy.model, state.processor, problems, config)
    sampled = resident("VmHWM") - before
    forget_peak()
    rollouts.mask.fill_(1)
    advantages = torch.linspace(-1, 1, config.num_generations).expand(1, -1)
    observe_r1.update(state, rollouts, advantages, config)
    updated = resident("VmHWM") - before
    P = rollouts.prompt["input_ids"].shape[1]
    config.max_new_tokens = rollouts.mask.shape[-1]
    expected = observe_r1.estimate_memory(config, P)
    if observe_r1.RANK == 0:
        size = sum(p.numel() for p in random_model("small", "meta", layers=layers).parameters())
        result = {"size": size, "rollout": sampled, "update": updated, "expected": expected}
        print(json.dumps(result), flush=True)


def estimate(options):
    """The estimate of each case against what a run of it takes, in processes of their own."""
    for name, (layers, processes, *_) in CASES.items():
        if options.case not in (None, name):
            continue
        with tempfile.TemporaryDirectory() as folder:
            random_model("small", "cpu", layers=layers).save_pretrained(f"{folder}/model")
            processor = transformers.AutoProcessor.from_pretrained(CONFIG.model)
            processor.save_pretrained(f"{folder}/model")
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc_per_node", str(processes), __file__, "measure", "--case", name]
            command += ["--folder", folder, "--tokens", "16", "--responses", "4"]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            errors = [line for line in run.stderr.splitlines() if "Error" in line]
            raise SystemExit(f"bench: {name} failed: {errors or run.stderr[-3000:]}")
        result = json.loads(run.stdout.splitlines()[-1])
        expected = result["expected"]
        measured = max(result["rollout"], result["update"])
        row(
            f"{name}, {result['size'] / 1e6:.0f} million weights",
            f"measured {measured / GIB:.2f} GiB",
            f"estimate {expected['peak'] / GIB:.2f} GiB, {expected['peak'] / measured:.2f} of it",
            "0.85 to 1.15",
        )


# --------------------------------------------------------------------------------------- on a card


def gpu(options):
    """Tokens a second of rollouts and updates, against `generate` and against the card's limits."""
    processor = transformers.AutoProcessor.from_pretrained(CONFIG.model)
    model = random_model(options.model, layers=options.layers)
    tokens = options.tokens
    problem, config = picture(options.picture)
    config = replace(config, max_new_tokens=tokens)
    size = sum(p.numel() for p in model.parameters())
    for batch in options.batches:
        model.eval()
        prompt = observe_r1.encode_prompts([problem] * (batch // 8), processor, config)
        ratio = against_generate(model, prompt, [-1], config, tokens, options.repeats)
        started = time.perf_counter()
        sample(model, prompt, [-1], config)
        synchronise()
        rate = batch * tokens / (time.perf_counter() - started)
        length = prompt["input_ids"].shape[1] + tokens / 2
        cached = observe_r1.cache_bytes(model.config, model.dtype) * batch * length
        traffic = 2 * size + cached  # bytes of a token
        limit = batch * options.bandwidth / traffic
        what = f"rollout, {batch} responses of {tokens} tokens: {rate:,.0f} tokens/s"
        against = f"`generate`; bandwidth limit {limit:,.0f} tokens/s"
        row(what, against, f"{ratio}; {rate / limit:.2f} of the limit", "≥ 2")
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    rollouts, config = forced_rollouts(processor, model.device, options.picture + 70, tokens)
    work = backward(observe_r1.response_log_probs, model, rollouts, config)
    seconds(work)
    count = rollouts.prompt["input_ids"].shape[1] + rollouts.mask.sum().item()
    rate = count / statistics.median(seconds(work) for _ in range(options.repeats))
    used = 6 * size * rate / options.flops  # what is computed again does not count
    row(f"update: {rate:,.0f} tokens/s", "FLOP/s of the card", f"{used:.2f} used", "≥ 0.40")


def step(options):
    """One optimiser step on forced responses with --kind full, offload or lora: its peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        observe_r1.start(CONFIG, Path(folder))  # the process group
    config = replace(CONFIG, cpu_offload=options.kind == "offload")
    config = replace(config, lora_rank=options.lora_rank if options.kind == "lora" else 0)
    where = "cpu" if config.cpu_offload else DEVICE
    dtype = observe_r1.compute_dtype(DEVICE) if config.lora_rank else torch.float32
    state = training_state(random_model(options.model, where, dtype, options.layers), config)
    processor = transformers.AutoProcessor.from_pretrained(CONFIG.model)
    P, T, B = options.picture + 70, options.tokens, options.prompts
    rollouts, lengths = forced_rollouts(processor, DEVICE, P, T, B)
    config = replace(config, max_pixels=lengths.max_pixels)
    advantages = torch.linspace(-1, 1, 8).expand(B, -1)
    observe_r1.update(state, rollouts, advantages, config)  # the first one fills the moments
    took = seconds(lambda: observe_r1.update(state, rollouts, advantages, config))
    if DEVICE.type == "cpu":
        peak = f"{resident('VmHWM') / GIB:.2f} GiB resident"
    else:
        peak = f"{torch.accelerator.max_memory_allocated() / GIB:.1f} GiB"
    rate = B * (P + 8 * T) / took
    what = f"a step, {options.kind}, {B} prompts x 8 responses of {T} tokens: {rate:,.0f} tokens/s"
    row(what, "peak memory", peak, {"offload": "≤ 22", "lora": "≤ 22"}.get(options.kind, ""))


def main():
    commands = (rollout, update, logits, growth, answers, trl, memory, estimate, measure, gpu, step)
    rows = {command.__name__: command for command in commands}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("rows", nargs="*", help=", ".join(rows))
    parser.add_argument("--gpu", action="store_true", help="the row gpu")
    parser.add_argument("--model", choices=SHAPES, default="3b", help="shapes of the model")
    parser.add_argument("--layers", type=int, help="so many layers instead")
    parser.add_argument("--lora_rank", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--responses", type=int, default=8, help="to each prompt")
    parser.add_argument("--tokens", type=int, default=256, help="of a response")
    parser.add_argument("--picture", type=int, default=1024, help="tokens of a prompt's picture")
    parser.add_argument(
        "--products",
        choices=("real", "none"),
        default="real",
        help="memory: none makes all tensors but multiplies nothing",
    )
    parser.add_argument(
        "--heap",
        choices=HEAPS,
        default="coarse",
        help="memory: finer counts less freed memory as used, and takes longer",
    )
    parser.add_argument("--kind", choices=("full", "offload", "lora"), default="lora")
    parser.add_argument("--batches", type=int, nargs="*", default=[64, 256], help="gpu: responses")
    parser.add_argument("--repeats", type=int, default=3, help="gpu: runs of each")
    parser.add_argument("--bandwidth", type=float, default=math.nan, help="of the card, bytes/s")
    parser.add_argument("--flops", type=float, default=math.nan, help="of the card in bf16, FLOP/s")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.rows + ["gpu"] * options.gpu or ["rollout", "update", "logits", "growth"]
    for name in names:
        if name not in rows:
            parser.error(f"there is no row {name!r}, only {', '.join(rows)}")
    if not {"answers", "memory", "measure"} & set(names):
        header("what", "against", "ratio", "goal")
    for name in names:
        rows[name](*[options] * (name != "answers"))


if __name__ == "__main__":
    main()
