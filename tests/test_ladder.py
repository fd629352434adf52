"""The ladder command and eval: counts, scores matched by content, several processes, files."""

import io
import json
import os
import random
import signal
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, TOY, command_line, read_jsonl, run_config, torchrun, write_parquet
from PIL import Image

import observe_r1
import rewards


@pytest.fixture(autouse=True)
def same_signals():
    """A test ends with the signal handlers with which it began."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def scores_of(output, name="scores"):
    """All rows of the score files, whichever process wrote them."""
    files = sorted(output.glob(f"{name}.*.jsonl"))
    return [row for file in files for row in read_jsonl(file)]


def levels_by_hand(built):
    level = [round(8 * row["difficulty"]) for row in built]
    return [level.count(n) for n in range(9)]


# --------------------------------------------------------------------------------- the whole command


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """16 toy problems with scores of old, one of them with a gold that no rule can check."""
    rows = observe_r1.load_problems(str(TOY / "ladder.parquet")).select(range(0, 960, 60))
    names = ["id", "images", "question", "answer", "difficulty", "complexity", "stage"]
    rows = rows.select_columns(names).to_list()
    rows[3]["answer"] = "N/A"
    rows[7]["answer"] = "31415"  # checkable, and never solved
    return write_parquet(tmp_path_factory.mktemp("data") / "raw.parquet", rows)


def real_config(data, output, **options):
    return run_config(data, output, **{"num_generations": 8, "max_new_tokens": 64, **options})


@pytest.fixture(scope="module")
def built(raw, tmp_path_factory):
    """A ladder in the default setting of eight responses: (its folder, its summary)."""
    output = tmp_path_factory.mktemp("ladder")
    summary = observe_r1.ladder(real_config(raw, output))
    return output, summary


def test_the_counts_of_a_ladder_add_up(built, raw):
    output, summary = built
    assert summary == json.loads((output / "summary.json").read_text())
    assert summary["raw"] == 16 and summary["uncheckable"] == 1
    parts = ("uncheckable", "solved_without_reasoning", "not_selected", "ladder")
    assert sum(summary[name] for name in parts) == 16
    rows = datasets.Dataset.from_parquet(
        str(output / "ladder.parquet"), cache_dir=str(output / "cache")
    )
    assert len(rows) == summary["ladder"] == len(set(rows["id"]))
    assert len(summary["levels"]) == len(summary["stages"]) == 9
    assert summary["levels"] == levels_by_hand(rows)
    assert summary["stages"] == [list(rows["stage"]).count(n) for n in range(9)]
    assert list(rows["stage"]) == sorted(rows["stage"])
    wanted = {"id", "images", "question", "answer", "difficulty", "complexity", "stage"}
    assert set(rows.column_names) >= wanted


def test_difficulty_and_complexity_are_those_of_the_recorded_responses(built):
    output, _ = built
    scores = {row["id"]: row for row in scores_of(output)}
    rows = observe_r1.load_problems(str(output / "ladder.parquet"))
    raw_pictures = observe_r1.load_problems(str(TOY / "ladder.parquet"))
    raw_pictures = {row["id"]: row["images"] for row in raw_pictures.select(range(0, 960, 60))}
    for row in rows:
        texts = [one["text"] for one in scores[row["id"]]["responses"]]
        right = [rewards.accuracy_reward(text, row["answer"]) for text in texts]
        lengths = [one["length"] for one in scores[row["id"]]["responses"]]
        assert len(right) == 8
        assert row["difficulty"] == 1 - sum(right) / 8
        assert row["complexity"] == sum(lengths) / 8
        assert row["images"][0].tobytes() == raw_pictures[row["id"]][0].tobytes()
    cleaned = {row["id"]: row for row in scores_of(output, "clean")}
    assert len(cleaned) == 15  # all that can be checked, greedily and once
    assert all(len(row["responses"]) == 1 for row in cleaned.values())
    assert set(scores) == {name for name, row in cleaned.items() if row["difficulty"] == 1}


def test_never_solved_problems_are_listed_with_the_commonest_answer(built):
    output, summary = built
    never = read_jsonl(output / "never_solved.jsonl")
    scores = {row["id"]: row for row in scores_of(output)}
    unsolved = {n for n, row in scores.items() if not any(r["accuracy"] for r in row["responses"])}
    assert {row["id"] for row in never} == unsolved and len(never) == summary["never_solved"] >= 1
    assert "31415" in [row["answer"] for row in never]
    for row in never:
        texts = [one["text"] for one in scores[row["id"]]["responses"]]
        answers = [rewards.extract_answer(text) for text in texts]
        assert answers.count(row["commonest"]) == max(answers.count(a) for a in answers)


def test_a_ladder_can_be_trained_on(built, tmp_path):
    output, _ = built
    options = {"max_steps": 1, "save_steps": 0, "order": "sorted"}
    config = run_config(output / "ladder.parquet", tmp_path / "run", **options)
    assert observe_r1.train(config)["steps"] == 1
    (line,) = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert 0 < line["difficulty"] <= 1  # the ladder's own, of four of its rows


def test_a_ladder_of_nothing_is_counted_and_not_trained_on(tmp_path):
    row = {"id": "a", "question": "What is 3+4?", "answer": "N/A", "images": []}
    data = write_parquet(tmp_path / "raw.parquet", [row])
    summary = observe_r1.ladder(run_config(data, tmp_path / "out"))
    assert summary["uncheckable"] == 1 and summary["ladder"] == 0
    config = run_config(tmp_path / "out" / "ladder.parquet", tmp_path / "run")
    with pytest.raises(ValueError, match="ladder.parquet: (holds no problems|cannot be read)"):
        observe_r1.train(config)


# -------------------------------------------------------- scores are matched by content, not position
# The model is replaced: sampling costs nothing, and how often a problem is solved follows from its
# content, so that a score that belongs to another problem shows.


def made_problems(count):
    """Rows whose pictures differ in one pixel row, and whose questions and golds differ too."""
    rows = []
    for n in range(count):
        picture = Image.new("RGB", (84, 28), (n, 100, 200))
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        images = [{"bytes": buffer.getvalue(), "path": None}]
        row = {"id": f"p{n}", "images": images, "question": f"What is {n}+1?", "answer": str(n + 1)}
        rows.append(row)
    return rows


def wrong_of(problem):
    """How many of its four responses are wrong: never none, so that no problem is dropped."""
    text = problem["question"] + problem["answer"]
    colour = problem["images"][0].getpixel((0, 0)) if problem["images"] else ()
    return 1 + random.Random(f"{text}{colour}").randrange(4)


@pytest.fixture
def fake_model(monkeypatch, toy_model):
    """Counts what is sampled with all responses; raises KeyboardInterrupt after so many batches."""
    sampled = {"ids": [], "left": 10**9}

    def sample(model, prompt, stop, config):
        return [torch.tensor([7, 8, 9])] * len(prompt["input_ids"]) * config.num_generations

    def score(rollouts, problems, config):
        G = config.num_generations
        accuracy = torch.zeros(len(problems), G)
        if G > 1:  # cleaning, with one response, solves nothing
            sampled["left"] -= 1
            if sampled["left"] < 0:
                raise KeyboardInterrupt
            sampled["ids"] += [problem["id"] for problem in problems]
            for row, problem in zip(accuracy, problems):
                row[: G - wrong_of(problem)] = 1
        names = ("accuracy", "format", "bonus", "reward")
        return {**dict.fromkeys(names, accuracy), "weight": torch.ones(len(problems))}

    monkeypatch.setattr(observe_r1, "sample", sample)
    monkeypatch.setattr(observe_r1, "score_rollouts", score)
    monkeypatch.setattr(observe_r1, "load_model", lambda config, trained=True: toy_model)
    return sampled


def fake_config(data, output, **options):
    return run_config(data, output, **{"num_generations": 4, **options})


def kill_after(sampled, batches, config):
    """A ladder that is interrupted after so many batches of responses."""
    sampled["left"] = batches
    with pytest.raises(KeyboardInterrupt):
        observe_r1.ladder(config)
    sampled["left"] = 10**9
    sampled["ids"].clear()


def check_own_difficulty(output, rows):
    """Each row of the ladder has the difficulty that follows from its own content."""
    ladder = observe_r1.load_problems(str(output / "ladder.parquet"))
    assert sorted(ladder["question"]) == sorted(row["question"] for row in rows)
    for row in ladder:
        assert row["difficulty"] == pytest.approx(wrong_of(row) / 4), row["id"]


def test_easy_and_short_problems_are_left_out_and_the_others_keep_their_scores(
    tmp_path, monkeypatch
):
    """The method's example: of difficulty 0 with 2, 23 and 56 tokens the first stays out."""
    difficulty = [0.5, 0, 0, 0, 1, 0.25]
    complexity = [9, 23, 2, 56, 40, 7]

    def score(model, processor, problems, config, rollout=None, file=None):
        rows = []
        for row in range(len(problems)):
            hard = {"difficulty": 1, "complexity": 1}  # nothing is solved without reasoning
            if file.name == "scores":
                hard = {"difficulty": difficulty[row], "complexity": complexity[row]}
            rows.append({**hard, "row": row, "id": str(row), "responses": [{"text": ""}]})
        return rows

    monkeypatch.setattr(observe_r1, "score_problems", score)
    monkeypatch.setattr(observe_r1, "load_model", lambda config, trained=True: None)
    data = write_parquet(tmp_path / "raw.parquet", made_problems(6))
    summary = observe_r1.ladder(fake_config(data, tmp_path / "out"))
    assert summary["not_selected"] == 1 and summary["ladder"] == 5
    assert summary["levels"] == [2, 0, 1, 0, 1, 0, 0, 0, 1]
    table = observe_r1.load_problems(str(tmp_path / "out" / "ladder.parquet"))
    questions = [row["question"] for row in made_problems(6)]
    kept = set()
    for row in table:
        number = questions.index(row["question"])
        assert (row["difficulty"], row["complexity"]) == (difficulty[number], complexity[number])
        kept.add(number)
    assert kept == {0, 1, 3, 4, 5}
    assert table["stage"][:] == sorted(table["stage"])


