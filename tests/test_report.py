"""The page of a run (tools/report.py): what it shows, what it escapes, what it reads again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.insert(0, str(TOOLS))
import report

EVIL = "<script>x</script><observe>a<think>b</observe></think><answer>&</answer>"
PICTURE = "data:image/png;base64,iVBORw0KGgo="


def metrics(step, **changes):
    row = {"step": step, "optimizer_step": 2 * step, "reward": 1.2, "accuracy": 0.625}
    row |= {"format": 0.496, "bonus": 0.0125, "response_length": 30.0, "truncated_fraction": 0.0}
    row |= {"weight": 1.5, "kl": 0.01, "clip_fraction": 0.02, "grad_norm": 2.0}
    row |= {"learning_rate": 1e-4, "zero_weight_fraction": 0.25, "seconds": 1.5}
    return row | changes


def response(text, accuracy, bonus, advantage):
    reward = accuracy + 0.5 + bonus
    row = {"text": text, "accuracy": accuracy, "format": 0.5, "bonus": bonus, "reward": reward}
    return row | {"advantage": advantage, "length": 40}


def group(step, name, advantages=(1.25, -0.5), weight=1.5, **changes):
    """A problem with a right response, which gets the bonus, and a wrong one."""
    high, low = advantages
    responses = [
        response(f"wrong-{name}", 0.0, 0.0, low),
        response(f"right-{name}", 1.0, 0.2, high),
    ]
    row = {"step": step, "id": name, "question": f"question {name}?", "answer": "7"}
    row |= {"difficulty": 0.375, "weight": weight, "pictures": [PICTURE], "responses": responses}
    return row | changes


def held_out(step, name, accuracy):
    row = group(step, name, (None, None), None, held_out=True)
    for one in row["responses"]:
        one |= {"accuracy": accuracy, "bonus": None}
    return row


def write_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(folder, steps=(), groups=(), summary=None, **config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"max_steps": 0, **config}))
    write_lines(folder / "metrics.jsonl", steps)
    write_lines(folder / "rollouts.jsonl", groups)
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


SUMMARY = {"accuracy_before": 0.4154, "accuracy_after": 0.8828, "format_before": 0.1895}
SUMMARY |= {"format_after": 0.4974, "response_length_before": 24.1, "response_length_after": 33.8}
SUMMARY |= {"seconds": 73.4, "steps": 2}


@pytest.fixture
def no_curves(monkeypatch):
    """For tests of the rest of the page: a dozen drawings take most of a second."""
    monkeypatch.setattr(report, "draw_chart", lambda *arguments, **options: "")


def page_of(folder):
    run = report.Run(folder)
    run.read()
    return report.write_page(run).read_text()


def test_the_result_stands_first_and_the_configuration_is_folded(tmp_path, no_curves):
    steps = [metrics(1, difficulty=0.25), metrics(2, difficulty=0.75, eval_accuracy=0.8828)]
    page = page_of(write_run(tmp_path / "a run", steps, [group(1, "a")], SUMMARY, seed=17))
    result = page.index("0.42 → <span>0.88</span>")
    assert (
        result < page.index("<details><summary>Configuration</summary>") < page.index("seed <b>17")
    )
    assert "38% → 99%" in page  # .1895 / .5 and .4974 / .5 of the responses are well-formed
    assert "24 → 34" in page and "73 s" in page
    assert "step 2 of 2 · difficulty of its problems 0.75" in page
    assert '<progress value="2" max="2">' in page
    assert "running" not in page and "http-equiv" not in page


def test_curves_have_every_number_that_was_logged(tmp_path):
    steps = [metrics(step, format=0.4 + 0.05 * step, humour=0.3) for step in (1, 2)]
    steps.insert(0, {"step": 0, "eval_accuracy": 0.4})
    steps[-1]["eval_accuracy"] = 0.5
    page = page_of(write_run(tmp_path, steps))
    for title in ("where the reward comes from", "response length", "KL", "clipped", "humour"):
        assert f"<h3>{title} " in page
    assert "held-out accuracy <small>0.4 → 0.5</small>" in page
    # under the pointer: the share of well-formed responses, .45 / .5 and .5 / .5, not the reward
    assert "<title>step 1: 0.9</title>" in page and "<title>step 2: 1</title>" in page
    assert page.count("<title>step 1: 0.3</title>") == 1  # a number of somebody's own
    assert "0.40 → <span>0.50</span>" in page and "before training and after step 2" in page


def test_points_of_a_curve_stand_at_their_step_and_value():
    """Places in the drawing rise in proportion to the values, and each carries its own title."""
    points = [(1, 0.5), (2, 1.0), (4, 0.25)]
    svg = report.draw_chart(report.single("kl", "KL", ""), [points])
    places = []
    for part in svg.split("<use ")[1:]:
        if "<title>" in part[:400].split("</use>")[0]:
            x = float(part.split(' x="')[1].split('"')[0])
            y = float(part.split(' y="')[1].split('"')[0])
            places.append((x, y, part.split("<title>")[1].split("</title>")[0]))
    assert [title for *_, title in places] == ["step 1: 0.5", "step 2: 1", "step 4: 0.25"]
    (x1, y1, _), (x2, y2, _), (x4, y4, _) = places
    assert (x4 - x2) == pytest.approx(2 * (x2 - x1), abs=0.05)
    assert (y1 - y2) == pytest.approx(2 * (y4 - y1), abs=0.05)  # y points down


def test_small_numbers_on_an_axis_keep_their_digits():
    points = [(step, step * 1e-5) for step in range(1, 11)]
    svg = report.draw_chart(report.single("learning_rate", "learning rate", ""), [points])
    assert ">0.00010<" in svg or ">0.0001<" in svg


def test_what_cannot_be_drawn_is_counted(tmp_path):
    steps = [metrics(1, kl=float("nan"), bonus=float("inf")), metrics(2, kl=0.5), metrics(3)]
    steps[0]["grad_norm"] = steps[1]["grad_norm"] = steps[2]["grad_norm"] = float("nan")
    page = page_of(write_run(tmp_path, steps))
    assert "nats a token; 1 of 3 steps are NaN or infinite and not drawn" in page
    assert "parts stacked; 1 of 3 steps are NaN" in page
    assert "before clipping; 3 of 3 steps are NaN" in page
    assert "<progress" not in page  # nobody knows how many steps there will be


def test_moving_mean_by_hand():
    points = [(step, float(step % 2)) for step in range(48)]  # two points on each side
    means = dict(report.moving_mean(points))
    assert means[10] == pytest.approx(2 / 5) and means[11] == pytest.approx(3 / 5)
    assert means[0] == pytest.approx(1 / 3)  # at the end only what is there


def test_a_group_says_who_got_the_bonus_and_where_the_reward_came_from(tmp_path, no_curves):
    page = page_of(write_run(tmp_path, [metrics(1)], [group(1, "a")], max_steps=60))
    assert "<h3>Step 1 of 60 <small>1 of 2 right · difficulty 0.375 · weight 1.5</small>" in page
    best, worst = page.index("right-a"), page.index("wrong-a")
    assert best < worst  # sorted by advantage
    rows = page.split('<div class="response')[2:]  # the first is the head
    assert "+1.25" in rows[0] and "★ bonus: shortest correct" in rows[0]
    assert "<b>1.7</b> = accuracy 1 + format 0.5 + bonus 0.2" in rows[0]
    # of a full bar of 1.7: accuracy 58.8 %, format 29.4 %, bonus 11.8 %
    for width in ("58.8%", "29.4%", "11.8%"):
        assert f"width:{width}" in rows[0]
    assert "-0.50" in rows[1] and "★" not in rows[1] and "<b>0.5</b> = format 0.5<" in rows[1]
    # the bars share a scale on which the largest advantage fills half the width
    assert "left:50.0%;width:50.0%" in rows[0] and "left:30.0%;width:20.0%" in rows[1]


def test_the_number_of_steps_is_told_by_the_log_before_the_options(tmp_path, no_curves):
    page = page_of(write_run(tmp_path, [metrics(3, total_steps=7)], max_steps=9))
    assert "step 3 of 7" in page and '<progress value="3" max="7">' in page
    assert "<h3>total_steps" not in page


def test_a_reward_of_ones_own_is_part_of_the_sum(tmp_path, no_curves):
    row = group(1, "a")
    row["responses"][0]["reward"] = 0.9
    page = page_of(write_run(tmp_path, [metrics(1)], [row]))
    assert "<b>0.9</b> = format 0.5 + other 0.4" in page


def test_what_a_model_or_a_file_wrote_is_escaped(tmp_path):
    row = group(1, "<b>", question="<script>q", answer="<i>")
    row["pictures"] = ["https://example.org/x.png", 'data:image/png;base64,"><script>']
    row["responses"][0]["text"] = EVIL
    late = held_out(2, "<b>", 1.0) | {"question": "<script>h", "answer": "<i>"}
    early = late | {"step": 0}
    steps = [metrics(1, **{"<script>m": 1.0})]
    page = page_of(write_run(tmp_path, steps, [early, row, late], **{"<script>c": "<script>d"}))
    assert "<script" not in page and "<i>" not in page and "example.org" not in page
    assert "&lt;script&gt;x&lt;/script&gt;" in page
    assert '<span class="answer">&lt;answer&gt;&amp;&lt;/answer&gt;</span>' in page
    for place in ("q", "h", "m", "c", "d"):
        assert f"&lt;script&gt;{place}" in page
    outside = page.replace("http://www.w3.org/", "")  # names of SVG, which nothing loads
    assert "http" not in outside and "url(h" not in outside


def test_ends_show_groups_that_were_trained_on():
    solved = group(1, "solved", (0.0, 0.0), 0.0)
    rows = [solved, group(1, "a"), group(1, "b"), group(2, "c"), group(3, "d"), group(3, "b")]
    rows.append(group(4, "hopeless", (0.0, 0.0), 0.0))
    first, last = report.first_and_last(rows)
    assert (first["step"], first["id"], last["step"], last["id"]) == (1, "b", 3, "b")
    first, last = report.first_and_last([*rows[:2], rows[4]])
    assert (first["id"], last["id"]) == ("a", "d")
    assert report.first_and_last([solved]) == []


def test_a_page_without_trained_groups_at_its_ends_says_so(tmp_path, no_curves):
    rows = [group(1, "x", (0.0, 0.0), 0.0), group(2, "a"), group(3, "y", (0.0, 0.0), 0.0)]
    page = page_of(write_run(tmp_path, [metrics(3)], rows))
    assert "Before step 2 none" in page and "After step 2 none" in page
    assert "all advantages 0: this group teaches nothing" in page
    page = page_of(write_run(tmp_path, [metrics(1)], rows[:1]))
    assert "No group that the log shows was trained on" in page


def test_a_held_out_problem_stands_beside_itself(tmp_path, no_curves):
    rows = [held_out(0, "h", 0.0), held_out(0, "once", 0.0), group(1, "a"), held_out(1, "h", 0.5)]
    rows.append(held_out(2, "h", 1.0))
    ((before, after),) = report.held_out_pairs(rows)
    assert (before["step"], after["step"]) == (0, 2)
    page = page_of(write_run(tmp_path, [metrics(1), metrics(2)], rows, max_steps=2))
    pair = page.index("The same held-out problem")
    assert pair < page.index("What was trained on")
    assert "<b>before training</b> <small>0 of 2 right" in page
    assert "<b>after step 2 of 2</b> <small>2 of 2 right" in page
    assert page.count("right-h") == 2  # and no card of a trained group


def test_follow_reads_only_what_was_appended(tmp_path):
    """A change in bytes that were read goes unseen; new lines, and a line's missing end, do not."""
    file = write_run(tmp_path, [metrics(1), metrics(2)]) / "metrics.jsonl"
    log = report.Log(file)
    assert log.read_new() and [row["step"] for row in log.rows] == [1, 2]
    assert not log.read_new()

    text = file.read_text()
    line = json.dumps(metrics(3)) + "\n"
    file.write_text(text.replace('"step": 1', '"step": 8') + line[:20])
    assert not log.read_new() and log.half_written
    with open(file, "a") as stream:
        stream.write(line[20:])
    assert log.read_new() and not log.half_written
    assert [row["step"] for row in log.rows] == [1, 2, 3]


