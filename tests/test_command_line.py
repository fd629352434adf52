"""Options as people mistype them, mistakes in one line, and the script alone in an empty folder."""

import dataclasses
import json
import os
import re
import shutil
import signal
import sys
from dataclasses import replace

import pytest
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
from observe_r1 import Config, parse_arguments

FIELDS = {field.name: field for field in dataclasses.fields(Config)}


def options_file(folder, content):
    """The words that name a file of options."""
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "options.json").write_text(text)
    return ["--config", str(folder / "options.json")]


# --------------------------------------------------------------------------- where values come from


def test_defaults_are_the_published_run():
    published = {
        "model": "Qwen/Qwen2.5-VL-3B-Instruct",
        "prompts_per_step": 128,
        "num_generations": 8,
        "minibatch_prompts": 8,
        "learning_rate": 1e-6,
        "warmup_ratio": 0.03,
        "max_grad_norm": 1.0,
        "temperature": 1.0,
        "clip_range": 0.2,
        "kl_coef": 0.01,
        "sigma": 1.8,
        "min_length": 100,
        "bonus": 0.2,
        "max_prompt_tokens": 9216,
        "max_new_tokens": 8192,
        "min_pixels": 3136,
        "max_pixels": 2560000,
        "observe": True,
        "dynamic_weight": True,
        "shuffle": False,
    }
    found = dataclasses.asdict(Config())
    assert {name: found[name] for name in published} == published


def test_options_win_over_the_file_over_the_model_over_defaults(tmp_path, capsys):
    shaped = {"observe": False, "system_prompt": "Look.", "min_pixels": 900, "max_pixels": 1000}
    (tmp_path / "observe_r1.json").write_text(json.dumps(shaped))
    file = {"model": str(tmp_path), "max_pixels": 2000, "min_pixels": 950, "seed": 4, "bonus": 0}
    words = ["eval", "--seed", "9", *options_file(tmp_path, file), "--min_pixels=960"]
    command, config = parse_arguments(words)
    assert command == "eval" and config.kl_coef == Config.kl_coef and config.bonus == 0
    assert (config.seed, config.min_pixels, config.max_pixels) == (9, 960, 2000)
    assert (config.observe, config.system_prompt) == (False, "Look.")
    screen = capsys.readouterr().out
    assert "observe_r1.json: {'observe': False" in screen
    assert parse_arguments([*words, "--observe", "true"])[1].observe
    assert parse_arguments(["--data", "x"])[1].max_pixels == Config.max_pixels


def test_without_data_it_is_the_toy_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    command, config = parse_arguments(["--max_steps", "5"])
    assert command == "train" and config.output_dir == "runs/toy" and config.max_steps == 5
    assert config.data == str(TOY / "ladder.parquet") and config.model == str(TOY / "model")
    folders = {parse_arguments([name, "--data=x"])[1].output_dir for name in observe_r1.COMMANDS}
    assert folders == {"runs/train", "runs/ladder", "runs/eval"}


def test_paths_of_a_file_start_at_its_folder(tmp_path, monkeypatch):
    """Where such a file exists; hub ids and paths of the command line stay as they are."""
    (tmp_path / "here" / "model").mkdir(parents=True)
    (tmp_path / "here" / "raw.parquet").write_text("")
    options_file(tmp_path / "here", {"model": "model", "data": "raw.parquet", "eval_data": ""})
    monkeypatch.chdir(tmp_path)
    words = ["train", "--config", "here/options.json"]
    config = parse_arguments(words)[1]
    assert (config.model, config.data, config.eval_data) == ("here/model", "here/raw.parquet", "")
    assert parse_arguments([*words, "--data", "raw.parquet"])[1].data == "raw.parquet"


