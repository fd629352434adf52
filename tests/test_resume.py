"""Runs that are stopped, killed, resumed, replaced: the same bits as undisturbed, or a named error."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
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
    run_script,
    write_parquet,
)

import observe_r1


@pytest.fixture(autouse=True)
def default_setting():
    """Two threads, as on any machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def rows():
    """12 toy problems, from easy to hard."""
    table = observe_r1.load_problems(str(TOY / "ladder.parquet")).select(range(0, 960, 80))
    names = ["id", "images", "question", "answer", "difficulty", "complexity", "stage"]
    return table.select_columns(names).to_list()


@pytest.fixture(scope="module")
def data(rows, tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("data") / "raw.parquet", rows)


def small_config(data, output, **options):
    """Six steps of two prompts, two optimiser steps each, saved every second step."""
    small = {"prompts_per_step": 2, "minibatch_prompts": 1, "max_new_tokens": 48, "config": ""}
    return run_config(data, output, **{**small, **options})


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("undisturbed")
    torch.set_num_threads(2)
    observe_r1.train(small_config(data, output))
    return output


@pytest.fixture
def copied(undisturbed, tmp_path):
    """A copy of that folder, to be damaged."""
    return Path(shutil.copytree(undisturbed, tmp_path / "run"))


def checkpoints(output):
    return sorted(folder.name for folder in output.glob("checkpoint-*"))


def logs_of(output):
    """The metrics but for the seconds, and the sampled responses."""
    lines = read_jsonl(output / "metrics.jsonl")
    for line in lines:
        line.pop("seconds")
    return lines, read_jsonl(output / "rollouts.jsonl")


def assert_same(one, other):
    """Weights of final/, moments and position of the last checkpoint, and logs: equal to the bit."""
    first, second = (
        safetensors.torch.load_file(output / "final" / "model.safetensors")
        for output in (one, other)
    )
    assert set(first) == set(second)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different
    assert logs_of(one) == logs_of(other)
    for folder in sorted(one.glob("checkpoint-*"))[-1:]:
        for name in ("state.json", "__0_0.distcp"):
            first, second = (output / folder.name / name for output in (one, other))
            assert first.read_bytes() == second.read_bytes(), name


def disturbed(step, interrupt):
    """A rollout function that does something to the run in the middle of a step."""
    calls = []

    def rollout(*arguments):
        calls.append(0)
        if len(calls) == step:
            interrupt()
        return observe_r1.rollout(*arguments)

    return rollout


def power_cut():
    raise RuntimeError("power cut")


def send(number):
    return lambda: os.kill(os.getpid(), number)


def crash(config, step):
    with pytest.raises(RuntimeError, match="power cut"):
        observe_r1.train(config, disturbed(step, power_cut))


# --------------------------------------------------------------------------------- to the same bits


