"""Options as people mistype them, errors in one line, and the script alone in an empty folder."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import sys
from typing import Literal, get_origin, get_type_hints

import pytest
import torch
import transformers
from conftest import (
    ROOT,
    TOY,
    command_line,
    read_jsonl,
    run_config,
    run_python,
    write_jsonl,
)
from PIL import Image

import observe_r1
from observe_r1 import Config, parse_arguments

# ------------------------------------------------------------------------- where values come from


def test_options_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "options.json"
    options = {"sigma": 2.5, "seed": 4, "observe": False, "bonus": 0, "order": "random"}
    file.write_text(json.dumps(options))
    words = ["train", "--config", str(file), "--seed", "9", "--order", "ladder"]
    command, config = parse_arguments(words)
    assert command == "train" and config.kl_coef == Config.kl_coef
    assert (config.sigma, config.observe, config.bonus) == (2.5, False, 0)
    assert (config.seed, config.order) == (9, "ladder")
    (again,) = {parse_arguments(["train", "--seed=9", f"--config={file}", *words[5:]])[1].seed}
    assert again == 9  # wherever --config stands
    assert parse_arguments([*words, "--observe", "true", "--sigma=1.8"])[1].observe


def test_paths_of_a_file_start_at_its_folder(tmp_path, monkeypatch):
    """Where such a file exists; hub ids and paths of the command line stay as they are."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "model").mkdir()
    (tmp_path / "here" / "rows.jsonl").write_text("")
    options = {"model": "model", "data": "rows.jsonl", "eval_data": "owner/name"}
    (tmp_path / "here" / "options.json").write_text(json.dumps(options))
    monkeypatch.chdir(tmp_path)
    words = ["eval", "--config", "here/options.json"]
    config = parse_arguments(words)[1]
    assert (config.model, config.data) == ("here/model", "here/rows.jsonl")
    assert config.eval_data == "owner/name"
    assert parse_arguments([*words, "--data", "rows.jsonl"])[1].data == "rows.jsonl"


@pytest.mark.parametrize("command", ["ladder", "eval"])
def test_what_would_run_on_the_cpu_unasked_is_refused(command):
    with pytest.raises(ValueError, match=f"--cpu_offload .*{command} would run on the CPU"):
        parse_arguments([command, "--cpu_offload", "true"])
    assert parse_arguments(["train", "--cpu_offload", "true"])[1].cpu_offload


def test_no_arguments_train_the_toy(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    command, config = parse_arguments([])
    assert command == "train" and config.output_dir == "runs/toy"
    assert config.data == str(TOY / "ladder.parquet") and config.model == str(TOY / "model")


def test_commands_write_into_folders_of_their_own():
    folders = {parse_arguments([command])[1].output_dir for command in observe_r1.COMMANDS}
    assert folders == {"runs/train", "runs/ladder", "runs/eval"}


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
        "order": "ladder",
        "freeze_vision": False,
    }
    found = dataclasses.asdict(Config())
    assert {name: found[name] for name in published} == published


# ------------------------------------------------------------------- types and ranges of every field

FIELDS = {field.name: field for field in dataclasses.fields(Config)}
HINTS = get_type_hints(Config)  # without the ranges


def wrong_types(name):
    """Values that JSON can hold and that are of another type than the field."""
    if get_origin(HINTS[name]) is Literal:
        return ["", "Ladder", 1, None, ["ladder"]]
    return {
        str: [1, True, None, ["a"]],
        bool: ["true", 1, 0, None],
        int: ["8", 8.0, True, None, [8]],
        float: ["0.5", True, None, [0.5]],
    }[HINTS[name]]


@pytest.mark.parametrize("name", FIELDS)
def test_values_of_another_type_are_refused(name, tmp_path):
    assert type(getattr(Config(), name)) in (HINTS[name], str)
    for value in wrong_types(name):
        with pytest.raises(ValueError, match=rf"--{name} .* is (no|none of) "):
            Config(**{name: value})
    if name != "config":
        (tmp_path / "options.json").write_text(json.dumps({name: wrong_types(name)[0]}))
        with pytest.raises(ValueError, match=rf"options.json: --{name} "):
            parse_arguments(["train", "--config", str(tmp_path / "options.json")])


