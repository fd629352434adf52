"""Prompts and rollouts: what is encoded, what is sampled, what is cached, when the batch shrinks."""

from dataclasses import replace

import pytest
import torch
from conftest import TOY, toy_problems
from PIL import Image
from transformers.cache_utils import Cache, DynamicLayer

import observe_r1
from observe_r1 import (
    PROMPTS,
    Config,
    RoomyLayer,
    encode_prompts,
    prompt_length,
    rollout,
    slice_prompts,
    vision_tokens,
)


def run_rollout(model, processor, problems, config, seed=0):
    torch.manual_seed(seed)
    return rollout(model, processor, problems, config)


def response_lengths(rollouts):
    return rollouts.mask.sum(-1)


@pytest.fixture
def batches(monkeypatch):
    """What the sampler did: per call its prompts' lengths, and the rows that each shrinking kept."""
    calls, sample, select = [], observe_r1.sample, Cache.batch_select_indices

    def sampled(model, prompt, *rest):
        calls.append({"prompts": prompt["attention_mask"].sum(-1).tolist(), "kept": []})
        return sample(model, prompt, *rest)

    def selected(cache, indices):
        calls[-1]["kept"].append((indices.tolist(), len(cache.layers[0].keys)))
        return select(cache, indices)

    monkeypatch.setattr(observe_r1, "sample", sampled)
    monkeypatch.setattr(Cache, "batch_select_indices", selected)
    return calls


# ----------------------------------------------------------------------------------------- prompts


def test_prompts(processor):
    problem = {"images": [], "question": "How many?"}
    for config, system in (
        (Config(), PROMPTS["observe"]),
        (Config(observe=False), PROMPTS["think"]),
        (Config(system_prompt="Look."), "Look."),
    ):
        ids = encode_prompts([problem], processor, config)["input_ids"][0]
        assert processor.decode(ids) == (
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n"
            "<|im_start|>assistant\n"
        )


@pytest.mark.parametrize(
    "size, budget, grid",
    [
        ((280, 140), (784, 10**6), [1, 10, 20]),
        ((20, 20), (3136, 10**6), [1, 4, 4]),  # enlarged to the floor of 56 x 56
        ((560, 560), (784, 10**6), [1, 40, 40]),  # above the processor's own ceiling of 50,176
        ((1120, 1120), (3136, 50176), [1, 16, 16]),  # reduced to the ceiling of 224 x 224
    ],
)
def test_one_pixel_budget(processor, size, budget, grid):
    config = Config(min_pixels=budget[0], max_pixels=budget[1])
    problem = {"images": [Image.new("RGB", size)], "question": "q"}
    batch = encode_prompts([problem], processor, config)
    assert batch["image_grid_thw"].tolist() == [grid]
    pads = (batch["input_ids"] == processor.image_token_id).sum()
    assert pads == grid[1] * grid[2] // 4
    assert prompt_length(problem, processor, config) == batch["input_ids"].shape[1]


def test_a_slice_of_a_batch_holds_the_pictures_of_its_prompt(processor, problems, config):
    batch = encode_prompts(problems, processor, config)
    assert batch["num_images"].tolist() == [1, 1, 1, 0, 2]
    assert (batch["attention_mask"] == 0).any()
    for b, problem in enumerate(problems):
        alone = encode_prompts([problem], processor, config)
        chosen = slice_prompts(batch, [b])
        assert set(chosen) == set(alone) - {"num_images"}
        assert ("pixel_values" in chosen) == bool(problem["images"])
        for name, value in chosen.items():
            assert torch.equal(value, alone[name]), name


@pytest.mark.parametrize("chosen", [[4, 0], [3, 2, 4], [1, 3], [3], [0, 1, 2, 3, 4]])
def test_a_slice_is_what_the_processor_makes_of_these_prompts_alone(
    processor, problems, config, chosen
):
    part = slice_prompts(encode_prompts(problems, processor, config), chosen)
    alone = encode_prompts([problems[b] for b in chosen], processor, config)
    assert set(part) == set(alone) - {"num_images"}
    for name, value in part.items():
        assert torch.equal(value, alone[name]), name


# ----------------------------------------------------------------------------- tokens, masks, texts


