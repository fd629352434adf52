"""The README's figures, each drawn from the functions themselves or from stored results.

    python tools/figures.py                 # all of them, into toy/figures/
    python tools/figures.py mask clip       # only these
    python tools/figures.py accuracy --runs runs/a runs/b    # the curve of your own runs

ladder, weight, group, mask and clip call the functions of observe_r1.py and rewards.py. accuracy
and ablations draw toy/ablations.json, rollouts draws toy/rollouts.json: toy/ablate.py writes both.
Needs matplotlib (pip install matplotlib). The same input gives the same bytes.
"""

import argparse
import base64
import io
import json
import math
import statistics
import sys
import textwrap
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
TOY = HERE.parent / "toy"
sys.path[:0] = [str(HERE), str(HERE.parent), str(TOY)]

import ablate
import report
from report import (
    BLUE,
    CARD,
    FAINT,
    GOLD,
    GREEN,
    GREY,
    INK,
    RED,
    VIOLET,
    new_figure,
    style_axes,
)

from observe_r1 import group_advantages, grpo_loss, mix_ladder, pack_group
from rewards import bonus_rewards, dynamic_weight

# How many of 1,000 problems have 0, 1, … 8 of 8 responses wrong in the paper's ladder.
LEVEL_SIZES = (15, 35, 50, 75, 135, 150, 150, 200, 190)

# One group of eight, as scored: its bonus, weight and advantages are what the figure computes.
ACCURACY = (1, 1, 0, 0, 0, 0, 1, 0)
FORMAT = (0.5, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0)
LENGTHS = (300, 200, 150, 120, 400, 500, 600, 700)

# A prompt of four tokens and three responses, for the picture of the attention mask.
PROMPT_LENGTH = 4
RESPONSE_LENGTHS = (3, 2, 4)


# ---------------------------------------------------------------------------- the method's figures


def ladder():
    """Nine stages by level: as wide as the stage is long, as high as the level's share of it."""
    difficulty = []
    for level, size in enumerate(LEVEL_SIZES):
        difficulty += [level / 8] * size
    complexity = list(range(len(difficulty)))
    order, stages = mix_ladder(difficulty, complexity, 0)

    counts = [[0] * 9 for _ in range(9)]  # [stage][level]
    for problem, stage in zip(order, stages):
        counts[stage][round(difficulty[problem] * 8)] += 1

    figure = new_figure(7.4, 3.4)
    axes = figure.subplots()
    colours = level_colours()
    left = 0
    for stage, row in enumerate(counts):
        size = sum(row)
        bottom = 0.0
        for level, count in enumerate(row):
            height = count / size
            bar = axes.bar(left, height, size, bottom, align="edge", color=colours[level])
            bar[0].set(edgecolor=CARD, linewidth=0.6, label=f"{stage} {level}")
            bottom += height
        text = f"{stage + 1}\n{size}"
        axes.text(left + size / 2, 1.02, text, ha="center", va="bottom", fontsize=8, color=INK)
        left += size

    axes.text(-8, 1.02, "stage\nproblems", ha="right", va="bottom", fontsize=8, color=INK)
    handles = [axes.patches[level] for level in reversed(range(9))]
    labels = [f"{level / 8:g}" for level in reversed(range(9))]
    legend = axes.legend(handles, labels, title="difficulty", loc="center left", fontsize=8)
    place_legend(legend, (1.01, 0.5))
    style_axes(axes)
    axes.grid(visible=False)
    axes.set_xlim(0, left)
    axes.set_ylim(0, 1)
    axes.set_xlabel("place in the ladder, of 1,000 problems: training reads from left to right")
    axes.set_ylabel("share of the stage")
    return figure