RANGES = {  # what lies outside, what lies just inside
    "seed": ([-1], [0]),
    "max_steps": ([-1], [0]),
    "prompts_per_step": ([0, -8], [1]),
    "num_generations": ([0, -1], [1]),
    "temperature": ([-0.1, math.nan], [0.0]),
    "max_prompt_tokens": ([0], [1]),
    "max_new_tokens": ([0, -1], [1]),
    "min_pixels": ([0, -1], [1]),
    "max_pixels": ([0, -1], [1]),
    "cache_gb": ([0.0, -1.0, math.nan], [0.001]),
    "min_length": ([-1], [0]),
    "bonus": ([-0.2, math.nan], [0.0]),
    "sigma": ([0.0, -1.8, math.nan], [0.1]),
    "minibatch_prompts": ([0, -1], [1]),
    "learning_rate": ([0.0, -1e-6, math.nan], [1e-9]),
    "warmup_ratio": ([-0.1, 1.1, math.nan], [0.0, 1.0]),
    "max_grad_norm": ([0.0, -1.0, math.nan], [0.5]),
    "clip_range": ([0.0, -0.2, math.nan], [0.1]),
    "kl_coef": ([-0.01, math.nan], [0.0]),
    "lora_rank": ([-1], [0]),
    "token_budget": ([0, -1], [1]),
    "eval_steps": ([-1], [0]),
    "num_samples": ([-1], [0]),
    "save_steps": ([-1], [0]),
    "keep_checkpoints": ([-1], [0]),
}


def test_every_number_has_a_range():
    assert set(RANGES) == {name for name in FIELDS if HINTS[name] in (int, float)}


@pytest.mark.parametrize("name", RANGES)
def test_values_outside_their_range_are_refused(name, tmp_path):
    outside, inside = RANGES[name]
    for value in outside:
        with pytest.raises(ValueError, match=f"--{name} .* outside the range"):
            parse_arguments(["train", f"--{name}={value}"])
        (tmp_path / "options.json").write_text(json.dumps({name: value}))  # NaN, too
        with pytest.raises(ValueError, match=f"--{name} .* outside the range"):
            parse_arguments(["train", "--config", str(tmp_path / "options.json")])
    for value in inside:
        assert getattr(parse_arguments(["train", f"--{name}={value}"])[1], name) == value


def test_a_whole_number_is_a_number():
    assert Config(sigma=2).sigma == 2.0 and type(Config(sigma=2).sigma) is float


@pytest.mark.parametrize(
    "content, why",
    [
        ('{"sigmas": 1}', "sigmas"),
        ('{"seed": ', "Expecting value"),
        ("[1]", "list"),
        ('"seed"', "str"),
        ("", "Expecting value"),
    ],
)
def test_files_of_options_that_are_none(tmp_path, content, why):
    (tmp_path / "options.json").write_text(content)
    with pytest.raises(ValueError, match=f"--config .*options.json: .*{why}"):
        parse_arguments(["train", "--config", str(tmp_path / "options.json")])


@pytest.mark.parametrize(
    "words, why",
    [
        (["--sigmas", "1"], "--sigmas"),
        (["--max_step", "3"], "--max_step"),  # an abbreviation of --max_steps
        (["--prompts", "3"], "--prompts"),
        (["extra"], "extra"),
        (["--seed", "1", "2"], "2"),
    ],
)
def test_unknown_options_are_refused(words, why):
    with pytest.raises(ValueError, match=f"not used .*{why}"):
        parse_arguments(["train", *words])


@pytest.mark.parametrize(
    "words",
    [["--seed", "1.5"], ["--seed"], ["--observe", "maybe"], ["--order", "up"], ["--sigma", "x"]],
)
def test_values_that_cannot_be_read(words, capsys):
    """The two lines name the option; the list of all options does not bury them."""
    with pytest.raises(SystemExit) as error:
        parse_arguments(["train", *words])
    lines = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and len(lines) == 2 and words[0] in lines[1]


@pytest.mark.parametrize("words", [["fly"], ["--data", "x"], ["--help"], ["Train"]])
def test_without_a_command_the_usage_is_told(words):
    with pytest.raises(ValueError, match=r"usage: .*train \| ladder \| eval"):
        parse_arguments(words)


