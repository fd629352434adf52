"""What tools/figures.py draws of functions and results; and toy/ablate.py's arithmetic.

That the functions which it calls are right, their own tests say.
"""

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

pytest.importorskip("matplotlib")
HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE / "tools"))
import figures
from figures import ablate


def texts_of(svg):
    """What can be read in a drawing. Its paths may differ from one matplotlib to the next."""
    root = ElementTree.fromstring(svg)
    return [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]


def axes_of(name):
    return getattr(figures, name)().axes


def test_mask_shows_the_prompt_and_the_own_response():
    (axes,) = axes_of("mask")
    drawn = {(round(bar.get_y() + 0.43), round(bar.get_x() + 0.43)) for bar in axes.patches}
    owner = np.repeat([0, 1, 2, 3], [4, 3, 2, 4])
    expected = np.tril((owner == owner[:, None]) | (owner == 0))
    assert drawn == {*map(tuple, np.argwhere(expected).tolist())}
    labels = " ".join(label.get_text() for label in axes.get_xticklabels())
    assert labels == "p1 p2 p3 p4 a1 a2 a3 b1 b2 c1 c2 c3 c4"


def test_clip_is_the_minimum_and_where_it_is_flat_only_dashed():
    (axes,) = axes_of("clip")
    for advantage, dashed, solid in ((1, *axes.lines[:2]), (-1, *axes.lines[2:])):
        assert dashed.is_dashed() and not solid.is_dashed()
        ratio, objective = map(np.array, dashed.get_data())
        expected = np.minimum(ratio * advantage, ratio.clip(0.8, 1.2) * advantage)
        assert objective == pytest.approx(expected, abs=1e-5)
        corner = 1 + 0.2 * advantage
        moves = advantage * ratio < advantage * corner
        assert (moves == ~np.isnan(solid.get_ydata()))[abs(ratio - corner) > 1e-3].all()


def test_ablations_pair_the_seeds_that_all_have(tmp_path, monkeypatch):
    runs = []
    variants = {"full": (0.7, 0.8, 0.9), "no bonus": (0.6, 0.72), "x": (0.8, 0.9)}
    for variant, ends in variants.items():
        for seed, end in enumerate(ends):
            runs.append({"variant": variant, "seed": seed, "accuracy": [[0, 0.1], [10, end]]})
    (tmp_path / "ablations.json").write_text(json.dumps({"runs": runs}))
    monkeypatch.setattr(figures, "TOY", tmp_path)
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
    sides = {"before": [{"text": "a $x$ < b", "accuracy": 0.0}]}
    sides["after"] = [{"text": long, "accuracy": 1.0}]
    picture = json.loads((HERE / "toy" / "rollouts.json").read_text())[0]["pictures"]
    row = {"question": "cost $1 or $2?", "answer": "3", "pictures": picture, **sides}
    (tmp_path / "rollouts.json").write_text(json.dumps([row]))
    monkeypatch.setattr(figures, "TOY", tmp_path)
    svg = figures.card_svg(figures.rollouts)
    texts = texts_of(svg)
    assert "cost $1 or $2?  (3)" in texts and "✗ a $x$ < b" in texts
    assert texts[-2].removeprefix("✓ ") + texts[-1].lstrip() == long


@pytest.mark.parametrize("drawing", figures.FIGURES)
def test_the_committed_figures_are_what_the_code_draws(drawing):
    """Each file is there, of sane size, dark where wanted, and drawn twice the same."""
    svg = figures.card_svg(drawing)
    assert svg == figures.card_svg(drawing)
    assert len(svg.encode()) < 100_000
    assert "prefers-color-scheme: dark" in svg
    for text in re.findall("<text [^>]*>", svg):
        assert any(f"fill: {colour}" in text for colour in figures.report.DARK), text
    committed = HERE / "toy" / "figures" / f"{drawing.__name__}.svg"
    assert texts_of(committed.read_text()) == texts_of(svg)


# ------------------------------------------------------------------------------- toy/ablate.py


def test_paired_difference_and_its_interval_by_hand():
    """Differences -.01, +.01, +.01: mean .0033, deviation .011547; 4.303 is t of two degrees."""
    mean, half = ablate.paired_difference([0.69, 0.73, 0.72], [0.70, 0.72, 0.71])
    assert mean == pytest.approx(0.01 / 3)
    assert half == pytest.approx(4.303 * 0.011547 / 3**0.5, rel=1e-3)


def test_habits_are_counted_by_response():
    texts = {
        "<answer>3</answer>": 0.0,
        "<think>3</think><answer>3</answer>": 1.0,
        "<observe>3</observe><think>3</think><answer>3</answer>": 1.0,
        "<observe>3</observe><think>3 again:3</think><answer>3</answer>": 0.0,
    }
    before = {"responses": [*texts], "accuracy": [*texts.values()]}
    after = {"responses": [[*texts][2]] * 2, "accuracy": [1.0, 0.0]}
    table = ablate.habit_table([before], [after])
    assert table.loc["observes, thinks"].tolist() == [0.25, 1, 1, 0.5]
    assert table.loc["thinks without observing"].tolist()[:2] == [0.25, 1]
    assert table.loc["answers at once"].tolist()[:2] == [0.25, 0]
    assert table.loc["observes, thinks, checks"].tolist()[:2] == [0.25, 0]
    assert table["after"].sum() == 1


def test_a_run_kept_from_other_options_is_refused(tmp_path):
    words = ablate.arguments("no bonus", 1, tmp_path)
    kept = vars(ablate.observe_r1.parse_arguments(words)[1])
    (tmp_path / "config.json").write_text(json.dumps({**kept, "output_dir": "elsewhere"}))
    ablate.check_options("no bonus", 1, tmp_path)
    with pytest.raises(ValueError, match="--seed 1, not 2"):
        ablate.check_options("no bonus", 2, tmp_path)
