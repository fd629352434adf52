"""How fast and how small, as Markdown tables: ratios of interleaved repeats in one process.

    python tools/bench.py                  # rollout and update of the toy: minutes
    python tools/bench.py answers          # our rules and math-verify (needs it; TRL's if there)
    python tools/bench.py count            # launches, FLOPs and bytes at 3B and 7B shapes
    python tools/bench.py attention        # memory of a packed row's attention
    python tools/bench.py memory           # the peak of a step against tools/memory.py (peft)
    python tools/bench.py rollout update step --model 3b    # random weights, on a card

A ratio is the median (lowest to highest) of neighbouring runs. What `count`, `attention` and
`memory` count runs on fake tensors, which have shapes and no numbers: the script's own functions at
full size, in bf16 as on a card, without arithmetic.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
import weakref
from contextlib import ExitStack, contextmanager, nullcontext, suppress
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
from transformers.initialization import no_init_weights

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import memory as estimates

import observe_r1
import rewards

HERE = Path(__file__).resolve().parent
FAKE = FakeTensorMode(allow_non_fake_inputs=True)  # inside, tensors have shapes and no numbers
CONFIG = observe_r1.parse_arguments(
    ["train", "--config", str(HERE.parent / "toy" / "config.json")]
)[1]
DEVICE = observe_r1.DEVICE


def seconds(work):
    """On a card by the clock; on a CPU of the processor, whatever else the machine does."""
    clock = time.perf_counter if observe_r1.ACCELERATOR else time.process_time
    synchronise = torch.accelerator.synchronize if observe_r1.ACCELERATOR else int
    synchronise()
    started = clock()
    work()
    synchronise()
    return clock() - started


def compare(ours, theirs, repeats=7):
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


# ------------------------------------------------------------------------------------------- speed


def load(options):
    """The toy, or a model of the shapes that --model names with the toy's tokens."""
    processor = transformers.AutoProcessor.from_pretrained(CONFIG.model)
    if not options.model:
        return observe_r1.load_model(CONFIG, torch.float32), processor
    model = random_model(options.model, layers=options.layers)
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model, processor


def picture(tokens):
    """A problem with a picture of so many tokens, and options that leave its size alone."""
    side = 28 * round(max(1, tokens) ** 0.5)
    config = replace(CONFIG, max_pixels=side * side, max_prompt_tokens=10**5)
    image = Image.effect_noise((side, side), 64)
    return {"images": [image], "question": "What is the sum of the digits?", "answer": "1"}, config


def padded(prompts, device):
    """Prompts as one batch, padded on the left, as `generate` wants them."""
    P = max(prompt["input_ids"].shape[1] for prompt in prompts)
    batch = {}
    for name in prompts[0]:
        parts = [prompt[name] for prompt in prompts]
        if parts[0].shape[0] == 1 and name != "image_grid_thw":  # [1,n]: tokens
            parts = [F.pad(part, (P - part.shape[1], 0)) for part in parts]
        batch[name] = torch.cat(parts).to(device)
    return batch


def against_generate(model, prompts, stop, config, repeats, shortest=None):
    """How many times as long transformers' `generate` takes for the same prompts, as text."""
    inputs, stop = padded(prompts, model.device), torch.tensor(stop, device=model.device)
    how = {"do_sample": True, "top_k": 0, "num_return_sequences": config.num_generations}
    how |= {"min_new_tokens": shortest, "max_new_tokens": config.max_new_tokens}

    def ours():
        with observe_r1.AUTOCAST:
            observe_r1.sample(model, prompts, stop, config)

    def theirs():
        with torch.no_grad(), observe_r1.AUTOCAST, library_attention(model):
            model.generate(**inputs, **how)

    text = compare(ours, theirs, repeats)
    rate = len(prompts) * config.num_generations * config.max_new_tokens / seconds(ours)
    return text, f"{rate:,.0f} tokens/s at most"


