"""The README's figures, each drawn from the functions themselves or from stored results.

    python tools/figures.py                 # all of them, into toy/figures/
    python tools/figures.py mask clip       # only these

ladder, weight, group, mask and clip call the functions of observe_r1.py and rewards.py. accuracy
and ablations draw toy/ablations.json, rollouts draws toy/rollouts.json: toy/ablate.py writes both.
Needs matplotlib (pip install matplotlib). The same input gives the same bytes.
"""

import argparse
import base64
import io
import json
import statistics
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
TOY = HERE.parent / "toy"
sys.path[:0] = [str(HERE), str(HERE.parent), str(TOY)]

import ablate
import report
from report import BLUE, CARD, FAINT, GOLD, GREEN, GREY, INK, RED, VIOLET, new_figure, style_axes

from observe_r1 import group_advantages, grpo_loss, mix_ladder, packed_attention
from rewards import dynamic_weight

# How many of 1,000 problems have 0, 1, ... 8 of 8 responses wrong.
LADDERS = {
    "the paper's problems": (15, 35, 50, 75, 135, 150, 150, 200, 190),
    "a model that solves much": (400, 200, 100, 80, 70, 50, 40, 30, 30),
    "mostly all or nothing": (285, 95, 48, 48, 48, 48, 48, 95, 285),
}
GROUPS = {"one of eight is right": 1, "four of eight are right": 4}  # for the picture of a group
PACKED = {"p": 4, "a": 3, "b": 2, "c": 4}  # tokens of a prompt and of three responses


# ---------------------------------------------------------------------------- the method's figures


def ladder():
    """Nine stages by level, for three mixtures of levels."""
    figure = new_figure(7.4, 7.6)
    panels = figure.subplots(3, 1)
    for axes, (name, sizes) in zip(panels, LADDERS.items()):
        difficulty = np.repeat(np.arange(9) / 8, sizes)
        order, stage = mix_ladder(difficulty, np.arange(len(difficulty)))
        report.draw_ladder(axes, difficulty[order], stage)
        axes.set_title(f"{name}: stage, and its size", loc="left", pad=26, color=INK, fontsize=9)
    panels[-1].set_xlabel("place of 1,000 problems: training reads from left to right")
    return figure


def weight():
    """The dynamic weight of a group by how many of its eight responses are right."""
    figure = new_figure(5.2, 2.9)
    axes = figure.subplots()
    solved = list(range(9))
    weights = [dynamic_weight([i < right for i in range(8)]) for right in solved]

    axes.bar(solved, weights, 0.6, color=BLUE)
    for right, value in zip(solved, weights):
        axes.text(right, value + 0.05, f"{value:g}", ha="center", fontsize=8, color=INK)

    style_axes(axes)
    axes.grid(visible=False, axis="x")
    axes.set_xticks(solved)
    axes.set_ylim(0, 2.1)
    axes.set_xlabel("right responses of the group's eight")
    axes.set_ylabel("weight w")
    return figure


def group():
    """Two groups, from rewards to advantages: what std does, and what the weight does to that."""
    figure = new_figure(7.4, 4.6)
    panels = figure.subplots(2, 3, sharex="col", sharey=True)
    places = np.arange(1, 9)
    for row, (name, right) in zip(panels, GROUPS.items()):
        correct = [place <= right for place in places]
        reward = torch.tensor(correct).float()  # accuracy alone
        w = dynamic_weight(correct)
        both = group_advantages(reward.repeat(2, 1), torch.tensor([1.0, w]))
        titles = (f"reward: {name}", "(r − mean) / std", f"times w = {w:g}")
        for axes, values, title in zip(row, (reward.tolist(), *both.tolist()), titles):
            colours = [GREEN if value > 0 else RED for value in values]
            axes.barh(places, values, 0.62, color=colours)
            for place, value in zip(places, values):
                text = f"{value:+.2f}" if axes is not row[0] else f"{value:g}"
                side = "left" if value >= 0 else "right"
                axes.text(value, place, f" {text} ", ha=side, va="center", fontsize=8, color=INK)
            axes.axvline(0, color=GREY, linewidth=0.8)
            axes.set_title(title)
            style_axes(axes)
            axes.grid(visible=False, axis="y")
        row[0].set(yticks=places, xlim=(0, 1.3), ylabel="response")
        row[0].set_ylim(8.6, 0.4)
        row[1].set_xlim(-2, 3.4)
        row[2].set_xlim(-2.7, 3.0)
    return figure