def test_a_row_deleted_between_kill_and_resume(fake_model, tmp_path, capsys):
    """By position, the scores of all rows behind the deleted one would belong to others."""
    rows = made_problems(20)
    data = write_parquet(tmp_path / "raw.parquet", rows)
    config = fake_config(data, tmp_path / "out")
    kill_after(fake_model, 3, config)
    rows = rows[:2] + rows[3:]
    write_parquet(tmp_path / "raw.parquet", rows)
    capsys.readouterr()
    observe_r1.ladder(replace(config, resume=True))
    check_own_difficulty(tmp_path / "out", rows)
    screen = capsys.readouterr().out
    assert "clean: ignores 1 scores" in screen and "scores: ignores 1 scores" in screen
    assert len(set(fake_model["ids"])) < 15  # what was scored is not scored again
    assert not {"p0", "p1", "p3"} & set(fake_model["ids"])


def test_rows_in_another_order_keep_their_scores(fake_model, tmp_path):
    rows = made_problems(20)
    data = write_parquet(tmp_path / "raw.parquet", rows)
    config = fake_config(data, tmp_path / "out")
    kill_after(fake_model, 4, config)
    random.Random(0).shuffle(rows)
    write_parquet(tmp_path / "raw.parquet", rows)
    observe_r1.ladder(replace(config, resume=True))
    check_own_difficulty(tmp_path / "out", rows)


