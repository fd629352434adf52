"""The README's figures (tools/figures.py): what they show equals an independent calculation."""

import json
import math
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib")
HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE / "tools"))
import figures
from figures import ablate

SHARES = (  # of each stage, from the figure of the paper: (first level, shares)
    (0, (0.29, 0.18, 0.19, 0.19, 0.17)),
    (0, (0.05, 0.50, 0.15, 0.155, 0.15)),
    (0, (0.02, 0.08, 0.51, 0.17, 0.23)),
    (1, (0.03, 0.07, 0.505, 0.21, 0.19)),
    (2, (0.03, 0.07, 0.58, 0.19, 0.14)),
    (3, (0.03, 0.10, 0.575, 0.15, 0.15)),
    (4, (0.05, 0.12, 0.54, 0.18, 0.12)),
    (4, (0.02, 0.055, 0.10, 0.685, 0.14)),
    (4, (0.02, 0.05, 0.07, 0.15, 0.72)),
)


def texts_of(svg):
    """What can be read in a drawing. Its paths may differ from one matplotlib to the next."""
    root = ElementTree.fromstring(svg)
    return [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]


def axes_of(name, **options):
    return figures.FIGURES[name](**options).axes


def test_ladder_bars_are_the_papers_shares():
    (axes,) = axes_of("ladder")
    heights = {}
    widths = {}
    for bar in axes.patches:
        stage, level = map(int, bar.get_label().split())
        heights[stage, level] = bar.get_height()
        widths[stage] = bar.get_width()
    for stage, (first, shares) in enumerate(SHARES):
        for level in range(9):
            place = level - first
            share = shares[place] / sum(shares) if 0 <= place < 5 else 0
            assert heights[stage, level] == pytest.approx(share, abs=0.015)
    assert sum(widths.values()) == 1000
    sizes = (42, 42, 54, 80, 112, 132, 155, 178, 206)
    assert list(widths.values()) == pytest.approx(sizes, abs=2)
    for level, size in enumerate(figures.LEVEL_SIZES):  # every problem once
        drawn = sum(heights[stage, level] * widths[stage] for stage in range(9))
        assert drawn == pytest.approx(size)


def test_weight_bars_are_the_methods_table():
    (axes,) = axes_of("weight")
    heights = [bar.get_height() for bar in axes.patches]
    table = [0, 0.7875, 1.35, 1.6875, 1.8, 1.6875, 1.35, 0.7875, 0]
    assert heights == pytest.approx(table)
    assert heights == pytest.approx([4 * 1.8 * k / 8 * (1 - k / 8) for k in range(9)])


def test_group_is_the_golden_case():
    left, right = axes_of("group")
    parts = [[bar.get_width() for bar in container] for container in left.containers]
    assert parts[0] == [1, 1, 0, 0, 0, 0, 1, 0]
    assert parts[2] == pytest.approx([0, 0.2, 0, 0, 0, 0, 0, 0])
    rewards = [sum(values) for values in zip(*parts)]
    ends = [bar.get_x() + bar.get_width() for bar in left.containers[2]]
    assert ends == pytest.approx(rewards)  # the parts stand end to end
    mean, std = statistics.mean(rewards), statistics.stdev(rewards)
    by_hand = [1.6875 * (reward - mean) / std for reward in rewards]
    drawn = [bar.get_width() for bar in right.patches]
    assert drawn == pytest.approx(by_hand, abs=1e-4)
    golden = [2.102, 2.596, -0.371, -0.371, -1.607, -1.607, 0.865, -1.607]
    assert drawn == pytest.approx(golden, abs=1e-3)