@contextmanager
def library_attention(model):
    """Without `packed_attention`, and with one call for each window of a picture."""
    model.model.language_model.config._attn_implementation = "sdpa"
    model.model.visual.config._attn_implementation = "sdpa"
    yield
    observe_r1.use_fast_attention(model)


def rollout(options):
    """Responses of one length to prompts with larger and larger pictures; then as they end."""
    header("rollout, 8 responses to each prompt", "`generate` takes", "ours")
    model, processor = load(options)
    model.eval()
    B, T = options.prompts, options.tokens
    for tokens in options.pictures:
        problem, config = picture(tokens)
        prompts = observe_r1.encode_prompts([problem], processor, config) * B
        config = replace(config, max_new_tokens=T)
        result = against_generate(model, prompts, [-1], config, options.repeats, T)
        P = prompts[0]["input_ids"].shape[1]
        row(f"{B} prompts, {T} tokens each, P = {P}", *result)
    if not options.model:
        config = replace(CONFIG, output_dir=tempfile.mkdtemp())
        problems = observe_r1.load_problems(CONFIG.data, processor, config)
        problems = observe_r1.read_problems(problems, range(400, 400 + B))
        prompts = observe_r1.encode_prompts(problems, processor, CONFIG)
        stop = model.generation_config.eos_token_id
        text, _ = against_generate(model, prompts, stop, CONFIG, 2 * options.repeats)
        row(f"{B} of the toy's prompts, as long as they come, P = 75", text, "")


def forced_rollouts(processor, P, T, B=1, G=8):
    """B prompts of about P tokens, most of them a picture, and G random responses of T tokens."""
    problem, config = picture(P - 70)
    prompts = observe_r1.encode_prompts([problem], processor, config) * B
    ids = torch.randint(100, 300, (B, G, T), device=DEVICE)
    return observe_r1.Rollouts(prompts, ids, torch.ones_like(ids, dtype=torch.bool), [])


PACK_GROUP = observe_r1.pack_group


def pack_densely(inputs, response_ids, mask):
    """`pack_group` with a mask over all pairs of tokens instead of lengths."""
    packed, predecessors = PACK_GROUP(inputs, response_ids, mask)
    lengths = torch.tensor(packed["attention_mask"]["full_attention"], device=mask.device)
    owner = torch.arange(len(lengths), device=mask.device).repeat_interleave(lengths)
    sees = (owner[:, None] == owner) | (owner == 0)  # its own response, and the prompt
    packed["attention_mask"] = {"full_attention": sees.tril()[None, None]}
    return packed, predecessors


@contextmanager
def as_before(model):
    """As the script did before `packed_attention` and `window_attention`."""
    with library_attention(model), patch.object(observe_r1, "pack_group", pack_densely):
        yield


def passes(policy, rollouts, around=nullcontext):
    """A forward and a backward pass of the first group, to be timed; returns log-probabilities."""
    with around(policy.model):
        log_probs = policy(rollouts, 0, slice(None))
        log_probs.sum().backward()
    return log_probs.detach()


LENGTHS = ((80, 48), (1024, 256), (136, 512))  # prompt and response of `update`, in tokens


def update(options):
    """A group against the slow form, which must give the same log-probabilities in fp32."""
    header("forward and backward pass of a group, G = 8", "dense mask, window by window takes")
    model, processor = load(options)
    policy = observe_r1.Policy(model.train())
    for P, T in LENGTHS:
        rollouts = forced_rollouts(processor, P, T)
        ours = partial(passes, policy, rollouts)
        slow = partial(ours, around=as_before)
        if observe_r1.DTYPE == torch.float32:
            torch.testing.assert_close(ours(), slow(), atol=1e-4, rtol=1e-4)
        P = rollouts.prompts[0]["input_ids"].shape[1]
        row(f"P = {P}, T = {T}", compare(ours, slow, options.repeats))


