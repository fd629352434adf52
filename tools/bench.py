"""How fast and how small, as Markdown tables: ratios of interleaved repeats in one process.

    python tools/bench.py rollout update     # the toy against the library's way: minutes
    python tools/bench.py samplers           # the toy: generate, graph_rollout.py, vLLM if there
    python tools/bench.py answers            # our rules and math-verify (needs it)
    python tools/bench.py count              # launches, FLOPs and bytes at 3B and 7B shapes
    python tools/bench.py attention          # memory of a packed row's attention
    python tools/bench.py step --model 3b --lora_rank 64 --prompts_per_step 2     # needs peft

takes the options of `observe_r1.py train` as well. --model 3b or 7b are random weights of these
shapes, for a card; --pictures are sizes of pictures in tokens. A ratio is the median (lowest to
highest) of neighbouring runs. `count`, `attention` and, without a card, `step` run on fake tensors,
which have shapes and no numbers: the script's own functions at full size, in bf16 as on a card,
without arithmetic.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import weakref
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT)]
import memory as estimates
from graph_rollout import graph_rollout
from vllm_rollout import vllm_rollout

import observe_r1
import rewards
from observe_r1 import ACCELERATOR, AUTOCAST, DEVICE, load_model

FAKE = FakeTensorMode(allow_non_fake_inputs=True)  # inside, tensors have shapes and no numbers
LARGE = "--max_pixels=100000000"  # so that no picture is made smaller
WORDS = ["train", f"--config={ROOT}/toy/config.json", LARGE]
_, CONFIG = observe_r1.parse_arguments(WORDS)
PROCESSOR = transformers.AutoProcessor.from_pretrained(CONFIG.model)


def seconds(work):
    """On a card by the clock; on a CPU of the processor, whatever else the machine does."""
    clock = time.perf_counter if ACCELERATOR else time.process_time
    synchronise = torch.accelerator.synchronize if ACCELERATOR else int
    synchronise()
    started = clock()
    work()
    synchronise()
    return clock() - started


def compare(ours, theirs, repeats):
    """How many times as long theirs takes, as text. One warm-up each, then turn by turn."""
    seconds(ours)
    seconds(theirs)
    ratios = [seconds(theirs) / seconds(ours) for _ in range(repeats)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def header(*cells):
    row(*cells)
    row(*["---"] * len(cells))


# ---------------------------------------------------------------------------------- models, inputs

TOWER = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
SHAPES = {  # of Qwen2.5-VL-Instruct: hidden, intermediate, layers, heads, key heads, vocabulary
    "3b": (2048, 11008, 36, 16, 2, 151936),
    "7b": (3584, 18944, 28, 28, 4, 152064),
}


def make_model(name, dtype=torch.float32, device=DEVICE):
    """The toy, or random weights of these shapes with its tokens; "fake": without numbers."""
    config = transformers.AutoConfig.from_pretrained(CONFIG.model)
    if name in SHAPES:
        text = config.text_config
        text.hidden_size, text.intermediate_size, text.num_hidden_layers, *heads = SHAPES[name]
        text.num_attention_heads, text.num_key_value_heads, text.vocab_size = heads
        text.layer_types = ["full_attention"] * text.num_hidden_layers
        text.rope_parameters |= {"rope_theta": 1e6, "mrope_section": [16, 24, 24]}
        config.vision_config.update(TOWER | {"out_hidden_size": text.hidden_size})
        config.tie_word_embeddings = text.tie_word_embeddings = name != "7b"
    elif device != "fake":
        return load_model(CONFIG, dtype)
    with FAKE if device == "fake" else torch.device(device):
        model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)
    return observe_r1.use_fast_attention(model)


def make_policy(name, device=DEVICE):
    policy = observe_r1.Policy(make_model(name, device=device)).train()
    if name in SHAPES:
        policy.model.activation_checkpointing_enable({"use_reentrant": False})
    return policy


def picture(tokens):
    """A problem with a picture of so many tokens."""
    side = 28 * round(tokens**0.5)
    image = Image.effect_noise((side, side), 64)
    return {"images": [image], "question": "What is the sum of the digits?", "answer": "1"}


def forced_rollouts(tokens, T, B=1):
    """B prompts with a picture of so many tokens, and 8 random responses of T tokens to each."""
    prompts = observe_r1.encode_prompts([picture(tokens)], PROCESSOR, CONFIG) * B
    ids = torch.randint(100, 300, (B, 8, T), device=DEVICE)
    return observe_r1.Rollouts(prompts, ids, torch.ones_like(ids, dtype=torch.bool), [])


def prepared(name, config):
    """What `prepare` makes of the toy, or of these shapes; without a card of fake tensors."""

    def make(config, dtype, where=None):
        return make_model(name, dtype, DEVICE if ACCELERATOR else "fake")

    with patch.multiple(observe_r1, load_model=make, say=str):
        if ACCELERATOR:
            return observe_r1.prepare(config, observe_r1.rollout)
        with FAKE, patch.object(torch.nn.Module, "to", fake_to):
            return observe_r1.prepare(config, observe_r1.rollout)


def fake_to(module, *where, **how):
    """In place of the library's, which cannot exchange fake weights."""
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            values = weight.data.to(*where, **how)
            setattr(part, name, torch.nn.Parameter(values, weight.requires_grad))
    return module


