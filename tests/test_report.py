"""The page of a run (tools/report.py): what it shows and what it escapes."""

import base64
import io
import json
import re
import sys
from pathlib import Path

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


def test_the_result_stands_first_and_the_configuration_is_folded(training, no_curves):
    held_out = {0: [group(row=0, accuracy=[0.0, 0.0])], 1: [group(row=0)]}
    (training.folder / "summary.json").write_text('{"steps": 1, "interval_after": [0.41, 0.59]}')
    page = training([metrics(1), metrics(2, format=0.25)], [group()], held_out, seed=17)
    assert page.index("<b>0 → 0.5</b>") < page.index("<summary>Configuration")
    assert "are right, step 0 and 1; 95 % interval of the last 0.41 to 0.59" in page
    assert "0.496 → 0.25" in page and "30 → 30" in page and "<div>seed <b>17</b>" in page
    assert "so far" not in page and "skipped" not in page


def test_a_running_page_shows_what_there_is(training, no_curves):
    assert "No step has been logged yet" in training([])
    held_out = {0: [group(), group(row=1)], 10: [group()]}  # the second is being measured
    page = training([metrics(1, skipped_updates=2)], [], held_out)
    assert "steps so far: running, or stopped early" in page and "2 updates skipped" in page
    assert "step 0 and 0" in page and "before and after" not in page
    with open(training.folder / "metrics.jsonl", "ab") as log:
        log.write('{"step": 2, "id": "ü'.encode()[:-1])  # in the middle of a character
    assert len(report.read_rows(training.folder / "metrics.jsonl")) == 1


def test_curves_have_every_number_that_was_logged(training):
    steps = [metrics(step, humour=0.3 * step, difficulty=0.5) for step in (1, 2)]
    steps[1] |= {"kl": None, "eval_accuracy": 0.5}  # a NaN
    steps[0]["grad_norm"] = steps[1]["grad_norm"] = None
    passed = {"pass_at_k_before": {"1": 0.0, "2": 0.0}, "pass_at_k_after": {"1": 0.5, "2": 1.0}}
    (training.folder / "summary.json").write_text(json.dumps(passed))
    page = training(steps, [], {0: [group(accuracy=[0.0, 0.0])], 2: [group()]})
    shown = {"held-out accuracy 0 → 0.5", "pass@k", "where the reward comes from", "the ladder"}
    shown |= {"humour 0.3 → 0.6", "learning_rate 0.0001 → 0.0001", "kl 0.01 → nan"}
    titles = re.findall("<h3>(.*?)</h3>", page)
    assert shown <= {*titles} and "grad_norm" not in "".join(titles)
    assert 'before</span><span class="key"' in page  # pass@k before and after, one drawing


def test_a_group_says_who_got_the_bonus_and_where_the_reward_came_from():
    page = report.group_html(group(difficulty=0.375), "Step 1")
    assert "Step 1 <small>1 of 2 right, difficulty 0.375, weight 1.5</small>" in page
    best, worst = page.split('<div class="response">')[1:]  # sorted by advantage
    assert "+1.25" in best and "30 tokens" in best and "right-0" in best
    assert "reward 1.7</b>: accuracy 1, format 0.5, bonus 0.2<" in best
    assert "-0.50" in worst and "40 tokens" in worst and "reward 0.5</b>: format 0.5<" in worst


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
    assert shown.size == stored.size
    assert "no longer" in page  # a problem that is another one now has no picture
    page = training([metrics(1)], [group()], data="nowhere.parquet")
    assert "nowhere.parquet has this problem" in page
    assert len(report.picture_html(Image.new("RGB", (5000, 3000)))) < 5000


def test_first_and_last_step_stand_open_the_others_are_folded(training, no_curves):
    rows = [group(1, 0, advantage=[0.0, 0.0]), *(group(step, step % 3) for step in range(2, 9))]
    page = training([metrics(8)], rows)
    found = re.findall(r"<h3>(Step \d) |<summary>(In between)", page)
    assert found[:3] == [("Step 2", ""), ("Step 8", ""), ("", "In between")]
    assert len(found) == 8 and ("Step 1", "") not in found


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """A ladder and an evaluation by the script itself."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_parquet(folder / "raw.parquet", toy_rows("ladder", range(0, 960, 60)))
    for name, command in (("ladder", observe_r1.ladder), ("eval", observe_r1.evaluate_model)):
        options = {"output_dir": str(folder / name), "eval_data": "", "eval_steps": 0}
        command(toy_config(data=data, num_samples=2, **options))
    return folder


def page_of(folder):
    result = run_python(ROOT / "tools/report.py", folder, cwd=folder)
    assert result.returncode == 0, result.stderr
    return Path(folder, "report.html").read_text()


def test_a_ladder_shows_its_stages_and_what_was_never_solved(commands):
    page = page_of(commands / "ladder")
    summary = json.loads((commands / "ladder/summary.json").read_text())
    assert f"<b>{summary['ladder']}</b><small>ladder" in page
    assert "never solved" in page and "Nine stages" in page
    assert page.count("The commonest answer was") == summary["never_solved"] > 0


def test_an_evaluation_shows_its_interval_and_pass_at_k(commands):
    file = commands / "eval/eval.json"
    result = json.loads(file.read_text()) | {"pass_at_k": {"1": 0.25, "2": 0.5}}
    file.write_text(json.dumps(result))
    page = page_of(commands / "eval")
    assert f"<b>{result['accuracy']:.3f}</b>" in page
    assert "95 % interval {:.3f} to {:.3f}".format(*result["interval"]) in page
    assert "<h3>pass@k 0.25 → 0.5</h3>" in page
    assert page.count("<img") == report.SHOWN


def test_mistakes_end_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^report: .*metrics.jsonl.*--output_dir$"):
        report.main()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    with pytest.raises(ValueError, match="pip install matplotlib"):
        report.new_figure(1, 1)
