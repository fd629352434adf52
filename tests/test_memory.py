"""What training is said to need before anything is loaded, and what is done where it is too much."""

import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import TOY, toy_config

import observe_r1

SIZE = 3_754_622_976  # weights of the 3B
LAYERS, HIDDEN, INTERMEDIATE, KEYS = 36, 2048, 11008, 2 * 128  # of its language model


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A folder that holds the configuration of a 3B and nothing else: no weight is read."""
    config = transformers.AutoConfig.from_pretrained(TOY / "model")
    text, vision = config.text_config, config.vision_config
    text.update({"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "vocab_size": 151936})
    text.update({"num_hidden_layers": LAYERS, "num_attention_heads": 16, "num_key_value_heads": 2})
    text.layer_types = ["full_attention"] * LAYERS
    vision.update({"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16})
    vision.update({"out_hidden_size": HIDDEN, "fullatt_block_indexes": [7, 15, 23, 31]})
    config.tie_word_embeddings = text.tie_word_embeddings = True
    folder = tmp_path_factory.mktemp("3b")
    config.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def card(monkeypatch):
    """As on a card: bf16."""
    monkeypatch.setattr(observe_r1, "compute_dtype", lambda device: torch.bfloat16)


@pytest.fixture
def config(shapes):
    return observe_r1.Config(model=shapes, max_new_tokens=1024, prompts_per_step=8)


def vision_size(shapes):
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(shapes)
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == SIZE
    return sum(parameter.numel() for parameter in model.model.visual.parameters())


def test_what_full_training_holds(card, config):
    """4 bytes a weight, 8 of moments, 4 of gradient, 4 of reference, 2 of the copy in bf16."""
    embedding = 151936 * HIDDEN
    parts = observe_r1.estimate_memory(config, 1000)
    assert parts["weights"] == parts["gradients"] == parts["reference"] == 4 * SIZE
    assert parts["moments"] == 8 * SIZE
    assert parts["copies"] == 2 * SIZE
    assert parts["optimizer"] == 8 * embedding < parts["activations"]
    held = 18 * SIZE + max(4 * SIZE + parts["activations"], parts["cache"])
    assert parts["peak"] == held
    without = observe_r1.estimate_memory(replace(config, kl_coef=0.0), 1000)
    assert without["reference"] == 0 and without["peak"] == held - 4 * SIZE


def test_activations_and_cache_by_hand(card, config):
    parts = observe_r1.estimate_memory(config, 1000)
    tokens = 1000 + 8 * 1024  # below the token budget
    layer = 2 * tokens * (9 * HIDDEN + 6 * INTERMEDIATE)
    kept = 2 * (LAYERS * tokens * HIDDEN + 32 * 4000 * 1280)
    logits = 16 * 512 * 151936  # in fp32: the logits, their exponentials and both gradients
    assert logits < layer  # the layer is the peak
    assert parts["activations"] == kept + layer
    assert parts["cache"] == 2 * 2 * LAYERS * KEYS * 8 * 8 * (1000 + 1024)
    small = observe_r1.estimate_memory(replace(config, cache_gb=1e-3), 1000)
    assert small["cache"] == parts["cache"] / 8  # a group is never divided
    short = observe_r1.estimate_memory(replace(config, token_budget=4096), 1000)
    assert short["activations"] == kept - 2 * LAYERS * (tokens - 4096) * HIDDEN + logits
    whole = observe_r1.estimate_memory(replace(config, gradient_checkpointing=False), 1000)
    text, tower = tokens * (8 * HIDDEN + 4 * INTERMEDIATE), 4000 * (8 * 1280 + 4 * 3420)
    backward = 2 * tokens * (HIDDEN + 2 * INTERMEDIATE)
    assert whole["activations"] == 2 * (LAYERS * text + 32 * tower) + max(backward, logits)
    frozen = observe_r1.estimate_memory(replace(config, freeze_vision=True), 1000)
    assert parts["activations"] - frozen["activations"] == 2 * 32 * 4000 * 1280


def test_several_processes_and_host_memory(card, config, monkeypatch, shapes):
    frozen = observe_r1.estimate_memory(replace(config, freeze_vision=True), 1000)
    assert frozen["weights"] == 4 * SIZE
    assert frozen["moments"] == 8 * (SIZE - vision_size(shapes))
    short = observe_r1.estimate_memory(replace(config, max_new_tokens=1, num_generations=2), 10)
    assert short["peak"] == 22 * SIZE + 8 * 151936 * HIDDEN  # the optimizer needs more than a pass
    offloaded = observe_r1.estimate_memory(replace(config, cpu_offload=True), 1000)
    assert offloaded["copies"] == 2 * SIZE
    assert offloaded["weights"] == offloaded["moments"] == offloaded["gradients"] == 0
    monkeypatch.setattr(observe_r1, "WORLD", 8)
    parts = observe_r1.estimate_memory(config, 1000)
    assert parts["weights"] == parts["reference"] == SIZE / 2
    assert parts["moments"] == SIZE
    assert parts["copies"] == 2 * SIZE
    assert parts["cache"] == 2 * 2 * LAYERS * KEYS * 8 * (1000 + 1024)  # one prompt each


@pytest.mark.parametrize("freeze_vision", [False, True])
def test_adapters_are_counted_as_peft_makes_them(card, config, freeze_vision):
    pytest.importorskip("peft")
    config = replace(config, lora_rank=64, freeze_vision=freeze_vision)
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(
            transformers.AutoConfig.from_pretrained(config.model)
        )
    observe_r1.add_adapters(model, config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parts = observe_r1.estimate_memory(config, 1000)
    assert parts["moments"] == 8 * trained
    assert parts["weights"] == 2 * SIZE + 4 * trained
    assert parts["reference"] == parts["copies"] == 0


def test_without_peft_its_saving_is_told_all_the_same(card, config, monkeypatch, capsys):
    """On a card of 24 GB the published run does not fit: what helps is told, largest part first."""
    monkeypatch.setattr(observe_r1, "device_memory", lambda device: 24e9)
    monkeypatch.setitem(sys.modules, "peft", None)
    observe_r1.report_memory(config, 1000)
    lines = capsys.readouterr().out.splitlines()
    peak = observe_r1.estimate_memory(config, 1000)["peak"]
    assert lines[0].endswith(f", peak {peak / 1e9:.1f}")
    assert lines[1].startswith("warning: the peak exceeds the 24.0 GB that there are")
    lora = observe_r1.estimate_memory(replace(config, lora_rank=64), 1000)["peak"]
    assert f"  --lora_rank 64: {(peak - lora) / 1e9:.1f} GB less" in lines
    assert lora < 24e9
    saved = [float(line.split(": ")[1].split()[0]) for line in lines[2:]]
    assert len(saved) >= 4 and min(saved) > 0
    assert "gradient_checkpointing" not in "".join(lines)  # it is on already


def test_where_it_fits_nothing_is_advised(capsys):
    observe_r1.report_memory(toy_config(prompts_per_step=2), 100)
    assert capsys.readouterr().out == "memory of a process at most, in GB: less than 0.1\n"


@pytest.mark.parametrize("share, lines", [(1.01, 1), (0.99, 2)])
def test_the_warning_starts_where_the_peak_exceeds_the_memory(
    card, config, monkeypatch, capsys, share, lines
):
    peak = observe_r1.estimate_memory(replace(config, token_budget=1), 1000)["peak"]
    monkeypatch.setattr(observe_r1, "device_memory", lambda device: share * peak)
    observe_r1.report_memory(replace(config, token_budget=1), 1000)
    assert len(capsys.readouterr().out.splitlines()[:2]) == lines


def test_memory_of_a_device(monkeypatch):
    card = SimpleNamespace(mem_get_info=lambda: (1, 24))
    machine = observe_r1.device_memory(torch.device("cpu"))
    assert 1e9 < machine < 1e14
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert observe_r1.device_memory(torch.device("cpu")) == machine / 4
    monkeypatch.setattr(torch, "get_device_module", lambda device: card)
    assert observe_r1.device_memory(torch.device("cuda")) == 24
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    monkeypatch.delattr(observe_r1.os, "sysconf")
    assert observe_r1.device_memory(torch.device("cpu")) == math.inf
