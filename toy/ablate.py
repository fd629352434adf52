"""What each part of the method is worth on the toy: the full method and five ablations.

    python toy/ablate.py                                  # 18 runs, about half an hour on two cores
    python toy/ablate.py --variants full --seeds 0 1 2    # the learning curve of the README
    python toy/ablate.py rollouts                         # its responses before and after

Runs are kept in runs/ablate and not repeated: an interrupted series goes on where it stopped.
Writes runs/ablate/table.md and runs/ablate/accuracy.svg from the runs that were asked for, and
runs/ablate/rollouts.svg from the model in toy/ and the one that `python observe_r1.py` trained.
"""

import argparse
import base64
import html
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import datasets

HERE = Path(__file__).resolve().parent
VARIANTS = {  # the paper's five ablations
    "full": "",
    "plain GRPO": "--observe false --order random --bonus 0 --dynamic_weight false",
    "random order": "--order random",
    "think/answer format": "--observe false",
    "no bonus": "--bonus 0",
    "no weight": "--dynamic_weight false",
}
COLOURS = ("#1f6feb", "#8b949e", "#d29922", "#bf3989", "#2da44e", "#8250df")
T_95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 10: 2.262}  # Student's t by number of runs


def run(variant: str, seed: int, output: Path) -> dict:
    """Summary and metrics of one run, trained now if it has not been before."""
    folder = output / f"{variant.replace(' ', '-').replace('/', '-')}-{seed}"
    if not (folder / "summary.json").exists():
        command = [
            sys.executable,
            HERE.parent / "observe_r1.py",
            "train",
            "--config",
            HERE / "config.json",
            "--eval_steps",
            "10",
            "--seed",
            seed,
            "--output_dir",
            folder,
        ]
        subprocess.run(
            [*map(str, command), *VARIANTS[variant].split()],
            check=True,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
    summary = json.loads((folder / "summary.json").read_text())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    print(variant, seed, summary, flush=True)
    return {**summary, "metrics": [json.loads(line) for line in lines]}


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def make_table(runs: dict[str, list[dict]]) -> str:
    """Markdown; the difference to the full method is paired by seed, with its 95 % t interval."""
    lines = [
        "| variant | accuracy before | after | paired difference to full | length after | gain per "
        "minute |",
        "|---|---|---|---|---|---|",
    ]
    for variant, results in runs.items():
        before, after, length, seconds = (
            [result[name] for result in results]
            for name in ("accuracy_before", "accuracy_after", "response_length_after", "seconds")
        )
        difference = "-"
        if "full" in runs and variant != "full" and len(after) == len(runs["full"]):
            gaps = [a - b["accuracy_after"] for a, b in zip(after, runs["full"])]
            half = T_95.get(len(gaps), 2.0) * spread(gaps) / math.sqrt(len(gaps))
            difference = f"{statistics.mean(gaps):+.3f} ± {half:.3f}"
        gain = [60 * (a - b) / s for a, b, s in zip(after, before, seconds)]
        lines.append(
            f"| {variant} | {statistics.mean(before):.3f} | {statistics.mean(after):.3f} ± "
            f"{spread(after):.3f} | {difference} | "
            f"{statistics.mean(length):.1f} ± {spread(length):.1f} "
            f"| {statistics.mean(gain):.2f} |"
        )
    return "\n".join(lines) + "\n"


def make_figure(runs: dict[str, list[dict]]) -> str:
    """Held-out accuracy by step: a thin line a seed, a thick one for their mean."""

    def point(step, value, last):
        return f"{50 + 500 * step / last:.1f},{270 - 250 * value:.1f}"

    shapes = []
    for tick in range(0, 11, 2):
        y = 270 - 25 * tick
        shapes.append(
            f'<line x1="50" x2="550" y1="{y}" y2="{y}" stroke="#8884"/>'
            f'<text x="42" y="{y + 4}" text-anchor="end">{tick / 10:.1f}</text>'
        )
    for colour, (variant, results), place in zip(COLOURS, runs.items(), range(9)):
        curves = []
        for result in results:
            curve = [(0, result["accuracy_before"])]
            curve += [
                (m["step"], m["eval_accuracy"]) for m in result["metrics"] if "eval_accuracy" in m
            ]
            curves.append(curve)
        last = curves[0][-1][0]
        means = [(points[0][0], statistics.mean(v for _, v in points)) for points in zip(*curves)]
        for curve, width in [*((curve, 0.7) for curve in curves), (means, 2.5)]:
            places = " ".join(point(step, value, last) for step, value in curve)
            shapes.append(
                f'<polyline points="{places}" fill="none" stroke="{colour}" '
                f'stroke-width="{width}"/>'
            )
        y = 262 - 16 * place
        shapes.append(f'<text x="545" y="{y}" text-anchor="end" fill="{colour}">{variant}</text>')
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 570 310" font-family="sans-serif" '
        'font-size="12" fill="#7d8590">' + "".join(shapes) + '<text x="300" y="302" '
        f'text-anchor="middle">step (of {last})</text><text x="50" y="12">accuracy on held-out '
        "handwriting, a thin line a seed</text></svg>\n"
    )