def answers(options):
    """Our rules and others' on three files of pairs, a row each."""
    import math_verify

    sources = {}
    for source in ("toy/answers.jsonl", "tests/answer_faults.jsonl", "tests/answer_faults_3.jsonl"):
        pairs = [json.loads(line) for line in (HERE.parent / source).open()]
        sources[source] = [pair for pair in pairs if not pair.get("debatable")]
        for pair in sources[source]:
            if "response" in pair:
                pair["answer"] = rewards.extract_answer(pair["response"])

    def verify(answer, gold):
        # Its own time limit is 5 s a step; 1 s here, or prose would hold up the table.
        parts = [math_verify.parse(f"${text}$", parsing_timeout=1) for text in (gold, answer)]
        return math_verify.verify(*parts, timeout_seconds=1)

    checkers = {"rewards.py": rewards.answers_match, "math-verify": verify}
    with suppress(ImportError):
        from trl.rewards import accuracy_reward

        def of_trl(answer, gold):
            return accuracy_reward([[{"content": f"${answer}$"}]], [f"${gold}$"])[0]

        checkers["TRL's accuracy_reward"] = of_trl
    header("pairs", "checker", "right", "wrongly accepted", "wrongly rejected", "median")
    for source, pairs in sources.items():
        for name, check in checkers.items():
            verdicts, times = [], []
            for pair in pairs:
                started = time.perf_counter()
                said = pair["answer"] is not None and bool(check(pair["answer"], pair["gold"]))
                times.append(time.perf_counter() - started)
                verdicts.append(said - pair["match"])  # 1: wrongly accepted, -1: wrongly rejected
            wrong = verdicts.count(1), verdicts.count(-1)
            right = f"{verdicts.count(0)} of {len(pairs)}"
            row(source, name, right, *wrong, f"{1e6 * statistics.median(times):.0f} µs")


# ------------------------------------------------------------------------------------------ shapes

TOWER = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
TOWER["fullatt_block_indexes"] = [7, 15, 23, 31]
SHAPES = {  # of Qwen2.5-VL-Instruct: hidden, intermediate, layers, heads, key heads, vocabulary
    "3b": (2048, 11008, 36, 16, 2, 151936),
    "7b": (3584, 18944, 28, 28, 4, 152064),
}


def random_model(name, dtype=torch.float32, device=DEVICE, layers=None):
    """A Qwen2.5-VL of these shapes with the toy's special tokens; "fake": without numbers."""
    config = transformers.AutoConfig.from_pretrained(CONFIG.model)
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers, *heads = SHAPES[name]
    text.num_attention_heads, text.num_key_value_heads, text.vocab_size = heads
    vision.update(TOWER | {"out_hidden_size": text.hidden_size})
    if layers:
        text.num_hidden_layers = layers
        vision.depth, vision.fullatt_block_indexes = layers, [layers - 1]
    text.rope_parameters = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [16, 24, 24],
    }
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    config.tie_word_embeddings = text.tie_word_embeddings = name != "7b"
    with FAKE if device == "fake" else torch.device(device), no_init_weights():
        model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)
    model.tie_weights()
    for weight, parameter in () if device == "fake" else model.named_parameters():
        torch.nn.init.normal_(parameter, float(weight.endswith("norm.weight")), 0.02)
    return observe_r1.use_fast_attention(model)


def prepared(options, config, device=DEVICE):
    """What `prepare` makes of the toy, or of a model of --model's shapes."""
    folder = tempfile.mkdtemp()
    config = replace(config, output_dir=folder, eval_data="", eval_steps=0)
    if not options.model:
        return observe_r1.prepare(config, observe_r1.rollout)

    def load_model(config, dtype, where=None):
        return random_model(options.model, dtype, device, options.layers)

    def to(module, *where, **how):  # the library's cannot exchange fake weights
        for part in module.modules():
            for name, weight in part.named_parameters(recurse=False):
                values = weight.data.to(*where, **how)
                setattr(part, name, torch.nn.Parameter(values, weight.requires_grad))
        return module

    with ExitStack() as stack:
        stack.enter_context(patch.multiple(observe_r1, load_model=load_model, say=str))
        if device == "fake":
            stack.enter_context(FAKE)
            stack.enter_context(patch.object(torch.nn.Module, "to", to))
        return observe_r1.prepare(config, observe_r1.rollout)


