"""Several processes: they learn what one learns, never wait for ever, stop together, go on."""

import importlib.util
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import (
    TOY,
    read_jsonl,
    run_config,
    torchrun,
    toy_config,
    toy_problems,
    toy_rows,
    write_parquet,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import observe_r1
from observe_r1 import Policy, Rollouts, gather

FEW = "few.parquet"


def uneven_config(output, **options):
    """Three steps of three prompts: two for the first process, one for the second."""
    small = {"prompts_per_step": 3, "minibatch_prompts": 3, "save_steps": 1, "max_new_tokens": 48}
    return run_config(FEW, output, **{**small, **options})


WAYS = {  # of training
    "all": {"gradient_checkpointing": True},
    "lora": {"lora_rank": 4, "gradient_checkpointing": False},
}
if not importlib.util.find_spec("peft"):  # the requirements do not ask for it
    del WAYS["lora"]


def learn(name):
    """Two optimiser steps on the prompts of this process: (metrics, all weights).

    SGD moves the weights in proportion to the gradient, which is cut to a norm of .2.
    """
    same = {"max_grad_norm": 0.2, "token_budget": 150, "learning_rate": 0.1}
    config = uneven_config(f"{name}-{observe_r1.WORLD}", **same, **WAYS[name])
    state = observe_r1.prepare(config, observe_r1.rollout)
    trained = [p for p in state.policy.parameters() if p.requires_grad]
    state.optimizer = torch.optim.SGD(trained)
    whole = torch.load("rollouts.pt", weights_only=False)
    mine = slice(observe_r1.RANK, None, observe_r1.WORLD)
    prompts = observe_r1.encode_prompts(whole["problems"][mine], state.processor, config)
    rollouts = Rollouts(prompts, whole["ids"][mine], whole["mask"][mine], [])
    metrics = observe_r1.update(state, rollouts, whole["advantages"][mine], config)
    how = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return metrics, get_model_state_dict(state.policy, options=how)


def stop_one(step, rank=1, error=None):
    """A rollout in which one process alone gets SIGTERM in a step, or fails."""
    calls = []

    def rollout(*arguments):
        calls.append(0)
        if len(calls) == step and observe_r1.RANK == rank:
            if error:
                raise error
            os.kill(os.getpid(), signal.SIGTERM)
        return observe_r1.rollout(*arguments)

    return rollout


def run(command, config, *rollout):
    """A command, the end of which is kept."""
    try:
        command(config, *rollout)
    except (SystemExit, ValueError) as error:
        Path(f"{config.output_dir}.{observe_r1.RANK}.txt").write_text(str(error))


def in_two_processes():
    """What the processes of the fixture `two` do, in its folder."""
    torch.distributed.init_process_group(observe_r1.BACKENDS)
    torch.distributed.init_process_group = lambda *_, **__: None  # one group for all commands
    assert gather([observe_r1.RANK]) == [0, 1]
    train = observe_r1.train
    run(train, uneven_config("whole"))
    run(train, uneven_config("signal"), stop_one(2))
    run(train, uneven_config("signal", resume=True))
    run(train, uneven_config("by_one", resume=True))
    if "lora" in WAYS:
        run(train, uneven_config("lora", **WAYS["lora"], max_steps=2))
        fp32 = observe_r1.DTYPE, observe_r1.AUTOCAST
        observe_r1.DTYPE, observe_r1.AUTOCAST = (
            torch.bfloat16,
            torch.autocast("cpu", torch.bfloat16),
        )
        run(train, uneven_config("bf16", **WAYS["lora"], max_steps=1))
        observe_r1.DTYPE, observe_r1.AUTOCAST = fp32
    run(train, uneven_config("small", prompts_per_step=1))
    run(observe_r1.ladder, uneven_config("ladder", prompts_per_step=4))
    run(observe_r1.evaluate_model, uneven_config("eval", prompts_per_step=4))
    for name in WAYS:
        metrics, weights = learn(name)
        if observe_r1.RANK == 0:
            torch.save((metrics, weights), f"{name}.pt")
    train(uneven_config("failing"), stop_one(1, error=RuntimeError("lost its disk")))


@pytest.fixture(scope="module")
def two(tmp_path_factory, toy_model, processor):
    """A folder in which two processes did all that the tests below look at, in one start."""
    folder = tmp_path_factory.mktemp("two")
    rows = toy_rows("ladder", range(0, 900, 100))
    for row in (rows[1], rows[2], rows[4]):  # in the first step, only one process sees a picture
        row |= {"images": [], "question": "What is 3+4?", "answer": "7"}
    write_parquet(folder / FEW, rows)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.chdir(folder)
        observe_r1.train(uneven_config("by_one"), stop_one(2, rank=0))
    torch.manual_seed(0)
    rollouts = observe_r1.rollout(toy_model, processor, toy_problems(), toy_config())
    advantages = torch.randn(5, 4)
    advantages[1] = 0
    saved = {"ids": rollouts.response_ids, "mask": rollouts.mask, "advantages": advantages}
    torch.save({**saved, "problems": toy_problems()}, folder / "rollouts.pt")
    script = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    (folder / "two.py").write_text(script + "import test_processes as t\nt.in_two_processes()\n")
    result = torchrun(folder / "two.py", cwd=folder)
    (folder / "screen.txt").write_text(result.stdout + result.stderr)
    assert (folder / f"{[*WAYS][-1]}.pt").exists(), result.stderr[-5000:]
    (folder / "code.txt").write_text(str(result.returncode))
    return folder


def final_bytes(output):
    return (output / "final" / "model.safetensors").read_bytes()


def metrics_of(output):
    rows = read_jsonl(output / "metrics.jsonl")
    return [{name: row[name] for name in row if name != "seconds"} for row in rows]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft's own call
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_learn_what_one_learns(way, two, monkeypatch):
    """Five prompts, unequal numbers of passes, one group without weight, one without a picture.

    The second process has only the group of weight 0 in the first mini-batch, and only the prompt
    without a picture in the second.
    """
    monkeypatch.chdir(two)
    metrics, weights = learn(way)
    others, learned = torch.load(f"{way}.pt", weights_only=False)
    assert others == pytest.approx(metrics, rel=1e-4, abs=1e-6)
    assert metrics["optimizer_step"] == 2 and metrics["grad_norm"] > 0.2  # so it was clipped
    assert set(learned) == set(weights)
    torch.testing.assert_close(learned, weights, atol=1e-6, rtol=1e-5)
    before = Policy(observe_r1.load_model(toy_config(), torch.float32)).state_dict()
    new = [name for name in weights if "lora_B" in name]  # they began at 0
    moved = [(weights[n] - before.get(n, 0)).abs().max() for n in new or weights]
    assert max(moved) > 1e-3


def test_two_processes_train_and_log_all_responses(two):
    rows = metrics_of(two / "whole")
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[2]["grad_norm"] > 0
    difficulty = [row["difficulty"] for row in toy_rows("ladder", (0, 100, 200))]
    assert rows[0]["difficulty"] == pytest.approx(sum(difficulty) / 3)  # of both processes
    names = safetensors.torch.load_file(TOY / "model" / "model.safetensors").keys()
    for run in ("whole", "lora")[: len(WAYS)]:
        final = safetensors.torch.load_file(two / run / "final" / "model.safetensors")
        assert final.keys() == names and metrics_of(two / run)[1]["kl"] > 0


def test_a_signal_to_one_process_stops_both_and_they_resume_to_the_same_bits(two):
    for rank in range(2):
        message = (two / f"signal.{rank}.txt").read_text()
        assert message == "stopped after step 2; --resume true goes on from it"
    assert metrics_of(two / "signal") == metrics_of(two / "whole")
    assert final_bytes(two / "signal") == final_bytes(two / "whole")


def test_what_one_process_began_two_go_on_with(two):
    assert "goes on after step 2, from by_one/checkpoint-2" in (two / "screen.txt").read_text()
    assert [row["step"] for row in metrics_of(two / "by_one")] == [1, 2, 3]
    assert final_bytes(two / "by_one")


def test_what_two_processes_wrote_one_reads(two, monkeypatch):
    """After the last step nothing is left to train: final/ is the checkpoint's weights."""
    monkeypatch.chdir(two)
    shutil.copytree("whole", "by_two")
    (two / "by_two" / "final" / "model.safetensors").unlink()
    observe_r1.train(uneven_config("by_two", resume=True))
    assert final_bytes(two / "by_two") == final_bytes(two / "whole")


def test_two_processes_build_a_ladder_and_evaluate(two):
    summary = json.loads((two / "ladder" / "summary.json").read_text())
    assert summary["raw"] == summary["checkable"] == 9
    rows = [row["row"] for row in read_jsonl(two / "ladder" / "scores.jsonl")]
    assert rows == sorted(set(rows)) and len(rows) == summary["not_solved_without_reasoning"]
    table = observe_r1.datasets.Dataset.from_parquet(str(two / "ladder" / "ladder.parquet"))
    assert len(set(table["id"])) == len(table) == sum(summary["stages"]) > 0
    rows = read_jsonl(two / "eval" / "responses.jsonl")
    assert [row["row"] for row in rows] == list(range(9))
    result = json.loads((two / "eval" / "eval.json").read_text())
    right = torch.tensor([row["accuracy"] for row in rows]).mean().item()
    assert result["n"] == 9 and result["accuracy"] == pytest.approx(right, abs=1e-4)


def test_an_error_ends_all_processes(two):
    """The other one would otherwise wait for it. A step must have a prompt for each."""
    assert (two / "code.txt").read_text() == "1"
    assert "lost its disk" in (two / "screen.txt").read_text()
    assert not (two / "failing" / "final").exists()
    for rank in range(2):
        message = (two / f"small.{rank}.txt").read_text()
        assert message == "a step of 1 problems for 2 processes"