@pytest.mark.parametrize("what", ["picture", "question", "answer"])
def test_changed_content_is_scored_anew(fake_model, tmp_path, what, capsys):
    """The same id, and for the picture the same path, but another problem."""
    rows = made_problems(8)
    for row in rows:
        (tmp_path / f"{row['id']}.png").write_bytes(row["images"][0]["bytes"])
        row["images"] = [f"{row['id']}.png"]
    file = tmp_path / "raw.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = fake_config(file, tmp_path / "out")
    kill_after(fake_model, 1, config)
    changed = {"question": "What is 50+50?", "answer": "77"}
    if what == "picture":
        Image.new("RGB", (84, 28), (250, 250, 0)).save(tmp_path / "p1.png")
    else:
        rows[1][what] = changed[what]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    observe_r1.ladder(replace(config, resume=True))
    check_own_difficulty(tmp_path / "out", rows)
    assert "p1" in fake_model["ids"]
    assert "scores: ignores 1 scores" in capsys.readouterr().out


CHANGES = {
    "temperature": 0.7,
    "max_new_tokens": 5,
    "num_generations": 5,
    "seed": 1,
    "observe": False,
    "system_prompt": "Answer.",
    "max_pixels": 10_000,
    "min_pixels": 1_000,
    "model": "another",
}


@pytest.mark.parametrize("name", CHANGES)
def test_scores_of_other_options_are_ignored_with_a_count(fake_model, tmp_path, name, capsys):
    """Each option that changes what is sampled; cleaning greedily is another matter."""
    data = write_parquet(tmp_path / "raw.parquet", made_problems(8))
    config = fake_config(data, tmp_path / "out")
    kill_after(fake_model, 1, config)
    value = CHANGES[name]
    if name == "model":
        value = str(tmp_path / "another")
        os.symlink(TOY / "model", value)
    observe_r1.ladder(replace(config, resume=True, **{name: value}))
    assert "scores: ignores 4 scores" in capsys.readouterr().out
    assert sorted(set(fake_model["ids"])) == [f"p{n}" for n in range(8)]


