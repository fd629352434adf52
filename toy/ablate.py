"""What each part of the method is worth on the toy: the full method and five ablations.

    python toy/ablate.py                                  # 18 runs, about half an hour on two cores
    python toy/ablate.py --variants full --seeds 0 1 2    # the learning curve of the README

Runs are kept in runs/ablate and not repeated: an interrupted series goes on where it stopped.
Writes runs/ablate/table.md and runs/ablate/accuracy.svg from the runs that were asked for.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/ablate"))
    args = parser.parse_args()
    runs = {
        variant: [run(variant, seed, args.output) for seed in args.seeds]
        for variant in args.variants
    }
    (args.output / "table.md").write_text(make_table(runs))
    (args.output / "accuracy.svg").write_text(make_figure(runs))
    print(make_table(runs))


if __name__ == "__main__":
    main()
