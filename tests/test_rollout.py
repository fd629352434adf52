"""Prompts and rollouts: what is encoded, what is sampled, what becomes of it in chunks."""

import copy
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.nn.functional import pad
from transformers.cache_utils import Cache

import observe_r1
from observe_r1 import (
    GREEDY,
    PROMPTS,
    Config,
    encode_prompts,
    rollout,
    sample,
    use_fast_attention,
    vision_tokens,
)
from rewards import format_reward

STOP = torch.tensor([2, 0])  # <|im_end|>, <|endoftext|>


@pytest.fixture
def model(model):
    return use_fast_attention(model).eval()


@pytest.fixture
def prompts(problems, processor, config):
    """Of 66 to 75 tokens, with no picture, one and two."""
    return encode_prompts(problems, processor, config)


def run_rollout(model, processor, problems, config):
    torch.manual_seed(0)
    return rollout(model, processor, problems, config)


# ----------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    "options, system",
    [
        ({}, PROMPTS["observe"]),
        ({"observe": False}, PROMPTS["think"]),
        ({"system_prompt": "Look."}, "Look."),
    ],
)
def test_prompts(processor, options, system):
    problem = {"images": [], "question": "How many?"}
    (prompt,) = encode_prompts([problem], processor, Config(**options))
    assert processor.decode(prompt["input_ids"][0]) == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "size, limits, grid",
    [
        ((280, 140), (784, 10**6), [1, 10, 20]),
        ((20, 20), (3136, 10**6), [1, 4, 4]),  # enlarged to 56 x 56
        ((560, 560), (784, 10**6), [1, 40, 40]),  # above the processor's own 50,176
        ((1120, 1120), (3136, 50176), [1, 16, 16]),  # reduced to 224 x 224
    ],
)
def test_limits_of_pixels(processor, size, limits, grid):
    config = Config(min_pixels=limits[0], max_pixels=limits[1])
    problem = {"images": [Image.new("RGB", size)], "question": "q"}
    (prompt,) = encode_prompts([problem], processor, config)
    assert prompt["image_grid_thw"].tolist() == [grid]
    assert (prompt["input_ids"] == processor.image_token_id).sum() == grid[1] * grid[2] // 4


# ---------------------------------------------------------------------------------------- sampling