def test_masks_end_with_the_stop_token(model, processor, problems, config):
    rollouts = run_rollout(model, processor, problems, config)
    stops = set(model.generation_config.eos_token_id)
    finished = 0
    for ids, mask, texts in zip(rollouts.response_ids, rollouts.mask, rollouts.texts):
        for row, on, text in zip(ids.tolist(), mask.tolist(), texts):
            n = sum(on)
            assert on == [1] * n + [0] * (len(on) - n)
            assert not stops & set(row[: n - 1])  # none before the end
            assert row[n - 1] in stops or n == config.max_new_tokens
            assert text == processor.decode(row[:n], skip_special_tokens=True)
            finished += row[n - 1] in stops
    assert finished > 5
    short = run_rollout(model, processor, problems, replace(config, max_new_tokens=3))
    lengths = response_lengths(short)
    assert (lengths <= 3).all() and (lengths == 3).any()


def test_every_stop_token_of_the_checkpoint_stops(model, processor, problems, config):
    token = processor.tokenizer.convert_tokens_to_ids("</observe>")
    for named in ([token], token):  # a list or a number
        model.generation_config.eos_token_id = named
        rollouts = run_rollout(model, processor, problems[:3], config)
        last = rollouts.response_ids.gather(-1, response_lengths(rollouts)[..., None] - 1)
        assert (last == token).any() and (last == processor.tokenizer.eos_token_id).any()
        earlier = rollouts.mask.cumsum(-1) < response_lengths(rollouts)[..., None]
        assert not (rollouts.response_ids[earlier] == token).any()


def want_pictures(model):
    """Let a model want nothing but tokens that stand for pictures."""
    head = model.lm_head

    def eager(hidden):
        logits = head(hidden)
        logits[:, vision_tokens(model)] += 1000
        return logits

    model.lm_head = torch.nn.Module()
    model.lm_head.forward = eager


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_vision_tokens_cannot_be_sampled(model, processor, problems, config, temperature):
    """Even from a policy that wants nothing else."""
    config.temperature = temperature
    plain = run_rollout(model, processor, problems, config)
    want_pictures(model)
    rollouts = run_rollout(model, processor, problems, config)
    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokens = processor.tokenizer.convert_tokens_to_ids(names)
    assert sorted(vision_tokens(model)) == sorted(tokens)
    assert not torch.isin(rollouts.response_ids, torch.tensor(tokens)).any()
    assert torch.equal(plain.response_ids, rollouts.response_ids)


def test_sampling_settings_of_the_checkpoint_do_not_leak(model, processor, problems, config):
    plain = run_rollout(model, processor, problems, config)
    settings = {"top_k": 1, "temperature": 0.01, "repetition_penalty": 9.0, "do_sample": False}
    model.generation_config.update(**settings)
    changed = run_rollout(model, processor, problems, config)
    assert torch.equal(plain.response_ids, changed.response_ids)


def test_tokens_are_drawn_from_the_softmax_at_the_temperature(model, processor, problems, config):
    """Frequencies of the first token of 3,000 responses against the probabilities."""
    config.temperature, config.max_new_tokens, config.num_generations = 2.0, 1, 3000
    prompt = encode_prompts(problems[:1], processor, config)
    with torch.no_grad():
        logits = model(**{k: v for k, v in prompt.items() if k != "num_images"}).logits[0, -1]
    logits[vision_tokens(model)] = -torch.inf
    expected = (logits / 2).softmax(-1)
    rollouts = run_rollout(model, processor, problems[:1], config)
    counts = torch.bincount(rollouts.response_ids.flatten(), minlength=len(expected))
    deviation = (counts - 3000 * expected) / (3000 * expected * (1 - expected)).sqrt()
    assert deviation[expected > 0.003].abs().max() < 4.5
    assert (expected > 0.003).sum() > 5


def test_a_rollout_forgets_the_training_mode(model, processor, problems, config):
    """No dropout, and the cache stays although an update checkpoints activations."""
    plain = run_rollout(model, processor, problems, config)
    model.activation_checkpointing_enable({"use_reentrant": False})
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    again = run_rollout(model, processor, problems, config)
    assert torch.equal(again.response_ids, plain.response_ids)


# ----------------------------------------------------------------------- chunks and shrinking batches


