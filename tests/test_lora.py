"""LoRA: exact at the start, nothing but adapters moves, and what is written loads by itself."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import read_jsonl, run_config, toy_rows, write_parquet

import observe_r1
from observe_r1 import response_log_probs, rollout, update

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_check")  # of peft's own making


def lora_config(data, output, **options):
    """Three steps of one optimiser step each, with a rate at which adapters move visibly."""
    small = {"lora_rank": 4, "max_steps": 3, "minibatch_prompts": 4, "learning_rate": 3e-3}
    return run_config(data, output, **{**small, "save_steps": 1, "max_new_tokens": 64, **options})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = toy_rows("ladder", range(0, 960, 80))
    return write_parquet(tmp_path_factory.mktemp("data") / "raw.parquet", rows)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A finished run: its files, and the state that training left in memory."""
    output, states, prepare = tmp_path_factory.mktemp("lora"), [], observe_r1.prepare
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(observe_r1, "prepare", lambda *a: states.append(prepare(*a)) or states[0])
        observe_r1.train(lora_config(data, output))
    metrics = read_jsonl(output / "metrics.jsonl")
    return SimpleNamespace(output=output, policy=states[0].policy, state=states[0], metrics=metrics)


@pytest.fixture
def prepared(data, tmp_path):
    """The state before the first step, with these options."""
    output = tmp_path / "run"
    return lambda **how: observe_r1.prepare(lora_config(data, output, **how), rollout)


def adapters(model):
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def frozen(model):
    """Weights without adapters, under their names in the base model."""
    weights = model.state_dict().items()
    return {name.replace("base_layer.", ""): x for name, x in weights if "lora_" not in name}


# ---------------------------------------------------------------------------------- before training


def test_fresh_adapters_change_nothing_and_alone_are_trained(
    prepared, toy_model, processor, problems, config
):
    state = prepared(gradient_checkpointing=True)
    policy, trained = state.policy, adapters(state.policy.model)
    rollouts = rollout(toy_model, processor, problems[:4], config)
    base = response_log_probs(toy_model, rollouts, config)
    assert torch.equal(response_log_probs(policy, rollouts, config), base)
    assert state.reference is None  # no second model: the adapters are switched off

    names = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert names == set(trained)
    assert any("visual" in name for name in names)
    assert not any("lm_head" in name or "embed" in name for name in names)
    (group,) = state.optimizer.param_groups
    assert set(group["params"]) == set(trained.values())

    before = copy.deepcopy(policy.model.state_dict())
    group["lr"] = config.learning_rate = 1e-2
    update(state, rollouts, torch.randn(4, 4), config)
    after = policy.model.state_dict()
    assert {name for name in after if (after[name] != before[name]).any()} == names


def test_frozen_weights_in_bf16_adapters_in_fp32(
    prepared, processor, problems, config, monkeypatch
):
    """Where the device has bf16; an update of 1e-6 of an adapter would be lost in bf16."""
    monkeypatch.setattr(observe_r1, "DTYPE", torch.bfloat16)
    monkeypatch.setattr(observe_r1, "AUTOCAST", torch.autocast("cpu", torch.bfloat16))
    state = prepared()
    model = state.policy.model
    assert {value.dtype for value in frozen(model).values()} == {torch.bfloat16}
    assert {p.dtype for p in adapters(model).values()} == {torch.float32}
    rollouts = rollout(model, processor, problems[:2], config)
    metrics = update(state, rollouts, torch.randn(2, 4), config)
    assert all(p.abs().max() > 0 for name, p in adapters(model).items() if "lora_B" in name)
    assert metrics["kl"] == 0


def test_without_peft_one_line_says_what_to_install(prepared, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="^--lora_rank needs peft: pip install peft$"):
        prepared()


# ----------------------------------------------------------------------------------- after training


@torch.no_grad()
def test_the_reference_stays_the_base_model(run, toy_model, processor, problems, config):
    """It is the policy without its adapters: equal at first, so that KL starts at 0."""
    kl = [row["kl"] for row in run.metrics]
    assert kl[0] == 0 and min(kl[1:]) > 0
    rollouts = rollout(toy_model, processor, problems[:3], config)
    base = response_log_probs(toy_model, rollouts, config)
    now = response_log_probs(run.policy, rollouts, config)
    with observe_r1.reference_policy(run.state) as reference:
        assert torch.equal(response_log_probs(reference, rollouts, config), base)
    assert torch.equal(response_log_probs(run.policy, rollouts, config), now)
    assert (now - base).abs().max() > 1e-3
    weights = toy_model.state_dict()
    assert all(
        torch.equal(value, weights[name]) for name, value in frozen(run.policy.model).items()
    )


@torch.no_grad()
def test_what_is_written_loads_by_itself_and_is_what_was_trained(
    run, toy_model, model, processor, problems, config
):
    """final/ has plain weights under plain names; final/adapter goes on the base model."""
    rollouts = rollout(toy_model, processor, problems[:3], config)
    trained = response_log_probs(run.policy, rollouts, config)
    final = type(toy_model).from_pretrained(run.output / "final", dtype=torch.float32)
    assert set(final.state_dict()) == set(toy_model.state_dict())
    adapted = peft.PeftModel.from_pretrained(model, run.output / "final" / "adapter")
    for written in (final, adapted.get_base_model()):
        found = response_log_probs(written, rollouts, config)
        torch.testing.assert_close(found, trained, atol=1e-4, rtol=1e-4)


def test_a_checkpoint_holds_adapters(run):
    """And, where it is tied to the embedding, the frozen head, which has a second name."""
    folder = run.output / "checkpoint-3"
    keys = torch.distributed.checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata
    weights = [key for key in keys if key.startswith("model_state_dict")]
    weights.remove("model_state_dict.model.lm_head.weight")
    assert len(weights) == len(adapters(run.policy.model)) and all(
        "lora_" in key for key in weights
    )
    assert len([key for key in keys if ".exp_avg" in key]) == 2 * len(weights)


def test_resume_is_exact(run, data, tmp_path):
    """A crash in the second step, then on: the same bits as undisturbed."""
    calls = []

    def crash(*arguments):
        calls.append(0)
        if len(calls) == 2:
            raise RuntimeError("power cut")
        return rollout(*arguments)

    config = lora_config(data, tmp_path / "run")
    with pytest.raises(RuntimeError, match="power cut"):
        observe_r1.train(config, crash)
    config.resume = True
    observe_r1.train(config)
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        pair = [(output / "final" / name).read_bytes() for output in (tmp_path / "run", run.output)]
        assert pair[0] == pair[1], name
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row | {"seconds": 0} for row in rows] == [row | {"seconds": 0} for row in run.metrics]