def test_help_lists_commands_and_options(capsys):
    with pytest.raises(SystemExit) as end:
        parse_arguments(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert not end.value.code and "[train | ladder | eval]" in text
    source = (ROOT / "observe_r1.py").read_text()
    for name, field in FIELDS.items():
        comment = re.search(rf"^    {name}: .* = .*  # (.+)$", source, re.MULTILINE)[1]
        assert re.search(rf"--{name} [^#]*{re.escape(comment)} \(default: ", text), name
        assert ("at least" in comment) == (field.type in (int, float)), name


# ------------------------------------------------------------------------------------ wrong options


@pytest.mark.parametrize("name", FIELDS)
def test_values_of_another_type_or_below_the_least_are_refused(name, tmp_path):
    kind = FIELDS[name].type
    wrong = {str: [1, None], bool: [1, None], int: [8.0, True, None], float: [True, None, [0.5]]}
    wrong = wrong[kind]
    if kind in (int, float):
        least = kind(float(observe_r1.HELP[name].partition("at least ")[2]))
        wrong += [least - 1, float("nan"), float("inf")]
        words = [f"--{name}={least}", "--min_pixels=1"]
        assert getattr(parse_arguments(words)[1], name) == least
        with pytest.raises(ValueError, match=f"--{name} .*at least"):
            parse_arguments([f"--{name}={least - 1}"])
    for value in wrong if name != "config" else ():
        with pytest.raises(ValueError, match=f"--{name} .*{kind.__name__}"):
            parse_arguments(options_file(tmp_path, {name: value}))


@pytest.mark.parametrize("content", ['{"seed": ', "[1]", '"seed"', "", '{"sigmas": 1}'])
def test_files_of_options_that_are_none(content, tmp_path):
    with pytest.raises(
        ValueError, match=r"options.json(: unknown .*sigmas| is not a JSON object: )"
    ):
        parse_arguments(options_file(tmp_path, content))


@pytest.mark.parametrize(
    "words, nearest",
    [
        (["--max_step", "3"], "--max_steps"),
        (["--prompts=3"], "--prompts_per_step"),
        (["tran"], "'train'"),
        (["eval", "--learning_rat", "1"], "--learning_rate"),
        (["train", "ladder"], "ladder is"),
        (["--seed", "1", "2"], "2 is"),
    ],
)
def test_mistyped_words_are_answered_with_the_nearest(words, nearest):
    with pytest.raises(
        ValueError, match=r"is unknown; the nearest are \[.*train \| ladder \| eval"
    ) as error:
        parse_arguments(words)
    assert nearest in str(error.value)


@pytest.mark.parametrize("words", [["--seed", "1.5"], ["--seed"], ["--observe", "maybe"]])
def test_values_that_cannot_be_read(words, capsys):
    """Two lines; the list of all options does not bury them."""
    with pytest.raises(SystemExit) as end:
        parse_arguments(words)
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 2 and words[0] in lines[1]


# ----------------------------------------------------------------------------- mistakes in one line


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four problems of the toy, one of them without a picture."""
    rows = toy_rows("ladder", [0, 1, 2, 3])
    rows[2] |= {"images": [], "question": "What is 3+4?", "answer": "7"}
    return write_parquet(tmp_path_factory.mktemp("data") / "raw.parquet", rows)


@pytest.fixture
def main(monkeypatch):
    """Run `main` with these words; what it says as it ends."""

    def main(*words):
        monkeypatch.setattr(sys, "argv", ["observe_r1.py", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            observe_r1.main()
        return str(end.value.code)

    return main


@pytest.mark.parametrize("command", observe_r1.COMMANDS)
@pytest.mark.parametrize(
    "options, why",
    [
        ({"num_generations": 1}, "--num_generations 1: "),
        ({"temperature": 1e-39}, "--temperature 1e-39: "),
        ({"min_pixels": 10, "max_pixels": 9}, "--min_pixels 10 > --max_pixels 9"),
        ({"eval_steps": 3}, "--eval_steps needs --eval_data"),
        ({"data": "nothing.parquet"}, "No such file .*nothing.parquet"),
        ({"data": str(ROOT / "LICENSE")}, "LICENSE: .*tools/convert.py"),
        ({"eval_data": "nothing.parquet"}, "No such file .*nothing.parquet"),
        ({"model": "owner/name"}, "We couldn't connect"),
        (
            {"max_prompt_tokens": 9},
            r"4 unusable rows(\n  row \d: the prompt has .*--max_pixels.*){4}",
        ),
        ({"resume": True}, "No such file .*config.json"),
        ({"output_dir": str(ROOT / "LICENSE" / "run")}, "Not a directory"),
        ({"output_dir": str(ROOT / "toy")}, "toy is taken: --resume true .*--overwrite true"),
    ],
)
def test_mistakes_are_told_before_the_model_loads(
    options, why, command, data, tmp_path, main, monkeypatch
):
    monkeypatch.setattr(observe_r1, "load_model", None)
    config = replace(run_config(data, tmp_path / "run"), **options)
    message = main(command, *command_line(config))
    assert re.match(f"observe_r1: .*{why}", message), message
    assert "Traceback" not in message


@pytest.mark.parametrize("fault", ["another", "cut"])
def test_models_that_cannot_be_used(fault, data, tmp_path, main):
    model = shutil.copytree(TOY / "model", tmp_path / "model")
    if fault == "cut":
        os.truncate(model / "model.safetensors", 1000)
    else:
        for file in model.glob("*_config.json"):
            file.write_text(file.read_text().replace("Qwen2_5_VLProcessor", "Qwen2VLProcessor"))
    message = main(*command_line(run_config(data, tmp_path / "run", model=str(model))))
    assert re.fullmatch("observe_r1: .*(is not a Qwen2.5-VL|[Hh]eader).*", message), message


@pytest.mark.parametrize("error", [None, ValueError("told"), TypeError("ours")])
def test_each_end_of_a_command_destroys_the_group(error, main, monkeypatch):
    """A mistake of the script itself keeps its traceback."""

    def command(config):
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        if error:
            raise error

    monkeypatch.setitem(observe_r1.COMMANDS, "train", command)
    if isinstance(error, ValueError):
        assert main() == "observe_r1: told"
    else:
        monkeypatch.setattr(sys, "argv", ["observe_r1.py"])
        with pytest.raises(TypeError) if error else pytest.MonkeyPatch.context():
            observe_r1.main()
    assert not torch.distributed.is_initialized()


def test_processes_may_end_hours_apart(data, tmp_path, monkeypatch):
    """The default of ten minutes would end a long rollout."""
    said = {}
    monkeypatch.setattr(observe_r1, "WORLD", 2)
    monkeypatch.setattr(observe_r1, "gather", None)  # what comes after the start
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **how: said.update(how))
    with pytest.raises(TypeError):
        observe_r1.train(run_config(data, tmp_path / "run"))
    assert said["timeout"].total_seconds() >= 12 * 3600


def test_out_of_memory_names_the_tool_that_helps(monkeypatch, main):
    def full(config):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(observe_r1.COMMANDS, "train", full)
    assert re.match(r"(?s)observe_r1: CUDA out of memory\n.*tools/memory.py", main())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", observe_r1.COMMANDS)
def test_a_signal_while_loading_ends_in_one_line(
    command, number, data, tmp_path, main, monkeypatch
):
    def interrupted(*arguments):
        os.kill(os.getpid(), number)

    monkeypatch.setattr(observe_r1, "check_problem", interrupted)
    message = main(command, *command_line(run_config(data, tmp_path / "run")))
    assert message == "observe_r1: stopped; what was written so far is kept"


# ----------------------------------------------------------------- the two files in an empty folder


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """observe_r1.py and rewards.py alone train on a file, in a home of their own."""
    folder = tmp_path_factory.mktemp("alone")
    for file in (ROOT / "observe_r1.py", ROOT / "rewards.py", data):
        shutil.copy(file, folder)
    write_parquet(folder / "held_out.parquet", toy_rows("heldout", range(4)))
    for name in ("home", "tmp"):
        (folder / name).mkdir()
    places = {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), "PYTHONPATH": ""}
    for name in ("HF_HOME", "XDG_CACHE_HOME", "HF_DATASETS_CACHE"):
        places[name] = str(folder / "home" / name)
    steps = {
        "prompts_per_step": 2,
        "save_steps": 1,
        "eval_data": "held_out.parquet",
        "eval_steps": 2,
    }
    config = run_config("raw.parquet", "run", max_new_tokens=64, **steps)
    return folder, run_python("observe_r1.py", *command_line(config), cwd=folder, **places)


def test_a_first_run_ends_well_and_without_a_warning(alone):
    folder, result = alone
    assert result.returncode == 0, result.stderr[-3000:]
    assert not re.search("warn|deprecat|error", result.stdout + result.stderr, re.IGNORECASE)
    assert "2 steps x 2 of 4 problems x 4 responses, 2 optimiser steps" in result.stdout
    metrics = read_jsonl(folder / "run" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2] and "eval_accuracy" in metrics[1]
    assert [row["step"] for row in read_jsonl(folder / "run" / "rollouts.jsonl")] == [1, 1, 2, 2]
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["steps"] == 2 and summary.keys() >= {"accuracy_before", "accuracy_after"}


def test_nothing_is_written_outside_the_run(alone):
    folder, _ = alone
    assert [path for path in (folder / "home").rglob("*") if path.is_file()] == []
    assert list((folder / "tmp").iterdir()) == []
    names = {path.name for path in folder.iterdir()} - {"__pycache__"}
    files = {"observe_r1.py", "rewards.py", "raw.parquet", "held_out.parquet"}
    assert names == {*files, "home", "tmp", "run"}


def test_a_runs_own_config_starts_it_again(alone, monkeypatch):
    folder, _ = alone
    monkeypatch.chdir(folder)
    words = ["--config", "run/config.json", "--output_dir", "again"]
    config = parse_arguments(words)[1]
    written = {**json.loads((folder / "run" / "config.json").read_text()), "output_dir": "again"}
    del written["content"]
    assert {name: getattr(config, name) for name in written} == written


@pytest.mark.slow
def test_the_first_command_of_the_readme(tmp_path):
    """Without arguments, in any folder: the toy learns to add."""
    result = run_python(ROOT / "observe_r1.py", cwd=tmp_path, timeout=1800)
    assert result.returncode == 0, result.stderr[-2000:]
    summary = json.loads((tmp_path / "runs/toy/summary.json").read_text())
    assert summary["accuracy_after"] - summary["accuracy_before"] > 0.3


def test_what_can_teach_nothing_or_measure_nothing_is_said(tmp_path, capsys):
    rows = toy_rows("ladder", range(0, 960, 200))
    data = write_parquet(tmp_path / "data.parquet", rows)
    held_out = write_parquet(tmp_path / "held_out.parquet", rows[:2])
    options = {"eval_data": held_out, "min_length": 128, "gradient_checkpointing": False}
    config = run_config(data, tmp_path / "run", num_samples=1, **options)
    observe_r1.prepare(config, observe_r1.rollout)
    screen = capsys.readouterr().out
    assert "2 held-out problems are training problems as well" in screen
    assert "no response can get the bonus" in screen