def test_mask_shows_the_prompt_and_the_own_response():
    (axes,) = axes_of("mask")
    drawn = set()
    for bar in axes.patches:
        row = bar.get_y() + bar.get_height() / 2
        column = bar.get_x() + bar.get_width() / 2
        drawn.add((round(row), round(column)))
    owner = [0] * 4 + [1] * 3 + [2] * 2 + [3] * 4
    expected = set()
    for query in range(13):
        for key in range(query + 1):
            if owner[key] in (0, owner[query]):
                expected.add((query, key))
    assert drawn == expected
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["p1", "p2", "p3", "p4", "a1", "a2", "a3", "b1", "b2", "c1", "c2", "c3", "c4"]


def test_clip_is_the_minimum_and_its_flat_parts_are_dashed():
    (axes,) = axes_of("clip")
    lines = [line for line in axes.lines if len(line.get_xdata()) > 100]
    assert len(lines) == 4
    for line, advantage, dashed in zip(lines, (1, 1, -1, -1), (False, True, False, True)):
        assert line.is_dashed() == dashed
        shown = 0
        for ratio, value in zip(line.get_xdata(), line.get_ydata()):
            flat = ratio > 1.2 if advantage > 0 else ratio < 0.8
            if abs(ratio - 1.2) < 1e-3 or abs(ratio - 0.8) < 1e-3:
                continue  # at the corner itself either side is right
            assert math.isnan(value) == (flat != dashed)
            if flat == dashed:
                clipped = min(max(ratio, 0.8), 1.2)
                assert value == pytest.approx(min(ratio * advantage, clipped * advantage), abs=1e-5)
                shown += 1
        assert shown > 50


def results(tmp_path, monkeypatch):
    """Stored results of two seeds of three variants, and one seed more of the full method."""
    runs = []
    for variant, ends in {
        "full": (0.7, 0.8, 0.9),
        "no bonus": (0.6, 0.72),
        "x": (0.8, 0.9),
    }.items():
        for seed, end in enumerate(ends):
            curve = [[0, 0.1 * seed], [10, end]]
            runs.append({"variant": variant, "seed": seed, "accuracy": curve})
    (tmp_path / "ablations.json").write_text(json.dumps({"runs": runs}))
    monkeypatch.setattr(figures, "TOY", tmp_path)


def test_accuracy_draws_every_seed_and_their_mean(tmp_path, monkeypatch):
    results(tmp_path, monkeypatch)
    (axes,) = axes_of("accuracy")
    curves = [list(line.get_ydata()) for line in axes.lines]
    assert curves[:3] == [[0, 0.7], [0.1, 0.8], [0.2, 0.9]]
    assert curves[3] == pytest.approx([0.1, 0.8])
    assert list(axes.lines[3].get_xdata()) == [0, 10]
    assert {text.get_text() for text in axes.texts} == {"0.100", "0.800"}


def test_accuracy_of_ones_own_runs(tmp_path):
    for name, after in (("a", 0.5), ("b", 0.75)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "reward": 1.0}\n')
        summary = {"accuracy_before": 0.25, "accuracy_after": after, "steps": 1}
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    (axes,) = axes_of("accuracy", folders=[tmp_path / "a", tmp_path / "b"])
    assert list(axes.lines[-1].get_ydata()) == [0.25, 0.625]
    (tmp_path / "b" / "summary.json").unlink()
    with pytest.raises(ValueError, match="b: not evaluated at the same steps"):
        axes_of("accuracy", folders=[tmp_path / "a", tmp_path / "b"])


def test_ablations_pair_the_seeds_that_all_have(tmp_path, monkeypatch):
    results(tmp_path, monkeypatch)
    left, right = axes_of("ablations")
    dots = [list(line.get_xdata()) for line in left.lines]
    assert dots[0::2] == [[0.7, 0.8], [0.6, 0.72], [0.8, 0.9]]
    assert [values[0] for values in dots[1::2]] == pytest.approx([0.75, 0.66, 0.85])
    # no bonus: differences -.1 and -.08, mean -.09, sd .014142; t of one degree of freedom 12.706
    for container, mean, half in zip(right.containers, (-0.09, 0.1), (12.706 * 0.01, 0.0)):
        dot, _, (bars,) = container
        (segment,) = bars.get_segments()
        assert dot.get_xdata()[0] == pytest.approx(mean)
        assert segment[:, 0] == pytest.approx([mean - half, mean + half])


