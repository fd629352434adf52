"""Plumbing: other people's data, processes, a faster cache, logs, checkpoints; not the method.

Under torchrun each process takes every WORLD-th prompt of a step and keeps 1 / WORLD of the fp32
weights, gradients and moments (FSDP2). A checkpoint is a model folder plus optimiser, schedule and
position, and is there whole or not at all.
"""
import hashlib
import json
import os
import re
import shutil
import signal
import sys
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL.Image import DecompressionBombError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed import fsdp
from torch.distributed.checkpoint import state_dict as dcp
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints

from report import rollout_row, write_report
from rewards import extract_answer

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # by torchrun
FULL = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=WORLD > 1)
FREE = {"resume", "config", "output_dir", "save_steps", "keep_checkpoints", "eval_steps",
        "cache_gb"}  # options that may change when a run goes on

# ---------------------------------------------------------------------------------------- problems
# Data sets disagree on column names: the table lists what each of ours is called elsewhere, the
# preferred name first.

COLUMNS = {
    "id": ("id", "pid", "ID", "question_id", "sample_index", "index", "problem_id"),
    "images": ("images", "decoded_image", "image", "image_path", "img", "image_1", "file_name"),
    "question": ("question", "problem", "query", "prompt", "message", "messages"),
    "answer": ("answer", "solution", "ground_truth", "gold", "label"),
    "options": ("options", "choices", "option"),
    "category": ("category", "subject", "subfield", "knowledge concept"),
}
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}

def load_problems(source: str, split: str = "train", check=None) -> datasets.Dataset:
    """Read any common layout into columns id, images, question, answer (and ladder scores).

    source: hub id, folder, or file of a type in READERS; picture paths start at its folder. A
    ValueError names the first row that cannot be used: no or damaged picture, empty or impossible
    answer, or whatever check(problem) raises it for.
    """
    path, reader = Path(source), READERS.get(Path(source).suffix.lower())
    try:
        raw = datasets.load_dataset(
            reader or source, split=split, data_files=str(path) if reader else None)
    except (FileNotFoundError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(f"{source}: cannot be read: {error.__cause__ or error}") from error
    names = {ours: next((name for name in theirs if name in raw.column_names), None)
             for ours, theirs in COLUMNS.items()}
    for ours in ("question", "answer"):
        if names[ours] is None:
            raise ValueError(f"{source}: no column {COLUMNS[ours]}, only {raw.column_names}")
    scores = [n for n in ("difficulty", "complexity", "stage") if n in raw.column_names]
    features = dict.fromkeys(("id", "question", "answer", "category"), datasets.Value("string"))
    features |= {"images": datasets.List(datasets.Image()), **{n: raw.features[n] for n in scores}}
    for name, feature in raw.features.items():  # pictures stay bytes or a path until looked at
        if isinstance(feature, datasets.Image):
            raw = raw.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            raw = raw.cast_column(name, datasets.List(datasets.Image(decode=False)))
    read = partial(_read_row, names=names, folder=path.parent if reader else path, check=check)
    return raw.map(  # never from the cache: a picture mended on disk must be looked at again
        read, with_indices=True, remove_columns=[n for n in raw.column_names if n not in scores],
        features=datasets.Features(features), load_from_cache_file=False, desc=path.name)

def _read_row(row: dict, index: int, names: dict, folder: Path, check) -> dict:
    """One row in our columns, after a look at all that training will need of it."""
    value = {ours: row[name] if name else None for ours, name in names.items()}
    out = {"id": str(index if value["id"] is None else value["id"]), "images": [],
           "category": str(value["category"] or "")}
    try:
        question, pictures = _read_message(value["question"])
        if names["images"] == "image_1":  # one column for each picture
            pictures = [row[name] for name in sorted(row) if re.fullmatch(r"image_\d+", name)]
        elif names["images"]:
            pictures = value["images"] if isinstance(value["images"], list) else [value["images"]]
        for picture in filter(None, pictures):
            if isinstance(picture, str):
                picture = {"path": str(folder / picture.removeprefix("file://")), "bytes": None}
            out["images"].append(picture)
        out["question"], out["answer"] = _add_options(question, value["answer"], value["options"])
        if not out["question"].strip() or not out["answer"]:
            raise ValueError("the question or the answer is empty")
        images = [datasets.Image().decode_example(picture) for picture in out["images"]]
        if check is not None:
            check(out | {"images": images})
    except (ValueError, OSError, SyntaxError, DecompressionBombError) as error:  # ours and PIL's
        raise ValueError(f"row {index} (id {out['id']}) cannot be used: {error}") from error
    return out

def _read_message(question) -> tuple[str, list]:
    """Text and pictures of a plain question or of chat messages (a list, or its JSON string)."""
    if isinstance(question, str) and question.lstrip().startswith('[{"'):
        question = json.loads(question)
    messages = question if isinstance(question, list) else [{"role": "user", "content": question}]
    contents = [message["content"] for message in messages if message["role"] == "user"]
    parts = [part for content in contents for part in (
        content if isinstance(content, list) else [{"text": str(content or "")}])]
    text = "\n".join(part["text"] for part in parts if part.get("text"))
    text = re.sub(r"<image\s?(\d*)>", lambda mark: mark[1] and f"picture {mark[1]}", text)
    return text.strip(), [part["image"] for part in parts if part.get("image")]

def _add_options(question: str, answer, options) -> tuple[str, str]:
    """Append lettered options to the question; a gold that quotes one becomes its letter."""
    answer = "" if answer is None else str(answer).strip()
    if isinstance(options, str):  # ["x", "y"], MMMU's ['x', 'y'], We-Math's "A. x; B. y"
        quoted = re.findall(r"""'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)\"""", options)
        options = [re.sub(r"\\(.)", r"\1", a or b) for a, b in quoted] if options[:1] == "[" else (
            re.split(r"(?:^|;)\s*[A-Z][.)]\s*", options)[1:])
    if not options:
        return question, answer
    texts = [str(o).strip() for o in (options.values() if isinstance(options, dict) else options)]
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:len(texts)]
    letter = letters[texts.index(answer)] if answer in texts else answer.strip("(). ").upper()
    if len(letter) != 1 or letter not in letters:
        raise ValueError(f"the answer {answer!r} is none of the options {texts}")
    return "\n".join([question, *(f"({a}) {b}" for a, b in zip(letters, texts))]), letter