def test_another_clean_model_cleans_anew(fake_model, tmp_path, capsys):
    data = write_parquet(tmp_path / "raw.parquet", made_problems(8))
    config = fake_config(data, tmp_path / "out")
    kill_after(fake_model, 1, config)
    os.symlink(TOY / "model", tmp_path / "another")
    config = replace(config, resume=True, clean_model=str(tmp_path / "another"))
    observe_r1.ladder(config)
    screen = capsys.readouterr().out
    assert "clean: ignores 8 scores" in screen and "scores: ignores" not in screen
    assert len(set(fake_model["ids"])) == 4  # the scores themselves are those of the same model


def scored_by(monkeypatch, toy_model, processor, problems, config, file, rank, world):
    """What one of several processes does: its share of the batches, without the others."""
    monkeypatch.setattr(observe_r1, "RANK", rank)
    monkeypatch.setattr(observe_r1, "WORLD", world)
    monkeypatch.setattr(observe_r1, "gather", lambda value: [value] * world)
    return observe_r1.score_problems(toy_model, processor, problems, config, file=file)


@pytest.mark.parametrize("before, after", [(4, 2), (2, 4), (2, 1), (1, 2)])
def test_another_number_of_processes_loses_nothing(
    fake_model, toy_model, processor, tmp_path, monkeypatch, before, after
):
    """Each process is killed after a batch, the first one after two: the rest is done once."""
    data = write_parquet(tmp_path / "raw.parquet", made_problems(40))
    problems = observe_r1.load_problems(data)
    config = fake_config(data, tmp_path)
    same = (monkeypatch, toy_model, processor, problems, config, tmp_path / "scores")
    for rank in range(before):
        fake_model["left"] = 1 if rank else 2  # of its share of ten batches
        with pytest.raises(KeyboardInterrupt):
            scored_by(*same, rank, before)
    fake_model["left"] = 10**9
    assert len(fake_model["ids"]) == 4 * (before + 1)
    for rank in range(after):
        rows = scored_by(*same, rank, after)
    assert sorted(fake_model["ids"]) == sorted(problems["id"])  # each problem once, all together
    fake_model["ids"].clear()
    rows = scored_by(*same, 0, 1)
    assert fake_model["ids"] == [] and len(rows) == 40
    for row, problem in zip(rows, problems, strict=True):
        assert row["id"] == problem["id"] and row["difficulty"] == wrong_of(problem) / 4


def test_a_torn_last_line_is_scored_again(fake_model, tmp_path):
    """kill -9 may leave half a line, and what is written behind it must not be lost with it."""
    rows = made_problems(12)
    data = write_parquet(tmp_path / "raw.parquet", rows)
    config = fake_config(data, tmp_path / "out", resume=True)
    kill_after(fake_model, 2, config)
    file = tmp_path / "out" / "scores.0.jsonl"
    for cut in (40, 90):  # killed twice
        os.truncate(file, file.stat().st_size - cut)
        kill_after(fake_model, 1, config)
    observe_r1.ladder(config)
    check_own_difficulty(tmp_path / "out", rows)
    assert len(read_jsonl(file)) >= 12  # every line is whole


# ----------------------------------------------------------------------------- with the real model


def test_a_killed_ladder_ends_with_the_same_scores(raw, built, tmp_path, monkeypatch):
    """Killed in the middle of a batch: the samples are those of the undisturbed run."""
    config = real_config(raw, tmp_path / "out")
    real, calls = observe_r1.score_rollouts, []

    def fail(*arguments):
        calls.append(1)
        if len(calls) == 7:  # the third batch of responses, after four of cleaning
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(observe_r1, "score_rollouts", fail)
    with pytest.raises(KeyboardInterrupt):
        observe_r1.ladder(config)
    file = tmp_path / "out" / "scores.0.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 8
    file.write_text("".join(lines[:6]) + lines[6][:20])  # half a batch and half a line
    monkeypatch.setattr(observe_r1, "score_rollouts", real)
    summary = observe_r1.ladder(replace(config, resume=True))
    undisturbed, expected = built
    assert summary == expected
    for name in ("ladder.parquet", "never_solved.jsonl"):
        one, other = (folder / name for folder in (undisturbed, tmp_path / "out"))
        assert one.read_bytes() == other.read_bytes(), name
    assert scores_of(tmp_path / "out") == scores_of(undisturbed)


