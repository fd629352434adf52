"""Runs that are stopped, killed, resumed or replaced: the same bits, or a named error."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import (
    ROOT,
    TOY,
    command_line,
    read_jsonl,
    run_config,
    run_python,
    toy_rows,
    write_parquet,
)

import observe_r1


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight toy problems, from easy to hard; the second of them without a picture."""
    rows = toy_rows("ladder", range(0, 960, 120))
    rows[1] |= {"images": [], "question": "What is 3+4?", "answer": "7"}
    return write_parquet(tmp_path_factory.mktemp("data") / "raw.parquet", rows)


def small_config(data, output, **options):
    """Four steps of two prompts, two updates each; measured each step, saved each second."""
    small = {"prompts_per_step": 2, "minibatch_prompts": 1, "max_new_tokens": 48}
    held_out = write_parquet(Path(data).with_name("held_out.parquet"), toy_rows("heldout", [0, 1]))
    small |= {"eval_data": held_out, "eval_steps": 1, "num_samples": 0}
    return run_config(data, output, **{**small, **options})


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("undisturbed")
    observe_r1.train(small_config(data, output))
    return output


@pytest.fixture
def copied(undisturbed, tmp_path):
    """A copy of that folder, to be damaged."""
    return Path(shutil.copytree(undisturbed, tmp_path / "run"))


def moved(output):
    """Names of the weights of final/ that training moved."""
    before, after = (
        safetensors.torch.load_file(folder / "model.safetensors")
        for folder in (TOY / "model", output / "final")
    )
    return [name for name in before if not torch.equal(before[name].float(), after[name])]


def checkpoints(output):
    return sorted(folder.name for folder in output.glob("checkpoint-*"))


def content_of(output, names="**/*"):
    """Every file of a folder but the copies of its data."""
    files = [file for file in output.glob(names) if file.is_file() and "data" not in file.parts]
    return {str(file.relative_to(output)): file.read_bytes() for file in files}


def assert_same(one, other):
    """Weights, moments and position of the last checkpoint, all logs: equal to the bit."""
    logs = []
    for output in (one, other):
        files = content_of(output, "*.jsonl") | content_of(output, "final/*")
        del files["metrics.jsonl"]
        rows = read_jsonl(output / "metrics.jsonl")
        for row in rows:
            del row["seconds"]
        last = content_of(output, f"{checkpoints(other)[-1]}/__*")
        position = json.loads((output / checkpoints(other)[-1] / "position.json").read_text())
        del position["logs"]["metrics.jsonl"]  # some digits of the seconds
        summary = json.loads((output / "summary.json").read_text())
        logs.append((files, rows, last, position, {**summary, "seconds": 0}))
    for first, second in zip(*logs, strict=True):
        assert first == second


def disturbed(step, interrupt):
    """A rollout function that does something to the run in the middle of a step.

    The step is the first, second, ... of this start; the held-out problems are sampled greedily.
    """
    calls = []

    def rollout(model, processor, problems, config):
        calls.append(config.temperature != observe_r1.GREEDY)
        if calls[-1] and sum(calls) == step:
            interrupt()
        return observe_r1.rollout(model, processor, problems, config)

    return rollout


def power_cut():
    raise RuntimeError("power cut")


def send(*numbers):
    return lambda: [os.kill(os.getpid(), number) for number in numbers]


# ------------------------------------------------------------------------------- to the same bits