# --------------------------------------------------------------------------------- the slower ways


@contextmanager
def library_attention(model):
    """Without `packed_attention`, and with one call for each window of a picture."""
    model.model.language_model.config._attn_implementation = "sdpa"
    model.model.visual.config._attn_implementation = "sdpa"
    yield
    observe_r1.use_fast_attention(model)


def generate(model, processor, problems, config):
    """Sampling by transformers' `generate`, for prompts padded on the left."""
    chats = [observe_r1.chat_messages(problem, config) for problem in problems]
    texts = observe_r1.prompt_text(chats, processor)
    pictures, _ = observe_r1.process_vision_info(chats)
    inputs = processor(
        text=texts,
        images=pictures,
        do_resize=False,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    with torch.no_grad(), AUTOCAST, library_attention(model.eval()):
        model.generate(
            **inputs.to(model.device),
            do_sample=True,
            top_k=0,
            num_return_sequences=config.num_generations,
            max_new_tokens=config.max_new_tokens,
        )


JOIN_ROWS = observe_r1.join_rows


def join_densely(packed):
    """`join_rows` with a mask over all pairs of tokens instead of lengths."""
    row, predecessors = JOIN_ROWS(packed)
    blocks = []
    for P, *lengths in row["attention_mask"]["full_attention"]:
        ones = (torch.ones(length, length) for length in (P, *lengths))
        blocks.append(torch.block_diag(*ones))
        blocks[-1][:, :P] = 1  # the prompt
    sees = torch.block_diag(*blocks).bool().tril().to(predecessors.device)
    row["attention_mask"] = {"full_attention": sees[None, None]}
    return row, predecessors


def growing_layer(buffer, length):
    """The library's cache, which copies everything for each new token, for `FixedLayer`."""
    layer = transformers.cache_utils.DynamicLayer()
    layer.update(*buffer[..., :length, :].unbind(1))
    return layer


@contextmanager
def as_before(model):
    """As the script did before `packed_attention`, `window_attention` and `FixedLayer`."""
    slow = {"join_rows": join_densely, "FixedLayer": growing_layer}
    with library_attention(model), patch.multiple(observe_r1, **slow):
        yield


# ------------------------------------------------------------------------------------------- speed


def rollout(options, config):
    """Responses of one length to prompts with larger and larger pictures."""
    B, T = config.prompts_per_step, config.max_new_tokens
    header(f"rollout, {B} prompts x 8 responses of {T} tokens", "`generate` takes", "ours")
    model = make_model(options.model)
    model.generation_config.eos_token_id = -1  # no response ends by itself
    for tokens in options.pictures:
        inputs = model, PROCESSOR, [picture(tokens)] * B, config
        ours = partial(observe_r1.rollout, *inputs)
        ratio = compare(ours, partial(generate, *inputs), options.repeats)
        rate = f"{B * 8 * T / seconds(ours):,.0f} tokens/s"
        row(f"a picture of {tokens} tokens in each prompt", ratio, rate)


def samplers(options, config):
    """The toy's own problems, whose responses are as long as they come."""
    problems = observe_r1.load_problems(config.data, PROCESSOR, config)
    problems = observe_r1.read_problems(problems, range(400, 400 + config.prompts_per_step))
    inputs = make_model("toy"), PROCESSOR, problems, config
    samplers = {
        "observe_r1.py": observe_r1.rollout,
        "graph_rollout.py": graph_rollout,
        "transformers' generate": generate,
    }
    with suppress(ImportError):
        import vllm

        samplers[f"vLLM {vllm.__version__}"] = vllm_rollout
    ours = partial(observe_r1.rollout, *inputs)
    tokens = ours().mask.sum()  # the others write about as many
    header(f"sampler, {len(problems)} of the toy's prompts x 8", "takes", "tokens a second")
    for name, sampler in samplers.items():
        theirs = partial(sampler, *inputs)
        ratio = compare(ours, theirs, options.repeats)
        row(name, ratio, f"{tokens / seconds(theirs):,.0f}")


def passes(policy, rollouts, around=nullcontext):
    """A forward and a backward pass of the first group, to be timed; returns log-probabilities."""
    with around(policy.model):
        log_probs = policy(rollouts, ([0] * 8, [*range(8)]))
        log_probs.sum().backward()
    return log_probs.detach()


LENGTHS = ((9, 48), (961, 256), (64, 512))  # tokens of picture and response, for `update`


def update(options, config):
    """A group against the slow form, which must give the same log-probabilities in fp32."""
    header("forward and backward pass of a group, G = 8", "dense mask, window by window takes")
    policy = make_policy(options.model)
    for tokens, T in LENGTHS:
        rollouts = forced_rollouts(tokens, T)
        ours = partial(passes, policy, rollouts)
        slow = partial(ours, around=as_before)
        if observe_r1.DTYPE == torch.float32:
            torch.testing.assert_close(ours(), slow(), atol=1e-4, rtol=1e-4)
        P = rollouts.prompts[0]["input_ids"].shape[1]
        row(f"P = {P}, T = {T}", compare(ours, slow, options.repeats))


def step(options, config):
    """An update of forced responses: on a card timed and measured, else counted."""
    header("update", "speed", "peak memory", "estimate of tools/memory.py", "estimate / peak")
    B, T, folder = config.prompts_per_step, config.max_new_tokens, tempfile.mkdtemp()
    rollouts = forced_rollouts(options.pictures[-1], T, B)
    P = rollouts.prompts[0]["input_ids"].shape[1]
    advantages = torch.linspace(-1, 1, 8).expand(B, -1)
    config = replace(config, output_dir=folder, eval_data="", eval_steps=0)
    counter = Counter()
    with nullcontext() if ACCELERATOR else counter.counting():
        state = prepared(options.model, config)
        for policy in filter(None, (state.policy, state.reference)):
            counter.hold(*policy.parameters())
        work = partial(observe_r1.update, state, rollouts, advantages, config)
        work()  # the first one makes the moments
        rate = B * (P + 8 * T) / seconds(work)
    peak = torch.accelerator.max_memory_allocated() if ACCELERATOR else counter.peak
    state.policy.model.config.save_pretrained(folder)
    config = replace(config, model=folder)
    expected = estimates.estimate_memory(config, P)["peak"]
    speed = f"{rate:,.0f} tokens/s" if ACCELERATOR else "-"
    sizes = [f"{size / 1e9:.1f} GB" for size in (peak, expected)]
    row(f"{B} x 8 responses of {T} tokens", speed, *sizes, f"{expected / peak:.2f}")


# ----------------------------------------------------------------------------------------- answers


def answers(options, config):
    """Our rules and math-verify's on three files of pairs, a row each."""
    import math_verify

    def verify(answer, gold):
        # Its own time limit is 5 s a step; 1 s here, or prose would hold up the table.
        parts = [math_verify.parse(f"${text}$", parsing_timeout=1) for text in (gold, answer)]
        return math_verify.verify(*parts, timeout_seconds=1)

    header("pairs", "checker", "right", "wrongly accepted", "wrongly rejected", "median")
    for source in ("toy/answers.jsonl", "tests/answer_faults.jsonl", "tests/answer_faults_3.jsonl"):
        pairs = [json.loads(line) for line in (ROOT / source).open()]
        pairs = [pair for pair in pairs if not pair.get("debatable")]
        for name, check in (("rewards.py", rewards.answers_match), ("math-verify", verify)):
            verdicts, times = [], []
            for pair in pairs:
                answer = pair.get("answer") or rewards.extract_answer(pair["response"])
                started = time.perf_counter()
                said = answer is not None and bool(check(answer, pair["gold"]))
                times.append(time.perf_counter() - started)
                verdicts.append(said - pair["match"])  # 1: wrongly accepted, -1: wrongly rejected
            right, accepted, rejected = (verdicts.count(verdict) for verdict in (0, 1, -1))
            median = f"{1e6 * statistics.median(times):.0f} µs"
            row(source, name, f"{right} of {len(pairs)}", accepted, rejected, median)


# ----------------------------------------------------------------------------------------- counting

aten = torch.ops.aten


class Counter(TorchDispatchMode):
    """Counts what fake tensors go through: launches, FLOPs, bytes moved, and the peak of memory.

    A launch is an operation that makes or changes a tensor; it moves what it reads and writes.
    Tensors with numbers (tokens, masks, positions) may take part, so that the script runs as ever.
    Where it asks a fake tensor for a number, the answer is a million, or true: all rows go on.
    """

    def __init__(self):
        super().__init__()
        self.numbers, self.asked = np.zeros(3), []  # launches, FLOPs, bytes moved; at each question
        self.live, self.held, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), how=None):
        first, how = next(iter(arguments), None), how or {}
        if function is aten._local_scalar_dense.default and isinstance(first, FakeTensor):
            self.asked.append(self.numbers.copy())
            return first.dtype == torch.bool or 10**6
        if function is aten.index.Tensor and isinstance(first, FakeTensor):
            indices = []  # the numbers of a mask say how large the result is
            for index in arguments[1]:
                is_mask = index is not None and index.dtype == torch.bool
                indices += index.nonzero(as_tuple=True) if is_mask else [index]
            arguments = (first, indices)
        result = function(*arguments, **how)
        if function.is_view or function.namespace == "prim":
            return result
        moved = tree_leaves(result)
        if not function._schema.is_mutable:
            self.hold(*moved)
        if function not in (aten.embedding.default, aten.index.Tensor):  # they read a few rows
            moved += tree_leaves((arguments, how))
        count = flop_registry.get(function.overloadpacket)
        flops = count(*arguments, **how, out_val=result) if count else 0
        size = sum(value.nbytes for value in filter(torch.is_tensor, moved))
        self.numbers += (1, flops, size)
        return result

    def hold(self, *tensors):
        """Count the storage of tensors from now until it is freed."""
        for tensor in filter(torch.is_tensor, tensors):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.live:
                self.live.add(storage._cdata)
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())

    def free(self, key, size):
        self.live.remove(key)
        self.held -= size

    @contextmanager
    def counting(self):
        """Inside, the script computes in bf16, as on a card, and everything is counted."""
        of_script = patch.multiple(
            observe_r1,
            DTYPE=torch.bfloat16,
            AUTOCAST=torch.autocast("cpu", torch.bfloat16),
            scaled_dot_product_attention=fused_attention,
            causal_lower_right=lambda queries, keys: None,
        )
        of_library = patch.object(F, "scaled_dot_product_attention", fused_attention)
        with of_script, of_library, self:
            yield self


