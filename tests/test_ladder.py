"""The ladder command and eval: counts, scores, kills, intervals, a model as it was trained."""

import json
import math
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import TOY, read_jsonl, run_config, toy_rows, write_parquet

import observe_r1
import rewards
from observe_r1 import accuracy_interval, parse_arguments

# --------------------------------------------------------------------------------- the whole ladder


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """16 toy problems with scores of old: one gold that no rule can check, one never solved."""
    rows = toy_rows("ladder", range(0, 960, 60))
    rows[3]["answer"], rows[7]["answer"] = "N/A", "31415"
    return write_parquet(tmp_path_factory.mktemp("data") / "raw.parquet", rows)


def ladder_config(data, output, **options):
    return run_config(data, output, **{"num_generations": 8, "max_new_tokens": 64, **options})


@pytest.fixture(scope="module")
def built(raw, tmp_path_factory):
    """A ladder of eight responses a problem."""
    output = tmp_path_factory.mktemp("ladder")
    summary = observe_r1.ladder(ladder_config(raw, output))
    clean, scores = (read_jsonl(output / f"{name}.jsonl") for name in ("clean", "scores"))
    return SimpleNamespace(output=output, summary=summary, clean=clean, scores=scores)


def read_ladder(output):
    file = str(output / "ladder.parquet")
    return datasets.Dataset.from_parquet(file, cache_dir=str(output / "cache"))


def test_the_counts_of_a_ladder_add_up(built):
    counts, rows = built.summary, read_ladder(built.output)
    assert counts == json.loads((built.output / "summary.json").read_text())
    assert counts["raw"] == 16 and counts["checkable"] == 15 == len(built.clean)
    assert 3 not in {row["row"] for row in built.clean}  # its gold cannot be checked
    assert all(len(row["responses"]) == 1 for row in built.clean)  # greedily, once
    unsolved = {row["row"] for row in built.clean if row["accuracy"] == [0]}
    assert {row["row"] for row in built.scores} == unsolved
    assert counts["not_solved_without_reasoning"] == len(unsolved) < 15
    assert len(rows) == counts["ladder"] == len(set(rows["id"]))
    assert counts["stages"] == [list(rows["stage"]).count(n) for n in range(9)]
    assert list(rows["stage"]) == sorted(rows["stage"])


def test_difficulty_and_complexity_are_those_of_the_recorded_responses(built, raw):
    scores = {row["id"]: row for row in built.scores}
    pictures = {row["id"]: row["images"] for row in datasets.Dataset.from_parquet(raw)}
    for row in read_ladder(built.output):
        score = scores[row["id"]]
        right = [rewards.accuracy_reward(text, row["answer"]) for text in score["responses"]]
        assert len(right) == 8 and score["accuracy"] == right
        assert row["difficulty"] == 1 - sum(right) / 8
        assert row["complexity"] == sum(score["response_length"]) / 8
        assert row["images"] == pictures[row["id"]]


def test_never_solved_problems_are_listed_with_the_commonest_answer(built):
    never = read_jsonl(built.output / "never_solved.jsonl")
    assert {row["row"] for row in never} == {
        row["row"] for row in built.scores if not any(row["accuracy"])
    }
    assert len(never) == built.summary["never_solved"]
    assert "31415" in [row["answer"] for row in never]
    for row in never:
        answers = [rewards.extract_answer(text) for text in row["responses"]]
        assert answers.count(row["commonest"]) == max(map(answers.count, answers))


def test_a_ladder_can_be_trained_on(built, tmp_path):
    config = run_config(built.output / "ladder.parquet", tmp_path / "run", max_steps=1)
    assert observe_r1.train(config)["steps"] == 1
    (line,) = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert 0 < line["difficulty"] <= 1


def test_a_killed_ladder_goes_on_with_the_same_scores(raw, built, tmp_path, monkeypatch):
    """kill -9 leaves whole batches and perhaps half a line."""
    score, calls = observe_r1.score_rollouts, []

    def fail(*arguments):
        calls.append(0)
        if len(calls) == 7:  # in the third batch of responses, after four of cleaning
            raise RuntimeError("power cut")
        return score(*arguments)

    monkeypatch.setattr(observe_r1, "score_rollouts", fail)
    config = ladder_config(raw, tmp_path / "out")
    with pytest.raises(RuntimeError, match="power cut"):
        observe_r1.ladder(config)
    file = tmp_path / "out" / "scores.jsonl"
    assert len(read_jsonl(file)) == 8
    with open(file, "a") as log:
        log.write('{"row": 9, "id": "torn')
    config = replace(config, resume=True)
    with pytest.raises(ValueError, match=r"cannot go on: \['temperature'\] changed"):
        observe_r1.ladder(replace(config, temperature=0.5))
    assert observe_r1.ladder(config) == built.summary
    assert len(calls) - 7 == math.ceil(len(built.scores) / 4) - 2  # nothing is scored twice
    for name in ("clean.jsonl", "scores.jsonl", "never_solved.jsonl", "ladder.parquet"):
        pair = [(folder / name).read_bytes() for folder in (tmp_path / "out", built.output)]
        assert pair[0] == pair[1], name


def test_a_ladder_of_nothing_is_counted_and_not_trained_on(tmp_path):
    row = {"images": [], "question": "What is 3+4?", "answer": "N/A"}
    data = write_parquet(tmp_path / "raw.parquet", [row])
    summary = observe_r1.ladder(run_config(data, tmp_path / "out"))
    assert (summary["raw"], summary["checkable"], summary["ladder"]) == (1, 0, 0)
    config = run_config(tmp_path / "out" / "ladder.parquet", tmp_path / "run")
    with pytest.raises(ValueError, match="ladder.parquet: "):
        observe_r1.train(config)