def eight_bit(image):
    """A picture that qwen-vl-utils shows right: 16 bits scaled down, transparency made explicit."""
    if image.mode.startswith("I"):
        return image.convert("I").point(lambda value: value / 257).convert("L")
    return image.convert("RGBA") if image.has_transparency_data else image

# --------------------------------------------------------------------------------------- processes
def join_processes() -> None:
    """Meet the other processes that torchrun started, if it did."""
    if "RANK" in os.environ and not torch.distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group()

def gather(value) -> list:
    """The values of all processes, in the order of their ranks, on each of them."""
    values = [value] * WORLD
    if WORLD > 1:
        torch.distributed.all_gather_object(values, value)
    return values

def shard(model, config):
    """Share the model out under torchrun. `model.run(f, ...)` is f(...) with the weights there.

    FSDP collects the weights of a layer when it runs, in bf16 on a GPU, and those outside of layers
    when the whole model is called. We call its parts, so `run` takes the place of that call.
    """
    def run(function, *arguments):  # gradients of all weights, even of a tower that saw no picture
        vision = [p for p in model.model.visual.parameters() if p.requires_grad]
        return function(*arguments) + 0 * sum(p.flatten()[0] for p in vision)

    model.run = lambda function, *arguments: function(*arguments)
    if torch.distributed.is_initialized():
        model.run = run
        gpu = torch.cuda.is_available()
        how = {"mp_policy": fsdp.MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if gpu else None, reduce_dtype=torch.float32)}
        if config.cpu_offload:
            how["offload_policy"] = fsdp.CPUOffloadPolicy(pin_memory=gpu)
        for part in (*model.model.language_model.layers, model):
            fsdp.fully_shard(part, **how)
        fsdp.register_fsdp_forward_method(model, "run")
    return model

@contextmanager
def gathered(model):
    """Inside, every process has all weights: sampling takes as many passes as it likes."""
    parts = [part for part in model.modules() if isinstance(part, fsdp.FSDPModule)]
    if parts:
        model.set_reshard_after_forward(False)
        model.run(lambda: 0)  # FSDP wants its first call to be one of the whole model
    for part in parts:
        part.unshard()
    yield
    for part in parts:
        part.reshard()
        part.set_reshard_after_forward(True, recurse=False)

