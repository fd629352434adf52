"""The page of a run (tools/report.py): what it shows and what it escapes."""

import base64
import io
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_python, toy_config, toy_rows, write_jsonl, write_parquet
from PIL import Image

pytest.importorskip("matplotlib")
sys.path.insert(0, str(ROOT / "tools"))
import report

import observe_r1

EVIL = "<script>x</script><observe>a<think>b</observe></think><answer>&</answer>"


def metrics(step, **changes):
    row = {"step": step, "optimizer_step": 2 * step, "reward": 1.2, "accuracy": 0.625}
    row |= {"format": 0.496, "bonus": 0.0125, "response_length": 30.0, "truncated_fraction": 0.0}
    row |= {"weight": 1.5, "kl": 0.01, "clip_fraction": 0.02, "grad_norm": 2.0, "seconds": 1.5}
    return row | {"learning_rate": 1e-4, "skipped_updates": 0} | changes


def group(step=1, row=0, **changes):
    """A right response, which gets the bonus, behind a wrong one."""
    logged = {"step": step, "row": row, "question": f"question {row}?", "answer": "7"}
    logged |= {"responses": [f"wrong-{row}", f"right-{row}"], "accuracy": [0.0, 1.0]}
    logged |= {"format": [0.5, 0.5], "bonus": [0.0, 0.2], "reward": [0.5, 1.7], "weight": 1.5}
    return logged | {"response_length": [40, 30], "advantage": [-0.5, 1.25], **changes}


@pytest.fixture
def training(tmp_path):
    """Writes the files of a training run on three problems; returns its page."""
    rows = toy_rows("heldout", [0, 1, 2])
    for i, row in enumerate(rows):
        row["question"] = f"question {i}?"
    data = write_parquet(tmp_path / "data.parquet", rows)

    def write(steps, groups=(), held_out=(), **config):
        config = {"data": data, "eval_data": data, **config}
        (tmp_path / "config.json").write_text(json.dumps(config))
        write_jsonl(tmp_path / "metrics.jsonl", steps)
        write_jsonl(tmp_path / "rollouts.jsonl", groups)
        for step, own in dict(held_out).items():
            write_jsonl(tmp_path / f"held_out-{step}.jsonl", own)
        return report.training_page(tmp_path, config) + report.options_html(config)

    write.folder = tmp_path
    return write


@pytest.fixture
def no_curves(monkeypatch):
    """For tests of the rest of the page: a dozen drawings take most of a second."""
    monkeypatch.setattr(report, "draw_curves", lambda *arguments, **options: "")


def test_pass_at_k_is_the_share_of_subsets_with_a_right_response():
    for samples, right in ((1, 0), (1, 1), (4, 1), (5, 2), (6, 6)):
        for k in range(1, samples + 1):
            subsets = list(itertools.combinations([1] * right + [0] * (samples - right), k))
            counted = np.mean([any(subset) for subset in subsets])
            assert report.pass_at_k(samples, right, k) == pytest.approx(counted)
    rows = [{"accuracy": [1.0, 0.0, 0.0]}, {"accuracy": [0.0, 0.0, 0.0]}]
    ks, values = report.pass_curve(rows)
    assert ks == [1, 2, 3] and values == pytest.approx([1 / 6, 1 / 3, 1 / 2])


def test_the_result_stands_first_and_the_configuration_is_folded(training, no_curves):
    held_out = {0: [group(row=0, accuracy=[0.0, 0.0])], 1: [group(row=0)]}
    (training.folder / "summary.json").write_text('{"interval_after": [0.41, 0.59]}')
    page = training([metrics(1), metrics(2, format=0.25)], [group()], held_out, seed=17)
    assert page.index("<b>0.00 → 0.50</b>") < page.index("<summary>Configuration")
    assert (
        "of held-out responses are right, step 0 and 1; 95 % interval of the last 0.41 to" in page
    )
    assert "0.50 → 0.25" in page and "30 → 30" in page and "<div>seed <b>17</b>" in page
    assert "so far" not in page and "skipped" not in page


def test_a_running_page_shows_what_there_is(training, no_curves):
    assert "No step has been logged yet" in training([])
    held_out = {0: [group(), group(row=1)], 10: [group()]}  # the second is being measured
    page = training([metrics(1, skipped_updates=2)], [], held_out)
    assert "steps so far: running, or stopped early" in page and "2 updates were skipped" in page
    assert "step 0 and 0" in page and "before and after" not in page
    with open(training.folder / "metrics.jsonl", "ab") as log:
        log.write('{"step": 2, "id": "ü'.encode()[:-1])  # in the middle of a character
    assert len(report.read_rows(training.folder / "metrics.jsonl")) == 1


def test_curves_have_every_number_that_was_logged(training):
    steps = [metrics(step, humour=0.3 * step, difficulty=0.5) for step in (1, 2)]
    steps[1]["kl"] = None  # a NaN
    steps[0]["grad_norm"] = steps[1]["grad_norm"] = None
    held_out = {0: [group(accuracy=[0.0, 0.0])], 2: [group()]}
    page = training(steps, [], held_out)
    for title in ("held-out accuracy 0 → 0.5", "pass@k", "where the reward comes from"):
        assert f"<h3>{title}</h3>" in page
    for title in ("the ladder", "humour 0.3 → 0.6", "learning_rate 0.0001 → 0.0001"):
        assert f"<h3>{title}</h3>" in page
    assert "nats a token; 1 values are NaN or infinite" in page and "grad_norm" not in page
    assert 'step 0</span><span class="key"' in page  # pass@k before and after, one drawing