def alone(model, prompt, ids):
    """Logits of each token of a response alone behind its prompt, at the model's own positions."""
    inputs, n = dict(prompt), len(ids)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids[None]], -1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = pad(inputs["mm_token_type_ids"], (0, n))
    logits = model(**inputs, use_cache=False).logits[0, -n - 1 : -1]  # [T,V]
    logits[:, vision_tokens(model)] = -torch.inf
    return logits


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_tokens_are_drawn_from_the_softmax(
    toy_model, model, prompts, config, monkeypatch, temperature
):
    """Each token of each response, with prompts of several lengths, before and after rows left."""
    config.temperature, config.max_new_tokens, config.num_generations = temperature, 24, 3
    drawn, multinomial, select = [], torch.multinomial, Cache.batch_select_indices
    rows = torch.arange(15)  # the response in each row of the batch

    def record(probabilities, count):
        drawn.append((rows, probabilities, multinomial(probabilities, count)))
        return drawn[-1][-1]

    def shrink(cache, going):
        nonlocal rows
        rows = rows[going]
        return select(cache, going)

    monkeypatch.setattr(torch, "multinomial", record)
    monkeypatch.setattr(Cache, "batch_select_indices", shrink)
    stop = torch.cat([STOP, torch.arange(24, 400, 25)])
    torch.manual_seed(0)
    ids, lengths = (x.flatten(0, 1) for x in sample(model, prompts, stop, config))
    assert lengths.max() == len(drawn) and lengths.unique().numel() > 4 and len(rows) < 12
    slow = []
    for n, length in enumerate(lengths.tolist()):
        logits = alone(toy_model, prompts[n // 3], ids[n, :length])
        slow.append((logits / temperature).softmax(-1))
        ends = torch.isin(ids[n, :length], stop)  # a stop token, or the cap
        assert not ends[:-1].any() and (ends[-1] or length == 24)
    for t, (rows, probabilities, tokens) in enumerate(drawn):
        assert (lengths[rows] > t).sum() > 0.75 * len(rows)  # or the others would have left
        going = lengths[rows] > t
        assert torch.equal(ids[rows[going], t], tokens[going, 0])
        expected = torch.stack([slow[n][t] for n in rows[going]])
        torch.testing.assert_close(probabilities[going], expected, atol=2e-5, rtol=0)


def test_greedy_responses_are_those_of_generate(toy_model, model, prompts, config):
    """Together, padded, with siblings, in a batch that shrinks, against the library's own loop."""
    config.temperature, config.num_generations = GREEDY, 2
    ids, lengths = sample(model, prompts, STOP, config)
    assert ids.shape == (5, 2, 48) and lengths.unique().numel() > 3
    for b, prompt in enumerate(prompts):
        how = {"do_sample": False, "suppress_tokens": vision_tokens(model)}
        output = toy_model.generate(**prompt, **how, max_new_tokens=48)
        expected = output[0, prompt["input_ids"].shape[1] :]
        for g in range(2):
            assert torch.equal(ids[b, g, : lengths[b, g]], expected)


def want_pictures(model):
    """Let a model want nothing but tokens that stand for pictures."""
    head = model.lm_head

    def eager(hidden):
        logits = head(hidden)
        logits[:, vision_tokens(model)] += 1000
        return logits

    model.lm_head = torch.nn.Module()
    model.lm_head.forward = eager


@pytest.mark.parametrize("temperature", [1.0, GREEDY])
def test_vision_tokens_cannot_be_sampled(model, processor, problems, config, temperature):
    """Even from a policy that wants nothing else; a checkpoint's own settings do not leak in."""
    config.temperature = temperature
    plain = run_rollout(model, processor, problems[:3], config)
    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    assert processor.tokenizer.convert_tokens_to_ids(names) == vision_tokens(model)
    model.generation_config.update(top_k=1, temperature=9.0, repetition_penalty=9.0)
    want_pictures(model)
    rollouts = run_rollout(model, processor, problems[:3], config)
    assert torch.equal(plain.response_ids, rollouts.response_ids)


def test_a_rollout_forgets_the_training_mode(model, processor, problems, config):
    """No dropout, and the cache stays although an update checkpoints activations."""
    plain = run_rollout(model, processor, problems[:3], config)
    model.activation_checkpointing_enable({"use_reentrant": False})
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    again = run_rollout(model, processor, problems[:3], config)
    assert torch.equal(again.response_ids, plain.response_ids)


def test_rollouts_in_bf16(model, processor, problems, config, monkeypatch):
    """The cache is in bf16, as attention reads it, and most greedy tokens are those of fp32."""
    config.temperature, config.max_new_tokens, dtypes = GREEDY, 8, set()
    exact = rollout(model, processor, problems, config)
    select = observe_r1.FixedLayer.update

    def update(layer, *rest):
        dtypes.add(layer.buffer.dtype)
        return select(layer, *rest)

    monkeypatch.setattr(observe_r1.FixedLayer, "update", lambda layer, *x, **how: update(layer, *x))
    monkeypatch.setattr(observe_r1, "AUTOCAST", torch.autocast("cpu", torch.bfloat16))
    monkeypatch.setattr(observe_r1, "DTYPE", torch.bfloat16)
    rough = rollout(model, processor, problems, config)
    assert dtypes == {torch.bfloat16}
    assert (rough.response_ids == exact.response_ids).float().mean() > 0.7


# ------------------------------------------------------------------------- chunks, stops, and texts


@pytest.mark.parametrize("stop", [[2, 0], 404])  # of the checkpoint; 404 is </think>
def test_every_stop_token_stops(model, processor, problems, config, stop):
    model.generation_config.eos_token_id = stop
    rollouts = run_rollout(model, processor, problems[:3], config)
    stops = torch.isin(rollouts.response_ids, torch.tensor(stop)) & rollouts.mask
    assert (stops.sum(-1) == 1).any()
    last = rollouts.mask.sum(-1) - 1
    assert (stops.nonzero()[:, 2] == last[stops.any(-1)]).all()


@pytest.mark.parametrize("room", [1, 2, 3, 5])
def test_chunks_of_the_cache(model, processor, problems, config, monkeypatch, room):
    """Each problem gets its own responses back, whatever chunk it was in.

    The tags of the format are special tokens here, and must stay in the texts.
    """
    processor = copy.deepcopy(processor)
    tags = [f"<{end}{name}>" for name in ("observe", "think", "answer") for end in ("", "/")]
    processor.tokenizer.add_special_tokens({"additional_special_tokens": tags})
    well = "<observe>1</observe><think>2</think><answer>3</answer>"
    written = torch.randint(7, 400, (5, 4, 48), generator=torch.Generator().manual_seed(0))
    lengths = torch.arange(5, 25).view(5, 4)
    for b in range(5):
        ids = processor.tokenizer(well)["input_ids"]
        written[b, 0, : len(ids)] = torch.tensor(ids)
        lengths[b, 0] = len(ids) + 1
    assert "think" not in processor.decode(ids, skip_special_tokens=True)
    ends = written.scatter_(2, lengths[..., None] - 1, torch.tensor([[[2], [0], [2], [50]]] * 5))
    prompts = encode_prompts(problems, processor, config)
    sizes = [prompt["input_ids"].shape[1] for prompt in prompts]
    chunks = []

    def sampled(model, chunk, stop, config):
        chunks.append([prompt["input_ids"].shape[1] for prompt in chunk])
        own = [sizes.index(size) for size in chunks[-1]]
        return ends[own], lengths[own]

    monkeypatch.setattr(observe_r1, "sample", sampled)
    P = max(sizes)
    # A token takes keys and values of 4 layers, 2 heads of 32 numbers, 4 bytes each.
    config.max_new_tokens = 40 * room  # for one group, the prompt's own pass takes more
    tokens = room * max(4 * (P + 40 * room), 7 * P)
    config.cache_gb = 1e-9 * (2 * 4 * 2 * 32 * 4) * (tokens + 1)
    rollouts = rollout(model, processor, problems, config)
    assert chunks == [sizes[i : i + room] for i in range(0, 5, room)]
    assert len(set(sizes)) == 5
    assert torch.equal(rollouts.mask, torch.arange(lengths.max()) < lengths[..., None])
    assert torch.equal(rollouts.response_ids, ends[..., : lengths.max()] * rollouts.mask)
    for b, prompt in enumerate(prompts):
        assert torch.equal(rollouts.prompts[b]["input_ids"], prompt["input_ids"])
        assert rollouts.texts[b][0] == well and format_reward(well) == 0.5
        for g in range(1, 4):
            n = lengths[b, g] - int(g < 3)  # the last response was cut by the cap
            assert rollouts.texts[b][g] == processor.decode(ends[b, g, :n])


def test_the_smallest_cache_holds_one_prompt(model, processor, problems, config):
    config = replace(config, cache_gb=1e-9, max_new_tokens=2, num_generations=2)
    assert run_rollout(model, processor, problems, config).response_ids.shape == (5, 2, 2)