def test_rollouts_show_every_response_as_it_is(tmp_path, monkeypatch):
    long = "<think>" + "9" * 150 + "</think>"
    sides = {
        "before": [{"text": "a $x$ < b", "accuracy": 0.0}],
        "after": [{"text": long, "accuracy": 1.0}],
    }
    picture = json.loads((HERE / "toy" / "rollouts.json").read_text())[0]["pictures"]
    row = {"question": "cost $1 or $2?", "answer": "3", "pictures": picture, **sides}
    (tmp_path / "rollouts.json").write_text(json.dumps([row]))
    monkeypatch.setattr(figures, "TOY", tmp_path)
    svg = figures.card_svg(figures.rollouts(), "rollouts")
    texts = texts_of(svg)
    assert "cost $1 or $2?  (3)" in texts and "✗ a $x$ < b" in texts
    first = next(i for i, text in enumerate(texts) if text.startswith("✓"))
    assert (texts[first] + texts[first + 1]).removeprefix("✓ ") == long


def test_the_committed_figures_are_what_the_code_draws(tmp_path):
    """Each file is there, of sane size, well-formed, dark where wanted, and drawn twice the same."""
    for name, drawing in figures.FIGURES.items():
        svg = figures.card_svg(drawing(), name)
        again = figures.card_svg(drawing(), name)
        assert svg == again
        assert len(svg.encode()) < 60_000
        assert "prefers-color-scheme: dark" in svg and "<dc:date>" not in svg
        for colour in figures.report.DARK:
            assert f'[style*="fill: {colour}"]' in svg
        for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"):
            _, _, colour = text.get("style").partition("fill: ")  # none would be black
            assert colour[:7] in figures.report.DARK, text.text
        committed = HERE / "toy" / "figures" / f"{name}.svg"
        stale = f"python tools/figures.py {name}"
        assert committed.exists(), stale
        assert texts_of(committed.read_text()) == texts_of(svg), stale