# ----------------------------------------------------------------------------------------- counting

aten = torch.ops.aten


class Counter(TorchDispatchMode):
    """Counts what fake tensors go through: launches, FLOPs, bytes moved, and the peak of memory.

    A launch is an operation that makes or changes a tensor; it moves what it reads and writes.
    Tensors with numbers (tokens, masks, positions) may take part, so that the script runs as ever;
    only where it asks a fake tensor for a number, `number` is the answer.
    """

    def __init__(self, number=0):
        super().__init__()
        self.number, self.numbers = number, np.zeros(3)  # launches, FLOPs, bytes moved
        self.live, self.held, self.peak, self.asked = {}, 0, 0, []

    def __torch_dispatch__(self, function, types, arguments=(), how=None):
        first, how = next(iter(arguments), None), how or {}
        if function is aten._local_scalar_dense.default and isinstance(first, FakeTensor):
            self.asked.append(self.numbers.copy())
            return first.dtype == torch.bool or self.number
        if function is aten.index.Tensor and isinstance(first, FakeTensor):
            numbers = []  # a mask's say how large the result is
            for index in arguments[1]:
                is_mask = index is not None and index.dtype == torch.bool
                numbers += index.nonzero(as_tuple=True) if is_mask else [index]
            arguments = (first, numbers)
        result = function(*arguments, **how)
        returned = [value.alias_info for value in function._schema.returns]
        if function.namespace == "prim" or any(a and not a.is_write for a in returned):
            return result  # a view
        self.numbers[0] += 1
        if count := flop_registry.get(function.overloadpacket):
            self.numbers[1] += count(*arguments, **how, out_val=result)
        self.move(*tree_leaves(result))
        if function not in (aten.embedding.default, aten.index.Tensor):  # they read a few rows
            self.move(*tree_leaves((arguments, how)))
        for tensor in tree_leaves(result) if not any(returned) else ():  # not what was changed
            self.hold(tensor)
        return result

    def move(self, *tensors):
        self.numbers[2] += sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))

    def hold(self, tensor):
        """Count a tensor's storage from now until it is freed."""
        if isinstance(tensor, torch.Tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self.free, storage._cdata)

    def free(self, key):
        self.held -= self.live.pop(key)

    def attention(self, query, key, value, attn_mask=None, *_, is_causal=False, **how):
        """In place of the library's: a card's kernel is one launch, and skips what is causal."""
        queries, keys = query.shape[-2], key.shape[-2]
        pairs = queries * keys
        if is_causal or isinstance(attn_mask, str):
            pairs -= queries * (queries - 1) // 2
        self.move(attn_mask)
        products = pairs * query.shape[:-2].numel() * query.shape[-1]
        parts = query.to(value.dtype), key.to(value.dtype), value
        return Attention.apply(self, products, *parts)

    @contextmanager
    def counting(self):
        """Inside, the script computes in bf16, as on a card, and everything is counted."""
        of_script = {
            "DTYPE": torch.bfloat16,
            "AUTOCAST": torch.autocast("cpu", torch.bfloat16),
            "scaled_dot_product_attention": self.attention,
            "causal_lower_right": lambda queries, keys: "causal",
        }
        with patch.multiple(observe_r1, **of_script), self:
            with patch.object(F, "scaled_dot_product_attention", self.attention):
                yield self


