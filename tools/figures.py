"""The README's figures, each drawn from the functions themselves or from stored results.

    python tools/figures.py     # all of them, into toy/figures/

ladder, weight, group, mask and clip call the functions of observe_r1.py and rewards.py. accuracy
and ablations draw toy/ablations.json, rollouts draws toy/rollouts.json: toy/ablate.py writes both.
Needs matplotlib (pip install matplotlib). The same input gives the same bytes.
"""

import json
import statistics
import sys
import textwrap
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
TOY = HERE.parent / "toy"
sys.path[:0] = [str(HERE), str(HERE.parent), str(TOY)]

import ablate
import report
from report import (
    BLUE,
    CARD,
    GOLD,
    GREEN,
    GREY,
    INK,
    RED,
    VIOLET,
    new_figure,
    style_axes,
)

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
    solved = range(9)
    weights = [dynamic_weight([i < right for i in range(8)]) for right in solved]
    bars = axes.bar(solved, weights, 0.6, color=BLUE)
    axes.bar_label(bars, fmt="%g", fontsize=8, color=INK)
    axes.set(xlabel="right responses of the group's eight", ylabel="weight w")
    axes.set(xticks=solved, ylim=(0, 2.1))
    style_axes(axes)
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
        for axes, values, title in zip(row, (reward, *both), titles):
            colours = [GREEN if value > 0 else RED for value in values]
            bars = axes.barh(places, values.tolist(), 0.62, color=colours)
            axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8, color=INK)
            axes.axvline(0, color=GREY, linewidth=0.8)
            axes.set_title(title)
            axes.margins(x=0.3)
            style_axes(axes)
        row[0].set(yticks=places, ylim=(8.6, 0.4), ylabel="response")
    return figure


def sees():
    """[S,S], true where the token of the row sees that of the column, as attention tells.

    Scores are all equal and values are unit vectors: a token's output shows which it looked at.
    """
    lengths = list(PACKED.values())
    same, unit = torch.zeros(1, 1, sum(lengths), 1), torch.eye(sum(lengths))[None, None]
    output, _ = packed_attention(None, same, same, unit, [lengths], scaling=1.0)
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
    places = range(len(names))
    axes.set_xticks(places, names)
    axes.set_yticks(places, names)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.margins(0)
    axes.invert_yaxis()
    label = "… sees this one: prompt p, responses a, b and c"
    axes.set(xlabel=label, ylabel="this token …", aspect="equal")
    return figure


def clip():
    """The clipped objective of one token by its ratio; dashed where its gradient is 0."""
    figure = new_figure(5.6, 3.2)
    axes = figure.subplots()
    ratios = torch.linspace(0.02, 2, 199)
    one = torch.ones(1, 1)
    for advantage, colour in ((1.0, GREEN), (-1.0, RED)):
        objective, moving = [], []  # the latter has a gap where the gradient is 0
        for ratio in ratios:
            log_prob = ratio.log().view(1, 1).requires_grad_()
            loss, _ = grpo_loss(log_prob, 0 * one, None, advantage * one[0], one)
            loss.backward()
            objective.append(-loss.item())
            moving.append(-loss.item() if log_prob.grad else np.nan)
        axes.plot(ratios, objective, "--", color=colour)
        axes.plot(ratios, moving, color=colour, linewidth=2)
        axes.text(0.05, 0.6 * advantage, f"advantage {advantage:+g}", color=colour, fontsize=9)

    axes.text(1.22, 0.03, "dashed: no gradient,\nthe push has done enough", fontsize=8, color=INK)
    label = "ratio: probability now / probability when sampled"
    axes.set(xlabel=label, ylabel="objective of a token", xticks=[0, 0.8, 1, 1.2, 2], xlim=(0, 2))
    style_axes(axes)
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
    axes.plot(steps, curves.T, color=BLUE, linewidth=0.7, alpha=0.6)
    means = curves.mean(0)
    axes.plot(steps, means, color=BLUE, linewidth=2.6, marker="o", markersize=5)
    for place in (0, -1):
        axes.text(steps[place], means[place] - 0.1, f"{means[place]:.3f}", ha="center", color=INK)
    axes.set(xlabel="step", ylabel="held-out problems answered correctly", ylim=(0, 1))
    axes.set_title(f"{len(curves)} seeds: a thin line each, their mean")
    style_axes(axes)
    return figure