def test_missing_results_and_unknown_names_end_in_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "TOY", tmp_path)
    words = ["figures.py", "weight", "accuracy", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        figures.main()
    assert stop.value.code == 1
    assert "accuracy was not drawn" in (message := capsys.readouterr().err)
    assert "ablations.json is missing: python toy/ablate.py writes it" in message
    assert (tmp_path / "out" / "weight.svg").exists()
    monkeypatch.setattr(sys, "argv", ["figures.py", "weigth"])
    with pytest.raises(SystemExit):
        figures.main()
    assert "no figure is called weigth" in capsys.readouterr().err


# ----------------------------------------------------------------------- toy/ablate.py's results


def finished_run(folder, after, length=30.0):
    folder.mkdir(parents=True)
    summary = {"accuracy_before": 0.2, "accuracy_after": after, "response_length_after": length}
    (folder / "summary.json").write_text(json.dumps({**summary, "seconds": 60.0}))
    lines = ['{"step": 5}', f'{{"step": 10, "eval_accuracy": {after}}}']
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_ablation_table_pairs_runs_by_seed(tmp_path):
    """Mean and t interval (two degrees of freedom: 4.303) of the differences, by hand."""
    ends = {"full": (0.70, 0.72, 0.71), "no bonus": (0.69, 0.73, 0.72)}
    runs = {variant: [] for variant in ends}
    for variant, values in ends.items():
        for seed, after in enumerate(values):
            folder = ablate.run_folder(variant, seed, tmp_path)
            finished_run(folder, after, 40.0 + seed)
            runs[variant].append(ablate.read_run(variant, seed, folder))
    table = ablate.make_table(runs)
    # differences -.01, +.01, +.01: mean .0033, standard deviation .011547, half width .0287
    row = next(line for line in table.splitlines() if line.startswith("| no bonus"))
    assert row == "| no bonus | 3 | 0.200 | 0.713 ± 0.021 | +0.003 ± 0.029 | 41.0 ± 1.0 |"
    assert runs["full"][1]["accuracy"] == [[0, 0.2], [10, 0.72]]


def test_results_hold_every_finished_run(tmp_path):
    finished_run(tmp_path / "full-10", 0.5)
    finished_run(tmp_path / "full-2", 0.6)
    finished_run(tmp_path / "think-answer-format-0", 0.7)
    finished_run(tmp_path / "full-old", 0.8)  # no seed: somebody's copy
    (tmp_path / "full-3").mkdir()  # not finished
    found = [(run["variant"], run["seed"]) for run in ablate.finished_runs(tmp_path)]
    assert found == [("full", 2), ("full", 10), ("think/answer format", 0)]


def test_a_run_kept_from_other_options_is_refused(tmp_path):
    _, config = ablate.observe_r1.parse_arguments(ablate.arguments("no bonus", 1, tmp_path))
    kept = {**asdict(config), "output_dir": "elsewhere", "eval_steps": 7}  # these may differ
    (tmp_path / "config.json").write_text(json.dumps(kept))
    ablate.check_options("no bonus", 1, tmp_path)
    with pytest.raises(ValueError, match="--seed 1, not 2"):
        ablate.check_options("no bonus", 2, tmp_path)
    with pytest.raises(ValueError, match="--bonus 0.0, not 0.2"):
        ablate.check_options("full", 1, tmp_path)


def test_responses_before_and_after_stand_side_by_side():
    problem = {"question": "?", "answer": "7", "images": [{"bytes": b"png"}]}
    texts = {"before": ("a", "b"), "after": ("c", "d")}
    sides = []
    for first, second in texts.values():
        wrong = {"text": first, "accuracy": 0.0, "format": 0.5}
        right = {"text": second, "accuracy": 1.0, "format": 0.5}
        sides.append([{"id": "1", "responses": [wrong, right]}])
    (row,) = ablate.compare([problem], *sides)
    assert row["pictures"] == ["data:image/png;base64,cG5n"]
    for when, (first, second) in texts.items():
        wrong, right = row[when]
        assert wrong == {"text": first, "accuracy": 0.0}
        assert right == {"text": second, "accuracy": 1.0}


def test_habits_are_counted_by_response():
    texts = {
        "<answer>3</answer>": 0.0,
        "<think>3</think><answer>3</answer>": 1.0,
        "<observe>3</observe><think>3</think><answer>3</answer>": 1.0,
        "<observe>3</observe><think>3 again:3</think><answer>3</answer>": 0.0,
    }
    before = [{"text": text, "accuracy": right} for text, right in texts.items()]
    after = [before[2], {**before[2], "accuracy": 0.0}]
    table = ablate.habit_table([{"responses": before}], [{"responses": after}])
    assert table.splitlines()[2:] == [
        "| answers at once | 0.250 | 0.00 | 0.000 | - |",
        "| observes, thinks | 0.250 | 1.00 | 1.000 | 0.50 |",
        "| observes, thinks, checks | 0.250 | 0.00 | 0.000 | - |",
        "| thinks without observing | 0.250 | 1.00 | 0.000 | - |",
    ]


def test_quantiles_of_student_and_a_single_seed():
    assert ablate.paired_difference([0.5], [0.4]) == (pytest.approx(0.1), math.inf)
    _, half = ablate.paired_difference([1.0, -1.0] * 4, [0.0] * 8)  # seven degrees of freedom
    assert half == pytest.approx(2.365 * statistics.stdev([1.0, -1.0] * 4) / math.sqrt(8))
    _, half = ablate.paired_difference([1.0, -1.0] * 50, [0.0] * 100)
    assert half >= 1.984 * statistics.stdev([1.0, -1.0] * 50) / 10  # never too narrow