def fused_attention(query, key, value, attn_mask=None, **how):
    """Attention as a card computes it, by one kernel; causal or not, all pairs are counted."""
    parts = [part.to(value.dtype) for part in (query, key, value)]
    kernel = aten._scaled_dot_product_efficient_attention
    return kernel(*parts, attn_mask, compute_log_sumexp=True)[0]


def count(options, config):
    """Before and after packed_attention, window_attention and FixedLayer, at real shapes."""
    rollouts = forced_rollouts(1430, 2000)
    (large,) = forced_rollouts(2.56e6 / 28**2, 1).prompts
    pixels, grid = large["pixel_values"], large["image_grid_thw"]

    def decode(policy, rows):
        config = replace(CONFIG, max_new_tokens=3, num_generations=rows)
        with observe_r1.AUTOCAST:
            observe_r1.sample(policy.model, rollouts.prompts, torch.tensor([-1]), config)

    def look(policy):
        with observe_r1.AUTOCAST, torch.no_grad():
            policy.model.model.visual(pixels, grid)

    works = {
        "a decoding step, 8 rows": partial(decode, rows=8),
        "a decoding step, 128 rows": partial(decode, rows=128),
        "update of a group": partial(passes, rollouts=rollouts),
        "a picture of 2.56 MP": look,
    }
    header("model", "what", "form", "launches", "TFLOP", "GB moved")
    for name in SHAPES:
        policy = make_policy(name, "fake")
        for what, work in works.items():
            for form, around in (("before", as_before), ("after", nullcontext)):
                with Counter().counting() as counter, around(policy.model):
                    work(policy)
                launches, flops, moved = counter.numbers
                if "decoding" in what:  # it asks once a token how many rows go on
                    launches, flops, moved = counter.asked[2] - counter.asked[1]
                sizes = f"{flops / 1e12:,.4g}", f"{moved / 1e9:,.4g}"
                row(name, what, form, f"{launches:,.0f}", *sizes)