def ablations():
    """Accuracy after training of each variant, and its difference to the full method by seed."""
    finals = {}
    for variant, runs in stored_runs().items():
        finals[variant] = {run["seed"]: run["accuracy"][-1][1] for run in runs}
    shared = set.intersection(*map(set, finals.values()))
    full = [finals["full"][seed] for seed in shared]

    figure = new_figure(7.4, 2.9)
    left, right = figure.subplots(1, 2, sharey=True)
    for place, (variant, by_seed) in enumerate(finals.items()):
        values = [by_seed[seed] for seed in shared]
        left.plot(values, [place] * len(values), "o", color=BLUE, markersize=5, alpha=0.6)
        left.plot(statistics.mean(values), place, "|", color=INK, markersize=15)
        if variant != "full":
            difference, half = ablate.paired_difference(values, full)
            right.errorbar(difference, place, xerr=half, fmt="o", color=BLUE, capsize=3)
    right.axvline(0, color=INK, linewidth=0.9)
    left.invert_yaxis()
    left.set_yticks(range(len(finals)), finals)
    left.set_xlabel(f"held-out accuracy after training:\n{len(shared)} seeds and their mean")
    right.set_xlabel("difference to full, paired by seed,\nwith its 95 % t interval")
    style_axes(left)
    style_axes(right)
    return figure


def rollouts():
    """Pictures, questions and responses, before training and after it, right or wrong."""
    lines, pictures = [], {}  # what is written in which colour; pictures by their line
    for problem in json.loads((TOY / "rollouts.json").read_text()):
        pictures[len(lines) + 1] = Image.open(urlopen(problem["pictures"][0]))  # a data URI
        question = f"{problem['question']}  ({problem['answer']})"
        lines += [("", INK)] * 3 + [(question, INK)]
        for when in ("before", "after"):
            lines.append((f"{when} training", INK))
            for response in problem[when]:
                mark, colour = ("✓", GREEN) if response["accuracy"] else ("✗", RED)
                wrapped = textwrap.wrap(f"{mark} {response['text']}", 118, subsequent_indent="  ")
                lines += [(line, colour) for line in wrapped]
    width, height = 7.9, (len(lines) + 1) * 0.165  # inches; a line is high 0.165
    figure = new_figure(width, height)
    axes = figure.subplots()
    axes.axis("off")
    plain = {"family": "monospace", "fontsize": 7.4, "parse_math": False}  # a dollar is a dollar
    for place, (line, colour) in enumerate(lines):
        axes.text(0.8, place, line, color=colour, va="center", **plain)
    for place, picture in pictures.items():
        right = 0.8 + 2.4 * picture.width / picture.height
        axes.imshow(picture, "gray", extent=(0.8, right, place + 1.4, place - 1))
    axes.set(xlim=(0, width / 0.165), ylim=(len(lines), -1))
    return figure


FIGURES = (ladder, weight, group, mask, clip, accuracy, ablations, rollouts)


def card_svg(drawing):
    """The figure on a card of its own, which turns dark with the reader's system."""
    figure = drawing()
    figure.get_layout_engine().set(w_pad=0.13, h_pad=0.13)
    svg = report.svg_text(figure, drawing.__name__)
    card = f'<rect width="100%" height="100%" rx="8" style="fill: {CARD}"/>'
    start = svg.index(">") + 1
    return f"{svg[:start]}\n<style>{report.dark_style()}</style>\n{card}{svg[start:]}"


def main():
    for drawing in FIGURES:
        file = TOY / "figures" / f"{drawing.__name__}.svg"
        file.write_text(card_svg(drawing), encoding="utf-8")
        print(file)


if __name__ == "__main__":
    main()
