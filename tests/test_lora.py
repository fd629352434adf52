"""LoRA: exact at the start, nothing but adapters moves, and what is written loads by itself."""

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import TOY, read_jsonl, run_config
from test_rollout import Accelerator, run_rollout
from torch.distributed.checkpoint import FileSystemReader

import observe_r1
from observe_r1 import load_problems, response_log_probs, rollout, update

peft = pytest.importorskip("peft")


def lora_config(data, output, **options):
    """Three steps of one optimiser step each, with a rate at which adapters move visibly."""
    small = {"lora_rank": 4, "max_steps": 3, "minibatch_prompts": 4, "learning_rate": 3e-3}
    return run_config(data, output, **{**small, "save_steps": 1, **options})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 problems of the toy."""
    file = tmp_path_factory.mktemp("data") / "raw.parquet"
    rows = load_problems(str(TOY / "ladder.parquet")).select(range(0, 960, 40))
    rows.remove_columns(["digest", "fault", "pictures"]).to_parquet(file)
    return file


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A finished run: its files, and the state that training left in memory."""
    output, states = tmp_path_factory.mktemp("lora"), []
    prepare = observe_r1.prepare

    def kept(*arguments):
        states.append(prepare(*arguments))
        return states[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(observe_r1, "prepare", kept)
        observe_r1.train(lora_config(data, output))
    return SimpleNamespace(
        output=output,
        state=states[0],
        model=states[0].policy.model.eval(),
        metrics=read_jsonl(output / "metrics.jsonl"),
    )


@pytest.fixture
def state(data, tmp_path):
    """The state before the first step."""
    return observe_r1.prepare(lora_config(data, tmp_path), tmp_path, rollout)


@pytest.fixture
def prompts(processor, problems, config):
    """Inputs of one forward pass: a picture of a word, and text alone."""
    batches = [observe_r1.encode_prompts([problems[b]], processor, config) for b in (0, 3)]
    for batch in batches:
        del batch["num_images"]
    return batches


@torch.no_grad()
def logits(model, prompts):
    return torch.cat([model.eval()(**prompt).logits.flatten() for prompt in prompts])


def adapters(model):
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def frozen(model):
    """Weights without adapters, under their names in the base model."""
    weights = model.state_dict()
    return {
        name.replace("base_layer.", ""): value
        for name, value in weights.items()
        if "lora_" not in name
    }


# ---------------------------------------------------------------------------------- before training


def test_fresh_adapters_change_no_log_probability(state, toy_model, processor, problems, config):
    rollouts = run_rollout(toy_model, processor, problems, config)
    with torch.no_grad():
        base = response_log_probs(toy_model, rollouts, config)
        assert torch.equal(response_log_probs(state.policy, rollouts, config), base)
    again = run_rollout(state.policy.model, processor, problems, config)
    assert torch.equal(again.response_ids, rollouts.response_ids)
    assert type(state.policy.model) is type(toy_model)


def test_only_adapters_train_and_the_vision_tower_has_some(state):
    trained = {name for name, p in state.policy.model.named_parameters() if p.requires_grad}
    assert trained == set(adapters(state.policy.model))
    assert any("visual" in name for name in trained)
    assert any("language_model" in name for name in trained)
    assert not any("lm_head" in name or "embed" in name for name in trained)
    optimised = {p for group in state.optimizer.param_groups for p in group["params"]}
    assert optimised == set(adapters(state.policy.model).values())
    assert state.reference is None  # no second model: the adapters are switched off


def test_freeze_vision_leaves_the_tower_without_adapters(data, tmp_path, processor, config):
    options = lora_config(data, tmp_path, freeze_vision=True)
    state = observe_r1.prepare(options, tmp_path, rollout)
    names = set(adapters(state.policy.model))
    assert names and not any("visual" in name for name in names)
    assert not any(p.requires_grad for p in state.policy.model.model.visual.parameters())
    problems = observe_r1.read_problems(state.problems, range(2), options)
    rollouts = run_rollout(state.policy.model, processor, problems, config)
    assert update(state, rollouts, torch.randn(2, 4), config)["grad_norm"] > 0


def test_an_update_moves_adapters_alone(state, toy_model, processor, problems, config):
    rollouts = run_rollout(toy_model, processor, problems[:4], config)
    before = copy.deepcopy(state.policy.model.state_dict())
    config.minibatch_prompts = 2
    for group in state.optimizer.param_groups:
        group["lr"] = 1e-2
    update(state, rollouts, torch.randn(4, 4), config)
    moved = {
        name for name, x in state.policy.model.state_dict().items() if (x != before[name]).any()
    }
    assert moved == set(adapters(state.policy.model))
    assert all(p.grad is None for p in state.policy.parameters())


def test_gradients_of_adapters_stand_checkpointing(state, toy_model, processor, problems, config):
    rollouts = run_rollout(toy_model, processor, problems[:3], config)
    state.policy.train()
    for p in adapters(state.policy.model).values():
        torch.nn.init.normal_(p, std=0.05)
    results = []
    for _ in range(2):
        state.policy.zero_grad()
        response_log_probs(state.policy, rollouts, config).sum().backward()
        results.append([p.grad.clone() for p in adapters(state.policy.model).values()])
        state.policy.model.activation_checkpointing_enable({"use_reentrant": False})
    assert all(gradient.abs().max() > 0 for gradient in results[0])
    torch.testing.assert_close(*results)


def test_frozen_weights_in_bf16_adapters_in_fp32(data, tmp_path, processor, config, monkeypatch):
    """Where the device has bf16; an update of 1e-6 of an adapter would be lost in bf16."""
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: Accelerator(True))
    state = observe_r1.prepare(lora_config(data, tmp_path), tmp_path, rollout)
    model = state.policy.model
    assert {value.dtype for value in frozen(model).values()} == {torch.bfloat16}
    assert {p.dtype for p in adapters(model).values()} == {torch.float32}
    problems = observe_r1.read_problems(state.problems, range(2), config)
    rollouts = run_rollout(model, processor, problems, config)
    before = copy.deepcopy(model.state_dict())
    metrics = update(state, rollouts, torch.randn(2, 4), config)
    moved = {name for name, x in model.state_dict().items() if (x != before[name]).any()}
    assert moved == {name for name in adapters(model) if "lora_B" in name}
    assert 0 < metrics["grad_norm"] < 1e3 and metrics["kl"] == 0