class Attention(torch.autograd.Function):
    """Shapes, FLOPs and bytes of attention, forwards and backwards."""

    @staticmethod
    def forward(ctx, counter, products, query, key, value):
        ctx.save_for_backward(query, key, value)
        ctx.counter, ctx.products = counter, products
        counter.numbers[1] += 4 * products
        counter.move(key, value)  # empty_like itself counts for the query and the result
        return torch.empty_like(query)

    @staticmethod
    def backward(ctx, gradient):
        ctx.counter.numbers[1] += 10 * ctx.products
        return None, None, *map(torch.empty_like, ctx.saved_tensors)


class GrowingLayer(transformers.cache_utils.DynamicLayer):
    """The library's cache, in place of `FixedLayer`: it copies everything for each new token."""

    def __init__(self, buffer, length):
        super().__init__()
        keys, values = buffer[..., :length, :].unbind(1)
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, keys, values, *_, **__):
        return super().update(keys.to(values.dtype), values)


def count_decoding(model, prompts, rows, form):
    """A decoding step: what comes between the second and the third token of a rollout."""
    config = replace(CONFIG, max_new_tokens=3, num_generations=rows)
    layer = GrowingLayer if form is as_before else observe_r1.FixedLayer
    with patch.object(observe_r1, "FixedLayer", layer):
        with Counter(number=rows).counting() as counter, observe_r1.AUTOCAST:
            observe_r1.sample(model, prompts, torch.tensor([-1]), config)
    return counter.asked[2] - counter.asked[1]  # it asks once a token how many go on


def count_calls(model, work, form):
    with Counter().counting() as counter, form(model.train()):
        work()
    return counter.numbers


def count(options):
    """Before and after packed_attention, window_attention and FixedLayer, at real shapes."""
    processor = transformers.AutoProcessor.from_pretrained(CONFIG.model)
    rollouts = forced_rollouts(processor, 1500, 2000)
    (large,) = forced_rollouts(processor, 2.56e6 / 28**2, 1).prompts
    header("model", "what", "form", "launches", "TFLOP", "GB moved")
    for name in [options.model] if options.model else SHAPES:
        model = random_model(name, device="fake", layers=options.layers)
        model.activation_checkpointing_enable({"use_reentrant": False})
        policy = observe_r1.Policy(model)

        def look(model=model):
            with observe_r1.AUTOCAST, torch.no_grad():
                model.model.visual(large["pixel_values"], large["image_grid_thw"])

        decoding = partial(count_decoding, model.eval(), rollouts.prompts)
        for what, counted in {
            "a decoding step, 8 rows": partial(decoding, 8),
            "a decoding step, 128 rows": partial(decoding, 128),
            "update of a group": partial(count_calls, model, partial(passes, policy, rollouts)),
            "a picture of 2.56 MP": partial(count_calls, model, look),
        }.items():
            for form in (as_before, nullcontext):
                launches, flops, moved = counted(form=form)
                when = "before" if form is as_before else "after"
                cells = f"{launches:,.0f}", f"{flops / 1e12:,.4g}", f"{moved / 1e9:,.4g}"
                row(name, what, when, *cells)


def attention(options):
    """Bytes that attention over a packed row holds at most, with its backward pass."""
    header("responses of 2,000 tokens behind 1,500", "packed_attention, GB", "dense mask, GB")
    module = SimpleNamespace(num_key_value_groups=8, is_causal=True)
    for G in (2, 4, 8, 16):
        lengths, cells = [1500] + [2000] * G, []
        L = sum(lengths)
        for mask in (lengths, torch.ones(1, 1, L, L, dtype=torch.bool)):
            with FAKE:
                parts = [torch.empty(1, heads, L, 128).bfloat16() for heads in (16, 2, 2)]
            query, key, value = (part.requires_grad_() for part in parts)
            with Counter().counting() as counter:
                counter.hold(mask)
                output, _ = observe_r1.packed_attention(module, query, key, value, mask, scaling=1)
                output.sum().backward()
            cells.append(f"{counter.peak / 1e9:.2f}")
        row(G, *cells)


