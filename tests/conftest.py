"""What all tests share: the script on sys.path, no network, the toy's model, problems, options."""

import copy
import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # so small a model is no faster with several

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import datasets
import pytest
import torch
import transformers
from PIL import Image

import observe_r1

TOY = ROOT / "toy"
PICTURES = datasets.List(datasets.Image(decode=False))

# What our own calls must not cause: the message of a deprecation that a library of ours gives.
OUTDATED = r"(?s).*(transformers|torch|datasets|past_key_values|_enable|deprecat|will be removed)"


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; left out unless `-m slow` asks for it")
    # The script's `main` silences it, too: one process needs no process group.
    config.addinivalue_line("filterwarnings", "ignore:torch.distributed is disabled")
    for category in ("FutureWarning", "DeprecationWarning"):
        config.addinivalue_line("filterwarnings", f"error:{OUTDATED}:{category}")


def pytest_collection_modifyitems(config, items):
    """Slow tests run only when -m names them."""
    if "slow" in (config.option.markexpr or ""):
        return
    skip = pytest.mark.skip(reason="pytest -m slow runs it")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def processor():
    size = {"shortest_edge": 784, "longest_edge": 50176}
    return transformers.AutoProcessor.from_pretrained(TOY / "model", size=size)


@pytest.fixture(scope="session")
def toy_model():
    model_class = transformers.Qwen2_5_VLForConditionalGeneration
    return model_class.from_pretrained(TOY / "model", dtype=torch.float32)


@pytest.fixture
def model(toy_model):
    """A copy of the toy's model, so that a test may train it."""
    return copy.deepcopy(toy_model)


@pytest.fixture(autouse=True)
def same_signals():
    """A test ends with the signal handlers with which it began, whatever `train` has set."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def toy_config(**options):
    """The toy's options, small enough for a test."""
    _, config = observe_r1.parse_arguments([])
    small = {"num_generations": 4, "max_new_tokens": 48, "minibatch_prompts": 2}
    return replace(config, **{**small, **options})


def run_config(data, output, **options):
    """A run of a few steps of four prompts, saved every second step, without held-out problems."""
    small = {"data": str(data), "output_dir": str(output), "prompts_per_step": 4}
    small |= {"eval_data": "", "eval_steps": 0, "save_steps": 2, "max_new_tokens": 128}
    return toy_config(**{**small, "overwrite": False, **options})


@pytest.fixture
def config():
    return toy_config()


def toy_rows(name, chosen):
    """Some rows of a file of the toy, their pictures encoded."""
    table = datasets.Dataset.from_parquet(str(TOY / f"{name}.parquet"))
    return table.cast_column("images", PICTURES).select(chosen).to_list()


def toy_problems():
    """One, three and two digits, a question without a picture and one with two."""
    rows = toy_rows("heldout", [0, 2, 1])
    for row in rows:
        row["images"] = [Image.open(io.BytesIO(stored["bytes"])) for stored in row["images"]]
    strip, tall = rows[0]["images"][0], Image.linear_gradient("L").resize((84, 56))
    text = {"id": "text", "images": [], "question": "What is 3+4?", "answer": "7"}
    # A picture of several rows takes fewer rope positions than tokens: 6 tokens, 3 positions.
    two = {"id": "two", "images": [strip, tall], "question": "What is the sum?", "answer": "9"}
    return [{**problem, "row": row} for row, problem in enumerate([*rows, text, two])]


@pytest.fixture
def problems():
    return toy_problems()


@pytest.fixture
def few(tmp_path):
    """24 toy problems with scores of old, one of them with a gold that no rule can check."""
    rows = toy_rows("ladder", range(0, 960, 40))
    rows[3]["answer"] = "N/A"
    return write_parquet(tmp_path / "raw.parquet", rows)


def write_parquet(file, rows):
    """Rows with embedded pictures ({"bytes", "path"}) in the script's format."""
    table = datasets.Dataset.from_list(rows)
    if "images" in table.column_names:
        table = table.cast_column("images", PICTURES)
    table.to_parquet(str(file))
    return str(file)


def write_jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def read_jsonl(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def command_line(config):
    """The options of a Config as words for a command line."""
    return [f"--{name}={value}" for name, value in vars(config).items() if value != ""]


def run_python(*words, cwd, timeout=170, **environment):
    """Run Python in a process of its own, on one thread."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        check=False,
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=timeout,
    )


def run_script(*words, cwd, **options):
    """Run the script in a process of its own."""
    return run_python(ROOT / "observe_r1.py", *words, cwd=cwd, **options)


def torchrun(*words, cwd, processes=2, **options):
    """Run a script in several processes."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes)
    return run_python(*launch, *words, cwd=cwd, **options)