def test_what_is_asked_and_what_stays(tmp_path, monkeypatch):
    """Cleaning is greedy and short; of lengths 2, 23 and 56, all always solved, 2 goes."""
    asked = []

    def score(model, processor, problems, numbers, config, file):
        asked.append(config)
        rows = []
        for row in numbers:
            solved = [row in (1, 2, 3)] * 8 if config.num_generations == 8 else [0]
            lengths = [(40, 23, 2, 56, 9, 7)[row]] * 8
            score = {"accuracy": solved, "response_length": lengths, "responses": [""]}
            rows.append({"row": int(row), **score})
        return rows

    monkeypatch.setattr(observe_r1, "score_problems", score)
    monkeypatch.setattr(observe_r1, "load_model", lambda *arguments: None)
    data = write_parquet(tmp_path / "raw.parquet", toy_rows("heldout", range(6)))
    for cap in (8192, 100):
        config = ladder_config(data, tmp_path / str(cap), max_new_tokens=cap)
        summary = observe_r1.ladder(config)
        clean, scored = asked[-2:]
        assert (clean.max_new_tokens, clean.num_generations) == (min(cap, 256), 1)
        assert clean.temperature == observe_r1.GREEDY and "without any reas" in clean.system_prompt
        assert scored == config
    assert summary["ladder"] == 5 and summary["never_solved"] == 3
    rows = read_ladder(tmp_path / "100")
    found = sorted((row["difficulty"], row["complexity"]) for row in rows)
    assert found == [(0, 23), (0, 56), (1, 7), (1, 9), (1, 40)]


# ------------------------------------------------------------------------------------------- eval


def test_eval_writes_what_it_measured(raw, tmp_path):
    data = write_parquet(tmp_path / "raw.parquet", toy_rows("heldout", range(6)))
    for samples in (0, 4):
        config = run_config(data, tmp_path / str(samples), num_samples=samples)
        result = observe_r1.evaluate_model(config)
        assert result == json.loads((tmp_path / str(samples) / "eval.json").read_text())
        rows = read_jsonl(tmp_path / str(samples) / "responses.jsonl")
        right, form = [], []
        for row in rows:
            right.append(
                [rewards.accuracy_reward(text, row["answer"]) for text in row["responses"]]
            )
            form.append([rewards.format_reward(text) for text in row["responses"]])
        assert np.shape(right) == (6, samples or 1) and result["n"] == 6
        assert result["accuracy"] == pytest.approx(np.mean(right), abs=1e-4)
        assert result["format"] == pytest.approx(np.mean(form), abs=1e-4)
        length = np.mean([row["response_length"] for row in rows])
        assert result["response_length"] == pytest.approx(length, abs=1e-4)
        interval = accuracy_interval(np.mean(right), len(rows))
        assert result["interval"] == pytest.approx(interval, abs=1e-4)
        for k, chance in result["pass_at_k"].items():
            every = [np.mean([max(some) for some in combinations(row, int(k))]) for row in right]
            assert chance == pytest.approx(np.mean(every), abs=1e-4)
        assert [*result["pass_at_k"]] == [str(k + 1) for k in range(samples or 1)]
    greedy = json.loads((tmp_path / "0" / "eval.json").read_text())
    config = run_config(data, tmp_path / "again", num_samples=0, seed=5)
    assert observe_r1.evaluate_model(config) == greedy  # the likeliest tokens know no seed


def test_the_interval_is_wilsons():
    for accuracy, wanted in ((1, (0.7225, 1)), (0, (0, 0.2775)), (0.9, (0.5958, 0.9821))):
        assert accuracy_interval(accuracy, 10) == pytest.approx(wanted, abs=2e-4)


def test_a_model_is_measured_as_it_was_trained(tmp_path, monkeypatch):
    """final/ carries the limits and the prompt of its training; options that are given win."""
    shaped = {"system_prompt": "Look.", "min_pixels": 20000, "max_pixels": 50000, "observe": False}
    data = write_parquet(tmp_path / "raw.parquet", toy_rows("heldout", range(4)))
    config = run_config(data, tmp_path / "run", max_steps=1, **shaped)
    seen, encode = [], observe_r1.encode_prompts

    def encoded(problems, processor, config):
        prompts = encode(problems, processor, config)
        rows = [problem["row"] for problem in problems]
        seen.append(dict(zip(rows, prompts, strict=True)))
        return prompts

    monkeypatch.setattr(observe_r1, "encode_prompts", encoded)
    observe_r1.train(config)
    words = ["--model", str(tmp_path / "run" / "final"), "--data", data, "--max_new_tokens=4"]
    words += ["--output_dir", str(tmp_path / "out")]
    observe_r1.evaluate_model(parse_arguments(["eval", *words])[1])
    trained, measured = seen
    assert trained
    for row, prompt in trained.items():
        for name, values in prompt.items():
            assert torch.equal(values, measured[row][name]), name
    words += ["--min_pixels=784", "--overwrite=true"]
    observe_r1.evaluate_model(parse_arguments(["eval", *words])[1])
    areas = [prompts[0]["image_grid_thw"].prod() * 14**2 for prompts in seen[1:]]
    assert areas[1] < 20000 <= areas[0]


def test_the_toy_is_measured_at_its_own_limits():
    found = parse_arguments(["eval", "--model", str(TOY / "model"), "--data", "x"])[1]
    assert (found.min_pixels, found.max_pixels) == (784, 50176)