def test_rollout_in_chunks_of_the_cache(model, processor, problems, config, batches):
    """The longest prompts together: the padding changes, the greedy responses do not."""
    greedy = replace(config, temperature=0.0, num_generations=2)
    whole = rollout(model, processor, problems, greedy)
    assert (whole.response_ids[:, 0] == whole.response_ids[:, 1]).all()
    lengths = whole.prompt["attention_mask"].sum(-1).tolist()
    longest = sorted(lengths, reverse=True)
    assert longest != lengths
    for prompts in (1, 2):  # in a cache for so many; a token takes 2 x 4 layers x 2 heads x 32 x 4
        batches.clear()
        tokens = prompts * 2 * (max(lengths) + greedy.max_new_tokens)
        greedy.cache_gb = 1e-9 * 2 * 4 * 2 * 32 * 4 * (tokens + 1)
        chunks = rollout(model, processor, problems, greedy)
        expected = [longest[i : i + prompts] for i in range(0, 5, prompts)]
        assert [call["prompts"] for call in batches] == expected
        assert torch.equal(whole.response_ids, chunks.response_ids)
        assert torch.equal(whole.mask, chunks.mask)
        assert whole.texts == chunks.texts
        for name, value in whole.prompt.items():
            assert torch.equal(chunks.prompt[name], value), name


def test_prompts_and_pictures_of_chunks_belong_to_their_problems(
    model, processor, problems, config
):
    config.cache_gb = 1e-9
    rollouts = run_rollout(model, processor, problems, replace(config, max_new_tokens=2))
    for b, problem in enumerate(problems):
        alone = encode_prompts([problem], processor, config)
        chosen = slice_prompts(rollouts.prompt, [b])
        for name, value in chosen.items():
            assert torch.equal(value, alone[name]), name


def test_the_batch_shrinks_when_a_quarter_of_it_is_done(
    model, processor, problems, config, batches
):
    """The rows that stay follow from the lengths alone; what is written is that of each alone."""
    config.num_generations = 6
    rollouts = run_rollout(model, processor, problems, config)
    lengths = response_lengths(rollouts)
    (call,) = batches
    prompt_lengths = rollouts.prompt["attention_mask"].sum(-1).tolist()
    order = sorted(range(5), key=lambda b: -prompt_lengths[b])  # as the chunk holds them
    rows = [length for b in order for length in lengths[b].tolist()]
    expected = []
    for t in range(1, config.max_new_tokens):
        left = [row for row, length in enumerate(rows) if length > t]
        if left and len(left) <= 0.75 * len(rows):
            expected.append((left, len(rows)))
            rows = [rows[row] for row in left]
    assert call["kept"] == expected
    assert 2 < len(expected) < len(set(lengths.flatten().tolist()))


def test_shrinking_changes_no_greedy_response(model, processor, problems, config, batches):
    """Alone, a response cannot share a batch that shrinks."""
    greedy = replace(config, temperature=0.0, num_generations=1)
    together = rollout(model, processor, problems, greedy)
    assert batches[0]["kept"] and len(batches) == 1
    for b, problem in enumerate(problems):
        alone = rollout(model, processor, [problem], greedy)
        assert alone.texts[0] == together.texts[b]
        n = int(response_lengths(alone)[0, 0])
        assert torch.equal(alone.response_ids[0, 0, :n], together.response_ids[b, 0, :n])
    assert not any(call["kept"] for call in batches[1:])


# ------------------------------------------------------------------------------------------- cache


def test_the_cache_with_room_holds_what_the_library_s_cache_holds():
    """A prompt of 5, repeated for 3 responses, 300 tokens, responses that finish on the way."""
    torch.manual_seed(0)
    layers = RoomyLayer(), DynamicLayer()
    prompt = torch.randn(2, 2, 2, 5, 4)
    for layer in layers:
        layer.update(*prompt)
        layer.batch_repeat_interleave(3)
    for t in range(300):
        new = torch.randn(2, len(layers[0].keys), 2, 1, 4)
        for seen, expected in zip(*(layer.update(*new) for layer in layers)):
            assert torch.equal(seen, expected) and seen.shape[2] == 6 + t
        if t in (0, 40, 122, 123, 250):
            for layer in layers:
                layer.batch_select_indices(torch.arange(len(layer.keys)) != 1)
        assert layers[0].get_seq_length() == 6 + t
    assert len(layers[0].keys) == 1