# ------------------------------------------------------------------------------------------- cache
class RoomyLayer(DynamicLayer):
    """Keys and values [N,heads,T,size] of a layer, in buffers with room for tokens to come.

    The parent's torch.cat copies all of them for each token. This is exact: attention sees the same
    values in the same shapes, and only the strides differ.
    """
    ROOM = 128  # tokens

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        self.buffers = [self.keys, self.values]

    def update(self, key_states, value_states, *args, **kwargs):
        key_states = key_states.to(value_states.dtype)  # rope makes fp32 of them, attention bf16
        T = self.get_seq_length()
        if T == 0:  # the prompt, before it is repeated
            return super().update(key_states, value_states)
        if T == self.buffers[0].shape[2]:
            self.buffers = [pad(buffer, (0, 0, 0, self.ROOM)) for buffer in self.buffers]
        for buffer, new in zip(self.buffers, (key_states, value_states)):
            buffer[:, :, T:T + 1] = new
        self.keys, self.values = (buffer[:, :, :T + 1] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        T = self.get_seq_length()
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self.keys, self.values = (buffer[:, :, :T] for buffer in self.buffers)

# --------------------------------------------------------------------------------- logs and signals
def read_log(file: Path, keep) -> list[dict]:
    """The first keep(rows) rows of a .jsonl file; the rest is cut off, so that no row comes twice.

    A kill may leave half a line, or rows of work that is going to be done again.
    """
    file.touch()
    lines = [n for n in file.read_bytes().splitlines(keepends=True) if n.endswith(b"\n")]
    rows = [json.loads(line) for line in lines]
    count = keep(rows)
    os.truncate(file, sum(map(len, lines[:count])))
    return rows[:count]

def cut_logs(output: Path, step: int) -> None:
    """Cut what a run logged after `step`; what it summed up, if it did, is no longer true."""
    for log in ("metrics.jsonl", "rollouts.jsonl"):
        read_log(output / log, lambda rows: sum(row["step"] <= step for row in rows))
    (output / "summary.json").unlink(missing_ok=True)

def append_log(file: Path, rows: list[dict]) -> None:
    """Add rows to a .jsonl file."""
    with open(file, "a") as log:
        log.writelines(json.dumps(row) + "\n" for row in rows)

def check_options(c) -> None:
    """ValueError for options of `train` that contradict each other, with the arithmetic."""
    left = c.prompts_per_step % c.minibatch_prompts
    for wrong, why in (
        (c.num_generations < 2, f"--num_generations {c.num_generations}: advantages compare the "
         "responses of a group, so it takes 2 or more"),
        (c.temperature <= 0, f"--temperature {c.temperature} makes all responses of a group equal"),
        (left, f"--prompts_per_step {c.prompts_per_step} is no multiple of --minibatch_prompts "
         f"{c.minibatch_prompts}: {left} would be left over"),
        (c.prompts_per_step < WORLD, f"--prompts_per_step {c.prompts_per_step}: {WORLD} processes"),
        (c.min_pixels > c.max_pixels, f"--min_pixels {c.min_pixels} > --max_pixels {c.max_pixels}"),
        (c.bonus and c.min_length >= c.max_new_tokens, f"--min_length {c.min_length} >= "
         f"--max_new_tokens {c.max_new_tokens}: no response can get the bonus (--bonus 0)"),
        (c.eval_steps and not c.eval_data, f"--eval_steps {c.eval_steps} needs --eval_data"),
        (c.cpu_offload and "RANK" not in os.environ,
         "--cpu_offload needs `torchrun --nproc_per_node 1 observe_r1.py`, also for one process"),
    ):
        if wrong:
            raise ValueError(why)

def stop_on_signals(state) -> None:
    """Ctrl-C, or the end of a machine's loan: finish the step, save, leave. Twice: at once."""
    def stop(*_):
        state.stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)

def log_step(progress, state, problems, rollouts, scores, advantages, metrics, config) -> None:
    """A line on the screen, a line in metrics.jsonl, two groups in rollouts.jsonl."""
    columns = {**scores, "advantage": advantages, "length": rollouts.mask.sum(-1).cpu()}
    tables = gather({name: values.numpy() for name, values in columns.items()})
    difficulty = sum(gather([problem.get("difficulty") for problem in problems]), [])
    if RANK:
        return
    whole = {name: np.concatenate([table[name] for table in tables]) for name in columns}
    metrics = {"step": state.step, **{name: float(whole[name].mean()) for name in scores},
               "response_length": float(whole["length"].mean()),
               "truncated_fraction": float((whole["length"] >= config.max_new_tokens).mean()),
               "zero_weight_fraction": float((whole["advantage"] == 0).all(1).mean()), **metrics}
    if None not in difficulty:  # of the ladder's scores
        metrics["difficulty"] = float(np.mean(difficulty))
    shown = len(problems) if state.skipped else 2  # a batch with NaN gradients is kept for a look
    rows = [rollout_row(state.step, problem, texts, {k: v[i].tolist() for k, v in columns.items()})
            for i, (problem, texts) in enumerate(zip(problems[:shown], rollouts.texts))]
    output = Path(config.output_dir)
    append_log(output / "metrics.jsonl", [metrics])
    append_log(output / "rollouts.jsonl", rows)
    write_report(output)  # reload the page to follow a run
    progress.update()
    short = "reward accuracy format bonus response_length zero_weight_fraction kl eval_accuracy"
    progress.write("  ".join([f"step {state.step}"] + [
        f"{name} {metrics[name]:.3g}" for name in short.split() if name in metrics]))
    if state.step in (1, len(state.steps)):  # a look at what the policy writes, first and last
        for text, *numbers in list(zip(rollouts.texts[0], scores["reward"][0], advantages[0]))[:3]:
            progress.write("    {!r}  reward {:.1f}  advantage {:+.2f}".format(text, *numbers))
    if state.skipped >= 3:
        raise ValueError(f"three updates in a row had NaN or infinite gradients, the last in step "
                         f"{state.step}; its batch ends {output}/rollouts.jsonl")