def test_points_of_a_curve_stand_in_proportion(monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "svg_text", lambda figure, name: drawn.append(figure.axes[0]))
    report.draw_curves("two", {"a": ([1, 2, 4], [0.5, 1.0, 0.25]), "b": ([1, 2], [-1, 0])})
    parts = {"a": ([1, 2], [0.5, 1.0]), "b": ([1, 2], [0.25, 0.5])}
    report.draw_curves("stacked", parts, stacked=True)
    assert [list(line.get_ydata()) for line in drawn[0].lines] == [[0.5, 1.0, 0.25], [-1, 0]]
    assert drawn[0].get_ylim()[0] < -1
    tops = [path.get_paths()[0].vertices[:, 1].max() for path in drawn[1].collections]
    assert tops == [1.0, 1.5] and drawn[1].get_ylim()[0] == 0


def test_a_group_says_who_got_the_bonus_and_where_the_reward_came_from():
    page = report.group_html(group(difficulty=0.375), "Step 1")
    assert "Step 1 <small>1 of 2 right, difficulty 0.375, weight 1.5</small>" in page
    best, worst = page.split('<div class="response">')[1:]  # sorted by advantage
    assert "+1.25" in best and "30 tokens" in best and "right-0" in best
    assert "1.7 = accuracy 1 + format 0.5 + bonus 0.2<" in best
    # of a full bar of 1.7: accuracy 58.8 %, format 29.4 %, bonus 11.8 %
    assert re.findall(r"width:([\d.]+)%", best) == ["58.8", "29.4", "11.8"]
    assert "-0.50" in worst and "40 tokens" in worst and "0.5 = format 0.5<" in worst
    own = report.group_html(group(reward=[0.9, 1.7]), "")  # a reward that somebody has added
    assert "0.9 = format 0.5 + others 0.4<" in own


def test_what_a_model_or_a_file_wrote_is_escaped(training, no_curves):
    evil = group(responses=[EVIL, "<i>"], question="<script>q", answer="<i>")
    page = training([metrics(1)], [evil], {0: [evil], 1: [evil]}, **{"<script>c": "<script>d"})
    page = report.page("<script>t", page)
    assert "<script" not in page and "<i>" not in page
    assert "&lt;script&gt;x&lt;/script&gt;" in page
    assert '<span class="answer">&lt;answer&gt;&amp;&lt;/answer&gt;</span>' in page
    assert "http" not in page and "url(" not in page  # nothing is loaded from elsewhere


def test_pictures_come_from_the_row_of_the_parquet_file(training, no_curves):
    page = training([metrics(1)], [group(row=2), group(row=1, question="another?")])
    (uri,) = re.findall(r"data:image/webp;base64,([^\"]+)", page)
    shown = Image.open(io.BytesIO(base64.b64decode(uri)))
    stored = Image.open(io.BytesIO(toy_rows("heldout", [2])[0]["images"][0]["bytes"]))
    assert np.abs(np.subtract(shown.convert("L"), stored, dtype=float)).mean() < 3
    assert "no longer" in page  # a problem that is another one now has no picture
    page = training([metrics(1)], [group()], data="nowhere.parquet")
    assert "nowhere.parquet has this problem" in page and "<img" not in page
    assert len(report.data_uri(Image.new("RGB", (5000, 3000)))) < 5000


def test_first_and_last_step_stand_open_the_others_are_folded(training, no_curves):
    rows = [group(1, 0, advantage=[0.0, 0.0]), *(group(step, step % 3) for step in range(2, 9))]
    page = training([metrics(8)], rows)
    found = re.findall(r"<h3>(Step \d) |<summary>(In between)", page)
    assert found[:3] == [("Step 2", ""), ("Step 8", ""), ("", "In between")]
    assert len(found) == 8 and ("Step 1", "") not in found
    assert report.evenly(list(range(100)), 5) == [0, 25, 50, 74, 99]
    assert report.evenly([]) == []


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """A ladder and an evaluation by the script itself."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_parquet(folder / "raw.parquet", toy_rows("ladder", range(0, 960, 60)))
    for name, command in (("ladder", observe_r1.ladder), ("eval", observe_r1.evaluate_model)):
        options = {"output_dir": str(folder / name), "eval_data": "", "eval_steps": 0}
        command(toy_config(data=data, num_samples=2, **options))
    return folder


def report_of(folder):
    result = run_python(ROOT / "tools/report.py", folder, cwd=folder)
    return result, Path(folder, "report.html")


def test_a_ladder_shows_its_stages_and_what_was_never_solved(commands):
    result, file = report_of(commands / "ladder")
    assert result.returncode == 0, result.stderr
    page = file.read_text()
    summary = json.loads((commands / "ladder/summary.json").read_text())
    assert f"<b>{summary['ladder']}</b><small>ladder" in page
    assert "never solved" in page and "Nine stages" in page
    assert page.count("The commonest answer was") == summary["never_solved"] > 0


def test_an_evaluation_shows_its_interval_and_pass_at_k(commands):
    result, file = report_of(commands / "eval")
    assert result.returncode == 0, result.stderr
    result = json.loads((commands / "eval/eval.json").read_text())
    rows = report.read_rows(commands / "eval/responses.jsonl")
    page = file.read_text()
    assert f"<b>{result['accuracy']:.3f}</b>" in page
    assert "95 % interval {:.3f} to {:.3f}".format(*result["interval"]) in page
    once = np.mean([any(row["accuracy"]) for row in rows])
    assert f"<b>{once:.3f}</b><small>pass@2" in page
    assert page.count("<img") == report.SHOWN


def test_mistakes_end_in_a_line(tmp_path, monkeypatch):
    result, _ = report_of(tmp_path)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "metrics.jsonl" in result.stderr and "--output_dir" in result.stderr
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    with pytest.raises(ValueError, match="pip install matplotlib"):
        report.new_figure(1, 1)