def level_colours() -> list[str]:
    """Nine colours from easy to hard that are read on light and on dark ground."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis"](0.97 - 0.82 * level / 8)) for level in range(9)]


def place_legend(legend, anchor: tuple[float, float]) -> None:
    legend.set_bbox_to_anchor(anchor)
    legend.get_frame().set(facecolor="none", edgecolor="none")
    for text in (*legend.get_texts(), legend.get_title()):
        text.set(color=INK, fontsize=8)


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
    """One group: each response's reward in its parts, and the advantage that comes of it."""
    correct = [value == 1 for value in ACCURACY]
    bonus = bonus_rewards(correct, LENGTHS)
    rewards = torch.tensor([ACCURACY, FORMAT, bonus]).sum(0)  # [G]
    w = dynamic_weight(correct)
    advantages = group_advantages(rewards[None], torch.tensor([w]))[0].tolist()  # G numbers

    figure = new_figure(7.4, 3.3)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.3))
    places = list(range(8))
    floor = [0.0] * 8
    for name, values, colour in zip(
        ("accuracy", "format", "bonus"), (ACCURACY, FORMAT, bonus), (BLUE, VIOLET, GOLD)
    ):
        left.barh(places, values, 0.62, floor, color=colour, label=name)
        floor = [low + value for low, value in zip(floor, values)]
    mean = rewards.mean().item()
    left.axvline(mean, color=INK, linewidth=1, linestyle=(0, (3, 2)))
    left.text(mean + 0.03, 7.6, f"mean {mean:.4g}", fontsize=8, color=INK, va="bottom")
    place_legend(left.legend(loc="lower center", ncols=3), (0.5, 1.0))

    colours = [GREEN if value > 0 else RED for value in advantages]
    right.barh(places, advantages, 0.62, color=colours)
    right.axvline(0, color=GREY, linewidth=0.8)
    for place, value in zip(places, advantages):
        side = "left" if value > 0 else "right"
        shift = 0.08 if value > 0 else -0.08
        right.text(
            value + shift, place, f"{value:+.3f}", ha=side, va="center", fontsize=8, color=INK
        )

    style_axes(left)
    style_axes(right)
    for axes in (left, right):
        axes.grid(visible=False, axis="y")
    left.set_yticks(places)
    marks = ["right" if value else "wrong" for value in correct]
    left.set_yticklabels([f"{m}, {length} tokens" for m, length in zip(marks, LENGTHS)])
    left.invert_yaxis()
    left.set_ylim(7.9, -0.6)
    left.set_xlim(0, 1.8)
    right.set_xlim(-2.6, 3.6)
    left.set_xlabel("reward r")
    right.set_xlabel(f"advantage w (r − mean) / std, here w = {w:g}")
    return figure


def packed_mask() -> torch.Tensor:
    """[S,S], True where the token of the row may look at the token of the column."""
    longest = max(RESPONSE_LENGTHS)
    lengths = torch.tensor(RESPONSE_LENGTHS)[:, None]
    mask = (torch.arange(longest) < lengths).long()  # [G,T]
    prompt = {
        "input_ids": torch.ones(1, PROMPT_LENGTH, dtype=torch.long),
        "position_ids": torch.arange(PROMPT_LENGTH).expand(3, 1, -1),
    }
    packed, _ = pack_group(prompt, torch.ones_like(mask), mask)
    return packed["attention_mask"][0, 0].bool()