def write_review(file: Path, problems, rows: list[dict]) -> None:
    """The problems that were never solved, with the commonest answer and a `keep` mark to edit."""
    hardest = [i for i, row in enumerate(rows) if row["difficulty"] == 1]
    answers = [[extract_answer(text) or "" for text in rows[i]["responses"]] for i in hardest]
    if not file.exists():  # one that is there may hold a person's marks
        review = problems.select(hardest).add_column("keep", [True] * len(hardest))
        review.add_column("most_common", [max(a, key=a.count) for a in answers]).to_parquet(file)

# ------------------------------------------------------------------------------------- checkpoints
def identity(config, problems) -> dict:
    """What must be the same when a run goes on: options, the content of the data, processes."""
    digest = hashlib.sha256()
    for row in problems.cast_column("images", datasets.List(datasets.Image(decode=False))):
        digest.update(repr(row).encode())
    options = {name: value for name, value in asdict(config).items() if name not in FREE}
    return options | {"data": digest.hexdigest(), "nproc_per_node": WORLD}

def save_model(state, folder: Path) -> None:
    """Write a folder that from_pretrained and AutoProcessor load; all processes take part."""
    weights = dcp.get_model_state_dict(state.model, options=FULL)
    if RANK == 0:
        state.model.save_pretrained(folder, state_dict=weights)
        state.processor.save_pretrained(folder)

def save_checkpoint(state, config) -> None:
    """Write checkpoint-N. Random states are no part of it: each step seeds its own."""
    output = Path(config.output_dir)
    folder, draft = output / f"checkpoint-{state.step}", output / "unfinished"
    if RANK == 0:
        shutil.rmtree(draft, ignore_errors=True)
    save_model(state, draft)
    moments = dcp.get_optimizer_state_dict(state.model, state.optimizer, options=FULL)
    if RANK == 0:
        tensors = {f"{name} {weight}": value for weight, values in moments["state"].items()
                   for name, value in values.items()}
        save_file(tensors, draft / "optimizer.safetensors")
        names = ("step", "optimizer_step", "skipped", "before", "identity")
        progress = {name: getattr(state, name) for name in names}
        progress["scheduler"] = state.scheduler.state_dict()
        (draft / "state.json").write_text(json.dumps(progress))
        for file in draft.iterdir():
            with open(file) as content:
                os.fsync(content.fileno())
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one, passed over by resume
        draft.rename(folder)
        rotate_checkpoints(output, config.keep_checkpoints)

def last_checkpoint(config) -> Path | None:
    """The newest checkpoint whose files are whole, or None; refuses to write over a run."""
    found = sort_checkpoints(config.output_dir)[::-1]
    if found and not config.resume:
        raise ValueError(f"{config.output_dir} holds checkpoints: --resume true goes on from the "
                         "last one; for a new run name another --output_dir")
    for folder in map(Path, found):
        try:
            json.loads((folder / "state.json").read_text())
            for file in folder.glob("*.safetensors"):
                safe_open(file, "pt").__exit__(None, None, None)  # compares size and header
            return folder
        except (OSError, ValueError, SafetensorError) as error:
            print(f"warning: {folder} is damaged and passed over: {error}", file=sys.stderr)
    return None

def restore(state, folder: Path) -> None:
    """Optimiser, schedule and position of a checkpoint; the model was loaded from it."""
    saved = json.loads((folder / "state.json").read_text())
    new, old = state.identity, saved["identity"]
    if changed := [f"--{name}" for name in new if new[name] != old.get(name)]:
        raise ValueError(f"{folder} cannot go on: {', '.join(changed)} (or the content of the "
                         "file) changed since; put it back, or name another --output_dir")
    moments = dcp.get_optimizer_state_dict(state.model, state.optimizer, options=FULL)
    for name, value in load_file(folder / "optimizer.safetensors").items() if RANK == 0 else ():
        name, weight = name.split(" ")
        moments["state"].setdefault(weight, {})[name] = value
    dcp.set_optimizer_state_dict(state.model, state.optimizer, moments, options=FULL)
    state.scheduler.load_state_dict(saved["scheduler"])
    for group in state.optimizer.param_groups:
        group["lr"] = state.scheduler.get_last_lr()[0]
    for name in ("step", "optimizer_step", "skipped", "before"):
        setattr(state, name, saved[name])
    if RANK == 0:
        print(f"goes on after step {state.step}, from {folder}")