def sees():
    """[S,S], true where the token of the row sees that of the column, as attention tells.

    Scores are all equal and values are unit vectors: a token's output shows which it looked at.
    """
    lengths = list(PACKED.values())
    same, unit = torch.zeros(1, 1, sum(lengths), 1), torch.eye(sum(lengths))[None, None]
    output, _ = packed_attention(None, same, same, unit, lengths, scaling=1.0)
    return output[0, :, 0] > 0


def mask():
    """Which token of a packed group sees which: the prompt, and its own response so far."""
    visible = sees()
    names = [f"{letter}{i + 1}" for letter, length in PACKED.items() for i in range(length)]
    colours = dict(zip(PACKED, (GREY, BLUE, VIOLET, GOLD)))
    figure = new_figure(4.6, 4.7)
    axes = figure.subplots()
    for row, column in visible.nonzero().tolist():
        axes.bar(column, 0.86, 0.86, row - 0.43, color=colours[names[column][0]])
    style_axes(axes)
    axes.grid(visible=False)
    size = len(names)
    for border in np.cumsum([*PACKED.values()])[:-1] - 0.5:
        axes.axhline(border, color=FAINT, linewidth=0.8)
        axes.axvline(border, color=FAINT, linewidth=0.8)
    axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), aspect="equal")
    axes.set_xticks(range(size), names)
    axes.set_yticks(range(size), names)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.spines["bottom"].set_visible(False)
    axes.set(xlabel="… sees this one: prompt p, responses a, b and c", ylabel="this token …")
    return figure


def clip():
    """The clipped objective of one token by its ratio; dashed where its gradient is 0."""
    figure = new_figure(5.6, 3.2)
    axes = figure.subplots()
    ratios = torch.linspace(0.02, 2, 199)
    one = torch.ones(1, 1)
    for advantage, colour in ((1.0, GREEN), (-1.0, RED)):
        objective, moves = np.zeros((2, len(ratios)))
        for i, ratio in enumerate(ratios):
            log_prob = ratio.log().view(1, 1).requires_grad_()
            loss, _ = grpo_loss(log_prob, 0 * one, None, advantage * one[0], one)
            loss.backward()
            objective[i], moves[i] = -loss.item(), log_prob.grad.item() != 0
        for moving, style in ((True, "-"), (False, (0, (2.2, 1.6)))):
            part = np.where(moves == moving, objective, np.nan)
            axes.plot(ratios.tolist(), part, color=colour, linewidth=2, linestyle=style)
        sign = "+" if advantage > 0 else "−"
        axes.text(0.05, 0.6 * advantage, f"advantage {sign}1", color=colour, fontsize=9)

    for ratio in (0.8, 1.2):
        axes.axvline(ratio, color=GREY, linewidth=0.8, linestyle=":")
    axes.plot([1, 1], [1, -1], "o", color=INK, markersize=5)
    axes.text(1.22, 0.03, "dashed: no gradient,\nthe push has done enough", fontsize=8, color=INK)
    style_axes(axes)
    axes.set_xticks([0, 0.5, 0.8, 1, 1.2, 1.5, 2])
    axes.set_xlim(0, 2)
    label = "ratio: probability now / probability when sampled"
    axes.set(xlabel=label, ylabel="objective of a token")
    return figure


# ------------------------------------------------------------------------------ results of runs


def stored_runs():
    """The runs of toy/ablations.json by variant."""
    variants = {}
    for run in json.loads((TOY / "ablations.json").read_text())["runs"]:
        variants.setdefault(run["variant"], []).append(run)
    return variants


def accuracy():
    """Held-out accuracy by step: a thin line a run, a thick one for their mean."""
    curves = np.array([run["accuracy"] for run in stored_runs()["full"]])  # [run,point,2]
    steps, curves = curves[0, :, 0], curves[..., 1]
    figure = new_figure(6.4, 3.2)
    axes = figure.subplots()
    for curve in curves:
        axes.plot(steps, curve, color=BLUE, linewidth=0.7, alpha=0.6)
    means = curves.mean(0)
    axes.plot(steps, means, color=BLUE, linewidth=2.6, marker="o", markersize=5)
    for place, shift in ((0, (8, -4)), (-1, (-2, 9))):
        point = (steps[place], means[place])
        axes.annotate(f"{point[1]:.3f}", point, shift, textcoords="offset points", color=INK)
    style_axes(axes)
    axes.set_ylim(0, 1)
    axes.set_xlabel("step")
    axes.set_ylabel("held-out problems answered correctly")
    seeds = f"{len(curves)} seeds: a thin line each, their mean"
    axes.set_title(seeds, loc="left", color=INK, fontsize=9)
    return figure