@pytest.fixture(scope="module")
def by_two(raw, tmp_path_factory):
    """Folder with a ladder and an eval that two processes made in one start."""
    folder = tmp_path_factory.mktemp("two")
    ladder = real_config(raw, "ladder")
    evaluation = real_config(raw, "eval", num_samples=2)
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import observe_r1
observe_r1.ladder(observe_r1.Config(**{vars(ladder)!r}))
observe_r1.evaluate_model(observe_r1.Config(**{vars(evaluation)!r}))
"""
    (folder / "two.py").write_text(script)
    result = torchrun(folder / "two.py", cwd=folder)
    assert result.returncode == 0, result.stderr[-5000:]
    return folder


def test_two_processes_build_the_ladder_of_one(by_two, built):
    """Batches have their own seeds, so it does not matter which process samples one."""
    alone, summary = built
    assert json.loads((by_two / "ladder" / "summary.json").read_text()) == summary
    shares = [read_jsonl(by_two / "ladder" / f"scores.{rank}.jsonl") for rank in range(2)]
    assert all(shares)  # both worked
    together = {row["key"]: row for share in shares for row in share}
    assert len(together) == sum(map(len, shares))  # each problem once
    assert together == {row["key"]: row for row in scores_of(alone)}
    one, other = (folder / "ladder.parquet" for folder in (alone, by_two / "ladder"))
    assert one.read_bytes() == other.read_bytes()


# -------------------------------------------------------------------------------------------- eval


def test_eval_writes_what_it_measured(raw, tmp_path):
    greedy = observe_r1.evaluate_model(real_config(raw, tmp_path / "greedy", num_samples=0))
    assert greedy == json.loads((tmp_path / "greedy" / "eval.json").read_text())
    rows = read_jsonl(tmp_path / "greedy" / "responses.jsonl")
    assert len(rows) == greedy["n"] == 16
    assert all(len(row["responses"]) == 1 for row in rows)
    again = observe_r1.evaluate_model(real_config(raw, tmp_path / "again", num_samples=0, seed=5))
    assert again == greedy  # the likeliest tokens know no seed


def test_eval_with_samples_and_by_two_processes(raw, by_two, tmp_path):
    result = observe_r1.evaluate_model(real_config(raw, tmp_path / "out", num_samples=2))
    rows = read_jsonl(tmp_path / "out" / "responses.jsonl")
    right, formats, lengths = [], [], []
    for row in rows:
        texts = [one["text"] for one in row["responses"]]
        right.append([rewards.accuracy_reward(text, row["answer"]) for text in texts])
        formats += [rewards.format_reward(text) for text in texts]
        lengths += [one["length"] for one in row["responses"]]
    assert np.shape(right) == (16, 2)
    assert result["accuracy"] == pytest.approx(np.mean(right))
    assert result["format"] == pytest.approx(np.mean(formats))
    assert result["response_length"] == pytest.approx(np.mean(lengths))
    assert result["interval"][0] <= result["accuracy"] <= result["interval"][1]
    assert json.loads((by_two / "eval" / "eval.json").read_text()) == result
    assert read_jsonl(by_two / "eval" / "responses.jsonl") == rows


def test_the_interval_agrees_with_a_bootstrap(monkeypatch):
    """Problems are resampled, not responses: samples of one problem are no independent evidence."""
    generator = np.random.default_rng(0)
    share = generator.random(300)
    right = generator.random((300, 4)) < share[:, None]
    means = right.mean(1)
    rows = []
    for mean in means:
        responses = [{"format": 0.5}] * 4
        rows.append({"difficulty": 1 - mean, "complexity": 10.0, "responses": responses})
    monkeypatch.setattr(observe_r1, "score_problems", lambda *_, **__: rows)
    result, _ = observe_r1.evaluate(None, None, None, observe_r1.Config(num_samples=4))
    drawn = means[generator.integers(300, size=(4000, 300))].mean(1)
    assert result["interval"] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.006)
    assert result["accuracy"] == pytest.approx(right.mean()) and result["n"] == 300


def test_the_interval_stays_between_0_and_1(monkeypatch):
    row = {"responses": [{"format": 0.5}], "complexity": 1.0}
    rows = [{**row, "difficulty": float(number == 0)} for number in range(10)]
    monkeypatch.setattr(observe_r1, "score_problems", lambda *_, **__: rows)
    result, _ = observe_r1.evaluate(None, None, None, observe_r1.Config())
    assert result["interval"] == [pytest.approx(0.9 - 1.96 * 0.3 / 3), 1.0]


def test_the_held_out_pass_encodes_in_bounded_chunks(raw, tmp_path, monkeypatch):
    """At most --prompts_per_step problems at a time, whatever the number of held-out problems."""
    encode, batches, pixels = observe_r1.encode_prompts, [], []
    score = observe_r1.score_rollouts

    def counted(problems, *arguments):
        batches.append(len(problems))
        return encode(problems, *arguments)

    def held(rollouts, *arguments):
        pixels.append(len(rollouts.prompt["pixel_values"]))
        return score(rollouts, *arguments)

    monkeypatch.setattr(observe_r1, "encode_prompts", counted)
    monkeypatch.setattr(observe_r1, "score_rollouts", held)
    config = run_config(raw, tmp_path / "out", prompts_per_step=3, max_new_tokens=8)
    result = observe_r1.evaluate_model(config)
    assert result["n"] == 16 == sum(batches) and max(batches) <= 3
    largest = 3 * 50176 // 14**2  # patches of three pictures of the largest size
    assert len(pixels) == 6 and max(pixels) <= largest


@pytest.mark.parametrize(
    "command, moment, number",
    [
        ("ladder", "load_problems", signal.SIGTERM),
        ("ladder", "load_model", signal.SIGINT),
        ("ladder", "rollout", signal.SIGTERM),
        ("ladder", "rollout", signal.SIGINT),
        ("eval", "load_model", signal.SIGTERM),
        ("eval", "rollout", signal.SIGINT),
    ],
)
def test_a_signal_ends_in_one_line(command, number, moment, raw, tmp_path, monkeypatch):
    """While data or the model loads, or between two batches: what is there stays, no traceback."""
    output = tmp_path / "out"
    real, calls = getattr(observe_r1, moment.replace("rollout", "score_rollouts")), []

    def interrupted(*arguments, **options):
        calls.append(0)
        if moment != "rollout" or len(calls) == 2:
            os.kill(os.getpid(), number)
        return real(*arguments, **options)

    monkeypatch.setattr(observe_r1, moment.replace("rollout", "score_rollouts"), interrupted)
    config = run_config(raw, output, num_generations=2, max_new_tokens=8)
    monkeypatch.setattr("sys.argv", ["observe_r1.py", command, *command_line(config)])
    with pytest.raises(SystemExit) as end:
        observe_r1.main()
    assert end.value.code == "observe_r1: stopped; what was written so far is kept"
    assert not (output / "summary.json").exists() and not (output / "eval.json").exists()
    if command == "ladder" and moment == "rollout":
        assert len(scores_of(output, "clean")) == 4  # the batch before the signal


@pytest.mark.parametrize("command", ["ladder", "eval"])
def test_a_finished_folder_is_refused_or_replaced(command, fake_model, tmp_path):
    """A second run neither mixes with the first nor replaces it unless it is told to."""
    run = observe_r1.COMMANDS[command]
    data = write_parquet(tmp_path / "raw.parquet", made_problems(8))
    output = tmp_path / "out"
    run(fake_config(data, output))
    before = {file.name: file.read_bytes() for file in output.iterdir() if file.is_file()}
    with pytest.raises(ValueError, match=r"holds a run: .*--overwrite true"):
        run(fake_config(data, output, max_new_tokens=5))
    after = {file.name: file.read_bytes() for file in output.iterdir() if file.is_file()}
    assert after == before
    fake_model["ids"].clear()
    write_parquet(tmp_path / "raw.parquet", made_problems(4))
    run(fake_config(data, output, overwrite=True))
    assert "p0" in fake_model["ids"] or command == "eval"  # nothing of the old is used
    run(fake_config(data, tmp_path / "fresh"))
    for name in before:
        if name != "config.json":
            replaced, fresh = output / name, tmp_path / "fresh" / name
            assert replaced.read_bytes() == fresh.read_bytes(), name


@pytest.mark.parametrize("command", ["ladder", "eval"])
def test_a_finished_run_that_is_resumed_repeats_no_row(command, fake_model, tmp_path):
    run = observe_r1.COMMANDS[command]
    data = write_parquet(tmp_path / "raw.parquet", made_problems(8))
    output = tmp_path / "out"
    run(fake_config(data, output))
    logs = {file: file.read_bytes() for file in output.glob("*.json*") if "config" not in file.name}
    run(fake_config(data, output, resume=True))
    assert {file: file.read_bytes() for file in logs} == logs