def mask():
    """Which token of a packed group sees which: the prompt, and its own response so far."""
    visible = packed_mask()
    names = [f"p{i + 1}" for i in range(PROMPT_LENGTH)]
    owners = [0] * PROMPT_LENGTH
    for owner, (letter, length) in enumerate(zip("abc", RESPONSE_LENGTHS), start=1):
        names += [f"{letter}{i + 1}" for i in range(length)]
        owners += [owner] * length

    figure = new_figure(4.6, 4.7)
    axes = figure.subplots()
    for row, owner in enumerate(owners):
        columns = visible[row].nonzero()[:, 0].tolist()
        colours = [
            GREY if owners[column] == 0 else (BLUE, VIOLET, GOLD)[owner - 1] for column in columns
        ]
        axes.bar(columns, 0.86, 0.86, row - 0.43, color=colours)

    style_axes(axes)
    axes.grid(visible=False)
    size = len(names)
    for border in range(1, size):
        if owners[border] != owners[border - 1]:
            axes.axhline(border - 0.5, color=FAINT, linewidth=0.8)
            axes.axvline(border - 0.5, color=FAINT, linewidth=0.8)
    axes.set_xlim(-0.5, size - 0.5)
    axes.set_ylim(size - 0.5, -0.5)
    axes.set_aspect("equal")
    axes.set_xticks(range(size), names)
    axes.set_yticks(range(size), names)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.spines["bottom"].set_visible(False)
    axes.set_xlabel("… sees this one: prompt p, responses a, b and c")
    axes.set_ylabel("this token …")
    return figure


def clip():
    """The clipped objective of one token by its ratio; dashed where its gradient is 0."""
    figure = new_figure(5.6, 3.2)
    axes = figure.subplots()
    for advantage, colour in ((1.0, GREEN), (-1.0, RED)):
        ratios = torch.linspace(0.02, 2, 199)
        values = []
        slopes = []
        for ratio in ratios:
            log_prob = ratio.log().view(1, 1).requires_grad_()
            old = torch.zeros(1, 1)
            ones = torch.ones(1, 1)
            loss, _ = grpo_loss(log_prob, old, None, torch.tensor([advantage]), ones)
            loss.backward()
            values.append(-loss.item())
            slopes.append(-log_prob.grad.item())
        for moving, style in ((True, "-"), (False, (0, (2.2, 1.6)))):
            part = [
                value if (slope != 0) == moving else math.nan
                for value, slope in zip(values, slopes)
            ]
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
    axes.set_xlabel("ratio: probability now / probability when sampled")
    axes.set_ylabel("objective of a token")
    return figure


# ------------------------------------------------------------------------------ results of runs


def read_results(name: str, command: str):
    file = TOY / name
    if not file.exists():
        raise ValueError(f"{file} is missing: {command} writes it")
    return json.loads(file.read_text())


def stored_runs() -> dict[str, list[dict]]:
    """The runs of toy/ablations.json by variant."""
    variants = {}
    for run in read_results("ablations.json", "python toy/ablate.py")["runs"]:
        variants.setdefault(run["variant"], []).append(run)
    return variants