def test_a_log_that_was_cut_or_begun_anew_is_read_again(tmp_path):
    file = write_run(tmp_path, [metrics(1), metrics(2), metrics(3)]) / "metrics.jsonl"
    log = report.Log(file)
    log.read_new()
    write_lines(file, [metrics(1), metrics(2)])  # resumed after step 2
    assert log.read_new() and [row["step"] for row in log.rows] == [1, 2]
    write_lines(file, [metrics(step, seconds=9.0) for step in (1, 2, 3, 4)])
    assert log.read_new() and len(log.rows) == 4 and log.rows[0]["seconds"] == 9.0
    file.unlink()
    assert log.read_new() and log.rows == []


def test_a_half_written_line_is_left_out_and_named(tmp_path, no_curves):
    run = write_run(tmp_path, [metrics(1)], [group(1, "a")])
    with open(run / "rollouts.jsonl", "ab") as stream:
        stream.write('{"step": 2, "id": "ü'.encode()[:-1])  # in the middle of a character
    (run / "summary.json").write_text('{"accuracy_before": 0.')
    page = page_of(run)
    assert "The last line of rollouts.jsonl is half written" in page
    assert "summary.json is no whole JSON object" in page and "running, or stopped early" in page


def command(*arguments):
    words = [sys.executable, str(TOOLS / "report.py"), *map(str, arguments)]
    return subprocess.run(words, check=False, capture_output=True, text=True, timeout=60)