def test_the_run_moves_its_weights(undisturbed):
    """Or all that follows would compare nothing."""
    assert len(moved(undisturbed)) > 70
    rows = read_jsonl(undisturbed / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[-1]["optimizer_step"] == 8
    assert checkpoints(undisturbed) == ["checkpoint-2", "checkpoint-4"]
    assert set(content_of(undisturbed, "held_out-*")) == {f"held_out-{n}.jsonl" for n in range(5)}


KILLED = """
import sys
sys.path[:0] = {path!r}
import test_resume as t
config = t.observe_r1.Config(**{options!r})
t.observe_r1.train(config, t.disturbed(4, t.send(9)))
"""


def test_kill_9_and_resume(data, undisturbed, tmp_path, capsys):
    """In step 4, after a measure and a line of the log that the checkpoint does not know."""
    config = small_config(data, tmp_path / "run")
    script = KILLED.format(path=[str(ROOT), str(ROOT / "tests")], options=vars(config))
    killed = run_python("-c", script, cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert checkpoints(tmp_path / "run") == ["checkpoint-2"]
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 3
    late = tmp_path / "run" / "held_out-3.jsonl"
    late.write_text(late.read_text().replace('"answer": "', '"answer": "of another life '))
    with open(tmp_path / "run" / "rollouts.jsonl", "a") as log:
        log.write('{"torn')
    observe_r1.train(replace(config, resume=True))
    assert f"goes on after step 2, from {tmp_path}/run/checkpoint-2" in capsys.readouterr().out
    assert_same(tmp_path / "run", undisturbed)


def test_signals_finish_the_step_and_a_second_one_does_not_wait(data, undisturbed, tmp_path):
    config = small_config(data, tmp_path / "run")
    stopped = "stopped after step {}; --resume true goes on from it"
    with pytest.raises(SystemExit, match=stopped.format(1)):
        observe_r1.train(config, disturbed(1, send(signal.SIGTERM)))
    assert checkpoints(tmp_path / "run") == ["checkpoint-1"]
    config = replace(config, resume=True)
    with pytest.raises(KeyboardInterrupt):
        observe_r1.train(config, disturbed(1, send(signal.SIGTERM, signal.SIGINT)))
    assert checkpoints(tmp_path / "run") == ["checkpoint-1"]
    with pytest.raises(SystemExit, match=stopped.format(3)):
        observe_r1.train(config, disturbed(2, send(signal.SIGINT)))
    assert checkpoints(tmp_path / "run") == ["checkpoint-2", "checkpoint-3"]  # two stay
    assert not (tmp_path / "run" / "summary.json").exists()
    observe_r1.train(config)
    assert_same(tmp_path / "run", undisturbed)


def test_steps_without_an_update_resume_too(tmp_path):
    """Two tokens solve nothing: the optimiser has no moments yet."""
    data = write_parquet(tmp_path / "raw.parquet", toy_rows("ladder", range(4)))
    options = {"eval_data": "", "eval_steps": 0, "dynamic_weight": True, "max_new_tokens": 2}
    config = small_config(data, tmp_path / "run", save_steps=1, **options)
    with pytest.raises(RuntimeError, match="power cut"):
        observe_r1.train(config, disturbed(2, power_cut))
    observe_r1.train(replace(config, resume=True))
    assert moved(tmp_path / "run") == []


@pytest.mark.slow
def test_killed_at_random_moments(data, undisturbed, tmp_path):
    """kill -9 at 10 moments, each time resumed."""
    moments, output = random.Random(0), tmp_path / "run"
    words = [sys.executable, str(ROOT / "observe_r1.py")]
    for _ in range(10):
        resume = any(output.glob("checkpoint-*/.metadata"))
        config = small_config(data, output, resume=resume, overwrite=not resume, save_steps=1)
        process = subprocess.Popen([*words, *command_line(config)])
        try:
            process.wait(timeout=moments.uniform(6, 14))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    observe_r1.train(small_config(data, output, resume=resume, overwrite=not resume))
    assert_same(output, undisturbed)


# ------------------------------------------------------------------- what a resumed run begins with


def test_a_checkpoint_that_is_not_whole_is_passed_over(data, undisturbed, copied, capsys):
    """.metadata comes last. Without a whole one, the run ends in an error."""
    (copied / "checkpoint-4" / ".metadata").unlink()
    observe_r1.train(small_config(data, copied, resume=True))
    assert "goes on after step 2" in capsys.readouterr().out
    assert_same(copied, undisturbed)
    for folder in copied.glob("checkpoint-*"):
        (folder / ".metadata").unlink()
    with pytest.raises(ValueError, match="holds no whole checkpoint; --overwrite true"):
        observe_r1.train(small_config(data, copied, resume=True))


CHANGED = {"sigma": 1.0, "seed": 1, "max_steps": 3, "lora_rank": 2}


@pytest.mark.parametrize("name", [*CHANGED, "content"])
def test_what_would_change_the_run_is_refused_by_name(name, data, undisturbed, tmp_path):
    before, options = content_of(undisturbed), {}
    if name == "content":  # of the file, under another name
        options["data"] = write_parquet(tmp_path / "raw.parquet", toy_rows("ladder", range(8)))
    else:
        options[name] = CHANGED[name]
    config = small_config(data, undisturbed, resume=True)
    with pytest.raises(ValueError, match=rf"cannot go on: \['{name}'\] changed since"):
        observe_r1.train(replace(config, **options))
    assert content_of(undisturbed) == before


def test_what_only_moves_files_or_memory_may_change(data, undisturbed, copied):
    shutil.rmtree(copied / "checkpoint-4")
    shutil.copy(data, copied.with_name("moved.parquet"))
    config = small_config(copied.with_name("moved.parquet"), copied, resume=True)
    same = {"save_steps": 4, "cache_gb": 2.0, "gradient_checkpointing": True}
    observe_r1.train(replace(config, **same))
    assert_same(copied, undisturbed)


def test_a_folder_that_is_taken_is_refused_or_moved_aside(data, undisturbed, copied):
    before = content_of(copied)
    for command in (observe_r1.train, observe_r1.ladder, observe_r1.evaluate_model):
        with pytest.raises(ValueError, match="run is taken: --resume true .*--overwrite true"):
            command(small_config(data, copied))
    assert content_of(copied) == before
    old = copied.with_name("run.old")
    old.mkdir()
    (old / "notes.txt").write_text("of an even older run")
    (copied / "notes.txt").write_text("the user's own")
    observe_r1.train(small_config(data, copied, overwrite=True))
    assert content_of(old) == {**before, "notes.txt": b"the user's own"}
    assert not (copied / "notes.txt").exists()
    assert_same(copied, undisturbed)


# -------------------------------------------------------------------------------------- NaN


def test_infinite_gradients_are_skipped_and_three_in_a_row_end_the_run(data, tmp_path, monkeypatch):
    backward, calls = observe_r1.optimizer_step, []

    def step(state, config):
        calls.append(0)
        if len(calls) in (1, 3, 4, 6, 7, 8):
            next(p for p in state.policy.parameters() if p.grad is not None).grad += float("inf")
        return backward(state, config)

    def advantages(rewards, weights):
        return torch.ones_like(rewards)  # so that every group is trained on

    monkeypatch.setattr(observe_r1, "optimizer_step", step)
    monkeypatch.setattr(observe_r1, "group_advantages", advantages)
    options = {"eval_data": "", "eval_steps": 0, "max_new_tokens": 8, "num_generations": 2}
    with pytest.raises(ValueError, match="infinite gradients in three updates up to step 4"):
        observe_r1.train(small_config(data, tmp_path / "run", **options))
    log = (tmp_path / "run" / "metrics.jsonl").read_text()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in log.splitlines()]
    assert [row["skipped_updates"] for row in rows] == [1, 3, 4, 6]