# ----------------------------------------------------------------------------------- after training


def test_the_kl_penalty_starts_at_0(run):
    """The reference is the policy without its adapters: equal at first, then no longer."""
    kl = [line["kl"] for line in run.metrics]
    assert kl[0] == 0 and min(kl[1:]) > 0
    assert all(line["grad_norm"] > 0 for line in run.metrics)


def test_the_reference_stays_the_base_model(run, toy_model, processor, problems, config):
    rollouts = run_rollout(toy_model, processor, problems[:3], config)
    with torch.no_grad():
        base = response_log_probs(toy_model, rollouts, config)
        now = response_log_probs(run.state.policy, rollouts, config)
        with observe_r1.reference_policy(run.state) as reference:
            assert torch.equal(response_log_probs(reference, rollouts, config), base)
        assert torch.equal(response_log_probs(run.state.policy, rollouts, config), now)
    assert (now - base).abs().max() > 1e-3
    assert all(p.requires_grad for p in adapters(run.model).values())


def test_frozen_weights_stay_as_they_were_to_the_bit(run, toy_model):
    weights = frozen(run.model)
    base = toy_model.state_dict()
    assert set(weights) == set(base)
    assert all(torch.equal(value, base[name]) for name, value in weights.items())
    moved = [p for name, p in adapters(run.model).items() if "lora_B" in name]
    assert all(p.abs().max() > 0 for p in moved)  # they start at 0


def test_the_final_model_loads_by_itself_and_is_what_was_trained(run, toy_model, prompts):
    """Merged: plain weights of the same names, and the logits of the policy with its adapters."""
    final = type(toy_model).from_pretrained(run.output / "final", dtype=torch.float32)
    transformers.AutoProcessor.from_pretrained(run.output / "final")
    assert set(final.state_dict()) == set(toy_model.state_dict())
    trained = logits(run.model, prompts)
    torch.testing.assert_close(logits(final, prompts), trained, atol=1e-5, rtol=1e-5)
    assert (trained - logits(toy_model, prompts)).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft's own call
def test_the_adapter_loads_on_the_base_model(run, model, prompts):
    trained = logits(run.model, prompts)
    again = peft.PeftModel.from_pretrained(model, run.output / "final" / "adapter")
    torch.testing.assert_close(logits(again, prompts), trained, atol=1e-5, rtol=1e-5)
    settings = json.loads((run.output / "final" / "adapter" / "adapter_config.json").read_text())
    assert settings["r"] == 4 and Path(settings["base_model_name_or_path"]) == TOY / "model"


def test_a_merged_model_in_bf16(run, data, toy_model, prompts):
    """Rounded once, after the merge: as near to the trained policy as bf16 can be."""
    config = lora_config(data, run.output, save_dtype="bfloat16")
    observe_r1.save_final(run.state, run.output / "half", config)
    merged = type(toy_model).from_pretrained(run.output / "final", dtype=torch.float32)
    half = type(toy_model).from_pretrained(run.output / "half", dtype="auto")
    assert half.dtype == torch.bfloat16
    for name, value in half.state_dict().items():
        exact = merged.state_dict()[name]
        torch.testing.assert_close(value.float(), exact, atol=1e-6, rtol=2**-8, msg=name)


def test_a_checkpoint_holds_no_frozen_weight(run):
    folder = run.output / "checkpoint-3"
    keys = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = [key for key in keys if key.startswith("model.") or ".exp_avg" in key]
    numbers = sum(p.numel() for p in adapters(run.model).values())
    assert [key for key in tensors if "lora_" not in key] == []  # nor a tied one by its other name
    assert len(tensors) == 3 * len(adapters(run.model))
    size = sum(file.stat().st_size for file in folder.iterdir())
    frozen_size = sum(value.nbytes for value in frozen(run.model).values())
    assert 3 * 4 * numbers < size < 3 * 4 * numbers + 0.25 * frozen_size


def test_resume_is_exact(run, data, tmp_path):
    """A crash in the second step, then on: the same bits as undisturbed."""
    calls = []

    def crash(*arguments):
        calls.append(0)
        if len(calls) == 2:
            raise RuntimeError("power cut")
        return rollout(*arguments)

    config = lora_config(data, tmp_path)
    with pytest.raises(RuntimeError, match="power cut"):
        observe_r1.train(config, crash)
    config.resume = True
    observe_r1.train(config)
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        pair = [(output / "final" / name).read_bytes() for output in (tmp_path, run.output)]
        assert pair[0] == pair[1], name
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    for line, expected in zip(lines, run.metrics, strict=True):
        assert {**line, "seconds": 0} == {**expected, "seconds": 0}
    with pytest.raises(ValueError, match="--lora_rank"):
        observe_r1.train(lora_config(data, tmp_path, resume=True, lora_rank=8))


def test_without_peft_one_line_says_what_to_install(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="pip install peft") as caught:
        observe_r1.train(lora_config(data, tmp_path))
    assert "\n" not in str(caught.value)