CASES = (  # shapes, tokens of a response, options
    ("3b", 1024, {}),
    ("3b", 256, {"gradient_checkpointing": False, "kl_coef": 0.0}),
    ("3b", 1024, {"freeze_vision": True, "token_budget": 4096}),
    ("3b", 1024, {"lora_rank": 64}),
    ("7b", 1024, {"lora_rank": 16}),
)


def count_step(options, config):
    """The most bytes that a rollout and an update of two groups hold, counted and estimated."""
    T, advantages = config.max_new_tokens, torch.linspace(-1, 1, 8).expand(2, -1)
    with Counter().counting() as counter:
        state = prepared(options, config, "fake")
        for part in filter(None, (state.policy, state.reference)):
            for weight in part.parameters():
                counter.hold(weight)
        rollouts = forced_rollouts(state.processor, options.pictures[-1] + 70, T, 2)
        rollouts.mask[0, :, 1:] = False  # one group is short, so that the other meets gradients
        observe_r1.update(state, rollouts, advantages, config)
        with observe_r1.AUTOCAST:
            observe_r1.sample(state.policy.model, rollouts.prompts, torch.tensor([-1]), config)
        observe_r1.update(state, rollouts, advantages, config)  # meets the moments, too
    with tempfile.TemporaryDirectory() as folder:
        state.policy.model.config.save_pretrained(folder)
        P = rollouts.prompts[0]["input_ids"].shape[1]
        return counter.peak, estimates.estimate_memory(replace(config, model=folder), P)["peak"]


def memory(options):
    """tools/memory.py against the peak of a step that runs on fake tensors, in bf16."""
    header("model", "options", "counted, GB", "estimate, GB", "estimate / counted")
    for name, tokens, changes in CASES:
        config = replace(CONFIG, prompts_per_step=2, max_new_tokens=tokens, token_budget=16384)
        config = replace(config, **{"gradient_checkpointing": True, **changes})
        options.model = name
        counted, expected = count_step(options, config)
        numbers = [f"{number / 1e9:.1f}" for number in (counted, expected)]
        told = " ".join(f"--{name} {value}" for name, value in changes.items()) or "all weights"
        row(name, told, *numbers, f"{expected / counted:.2f}")


def step(options):
    """Speed and peak memory of an update on forced responses."""
    config = replace(CONFIG, lora_rank=options.lora_rank, gradient_checkpointing=True)
    state = prepared(options, config)
    B, T = options.prompts, options.tokens
    rollouts = forced_rollouts(state.processor, options.pictures[-1] + 70, T, B)
    advantages = torch.linspace(-1, 1, 8).expand(B, -1)
    work = partial(observe_r1.update, state, rollouts, advantages, config)
    work()  # the first one makes the moments
    rate = B * (rollouts.prompts[0]["input_ids"].shape[1] + 8 * T) / seconds(work)
    peak = torch.accelerator.max_memory_allocated() if observe_r1.ACCELERATOR else math.nan
    header("update", "speed", "peak memory")
    what = f"LoRA rank {options.lora_rank}, {B} x 8 responses of {T} tokens"
    row(what, f"{rate:,.0f} tokens/s", f"{peak / 1e9:.1f} GB")


def main():
    functions = (rollout, update, answers, count, attention, memory, step)
    rows = {function.__name__: function for function in functions}
    how = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("rows", nargs="*", default=["rollout", "update"], help=", ".join(rows))
    parser.add_argument("--model", choices=SHAPES, help="shapes of the model; else the toy")
    parser.add_argument("--layers", type=int, help="so many layers instead")
    parser.add_argument("--lora_rank", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="of a response")
    parser.add_argument("--pictures", type=int, nargs="*", default=[5, 256, 961], help="tokens")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    for name in options.rows:
        if name not in rows:
            parser.error(f"there is no row {name!r}, only {', '.join(rows)}")
        rows[name](options)


if __name__ == "__main__":
    main()
