"""Several processes: they learn what one learns, stop together, and go on in another number."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    TOY,
    read_jsonl,
    run_config,
    torchrun,
    toy_config,
    toy_problems,
    write_parquet,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import observe_r1
from observe_r1 import Policy, Rollouts, TrainState

FEW = "few.parquet"
COLUMNS = ["id", "images", "question", "answer", "difficulty", "complexity", "stage"]


def uneven_config(data, output, **options):
    """Four steps of three prompts: two for the first process, one for the second."""
    small = {"prompts_per_step": 3, "minibatch_prompts": 3, "save_steps": 1, "max_new_tokens": 48}
    return run_config(data, output, **{**small, **options})


def update_config():
    """Three groups an optimiser step; gradients are longer than the norm to which they are cut."""
    config = toy_config(minibatch_prompts=3, max_grad_norm=0.5, gradient_checkpointing=True)
    return replace(config, token_budget=150)


def learn(folder, processor):
    """Two optimiser steps on the prompts of this process: (metrics, all weights).

    SGD moves the weights in proportion to the gradient.
    """
    config = update_config()
    whole = torch.load(folder / "rollouts.pt", weights_only=False)
    mine = slice(observe_r1.RANK, None, observe_r1.WORLD)
    policies = []
    for _ in range(2):
        policies.append(observe_r1.shard(Policy(observe_r1.load_model(config)), config))
    policy, reference = policies
    policy.model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.SGD(policy.parameters(), 0.05)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    state = TrainState(
        policy=policy,
        reference=reference,
        adapters=None,
        processor=processor,
        problems=None,
        held_out=None,
        steps=[],
        optimizer=optimizer,
        scheduler=scheduler,
    )
    prompt = observe_r1.encode_prompts(whole["problems"][mine], processor, config)
    rollouts = Rollouts(prompt, whole["ids"][mine], whole["mask"][mine], [])
    metrics = observe_r1.update(state, rollouts, whole["advantages"][mine], config)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return metrics, get_model_state_dict(policy, options=options)


def power_cut(at):
    """A rollout that fails in every process in the given step."""
    calls = []

    def rollout(*arguments):
        calls.append(0)
        if len(calls) == at:
            raise RuntimeError("power cut")
        return observe_r1.rollout(*arguments)

    return rollout


def signal_to_one(at):
    """A rollout in which the second process alone gets SIGTERM."""
    calls = []

    def rollout(*arguments):
        calls.append(0)
        if len(calls) == at and observe_r1.RANK == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return observe_r1.rollout(*arguments)

    return rollout


def in_two_processes():
    """What the processes of the fixture `two` run, in its folder."""
    config = uneven_config(FEW, "whole")
    observe_r1.train(config)
    try:
        observe_r1.train(replace(config, output_dir="killed"), power_cut(3))
    except RuntimeError:
        observe_r1.train(replace(config, output_dir="killed", resume=True))
    try:
        observe_r1.train(replace(config, output_dir="signal"), signal_to_one(2))
    except SystemExit as end:
        Path(f"signal.{observe_r1.RANK}.txt").write_text(str(end))
    observe_r1.train(uneven_config(FEW, "by_one", resume=True))
    processor = observe_r1.transformers.AutoProcessor.from_pretrained(TOY / "model")
    metrics, weights = learn(Path(), processor)
    if observe_r1.RANK == 0:
        torch.save(weights, "learned.pt")
        Path("metrics.json").write_text(json.dumps(metrics))


@pytest.fixture(scope="module")
def two(tmp_path_factory, toy_model, processor):
    """A folder in which two processes did all that the tests below look at, in one start."""
    folder = tmp_path_factory.mktemp("two")
    rows = observe_r1.load_problems(str(TOY / "ladder.parquet")).select(range(0, 960, 80))
    rows = rows.select_columns(COLUMNS).to_list()
    write_parquet(folder / FEW, rows)
    here = os.getcwd()
    os.chdir(folder)  # so that --data is the same words for both
    with pytest.raises(RuntimeError, match="power cut"):
        observe_r1.train(uneven_config(FEW, "by_one"), power_cut(3))
    os.chdir(here)
    torch.manual_seed(0)
    rollouts = observe_r1.rollout(toy_model, processor, toy_problems(), update_config())
    advantages = torch.randn(5, 4)
    advantages[1] = 0
    saved = {"ids": rollouts.response_ids, "mask": rollouts.mask, "advantages": advantages}
    torch.save({**saved, "problems": toy_problems()}, folder / "rollouts.pt")
    script = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    (folder / "two.py").write_text(script + "import test_processes as t\nt.in_two_processes()\n")
    result = torchrun(folder / "two.py", cwd=folder)
    assert result.returncode == 0, result.stderr[-5000:]
    (folder / "stdout.txt").write_text(result.stdout)
    return folder


def final_bytes(run):
    return (run / "final" / "model.safetensors").read_bytes()


def metrics_of(run):
    lines = read_jsonl(run / "metrics.jsonl")
    return [{name: line[name] for name in line if name != "seconds"} for line in lines]


def test_two_processes_learn_what_one_learns(two, processor):
    """Five prompts, unequal numbers of passes, one group without weight, one without a picture.

    The second process has only the group of weight 0 in the first mini-batch, and only the prompt
    without a picture in the second.
    """
    assert toy_problems()[3]["images"] == []
    metrics, weights = learn(two, processor)
    others = json.loads((two / "metrics.json").read_text())
    assert others == {
        name: pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in metrics.items()
    }
    assert metrics["optimizer_step"] == 2 and metrics["grad_norm"] > 0.5  # so it was clipped
    learned = torch.load(two / "learned.pt", weights_only=True)
    before = Policy(observe_r1.load_model(update_config())).state_dict()
    assert set(learned) == set(weights)
    for name, value in weights.items():
        torch.testing.assert_close(learned[name], value, atol=1e-6, rtol=1e-5, msg=name)
    moved = [(weights[name] - before[name]).abs().max() for name in weights]
    assert max(moved) > 1e-3


def test_two_processes_train_and_log_all_responses(two):
    lines = metrics_of(two / "whole")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    problems = observe_r1.load_problems(str(two / FEW))
    mean = torch.tensor(problems["difficulty"][:3]).mean().item()
    assert lines[0]["difficulty"] == pytest.approx(mean)  # of both processes
    model_class = observe_r1.transformers.Qwen2_5_VLForConditionalGeneration
    model, loading = model_class.from_pretrained(
        two / "whole" / "final", output_loading_info=True, dtype=torch.float32
    )
    assert not any(loading.values())
    before = observe_r1.load_model(update_config()).state_dict()
    changed = [not torch.equal(before[name], value) for name, value in model.state_dict().items()]
    assert sum(changed) > 0.9 * len(changed)


def test_two_processes_resume_to_the_same_bits(two):
    assert metrics_of(two / "killed") == metrics_of(two / "whole")
    assert final_bytes(two / "killed") == final_bytes(two / "whole")
    assert "goes on after step 2, from killed/checkpoint-2" in (two / "stdout.txt").read_text()


def test_a_signal_to_one_process_stops_both_after_the_step(two):
    for rank in range(2):
        message = (two / f"signal.{rank}.txt").read_text()
        assert message == "stopped after step 2; --resume true goes on from it"
    assert (two / "signal" / "checkpoint-2" / ".metadata").exists()
    assert [line["step"] for line in metrics_of(two / "signal")] == [1, 2]


def test_what_one_process_began_two_go_on_with(two):
    screen = (two / "stdout.txt").read_text()
    assert "goes on after step 2, from by_one/checkpoint-2" in screen
    assert "2 processes instead of 1" in screen
    assert [line["step"] for line in metrics_of(two / "by_one")] == [1, 2, 3, 4]
    assert final_bytes(two / "by_one")


def test_what_two_processes_began_one_goes_on_with(two, monkeypatch, capsys):
    """The position, the weights and the moments are those that the two wrote."""
    monkeypatch.chdir(two)
    shutil.copytree("whole", "by_two")
    for name in ("checkpoint-3", "checkpoint-4"):
        shutil.rmtree(f"by_two/{name}")
    observe_r1.train(uneven_config(FEW, "by_two", resume=True))
    screen = capsys.readouterr().out
    assert "goes on after step 2, from by_two/checkpoint-2" in screen
    assert "1 processes instead of 2" in screen
    lines, others = metrics_of(two / "by_two"), metrics_of(two / "whole")
    assert lines[:2] == others[:2] and [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[3]["learning_rate"] == others[3]["learning_rate"]


def test_a_checkpoint_holds_the_same_whoever_reads_it(two, monkeypatch):
    """After the last step nothing is left to train: final/ is the checkpoint's weights."""
    monkeypatch.chdir(two)
    shutil.copytree("whole", "finished")
    (two / "finished" / "final" / "model.safetensors").unlink()
    observe_r1.train(uneven_config(FEW, "finished", resume=True))
    assert final_bytes(two / "finished") == final_bytes(two / "whole")


def test_one_failing_process_ends_all(two, tmp_path):
    """The other one would otherwise wait for it."""
    script = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import test_processes as t
import observe_r1 as o

def failing(*arguments):
    if o.RANK == 1:
        raise RuntimeError("rank 1 has lost its disk")
    return o.rollout(*arguments)

o.train(t.uneven_config({str(two / FEW)!r}, "run"), failing)
"""
    (tmp_path / "fail.py").write_text(script)
    started = time.time()
    result = torchrun(tmp_path / "fail.py", cwd=tmp_path)
    assert result.returncode != 0 and "rank 1 has lost its disk" in result.stderr
    assert time.time() - started < 120
    assert not (tmp_path / "run" / "final").exists()


def test_processes_may_finish_hours_apart(two, tmp_path, monkeypatch):
    """Where they meet, the timeout is said once: the default of ten minutes ends an evaluation."""
    said = {}

    def init(*arguments, **options):
        said.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.distributed, "init_process_group", init)
    with pytest.raises(KeyboardInterrupt):
        observe_r1.evaluate_model(uneven_config(two / FEW, tmp_path))
    assert said["timeout"] >= timedelta(hours=12)
