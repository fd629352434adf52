"""What each part of the method is worth on the toy: the full method, five ablations, and LoRA.

    python toy/ablate.py                                  # all of them with three seeds: 21 runs
    python toy/ablate.py --variants full --seeds 0 1 2    # fewer of them
    python toy/ablate.py rollouts                         # responses before and after training
    python tools/figures.py                               # draws what these have written

Runs are kept in runs/ablate and not repeated: an interrupted series goes on where it stopped.
A kept run that was made with other options is refused.
The table is printed. toy/ablations.json gets the held-out accuracy of every run in runs/ablate.
`rollouts` reads the run of `python observe_r1.py` (runs/toy): toy/rollouts.json gets the responses
to two held-out problems before and after training, and how often the model responds in which way
is printed. LoRA needs peft (pip install peft).
"""

import argparse
import base64
import json
import math
import statistics
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import observe_r1

HERE = Path(__file__).resolve().parent

VARIANTS = {  # the paper's five ablations, and adapters in place of all weights
    "full": "--eval_steps 10",  # for the learning curve; evaluations change nothing
    "plain GRPO": "--observe false --shuffle true --bonus 0 --dynamic_weight false",
    "random order": "--shuffle true",
    "think/answer format": "--observe false",
    "no bonus": "--bonus 0",
    "no weight": "--dynamic_weight false",
    "LoRA": "--lora_rank 16 --learning_rate 1e-3",
}
# Options that change no result, and paths, which differ by where a run was made.
UNCHECKED = {"config", "model", "data", "eval_data", "output_dir", "eval_steps"}
MEASURED = ("accuracy", "format", "response_length")
SHOWN = (2, 5)  # held-out problems for rollouts.json: the first of three digits, the first of six

# The 97.5 % quantiles of Student's t for 1 to 9 degrees of freedom. With more than 9 the last one
# is a little too wide, never too narrow.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def run_folder(variant, seed, output):
    return output / f"{variant.replace(' ', '-').replace('/', '-')}-{seed}"


def arguments(variant, seed, folder):
    """What a run gives to observe_r1.py."""
    options = ["--config", HERE / "config.json", "--eval_steps", 0, "--seed", seed]
    options += ["--output_dir", folder, *VARIANTS[variant].split()]
    return ["train", *map(str, options)]


def train(variant, seed, folder):
    """One run of observe_r1.py into this folder; what it prints goes into a .log beside it."""
    log = folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        HERE.parent / "observe_r1.py",
        *arguments(variant, seed, folder),
    ]
    with open(log, "w") as file:
        result = subprocess.run(command, check=False, stdout=file, stderr=subprocess.STDOUT)
    if result.returncode:
        raise ValueError(f"{log}: the run failed: {' '.join(log.read_text().splitlines()[-1:])}")


def check_options(variant, seed, folder):
    """ValueError if a kept run was made with other options than it would be made with now."""
    kept = json.loads((folder / "config.json").read_text())
    _, config = observe_r1.parse_arguments(arguments(variant, seed, folder))
    for name, value in asdict(config).items():
        if name not in UNCHECKED and kept.get(name, value) != value:
            found = f"--{name} {kept[name]}, not {value}"
            raise ValueError(f"{folder} was run with {found}: delete it or name another --output")


def read_run(variant, seed, folder):
    """What the table and the figures need of a finished run: its summary and accuracy by step."""
    check_options(variant, seed, folder)
    summary = json.loads((folder / "summary.json").read_text())
    curve = {0: summary["accuracy_before"]}
    for metrics in observe_r1.read_log(folder / "metrics.jsonl"):
        if metrics.get("eval_accuracy") is not None:
            curve[metrics["step"]] = metrics["eval_accuracy"]
    curve[metrics["step"]] = summary["accuracy_after"]
    run = {"variant": variant, "seed": seed, "steps": metrics["step"]}
    for name in MEASURED:
        for when in ("before", "after"):
            run[f"{name}_{when}"] = round(summary[f"{name}_{when}"], 4)
    run["accuracy"] = [[step, round(value, 4)] for step, value in sorted(curve.items())]
    return run


def finished_runs(output):
    """Every finished run of a known variant under `output`, variant by variant, seed by seed."""
    runs = []
    for variant in VARIANTS:
        prefix = run_folder(variant, "", output).name
        names = [file.parent.name for file in output.glob(f"{prefix}*/summary.json")]
        seeds = [name.removeprefix(prefix) for name in names]
        for seed in sorted(int(seed) for seed in seeds if seed.isdecimal()):
            runs.append(read_run(variant, seed, run_folder(variant, seed, output)))
    return runs


def mean_and_spread(values, digits):
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


