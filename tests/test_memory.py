"""tools/memory.py: what training is said to need, by hand and against what a step really holds."""

import copy
import json
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import ROOT, TOY, run_python, toy_config

import observe_r1

sys.path.insert(0, str(ROOT / "tools"))
import memory

SIZE, HEAD = 3_754_622_976, 151936 * 2048  # weights of the 3B, and of its head
LAYERS, HIDDEN, INTERMEDIATE = 36, 2048, 11008  # of its language model


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A folder that holds the configuration of a 3B and nothing else: no weight is read."""
    config = json.loads((TOY / "model" / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    text |= {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "vocab_size": 151936}
    text |= {"num_hidden_layers": LAYERS, "num_attention_heads": 16, "num_key_value_heads": 2}
    text["layer_types"] = ["full_attention"] * LAYERS
    vision |= {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
    vision |= {"out_hidden_size": HIDDEN, "fullatt_block_indexes": [7, 15, 23, 31]}
    folder = tmp_path_factory.mktemp("3b")
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture
def config(shapes):
    return observe_r1.Config(model=shapes, max_new_tokens=1024, prompts_per_step=8)


@pytest.fixture(scope="module")
def model(shapes):
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(shapes)
        return transformers.Qwen2_5_VLForConditionalGeneration(config)


def count(modules):
    return sum(weight.numel() for module in modules for weight in module.parameters())


def linear_weights(module):
    return count(part for part in module.modules() if isinstance(part, torch.nn.Linear))


def test_what_full_training_holds(config, model):
    """4 bytes a weight, 8 of moments, 4 of gradient; of the reference 2 a linear weight, else 4."""
    parts, linear = memory.estimate_memory(config, 1000), linear_weights(model.model)
    assert count([model]) == SIZE
    assert parts["weights"] == parts["gradients"] == 4 * SIZE
    assert parts["moments"] == 8 * SIZE
    assert parts["reference"] == 4 * SIZE - 2 * linear
    assert parts["copies"] == 0
    assert parts["peak"] == 20 * SIZE - 2 * linear + parts["activations"]
    without = memory.estimate_memory(replace(config, kl_coef=0.0), 1000)
    assert parts["peak"] - without["peak"] == parts["reference"]


def test_activations_and_cache_by_hand(config, model):
    parts = memory.estimate_memory(config, 1000)
    tokens = 16384  # eight groups would be more
    vision = 2 * 32 * 32000 * 1280  # the inputs of its layers, eight pictures of 4,000 patches
    casts = 2 * linear_weights(model.model)  # more than a layer, and more than the logits
    assert parts["activations"] == 4 * LAYERS * tokens * HIDDEN + vision + casts
    assert parts["cache"] == 2 * 2 * LAYERS * 2 * 128 * 8 * (1000 + 1024)  # of one group
    larger = memory.estimate_memory(replace(config, cache_gb=1e3), 1000)
    assert larger["cache"] == 8 * parts["cache"]  # never more than all of a step's
    short = memory.estimate_memory(replace(config, token_budget=8192), 1000)
    assert parts["activations"] - short["activations"] == 4 * LAYERS * (tokens - 8192) * HIDDEN

    whole = memory.estimate_memory(replace(config, gradient_checkpointing=False), 1000)
    text, tower = tokens * (32 * HIDDEN + 8 * INTERMEDIATE), 32000 * (32 * 1280 + 8 * 3420)
    logits = 16 * 512 * 151936 + 8 * HEAD  # and the head's gradient
    assert whole["activations"] == LAYERS * text + 32 * tower + casts + logits


def test_several_cards(config):
    eight = memory.estimate_memory(config, 1000, cards=8)
    assert eight["weights"] == eight["reference"] == SIZE / 2  # FSDP wants one dtype
    assert eight["moments"] == SIZE
    assert eight["copies"] == 2 * SIZE


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # peft asks for a name of old
def test_adapters_are_counted_as_peft_makes_them(toy_model):
    pytest.importorskip("peft")
    config = toy_config(lora_rank=16)
    size = count([toy_model])
    model = copy.deepcopy(toy_model)
    observe_r1.add_adapters(model, config)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    parts = memory.estimate_memory(config, 70)
    assert parts["moments"] == 8 * trained
    assert parts["weights"] == 2 * size + 4 * trained
    assert parts["reference"] == 0


def test_what_helps_is_told(config, capsys):
    memory.report_memory(config, 1000)
    first, *lines = capsys.readouterr().out.splitlines()
    peak = memory.estimate_memory(config, 1000)["peak"]
    lora = memory.estimate_memory(replace(config, lora_rank=64), 1000)["peak"]
    assert first.endswith(f", peak {peak / 1e9:.1f}")
    assert f"  --lora_rank 64: {(peak - lora) / 1e9:.1f} GB less" in lines
    assert len(lines) >= 3 and "gradient_checkpointing" not in str(lines)  # it is on already


def test_the_command_measures_the_prompts_of_the_data(tmp_path):
    run = run_python(ROOT / "tools" / "memory.py", "train", "--cards", 2, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "GB of each card, prompts of 75 tokens: " in run.stdout
    assert not list(tmp_path.iterdir())
    assert memory.longest_prompt(toy_config(data=str(tmp_path / "none"))) == 9216