def ablations():
    """Accuracy after training of each variant, and its difference to the full method by seed."""
    variants = stored_runs()
    shared = set.intersection(*({run["seed"] for run in runs} for runs in variants.values()))
    finals = {}
    for variant, runs in variants.items():
        by_seed = {run["seed"]: run["accuracy"][-1][1] for run in runs}
        finals[variant] = [by_seed[seed] for seed in sorted(shared)]

    figure = new_figure(7.4, 2.9)
    left, right = figure.subplots(1, 2, sharey=True)
    for place, (variant, values) in enumerate(finals.items()):
        left.plot(values, [place] * len(values), "o", color=BLUE, markersize=5, alpha=0.6)
        mean = statistics.mean(values)
        left.plot([mean], [place], "|", color=INK, markersize=15, markeredgewidth=2)
        if variant != "full":
            difference, half = ablate.paired_difference(values, finals["full"])
            right.errorbar(difference, place, xerr=half, fmt="o", color=BLUE, capsize=3)

    style_axes(left)
    style_axes(right)
    right.axvline(0, color=INK, linewidth=0.9)
    left.set_yticks(range(len(finals)), list(finals))
    left.set_ylim(len(finals) - 0.5, -0.5)
    left.set_xlabel(f"held-out accuracy after training:\n{len(shared)} seeds and their mean")
    right.set_xlabel("difference to full, paired by seed,\nwith its 95 % t interval")
    return figure


def rollouts():
    """Pictures, questions and responses, before training and after it, right or wrong."""
    problems = json.loads((TOY / "rollouts.json").read_text())
    line_height = 0.165  # inches
    rows = []  # (what to draw, colour, its height in lines)
    for problem in problems:
        rows.append((problem, INK, 3.6))
        for when in ("before", "after"):
            rows.append((f"{when} training", INK, 1.4))
            for response in problem[when]:
                mark, colour = ("✓", GREEN) if response["accuracy"] else ("✗", RED)
                lines = textwrap.wrap(f"{mark} {response['text']}", 118, subsequent_indent="  ")
                rows += [(line, colour, 1.0) for line in lines]
    total = sum(height for *_, height in rows) + 0.5
    figure = new_figure(7.9, total * line_height, layout=None)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")

    place = 0.0
    for what, colour, height in rows:
        place += height
        if isinstance(what, dict):
            data = base64.b64decode(what["pictures"][0].partition(",")[2])
            picture = Image.open(io.BytesIO(data)).convert("L")
            width = 2.4 * picture.width / picture.height
            spread = (0.8, 0.8 + width, place, place - 2.4)
            axes.imshow(picture, "gray", extent=spread, aspect="auto", vmin=0, vmax=255)
            text = f"{what['question']}  ({what['answer']})"
            axes.text(width + 1.6, place - 1.2, text, color=INK, va="center", parse_math=False)
        elif colour == INK:
            axes.text(0.8, place, what, color=colour, fontsize=9, fontweight="bold")
        else:
            plain = {"family": "monospace", "parse_math": False}  # a dollar is a dollar
            axes.text(0.8, place, what, color=colour, fontsize=7.4, **plain)
    axes.set(xlim=(0, 7.9 / line_height), ylim=(total, 0))
    return figure


FIGURES = {
    drawing.__name__: drawing
    for drawing in (ladder, weight, group, mask, clip, accuracy, ablations, rollouts)
}


def card_svg(figure, name):
    """The figure on a card of its own, which turns dark with the reader's system."""
    if figure.get_layout_engine():
        figure.get_layout_engine().set(w_pad=0.13, h_pad=0.13)
    svg = report.svg_text(figure, name)
    card = f'<rect width="100%" height="100%" rx="8" style="fill: {CARD}"/>'
    start = svg.index(">") + 1
    return f"{svg[:start]}\n<style>{report.dark_style()}</style>\n{card}{svg[start:]}"


def main():
    how = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(FIGURES))
    parser.add_argument("--output", type=Path, default=TOY / "figures")
    args = parser.parse_args()
    names = args.names or list(FIGURES)
    unknown = [name for name in names if name not in FIGURES]
    if unknown:
        parser.error(f"no figure is called {', '.join(unknown)}: choose from {', '.join(FIGURES)}")

    args.output.mkdir(parents=True, exist_ok=True)
    for name in names:
        try:
            svg = card_svg(FIGURES[name](), name)
        except FileNotFoundError as error:
            sys.exit(f"figures: {error.filename} is missing: toy/ablate.py writes it")
        file = args.output / f"{name}.svg"
        file.write_text(svg, encoding="utf-8")
        print(file)


if __name__ == "__main__":
    main()
