"""What may differ on an accelerator. Without one, the same checks run on the CPU."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TOY, command_line, read_jsonl, run_config, run_script
from safetensors.torch import load_file
from test_update import run_tower

import observe_r1
from observe_r1 import DEVICE, DTYPE, encode_prompts, response_log_probs, rollout

CPU = DEVICE.type == "cpu"
# What other tests show on a CPU takes half a minute here.
slow_on_a_cpu = pytest.mark.slow if CPU else lambda test: test


@pytest.fixture
def placed(model):
    """The toy's model where training would have it."""
    return observe_r1.use_fast_attention(model).to(DEVICE)


def test_log_probs_in_bf16_are_near_those_in_fp32(placed, processor, problems, config):
    """For prompts of all lengths, one of them 1 more than a multiple of 32; finite gradients."""
    for problem in [{**problems[3], "question": "4" * n} for n in range(1, 33)]:
        if encode_prompts([problem], processor, config)[0]["input_ids"].shape[1] % 32 == 1:
            problems.append(problem)
    assert len(problems) > 5
    rollouts = rollout(placed, processor, problems[-6:], config)
    fast = response_log_probs(placed, rollouts, config)
    fast.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in placed.parameters())
    rollouts = replace(rollouts, response_ids=rollouts.response_ids.cpu(), mask=rollouts.mask.cpu())
    slow = response_log_probs(copy.deepcopy(placed).cpu(), rollouts, config)
    difference = (fast.cpu() - slow)[rollouts.mask].abs()
    largest, mean = (0.5, 0.03) if DTYPE == torch.bfloat16 else (1e-3, 1e-5)
    assert difference.max() < largest and difference.mean() < mean


def test_attention_is_the_kind_that_was_chosen(placed):
    """cuDNN's stays off; windows at once give what the library's loop gives."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    towers = placed.model.visual, copy.deepcopy(placed.model.visual)
    towers[1].config._attn_implementation = "sdpa"
    outputs = [run_tower(tower, [[1, 10, 20], [1, 12, 26]]) for tower in towers]
    torch.testing.assert_close(*outputs, atol=1e-3, rtol=1e-3)


@pytest.mark.skipif(CPU, reason="counts the memory of a card")
def test_log_probs_take_little_memory():
    """8,192 tokens of 152,000 words: a third of their logits in fp32."""
    hidden = torch.randn(8192, 64, device=DEVICE, requires_grad=True)
    head = torch.randn(152_000, 64, device=DEVICE)
    targets = torch.arange(8192, device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    observe_r1.token_log_probs(hidden, targets, head, [0], 1.0).sum().backward()
    assert torch.cuda.max_memory_allocated() < 8192 * 152_000 * 4 / 3


def train_here(config, tmp_path):
    """Train, on a card in a process of its own, whose libraries nobody has set up yet."""
    if CPU:
        observe_r1.train(config)
    else:
        run = run_script("train", *command_line(config), cwd=tmp_path)
        assert run.returncode == 0, run.stderr[-3000:]
    return read_jsonl(Path(config.output_dir) / "metrics.jsonl")


@slow_on_a_cpu
def test_a_resumed_run_goes_on_where_it_was(tmp_path):
    """On a CPU to the bit; a card adds in another order each time."""
    folder = tmp_path / "run"
    config = run_config(TOY / "ladder.parquet", folder, max_steps=2, save_steps=1)
    before, final = train_here(config, tmp_path), folder / "final" / "model.safetensors"
    expected = load_file(final)
    for path in (folder / "checkpoint-2", folder / "final"):
        path.rename(tmp_path / path.name)
    after = train_here(replace(config, resume=True), tmp_path)
    assert after[0] == before[0] and after[1]["learning_rate"] == before[1]["learning_rate"]
    for name, weight in load_file(final).items():
        tolerance = 0 if CPU else 2 * config.learning_rate  # of two updates of Adam
        torch.testing.assert_close(weight, expected[name], atol=tolerance, rtol=0)


@slow_on_a_cpu
def test_adapters_start_as_the_plain_model(tmp_path):
    pytest.importorskip("peft")
    plain = run_config(TOY / "ladder.parquet", tmp_path / "plain", max_steps=2, save_steps=0)
    lora = replace(plain, output_dir=str(tmp_path / "lora"), lora_rank=8)
    expected, found = (train_here(config, tmp_path)[0] for config in (plain, lora))
    for name in ("reward", "response_length"):
        tolerance = 1e-4 if DTYPE == torch.float32 else 0.2
        assert found[name] == pytest.approx(expected[name], rel=tolerance), name
    assert found["kl"] < 0.01 and found["grad_norm"] > 0