def test_the_run_moves_its_weights(undisturbed):
    """Or all that follows would compare nothing."""
    before = safetensors.torch.load_file(TOY / "model" / "model.safetensors")
    after = safetensors.torch.load_file(undisturbed / "final" / "model.safetensors")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) > 0.9 * len(before)
    lines = read_jsonl(undisturbed / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["optimizer_step"] >= 6
    assert checkpoints(undisturbed) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_the_resumed_run_is_exact(
    number, data, undisturbed, tmp_path, capsys
):
    """In step 3, of which no checkpoint is due."""
    config = small_config(data, tmp_path / "run")
    with pytest.raises(SystemExit) as end:
        observe_r1.train(config, disturbed(3, send(number)))
    assert end.value.code == "stopped after step 3; --resume true goes on from it"
    assert checkpoints(tmp_path / "run") == ["checkpoint-2", "checkpoint-3"]
    assert not (tmp_path / "run" / "summary.json").exists()
    capsys.readouterr()
    observe_r1.train(replace(config, resume=True))
    assert f"goes on after step 3, from {tmp_path}/run/checkpoint-3" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    assert_same(tmp_path / "run", undisturbed)


def test_two_signals_do_not_wait_and_lose_only_the_step(data, undisturbed, tmp_path):
    config = small_config(data, tmp_path / "run")

    def twice():
        send(signal.SIGTERM)()
        send(signal.SIGINT)()

    with pytest.raises(KeyboardInterrupt):
        observe_r1.train(config, disturbed(4, twice))
    assert checkpoints(tmp_path / "run") == ["checkpoint-2"]
    crash(replace(config, resume=True), 2)  # and once more, in step 4 again
    observe_r1.train(replace(config, resume=True))
    assert_same(tmp_path / "run", undisturbed)


KILLED = """
import os, sys
sys.path.insert(0, {root!r})
import observe_r1
steps = []

def rollout(*arguments):
    steps.append(0)
    if len(steps) == 4:
        os.kill(os.getpid(), 9)
    return observe_r1.rollout(*arguments)

config = observe_r1.Config(**{options!r})
observe_r1.train(observe_r1.replace(config, output_dir="undisturbed"))
observe_r1.train(config, rollout)
"""


def test_kill_9_and_resume_in_the_default_setting(data, tmp_path):
    """In processes of their own, whose threads nobody set: what they compute is deterministic.

    The whole run too: MKL may take other threads where a program has set their number.
    """
    config = small_config(data, tmp_path / "run", max_steps=4)
    (tmp_path / "killed.py").write_text(KILLED.format(root=str(ROOT), options=vars(config)))
    killed = run_python(tmp_path / "killed.py", cwd=tmp_path, OMP_NUM_THREADS="2")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert checkpoints(tmp_path / "run") == ["checkpoint-2"]
    words = command_line(replace(config, resume=True))
    result = run_script("train", *words, cwd=tmp_path, OMP_NUM_THREADS="2")
    assert result.returncode == 0, result.stderr[-2000:]
    assert_same(tmp_path / "run", tmp_path / "undisturbed")


@pytest.mark.parametrize("start", ["text", "unsolvable"])
def test_the_first_steps_trained_little_or_nothing(start, rows, tmp_path):
    """Text alone: the vision tower has no gradient. Never solved: there is no update at all."""
    first = {"text": {"images": [], "question": "What is 3+4?"}, "unsolvable": {"answer": "31415"}}
    rows = [{**row, **first[start]} for row in rows[:4]] + rows[4:8]
    data = write_parquet(tmp_path / "raw.parquet", rows)
    options = {"save_steps": 0, "dynamic_weight": start == "unsolvable"}
    config = small_config(data, tmp_path / "one", **options)
    observe_r1.train(config)  # without a checkpoint: to write one must change nothing
    for step in (2, 3):
        other = replace(config, output_dir=str(tmp_path / f"killed-{step}"), save_steps=1)
        crash(other, step)
        folder = tmp_path / f"killed-{step}" / f"checkpoint-{step - 1}"
        early = json.loads((folder / "state.json").read_text())
        assert (early["optimizer_step"] == 0) == (start == "unsolvable")
        observe_r1.train(replace(other, resume=True))
        assert_same(tmp_path / "one", tmp_path / f"killed-{step}")
    assert read_jsonl(tmp_path / "one" / "metrics.jsonl")[-1]["optimizer_step"] > 0


def test_held_out_results_before_training_survive_a_resume(data, rows, tmp_path):
    """They belong to the untrained model, which a resumed run no longer has."""
    four = write_parquet(tmp_path / "held_out.parquet", rows[:4])
    held_out = {"eval_data": four, "eval_steps": 2, "num_samples": 0, "max_steps": 4}
    config = small_config(data, tmp_path / "one", **held_out)
    summary = observe_r1.train(config)
    other = replace(config, output_dir=str(tmp_path / "other"))
    with pytest.raises(SystemExit):  # four problems, two at a time, come before the first step
        observe_r1.train(other, disturbed(2 + 2, send(signal.SIGINT)))
    resumed = observe_r1.train(replace(other, resume=True))
    for name in ("accuracy", "format", "response_length"):
        assert resumed[f"{name}_before"] == summary[f"{name}_before"]
        assert resumed[f"{name}_after"] == summary[f"{name}_after"]
    assert summary["response_length_before"] != summary["response_length_after"]
    assert_same(tmp_path / "one", tmp_path / "other")


# ------------------------------------------------------------------------- damaged or no checkpoints


def break_metadata(folder):
    (folder / ".metadata").unlink()


def break_tensors(folder):
    file = folder / "__0_0.distcp"
    os.truncate(file, file.stat().st_size // 2)


def break_position(folder):
    (folder / "state.json").unlink()


def tear_position(folder):
    (folder / "state.json").write_text('{"step"')


def tear_metadata(folder):
    os.truncate(folder / ".metadata", 100)


DAMAGES = [break_metadata, break_tensors, break_position, tear_position, tear_metadata]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(damage, data, undisturbed, copied, capsys):
    damage(copied / "checkpoint-6")
    observe_r1.train(small_config(data, copied, resume=True))
    screen = capsys.readouterr().out
    assert "checkpoint-6 is damaged and passed over" in screen
    assert "goes on after step 4" in screen and "Traceback" not in screen
    assert_same(copied, undisturbed)


def test_several_damaged_checkpoints(data, undisturbed, copied, capsys):
    break_tensors(copied / "checkpoint-6")
    break_metadata(copied / "checkpoint-4")
    (copied / "checkpoint-5").mkdir()
    (copied / "checkpoint-old").mkdir()
    observe_r1.train(small_config(data, copied, resume=True))
    assert "goes on after step 2" in capsys.readouterr().out
    assert not (copied / "checkpoint-5").exists()  # damaged ones that are passed over go
    shutil.rmtree(copied / "checkpoint-old")
    assert_same(copied, undisturbed)


@pytest.mark.parametrize("damage", [break_tensors, break_metadata])
def test_without_a_whole_checkpoint_no_half_loaded_weights_are_trained(
    damage, data, undisturbed, copied, capsys
):
    """A file that ends early has already overwritten some weights: that is refused, not trained."""
    shutil.rmtree(copied / "checkpoint-4")
    shutil.rmtree(copied / "checkpoint-6")
    damage(copied / "checkpoint-2")
    shutil.rmtree(copied / "final")
    (copied / "summary.json").unlink()
    config = small_config(data, copied, resume=True)
    if damage is break_tensors:
        with pytest.raises(ValueError, match="no checkpoint can be read; --overwrite true"):
            observe_r1.train(config)
    else:  # nothing was read, as after a kill in the first save
        observe_r1.train(config)
        assert "holds no whole checkpoint: starts from the beginning" in capsys.readouterr().out
        assert_same(copied, undisturbed)


def test_resume_in_an_empty_folder_starts_from_the_beginning(data, undisturbed, tmp_path, capsys):
    """So that a job that is started again and again can always say --resume true."""
    observe_r1.train(small_config(data, tmp_path / "run", resume=True))
    assert "starts from the beginning" in capsys.readouterr().out
    assert_same(tmp_path / "run", undisturbed)


FULL = """
import resource, sys
sys.path.insert(0, {root!r})
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
import observe_r1
sys.argv = ["observe_r1.py", "train", *{words!r}]
observe_r1.main()
"""


def test_a_full_disk_keeps_the_last_checkpoint(data, undisturbed, copied, tmp_path):
    """A write that stops short ends in one line, and what was whole stays and is gone on from."""
    for name in ("checkpoint-4", "checkpoint-6", "final"):
        shutil.rmtree(copied / name)
    config = small_config(data, copied, resume=True, keep_checkpoints=1)
    script = FULL.format(root=str(ROOT), limit=5_000_000, words=command_line(config))
    (tmp_path / "full.py").write_text(script)
    result = run_python(tmp_path / "full.py", cwd=tmp_path)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.count("observe_r1: no checkpoint written: ") == 1
    assert (copied / "checkpoint-2" / ".metadata").exists()
    assert not (copied / "checkpoint-4" / ".metadata").exists()
    observe_r1.train(replace(config, keep_checkpoints=0))
    assert_same(copied, undisturbed)


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_the_newest_checkpoints_stay(keep, data, tmp_path):
    config = small_config(data, tmp_path / "run", save_steps=1, max_steps=4, keep_checkpoints=keep)
    observe_r1.train(config)
    steps = [1, 2, 3, 4][-keep:]
    assert checkpoints(tmp_path / "run") == [f"checkpoint-{step}" for step in steps]


def test_a_damaged_checkpoint_does_not_outlive_the_whole_ones(data, copied):
    """It has the highest number, but the newest whole one is the one to keep."""
    break_metadata(copied / "checkpoint-6")
    shutil.rmtree(copied / "checkpoint-4")
    config = small_config(data, copied, resume=True, keep_checkpoints=1)
    with pytest.raises(RuntimeError, match="power cut"):
        observe_r1.train(config, disturbed(3, power_cut))  # in step 5, after checkpoint-4
    assert (copied / "checkpoint-4" / ".metadata").exists()


# ------------------------------------------------------------- what a folder holds, and other options


CHANGED = {"sigma": 1.0, "seed": 1, "max_steps": 3, "freeze_vision": True}


@pytest.mark.parametrize("name", CHANGED)
def test_a_changed_option_stops_a_resume_by_name(name, data, copied):
    """Also where the weights of the checkpoint would not fit: it is not called damaged."""
    config = small_config(data, copied, resume=True, **{name: CHANGED[name]})
    with pytest.raises(ValueError, match=f"cannot go on: --{name} "):
        observe_r1.train(config)


def test_options_that_may_change(data, undisturbed, copied):
    """When to save, to keep and to evaluate moves no weight."""
    shutil.rmtree(copied / "checkpoint-6")
    options = {"save_steps": 3, "keep_checkpoints": 5, "resume": True}
    observe_r1.train(small_config(data, copied, **options))
    assert "checkpoint-4" in checkpoints(copied)
    assert_same(copied, undisturbed)


@pytest.mark.parametrize("what", ["answer", "picture", "order", "less"])
def test_changed_data_stop_a_resume(what, rows, tmp_path):
    """The same file name, other content."""
    rows = [dict(row) for row in rows[:8]]
    data = write_parquet(tmp_path / "raw.parquet", rows)
    config = small_config(data, tmp_path / "run", save_steps=1)
    crash(config, 2)
    if what == "answer":
        rows[5]["answer"] = "1"
    if what == "picture":
        rows[5]["images"] = rows[6]["images"]
    if what == "order":
        rows.reverse()
    if what == "less":
        rows = rows[:-1]
    write_parquet(tmp_path / "raw.parquet", rows)
    with pytest.raises(ValueError, match="cannot go on: --data "):
        observe_r1.train(replace(config, resume=True))


def content_of(output):
    """Every file of a folder but for the lock."""
    files = [file for file in output.rglob("*") if file.is_file() and ".lock" not in file.name]
    return {str(file.relative_to(output)): file.read_bytes() for file in files}


def test_a_finished_folder_is_refused(data, copied):
    before = content_of(copied)
    with pytest.raises(ValueError, match=r"run holds a run: --resume true .*--overwrite true"):
        observe_r1.train(small_config(data, copied, seed=3))
    assert content_of(copied) == before


def test_a_killed_run_is_refused_too(data, tmp_path):
    """Before its first checkpoint there are only logs, and they are work as well."""
    config = small_config(data, tmp_path / "run")
    crash(config, 2)
    assert checkpoints(tmp_path / "run") == []
    with pytest.raises(ValueError, match="holds a run"):
        observe_r1.train(config)


def test_a_ladder_keeps_out_of_the_folder_of_a_run(data, copied):
    before = content_of(copied)
    with pytest.raises(ValueError, match="holds a run"):
        observe_r1.ladder(small_config(data, copied))
    assert content_of(copied) == before


def test_eval_in_the_folder_of_a_run_leaves_its_results_alone(data, copied):
    """It adds files of its own, and with --overwrite true it replaces no others."""
    names = ("metrics.jsonl", "rollouts.jsonl", "summary.json", "final/model.safetensors")
    before = content_of(copied)
    for overwrite in (False, True):
        config = small_config(data, copied, num_samples=0, overwrite=overwrite)
        observe_r1.evaluate_model(config)
        after = content_of(copied)
        assert [after[name] for name in names] == [before[name] for name in names]
        assert checkpoints(copied) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert {"eval.json", "responses.jsonl"} <= set(after)


def test_a_run_keeps_out_of_the_folder_of_a_killed_ladder(data, tmp_path, monkeypatch):
    """Of which there are only scores, which cost as much as checkpoints."""
    config = small_config(data, tmp_path / "ladder", max_new_tokens=8)
    real, calls = observe_r1.score_rollouts, []

    def killed(*arguments):
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(observe_r1, "score_rollouts", killed)
    with pytest.raises(KeyboardInterrupt):
        observe_r1.ladder(config)
    before = content_of(tmp_path / "ladder")
    with pytest.raises(ValueError, match="holds a run"):
        observe_r1.train(config)
    assert content_of(tmp_path / "ladder") == before


def test_overwrite_leaves_nothing_of_the_old_run(data, copied, tmp_path):
    """As if the folder had been empty, file by file."""
    (copied / "final" / "adapter").mkdir()
    (copied / "final" / "adapter" / "adapter_model.safetensors").write_bytes(b"of an older run")
    (copied / "ladder.parquet").write_bytes(b"of a ladder")
    (copied / "scores.3.jsonl").write_text("{}\n")
    (copied / "notes.txt").write_text("the user's own")
    options = {"max_steps": 2, "save_steps": 0, "seed": 3}
    observe_r1.train(small_config(data, copied, overwrite=True, **options))
    observe_r1.train(small_config(data, tmp_path / "fresh", **options))
    assert (copied / "notes.txt").read_text() == "the user's own"
    (copied / "notes.txt").unlink()
    replaced, fresh = content_of(copied), content_of(tmp_path / "fresh")
    assert set(replaced) == set(fresh)
    assert logs_of(copied) == logs_of(tmp_path / "fresh")
    assert replaced["final/model.safetensors"] == fresh["final/model.safetensors"]


def test_two_runs_at_a_time_are_refused(data, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    other = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import observe_r1
with observe_r1.run_folder(observe_r1.Config(output_dir={str(output)!r})):
    print("locked", flush=True)
    sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", other], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "locked\n"
        for command in observe_r1.COMMANDS.values():
            with pytest.raises(ValueError, match="run is in use by another run"):
                command(small_config(data, output, overwrite=True))
    finally:
        process.kill()
        process.wait()
    with observe_r1.run_folder(observe_r1.Config(output_dir=str(output))):
        pass  # the lock of a process that was killed holds nobody up


# -------------------------------------------------------------------------------- the command itself


@pytest.mark.parametrize(
    "moment, number",
    [
        ("load_problems", signal.SIGINT),
        ("load_model", signal.SIGTERM),
        ("rollout", signal.SIGINT),
    ],
)
def test_a_signal_before_the_first_step_ends_in_one_line(
    moment, number, data, tmp_path, monkeypatch
):
    """While data or models load, or in the held-out pass before training."""
    real = getattr(observe_r1, moment if moment != "rollout" else "score_rollouts")

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), number)
        return real(*arguments, **options)

    monkeypatch.setattr(observe_r1, real.__name__, interrupted)
    config = small_config(data, tmp_path / "run", eval_data=data)
    monkeypatch.setattr(sys, "argv", ["observe_r1.py", "train", *command_line(config)])
    with pytest.raises(SystemExit) as end:
        observe_r1.main()
    assert end.value.code == "observe_r1: stopped; what was written so far is kept"


def test_sigterm_to_the_command(data, tmp_path):
    """Exit status 1 and one line beside the progress bar; the step is finished and saved."""
    config = small_config(data, tmp_path / "run", save_steps=0)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "observe_r1.py"), "train", *command_line(config)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.time() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in errors
    lines = read_jsonl(metrics)
    last = lines[-1]["step"]
    wanted = f"stopped after step {last}; --resume true goes on from it"
    assert errors.count(wanted) == 1
    assert checkpoints(tmp_path / "run") == [f"checkpoint-{last}"]


@pytest.mark.slow
def test_killed_at_random_moments(data, undisturbed, tmp_path):
    """kill -9 at 20 moments, each time resumed; the last one may finish."""
    moments = random.Random(0)
    config = small_config(data, tmp_path / "run", resume=True)
    words = [sys.executable, str(ROOT / "observe_r1.py"), "train", *command_line(config)]
    for _ in range(20):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=moments.uniform(4, 12))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    observe_r1.train(config)
    assert_same(tmp_path / "run", undisturbed)