@pytest.mark.parametrize("command", observe_r1.COMMANDS)
def test_help_has_a_line_for_every_field(command, capsys):
    with pytest.raises(SystemExit) as error:
        parse_arguments([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    source = (ROOT / "observe_r1.py").read_text()
    assert not error.value.code
    for name in FIELDS:
        comment = re.search(rf"^    {name}: .* = .*  # (.+)$", source, re.MULTILINE)[1]
        assert re.search(rf"--{name} [^#]*{re.escape(comment)} \(default: ", text), name


# --------------------------------------------------------------------------- errors in one line


@pytest.fixture
def data(tmp_path):
    """Eight problems, half of them with a picture, and four that are held out."""
    Image.new("L", (56, 56), 200).save(tmp_path / "grey.png")
    rows = [{"question": f"What is {k} + 1?", "answer": k + 1} for k in range(12)]
    for row in rows[::2]:
        row["image"] = "grey.png"
    write_jsonl(tmp_path / "held_out.jsonl", rows[8:])
    return write_jsonl(tmp_path / "rows.jsonl", rows[:8])


@pytest.fixture
def command(monkeypatch):
    """Run the script's `main` here; what it says as it ends, in one line."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["observe_r1.py", *map(str, words)])
        with pytest.raises(SystemExit) as error:
            observe_r1.main()
        message = str(error.value.code)
        assert message.startswith("observe_r1: ")
        return message

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "options, why",
    [
        ({"num_generations": 1}, "--num_generations 1: "),
        ({"temperature": 0.0}, "--temperature 0 .* equal"),
        ({"prompts_per_step": 10, "minibatch_prompts": 4}, "10 is no multiple of .* 4"),
        ({"prompts_per_step": 4, "minibatch_prompts": 8}, "4 is no multiple of .* 8"),
        ({"min_pixels": 10, "max_pixels": 9}, "--min_pixels 10 > --max_pixels 9"),
        ({"min_length": 128}, "--min_length 128 >= --max_new_tokens 128: .*--bonus 0"),
        ({"eval_steps": 3}, "--eval_steps needs --eval_data"),
        ({"data": ""}, "--data is missing"),
        ({"data": "nothing.jsonl"}, "nothing.jsonl: there is no such file"),
        ({"data": "owner/name"}, "owner/name: cannot be read: .*Hub"),
        ({"eval_data": "nothing.jsonl"}, "nothing.jsonl: there is no such file"),
        ({"split": "test"}, 'rows.jsonl: .*"test"'),
        ({"model": "no_model"}, "--model no_model: "),
        ({"model": "owner/name"}, "--model owner/name: "),
        ({"device": "gpu"}, "--device gpu: "),
        ({"device": "xla"}, "--device xla: "),
        ({"max_prompt_tokens": 9}, "8 rows cannot be used:\n.*row 0 .*--max_prompt_tokens is 9"),
    ],
)
def test_mistakes_are_told_before_the_model_loads(
    data, tmp_path, options, why, command, monkeypatch
):
    monkeypatch.setattr(observe_r1, "load_model", None)
    options = {"data": data, "output": tmp_path / "run", **options}
    message = command("train", *command_line(run_config(**options)))
    assert re.search(why, message), message


@pytest.mark.parametrize("name", ["ladder", "eval"])
def test_the_other_commands_tell_mistakes_too(data, tmp_path, name, command, monkeypatch):
    monkeypatch.setattr(observe_r1, "load_model", None)
    options = command_line(run_config("", tmp_path / "run"))
    assert "--data is missing" in command(name, *options)
    options = command_line(run_config(tmp_path / "nothing.csv", tmp_path / "run"))
    assert "there is no such file" in command(name, *options)


def test_other_models_are_refused_by_name(data, tmp_path, command):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "qwen2_vl"}')
    config = run_config(data, tmp_path / "run", model=str(tmp_path / "other"))
    message = command("train", *command_line(config))
    assert re.search("other is a qwen2_vl; only Qwen2.5-VL", message)


def test_an_output_folder_that_cannot_be_written(data, tmp_path, command):
    (tmp_path / "file").write_text("")
    message = command("train", *command_line(run_config(data, tmp_path / "file" / "run")))
    assert re.fullmatch(r"observe_r1: .*(Not a directory|File exists).*", message)


def test_a_damaged_model_is_told_in_one_line(data, tmp_path, command):
    shutil.copytree(TOY / "model", tmp_path / "model")
    os.truncate(tmp_path / "model" / "model.safetensors", 1000)
    config = run_config(data, tmp_path / "run", model=str(tmp_path / "model"))
    assert "\n" not in command("train", *command_line(config))


def test_out_of_memory_names_what_helps(monkeypatch, command):
    def full(config):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(observe_r1.COMMANDS, "train", full)
    message = command("train")
    assert re.search(r"(?s)out of memory.*--lora_rank.*--token_budget, --max_pixels", message)
    for option in re.findall(r"--(\w+)", message):
        assert option in FIELDS


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", observe_r1.COMMANDS)
def test_a_signal_while_loading_ends_in_one_line(
    data, tmp_path, command, monkeypatch, name, number
):
    def interrupted(*arguments, **options):
        os.kill(os.getpid(), number)

    monkeypatch.setattr(observe_r1, "read_row", interrupted)
    message = command(name, *command_line(run_config(data, tmp_path / "run")))
    assert message == "observe_r1: stopped; what was written so far is kept"


def test_mistakes_of_the_script_itself_keep_their_traceback(monkeypatch):
    def wrong(config):
        raise ZeroDivisionError

    monkeypatch.setitem(observe_r1.COMMANDS, "train", wrong)
    monkeypatch.setattr(sys, "argv", ["observe_r1.py", "train"])
    with pytest.raises(ZeroDivisionError):
        observe_r1.main()


# ------------------------------------------------------------------------- the output folder


def test_a_folder_that_holds_a_run_is_refused_by_name(tmp_path):
    """Each file of a run, and a checkpoint; --resume keeps them, --overwrite replaces them."""
    names = ("metrics.jsonl", "summary.json", "eval.json", "scores.0.jsonl", "ladder.parquet")
    for number, name in enumerate((*names, "final/config.json", "checkpoint-3/state.json")):
        folder = tmp_path / str(number)
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("{}")
        (folder / "notes.txt").write_text("mine")
        config = Config(output_dir=str(folder))
        refusal = pytest.raises(ValueError, match=f"{folder} holds a run: .*--overwrite true")
        with refusal, observe_r1.run_folder(config):
            pass
        config.resume = True
        with observe_r1.run_folder(config) as output:
            assert output == folder and (folder / name).exists()
        config.resume, config.overwrite = False, True
        with observe_r1.run_folder(config):  # nothing goes before the new run's input is checked
            assert (folder / name).exists()


def test_overwrite_keeps_what_the_new_run_needs_or_has_not_checked(tmp_path):
    """A mistake in the options, an input inside the folder, an `eval`: the old run stays."""
    shutil.copytree(TOY / "model", tmp_path / "run" / "final")
    (tmp_path / "run" / "summary.json").write_text("{}")
    config = Config(output_dir=str(tmp_path / "run"), overwrite=True)
    rows = [{"question": "What is 3+4?", "answer": "7"}]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    for options, message in (
        ({"data": "nothing.jsonl"}, "no such file"),
        ({"data": data, "eval_data": "nothing.jsonl"}, "nothing.jsonl: there is no such file"),
        ({"model": str(tmp_path / "run" / "final")}, "would delete --model"),
    ):
        with pytest.raises(ValueError, match=message):
            observe_r1.train(
                dataclasses.replace(config, **{"model": str(TOY / "model"), **options})
            )
        assert (tmp_path / "run" / "summary.json").exists()
    model = str(tmp_path / "run" / "final")
    observe_r1.evaluate_model(dataclasses.replace(config, data=data, model=model, max_new_tokens=8))
    names = {path.name for path in (tmp_path / "run").glob("*")}
    assert names >= {"final", "summary.json", "eval.json", "responses.jsonl"}


def test_the_lock_ends_with_the_run(tmp_path):
    """While a run uses the folder, others are refused; afterwards it is free again."""
    config = Config(output_dir=str(tmp_path))
    for _ in range(2):
        with observe_r1.run_folder(config) as output:
            assert output == tmp_path
            with pytest.raises(ValueError, match="is in use"), observe_r1.run_folder(config):
                pass


def test_an_empty_or_foreign_folder_is_taken(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with observe_r1.run_folder(Config(output_dir=str(tmp_path))):
        pass
    with observe_r1.run_folder(Config(output_dir=str(tmp_path / "a" / "b"))) as output:
        assert output.is_dir()


# --------------------------------------------------------------- the two files in an empty folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """observe_r1.py and rewards.py alone train on a file of rows, in a home of its own."""
    folder = tmp_path_factory.mktemp("alone")
    for name in ("observe_r1.py", "rewards.py"):
        shutil.copy(ROOT / name, folder / name)
    home = folder / "home"
    home.mkdir()
    Image.new("L", (56, 56), 200).save(folder / "grey.png")
    rows = [{"question": f"What is {k} + 1?", "answer": k + 1} for k in range(6)]
    rows[0]["image"] = rows[3]["image"] = "grey.png"
    write_jsonl(folder / "rows.jsonl", rows[:4])
    write_jsonl(folder / "held_out.jsonl", rows[4:])
    config = Config(
        model=str(TOY / "model"),
        data="rows.jsonl",
        eval_data="held_out.jsonl",
        output_dir="run",
        prompts_per_step=2,
        minibatch_prompts=1,
        num_generations=2,
        max_new_tokens=16,
        min_length=4,
        max_pixels=50176,
        save_steps=1,
        eval_steps=2,
        dynamic_weight=False,
        learning_rate=1e-3,
    )
    places = {"HOME": str(home), "HF_HOME": str(home / "hf"), "XDG_CACHE_HOME": str(home / "c")}
    places |= {"TMPDIR": str(folder / "tmp"), "PYTHONPATH": ""}
    (folder / "tmp").mkdir()
    words = ("observe_r1.py", "train", *command_line(config))
    return folder, run_python(*words, cwd=folder, **places)


def test_two_files_are_all_that_training_needs(alone):
    folder, result = alone
    assert result.returncode == 0, result.stderr[-3000:]
    run = folder / "run"
    metrics = read_jsonl(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2] and "eval_accuracy" in metrics[1]
    assert [path.name for path in sorted(run.glob("checkpoint-*"))] == [
        "checkpoint-1",
        "checkpoint-2",
    ]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 2 and {"accuracy_before", "accuracy_after"} <= summary.keys()
    assert json.loads((run / "config.json").read_text())["prompts_per_step"] == 2
    trained = [row for row in read_jsonl(run / "rollouts.jsonl") if "held_out" not in row]
    assert [row["step"] for row in trained] == [1, 1, 2, 2]
    for line in ("4 problems with 2 pictures", "2 problems with 0 pictures", "step 2 "):
        assert line in result.stdout + result.stderr


def test_final_is_a_model_that_loads_and_answers(alone, processor, problems, config):
    folder, _ = alone
    model_class = transformers.Qwen2_5_VLForConditionalGeneration
    model = model_class.from_pretrained(folder / "run/final", dtype=torch.float32)
    start = model_class.from_pretrained(TOY / "model", dtype=torch.float32)
    pairs = zip(start.named_parameters(), model.named_parameters(), strict=True)
    moved = [not torch.equal(one, two) for (_, one), (_, two) in pairs]
    assert sum(moved) > 0.9 * len(moved)
    saved = transformers.AutoProcessor.from_pretrained(folder / "run/final")
    config.temperature = 0.0
    texts = [observe_r1.rollout(model, p, problems, config).texts for p in (saved, processor)]
    assert texts[0] == texts[1]


def test_nothing_is_written_outside_the_run(alone):
    """No cache of a library under the user's home, no copy of the data that stays behind."""
    folder, _ = alone
    assert [path for path in (folder / "home").rglob("*") if path.is_file()] == []
    assert list((folder / "tmp").iterdir()) == []
    names = {path.name for path in folder.iterdir()} - {"__pycache__"}
    own = {"observe_r1.py", "rewards.py", "grey.png", "rows.jsonl", "held_out.jsonl"}
    assert names == own | {"home", "tmp", "run"}


def test_the_first_run_prints_no_warning(alone):
    _, result = alone
    assert not re.search("warn|deprecat|Error", result.stdout + result.stderr, re.IGNORECASE)


def test_a_mistake_prints_no_traceback(alone):
    """In a process of its own: one line, whatever the libraries would like to add."""
    folder, _ = alone
    (folder / "broken.jsonl").write_text('{"question": ')
    words = ("train", "--model", TOY / "model", "--data", "broken.jsonl", "--output_dir", "broken")
    result = run_python(folder / "observe_r1.py", *words, cwd=folder)
    assert result.returncode == 1 and result.stdout == ""
    assert re.fullmatch(r"observe_r1: broken.jsonl: cannot be read: .*\n", result.stderr)
    shutil.rmtree(folder / "broken")


@pytest.mark.slow
def test_the_first_command_of_the_readme(tmp_path):
    """Without arguments, in any folder: the toy learns to add."""
    result = run_python(ROOT / "observe_r1.py", cwd=tmp_path, timeout=1800)
    assert result.returncode == 0, result.stderr[-2000:]
    summary = json.loads((tmp_path / "runs/toy/summary.json").read_text())
    assert summary["accuracy_after"] - summary["accuracy_before"] > 0.3