def attention(options, config):
    """Bytes that attention over a packed row holds at most, with its backward pass."""
    header("responses of 2,000 tokens behind 1,500", "packed_attention, GB", "dense mask, GB")
    module = SimpleNamespace(num_key_value_groups=8, is_causal=True)
    for G in (2, 4, 8, 16):
        lengths, cells = [1500] + [2000] * G, []
        L = sum(lengths)
        for dense in (False, True):
            with FAKE, Counter().counting() as counter:
                parts = [torch.empty(1, heads, L, 128).bfloat16() for heads in (16, 2, 2)]
                parts = [part.requires_grad_() for part in parts]
                mask = torch.empty(1, 1, L, L, dtype=torch.bool) if dense else [lengths]
                output, _ = observe_r1.packed_attention(module, *parts, mask, scaling=1)
                output.sum().backward()
            cells.append(f"{counter.peak / 1e9:.2f}")
        row(G, *cells)


def main():
    functions = (rollout, samplers, update, step, answers, count, attention)
    rows = {function.__name__: function for function in functions}
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.add_argument("rows", nargs="+", choices=rows)
    parser.add_argument("--model", choices=SHAPES, default="toy")
    parser.add_argument("--pictures", type=int, nargs="+", default=[5, 256, 961])
    parser.add_argument("--repeats", type=int, default=5)
    options, words = parser.parse_known_args()
    _, config = observe_r1.parse_arguments([*WORDS, *words])
    for name in options.rows:
        rows[name](options, config)


if __name__ == "__main__":
    main()