def accuracy(folders: list[Path] = ()):
    """Held-out accuracy by step: a thin line a run, a thick one for their mean."""
    curves = {}
    for folder in folders:
        run = report.Run(folder)
        run.read()
        curves[folder] = run.held_out_accuracy()
    if not folders:
        for run in stored_runs()["full"]:
            curves[f"seed {run['seed']}"] = run["accuracy"]

    steps = [step for step, _ in next(iter(curves.values()))]
    for name, curve in curves.items():
        if not curve or [step for step, _ in curve] != steps:
            raise ValueError(f"{name}: not evaluated at the same steps as the others, or never")
    curves = list(curves.values())

    figure = new_figure(6.4, 3.2)
    axes = figure.subplots()
    for curve in curves:
        axes.plot(steps, [value for _, value in curve], color=BLUE, linewidth=0.7, alpha=0.6)
    means = []
    for values in zip(*curves):
        means.append(statistics.mean(value for _, value in values))
    axes.plot(steps, means, color=BLUE, linewidth=2.6, marker="o", markersize=5)
    for place, shift in ((0, (8, -4)), (-1, (-2, 9))):
        text = f"{means[place]:.3f}"
        axes.annotate(
            text, (steps[place], means[place]), shift, textcoords="offset points", color=INK
        )

    style_axes(axes)
    axes.set_ylim(0, 1)
    axes.set_xlabel("step")
    axes.set_ylabel("held-out problems answered correctly")
    seeds = "one run" if len(curves) == 1 else f"{len(curves)} seeds: a thin line each, their mean"
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
    from PIL import Image

    problems = read_results("rollouts.json", "python toy/ablate.py rollouts")
    line_height = 0.165  # inches
    rows = []  # (kind, what to draw, colour), a line each
    for problem in problems:
        rows.append(("problem", problem, INK))
        for when in ("before", "after"):
            rows.append(("when", f"{when} training", INK))
            for response in problem[when]:
                colour = GREEN if response["accuracy"] else RED
                mark = "✓" if response["accuracy"] else "✗"
                lines = textwrap.wrap(response["text"], 116) or [""]
                rows.append(("text", f"{mark} {lines[0]}", colour))
                rows += [("more", line, colour) for line in lines[1:]]

    heights = {"problem": 3.6, "when": 1.4, "text": 1.0, "more": 1.0}  # in lines
    total = sum(heights[kind] for kind, _, _ in rows) + 0.5
    figure = new_figure(7.9, total * line_height, layout=None)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 7.9 / line_height)
    axes.set_ylim(total, 0)
    axes.axis("off")

    plain = {"family": "monospace", "parse_math": False}  # a dollar is a dollar
    place = 0.0
    for kind, what, colour in rows:
        place += heights[kind]
        if kind == "problem":
            data = base64.b64decode(what["pictures"][0].partition(",")[2])
            picture = Image.open(io.BytesIO(data)).convert("L")
            width = 2.4 * picture.width / picture.height
            spread = (0.8, 0.8 + width, place, place - 2.4)
            axes.imshow(picture, "gray", extent=spread, aspect="auto", vmin=0, vmax=255)
            text = f"{what['question']}  ({what['answer']})"
            axes.text(width + 1.6, place - 1.2, text, color=INK, va="center", parse_math=False)
            axes.set_xlim(0, 7.9 / line_height)
            axes.set_ylim(total, 0)
        elif kind == "when":
            axes.text(0.8, place, what, color=colour, fontsize=9, fontweight="bold")
        else:
            left = 0.8 if kind == "text" else 1.5  # a long response goes on further in
            axes.text(left, place, what, color=colour, fontsize=7.4, **plain)
    return figure


FIGURES = {
    drawing.__name__: drawing
    for drawing in (ladder, weight, group, mask, clip, accuracy, ablations, rollouts)
}


def card_svg(figure, name: str) -> str:
    """The figure on a card of its own, which turns dark with the reader's system."""
    if figure.get_layout_engine():
        figure.get_layout_engine().set(w_pad=0.13, h_pad=0.13)
    svg = report.svg_text(figure, name)
    card = f'<rect width="100%" height="100%" rx="8" style="fill: {CARD}"/>'
    start = svg.index(">") + 1
    return f"{svg[:start]}\n<style>{report.dark_style()}</style>\n{card}{svg[start:]}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(FIGURES))
    parser.add_argument("--runs", nargs="+", type=Path, default=[], help="folders for accuracy")
    parser.add_argument("--output", type=Path, default=TOY / "figures")
    args = parser.parse_args()
    names = args.names or list(FIGURES)
    unknown = [name for name in names if name not in FIGURES]
    if unknown:
        parser.error(f"no figure is called {', '.join(unknown)}: choose from {', '.join(FIGURES)}")

    args.output.mkdir(parents=True, exist_ok=True)
    missing = 0
    for name in names:
        options = {"folders": args.runs} if name == "accuracy" else {}
        try:
            figure = FIGURES[name](**options)
        except ValueError as error:
            print(f"{name} was not drawn: {error}", file=sys.stderr)
            missing += 1
            continue
        file = args.output / f"{name}.svg"
        file.write_text(card_svg(figure, name), encoding="utf-8")
        print(file)
    sys.exit(1 if missing else 0)


if __name__ == "__main__":
    main()