def sampled(model: Path, output: Path) -> list[dict]:
    """Four responses of a model to each held-out problem."""
    options = ["--config", HERE / "config.json", "--model", model, "--output_dir", output]
    options += ["--data", HERE / "heldout.parquet", "--num_samples", 4]
    command = [sys.executable, HERE.parent / "observe_r1.py", "eval", *options]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (output / "responses.jsonl").read_text().splitlines()]


def make_rollouts(problems: list[dict], before: list[dict], after: list[dict]) -> str:
    """Pictures, questions and four responses each, before training and after it, right or wrong."""
    shapes, height = [], 10 + 46 + 8 * 17 + 20
    for top, problem, *rows in zip(range(10, 10**6, height), problems, before, after):
        data = base64.b64encode(problem["images"][0]["bytes"]).decode()
        shapes.append(
            f'<image x="10" y="{top}" height="36" href="data:image/png;base64,{data}"/><text '
            f'x="240" y="{top + 22}">{html.escape(problem["question"])} '
            f"({problem['answer']})</text>"
        )
        lines = [
            (when, *line)
            for when, row in zip(("before", "after"), rows)
            for line in zip(row["responses"], row["accuracy"])
        ]
        for y, (when, response, right) in zip(range(top + 56, 10**6, 17), lines):
            colour, mark = ("#2da44e", "✓") if right else ("#d1434b", "✗")
            response = response if len(response) < 100 else response[:98] + " …"
            shapes.append(
                f'<text x="10" y="{y}" fill="{colour}">{mark}</text><text x="26" y="{y}">{when}'
                f'</text><text x="72" y="{y}" font-family="monospace" font-size="10.5" '
                f'fill="{colour}">{html.escape(response)}</text>'
            )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {len(problems) * height}" '
        'fill="#7d8590" font-family="sans-serif" font-size="13">' + "".join(shapes) + "</svg>\n"
    )


def rollouts(output: Path) -> None:
    """rollouts.svg: the first held-out problem of three digits and the first of six, seed 0."""
    problems = datasets.Dataset.from_parquet(str(HERE / "heldout.parquet")).select([2, 5])
    problems = problems.cast_column("images", datasets.List(datasets.Image(decode=False)))
    before = sampled(HERE / "model", output / "eval-before")
    after = sampled(Path("runs/toy/final"), output / "eval-after")
    picture = make_rollouts(list(problems), *([rows[2], rows[5]] for rows in (before, after)))
    (output / "rollouts.svg").write_text(picture)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", nargs="?", default="runs", choices=["runs", "rollouts"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/ablate"))
    args = parser.parse_args()
    if args.what == "rollouts":
        return rollouts(args.output)
    runs = {
        variant: [run(variant, seed, args.output) for seed in args.seeds]
        for variant in args.variants
    }
    (args.output / "table.md").write_text(make_table(runs))
    (args.output / "accuracy.svg").write_text(make_figure(runs))
    print(make_table(runs))


if __name__ == "__main__":
    main()