def paired_difference(values, others):
    """Mean of the differences, seed by seed, and half the width of its 95 % t interval.

    The interval of a single seed is unknown: infinite.
    """
    gaps = [a - b for a, b in zip(values, others, strict=True)]
    if len(gaps) == 1:
        return gaps[0], math.inf
    t = T_95[min(len(gaps) - 1, len(T_95)) - 1]
    return statistics.mean(gaps), t * statistics.stdev(gaps) / math.sqrt(len(gaps))


def make_table(runs):
    """Markdown; the difference to the full method is paired by seed, with its 95 % t interval."""
    names = "variant, seeds, accuracy before, after, paired difference to full, length after"
    lines = [names.split(", "), ["---"] * 6]
    for variant, results in runs.items():
        ends = {name: [result[name] for result in results] for name in results[0]}
        difference, after = "-", ends["accuracy_after"]
        if "full" in runs and variant != "full":
            full = [result["accuracy_after"] for result in runs["full"]]
            difference = "{:+.3f} ± {:.3f}".format(*paired_difference(after, full))
        before = f"{statistics.mean(ends['accuracy_before']):.3f}"
        length = mean_and_spread(ends["response_length_after"], 1)
        seeds = str(len(results))
        lines.append([variant, seeds, before, mean_and_spread(after, 3), difference, length])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def habit(text):
    """The way of a response; make_toy.py taught the model all four."""
    if "<think>" not in text:
        return "answers at once"
    if "<observe>" not in text:
        return "thinks without observing"
    return "observes, thinks, checks" if "again:" in text else "observes, thinks"


def habit_table(before, after):
    """Markdown: each habit's share of the responses and the share of these that are right."""
    sides = []
    for rows in (before, after):
        right = defaultdict(list)  # habit -> accuracies
        for row in rows:
            for text, accuracy in zip(row["responses"], row["accuracy"], strict=True):
                right[habit(text)].append(accuracy)
        sides.append(right)
    lines = [["habit", "before", "of these right", "after", "of these right"], ["---"] * 5]
    for name in sorted(sides[0] | sides[1]):
        cells = [name]
        for right in sides:
            values, total = right[name], sum(map(len, right.values()))
            cells.append(f"{len(values) / total:.3f}")
            cells.append(f"{statistics.mean(values):.2f}" if values else "-")
        lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def compare(pictures, before, after):
    """Problems with their pictures as data URIs, and the responses of both models, as they came."""
    shown = []
    for own, *sides in zip(pictures, before, after, strict=True):
        row = {name: sides[0][name] for name in ("question", "answer")}
        uris = [base64.b64encode(stored["bytes"]).decode() for stored in own]
        row["pictures"] = [f"data:image/png;base64,{uri}" for uri in uris]
        for name, side in zip(("before", "after"), sides, strict=True):
            pairs = zip(side["responses"], side["accuracy"], strict=True)
            row[name] = [{"text": text, "accuracy": accuracy} for text, accuracy in pairs]
        shown.append(row)
    return shown


def rollouts(folder):
    """Responses to the problems in SHOWN, chosen by their place in the file and nothing else."""
    files = sorted(folder.glob("held_out-*.jsonl"), key=lambda file: int(file.stem.split("-")[1]))
    if not files:
        raise ValueError(f"{folder} holds no run: python observe_r1.py makes it")
    before, after = (observe_r1.read_log(file) for file in (files[0], files[-1]))
    print(habit_table(before, after))
    config = json.loads((folder / "config.json").read_text())
    pictures = pyarrow.parquet.read_table(config["eval_data"])["images"].to_pylist()
    return compare(*([rows[place] for place in SHOWN] for rows in (pictures, before, after)))


def main():
    how = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("what", nargs="?", default="runs", choices=["runs", "rollouts"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/ablate"))
    parser.add_argument("--trained", type=Path, default=Path("runs/toy"), help="a run's folder")
    parser.add_argument("--results", type=Path, default=HERE, help="folder of the JSON files")
    args = parser.parse_args()

    if args.what == "rollouts":
        text = json.dumps(rollouts(args.trained), indent=1) + "\n"
        (args.results / "rollouts.json").write_text(text)
        return

    runs = defaultdict(list)
    for variant in args.variants:
        for seed in args.seeds:
            folder = run_folder(variant, seed, args.output)
            if not (folder / "summary.json").exists():
                train(variant, seed, folder)
            run = read_run(variant, seed, folder)
            runs[variant].append(run)
            print(f"{variant}, seed {seed}: {run['accuracy_before']} to {run['accuracy_after']}")
    print(make_table(runs))

    found = finished_runs(args.output)
    lines = ",\n".join(map(json.dumps, found))  # a run a line, for people to read
    text = f'{{"source": "toy/ablate.py", "runs": [\n{lines}\n]}}\n'
    (args.results / "ablations.json").write_text(text)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"ablate: {error}")