def test_greedy_responses_are_those_of_generate(model, processor, problems, config):
    """Against the library's own loop and cache, prompt by prompt."""
    greedy = replace(config, temperature=0.0, num_generations=1)
    rollouts = rollout(model, processor, problems, greedy)
    for b, problem in enumerate(problems):
        prompt = encode_prompts([problem], processor, greedy)
        del prompt["num_images"]
        generated = model.generate(
            **prompt,
            do_sample=False,
            max_new_tokens=greedy.max_new_tokens,
            suppress_tokens=vision_tokens(model),
        )
        response = generated[0, prompt["input_ids"].shape[1] :].tolist()
        n = int(response_lengths(rollouts)[b, 0])
        assert rollouts.response_ids[b, 0, :n].tolist() == response


def test_keys_in_bf16_change_nothing_under_autocast(
    model, processor, problems, config, monkeypatch
):
    """The cache holds them as attention reads them: half the bytes, the same probabilities."""
    prompt = encode_prompts(problems, processor, config)
    update, seen, probabilities = RoomyLayer.update, [], []

    def keep(layer, keys, values, *rest, **options):
        if as_is:
            return DynamicLayer.update(layer, keys, values, *rest, **options)
        held = update(layer, keys, values, *rest, **options)
        assert keys.dtype == torch.float32 and held[0].dtype == torch.bfloat16
        return held

    def record(values, count):
        probabilities.append(values)
        return values.argmax(-1, keepdim=True)

    monkeypatch.setattr(RoomyLayer, "update", keep)
    monkeypatch.setattr(torch, "multinomial", record)
    for as_is in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            observe_r1.sample(model.eval(), prompt, [-1], replace(config, max_new_tokens=8))
        seen.append(torch.stack(probabilities))
        probabilities.clear()
    assert torch.equal(*seen)


def test_bytes_of_the_cache(model):
    """Keys and values of 4 layers, 2 heads of 32 numbers, 4 bytes each, counted in a real cache."""
    cache = model(torch.zeros(1, 10, dtype=torch.long), use_cache=True).past_key_values
    counted = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    assert observe_r1.cache_bytes(model.config, torch.float32) == counted / 10 == 2 * 4 * 2 * 32 * 4


# ----------------------------------------------------------------------------------- number formats


class Silent:
    """A device module that says nothing of bf16, as Apple's."""

    def is_available(self):
        return False


class Accelerator(Silent):
    """A device module whose cards have bf16, or have it by emulation only."""

    def __init__(self, native):
        self.native = native

    def is_bf16_supported(self, including_emulation=True):
        return self.native or including_emulation


@pytest.mark.parametrize(
    "module, dtype",
    [
        (Accelerator(True), torch.bfloat16),
        (Accelerator(False), torch.float32),  # a T4 or V100
        (Silent(), torch.float32),
    ],
)
def test_bf16_only_where_the_device_has_it(model, config, monkeypatch, module, dtype):
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: module)
    assert observe_r1.compute_dtype(torch.device("cuda", 0)) == dtype
    config.model = str(TOY / "model")
    assert observe_r1.load_model(config).dtype == torch.float32  # what learns stays fp32
    assert observe_r1.load_model(config, trained=False).dtype == dtype
    with observe_r1.autocast(model):
        product = torch.nn.Linear(2, 2)(torch.ones(2, 2))
    assert product.dtype == dtype
    assert observe_r1.cache_bytes(model.config, dtype) == 2 * 4 * 2 * 32 * dtype.itemsize


def test_the_cpu_computes_in_fp32():
    assert observe_r1.compute_dtype(torch.device("cpu")) == torch.float32


def test_rollouts_in_bf16_agree_with_fp32_where_it_matters(
    toy_model, processor, config, monkeypatch
):
    """Arithmetic in bf16: most greedy tokens are the same, and nothing fails on the way."""
    problems = toy_problems()[:3]
    greedy = replace(config, temperature=0.0, num_generations=2, max_new_tokens=8)
    exact = rollout(toy_model, processor, problems, greedy)
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: Accelerator(True))
    rough = rollout(toy_model, processor, problems, greedy)
    same = (rough.response_ids == exact.response_ids).float().mean()
    assert same > 0.7
