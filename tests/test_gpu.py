"""What may differ on an accelerator. Without one, the same checks run on the CPU."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    TOY,
    command_line,
    read_jsonl,
    run_config,
    run_script,
    torchrun,
)

import observe_r1

DEVICE = observe_r1.pick_device(observe_r1.Config())
DTYPE = observe_r1.compute_dtype(DEVICE)
TRAIN = str(TOY / "ladder.parquet")
# What test_resume.py and test_processes.py show on a CPU takes half a minute here.
SLOW = [pytest.mark.slow] if DEVICE.type == "cpu" else []


def slow_on_a_cpu(test):
    return pytest.mark.slow(test) if SLOW else test


@pytest.fixture
def placed(model):
    """The toy's model where training would have it."""
    return model.to(DEVICE)


def test_log_probs_in_bf16_are_near_those_in_fp32(placed, processor, problems, config):
    rollouts = observe_r1.rollout(placed, processor, problems, config)
    fast = observe_r1.response_log_probs(placed, rollouts, config).cpu()
    exact = copy.deepcopy(placed).cpu()
    rollouts.response_ids, rollouts.mask = rollouts.response_ids.cpu(), rollouts.mask.cpu()
    slow = observe_r1.response_log_probs(exact, rollouts, config)
    difference = (fast - slow)[rollouts.mask.bool()].abs()
    largest, mean = (0.5, 0.03) if DTYPE == torch.bfloat16 else (1e-3, 1e-5)
    assert difference.max() < largest
    assert difference.mean() < mean


def test_rollout_in_fp32_is_that_of_generate(placed, processor, problems, config, monkeypatch):
    """The likeliest tokens: in fp32, because two sums in bf16 may well prefer another token."""
    monkeypatch.setattr(observe_r1, "compute_dtype", lambda device: torch.float32)
    config = replace(config, temperature=0.0, num_generations=1)
    rollouts = observe_r1.rollout(placed, processor, problems, config)
    same = []
    for b, problem in enumerate(problems):
        prompt = observe_r1.encode_prompts([problem], processor, config)
        prompt.pop("num_images")
        output = placed.generate(
            **{name: values.to(DEVICE) for name, values in prompt.items()},
            do_sample=False,
            max_new_tokens=config.max_new_tokens,
        )
        expected = output[0, prompt["input_ids"].shape[1] :]
        ours = rollouts.response_ids[b, 0][rollouts.mask[b, 0].bool()]
        same.append(torch.equal(ours, expected))
    assert sum(same) >= len(problems) - (DEVICE.type != "cpu")  # a tie may fall either way


def final_weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "final" / "model.safetensors")


def train_here(config, tmp_path):
    """Train, on a card in a process of its own, whose libraries nobody has set up yet."""
    if DEVICE.type == "cpu":
        observe_r1.train(config)
        return read_jsonl(Path(config.output_dir) / "metrics.jsonl")
    run = run_script("train", *command_line(config), cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    return read_jsonl(Path(config.output_dir) / "metrics.jsonl")


@slow_on_a_cpu
def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    whole = run_config(TRAIN, tmp_path / "whole", max_steps=2, save_steps=1, deterministic=True)
    train_here(whole, tmp_path)
    folder = tmp_path / "whole"
    expected = final_weights(folder)
    for path in (folder / "checkpoint-2", folder / "final"):
        path.rename(tmp_path / path.name)
    train_here(replace(whole, resume=True), tmp_path)
    for name, weight in final_weights(folder).items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("how", [pytest.param("torchrun", marks=SLOW), "cpu_offload", "lora"])
def test_other_ways_of_training(how, tmp_path):
    """One process of torchrun (NCCL on a card), weights in host memory, and adapters."""
    base = run_config(TRAIN, tmp_path / "plain", max_steps=2, save_steps=0)
    if how == "lora":
        pytest.importorskip("peft")
        base = replace(base, lora_rank=8)
        metrics = train_here(base, tmp_path)
        assert metrics[0]["kl"] == pytest.approx(0, abs=1e-3)
        assert all(0 < row["grad_norm"] < 1e3 for row in metrics)
        return
    expected = train_here(base, tmp_path)
    other = replace(base, output_dir=str(tmp_path / how), cpu_offload=how == "cpu_offload")
    if how == "torchrun":
        words = ("train", *command_line(other))
        run = torchrun(str(ROOT / "observe_r1.py"), *words, cwd=tmp_path, processes=1)
        assert run.returncode == 0, run.stderr[-3000:]
        metrics = read_jsonl(tmp_path / how / "metrics.jsonl")
    else:
        metrics = train_here(other, tmp_path)
    assert len(metrics) == len(expected)
    tolerance = 1e-4 if DTYPE == torch.float32 else 0.2
    for name in ("reward", "response_length", "grad_norm"):
        assert metrics[0][name] == pytest.approx(expected[0][name], rel=tolerance), name