def test_a_folder_without_a_run_is_refused_by_name(tmp_path):
    result = command(tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert (
        f"{tmp_path}/metrics.jsonl is missing" in result.stderr and "--output_dir" in result.stderr
    )
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"reward": 1}\n')
    result = command(tmp_path)
    assert result.returncode == 1 and "metrics.jsonl, line 2" in result.stderr
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    result = command(tmp_path)
    assert result.returncode == 0 and "note: config.json is missing" in result.stdout
    assert "rollouts.jsonl is missing" in (tmp_path / "report.html").read_text()


def test_without_matplotlib_the_command_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    monkeypatch.setattr(sys, "argv", ["report.py", str(write_run(tmp_path, [metrics(1)]))])
    with pytest.raises(SystemExit) as stop:
        report.main()
    assert "pip install matplotlib" in str(stop.value.code)  # text as the code: exit status 1
    assert not (tmp_path / "report.html").exists()


def test_follow_rewrites_the_page_until_the_summary_comes(tmp_path, monkeypatch, no_curves):
    """Each pause of `follow` is a step of the training that it watches."""
    folder = write_run(tmp_path, [metrics(1)], max_steps=2)
    pages = []

    def train_on(seconds):
        pages.append((folder / "report.html").read_text())
        if len(pages) == 2:
            (folder / "summary.json").write_text(json.dumps(SUMMARY))
        elif len(pages) == 1:
            with open(folder / "metrics.jsonl", "a") as stream:
                stream.write(json.dumps(metrics(2)) + "\n")

    monkeypatch.setattr(report.time, "sleep", train_on)
    monkeypatch.setattr(sys, "argv", ["report.py", str(folder), "--follow"])
    report.main()
    assert ["step 1 of 2" in page for page in pages] == [True, False]
    assert "step 2 of 2" in pages[1] and all('http-equiv="refresh"' in page for page in pages)
    last = (folder / "report.html").read_text()
    assert "0.42 → <span>0.88</span>" in last and "http-equiv" not in last
