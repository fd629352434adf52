"""What each part of the method is worth on the toy: the full method, five ablations, and LoRA.

    python toy/ablate.py                                  # all of them with three seeds: 21 runs
    python toy/ablate.py --variants full --seeds 0 1 2    # fewer of them
    python toy/ablate.py rollouts                         # responses before and after training
    python tools/figures.py                               # draws what these have written

Runs are kept in runs/ablate and not repeated: an interrupted series goes on where it stopped.
A kept run that was made with other options is refused.
The table is printed and written to runs/ablate/table.md. toy/ablations.json gets the held-out
accuracy of every run that is in runs/ablate, and toy/rollouts.json the responses of the model in
toy/ and of the one that `python observe_r1.py` trained (runs/toy/final) to two held-out problems;
it also prints how often each of them responds in which way. LoRA needs peft (pip install peft).
"""

import argparse
import base64
import json
import math
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import datasets

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import observe_r1

VARIANTS = {  # the paper's five ablations, and adapters in place of all weights
    "full": "--eval_steps 10",  # for the learning curve; evaluations change nothing
    "plain GRPO": "--observe false --order random --bonus 0 --dynamic_weight false",
    "random order": "--order random",
    "think/answer format": "--observe false",
    "no bonus": "--bonus 0",
    "no weight": "--dynamic_weight false",
    "LoRA": "--lora_rank 16 --learning_rate 1e-3",
}
# Options that change no result, and paths, which differ by where a run was made.
UNCHECKED = (
    *("config", "model", "data", "eval_data", "output_dir"),
    *("eval_steps", "overwrite", "resume"),
)
SHOWN = (2, 5)  # held-out problems for rollouts.json: the first of three digits, the first of six

# The 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom. With more than 30 the last
# one is a little too wide, never too narrow.
T_95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def run_folder(variant: str, seed: int, output: Path) -> Path:
    name = variant.replace(" ", "-").replace("/", "-")
    return output / f"{name}-{seed}"


def arguments(variant: str, seed: int, folder: Path) -> list[str]:
    """What a run gives to observe_r1.py."""
    options = ["--config", HERE / "config.json", "--eval_steps", 0, "--seed", seed]
    options += ["--output_dir", folder, *VARIANTS[variant].split()]
    return ["train", *(str(option) for option in options)]


def train(variant: str, seed: int, folder: Path) -> None:
    """One run of observe_r1.py into this folder; what it prints goes to log.txt there."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, HERE.parent / "observe_r1.py", *arguments(variant, seed, folder)]
    with open(folder / "log.txt", "w") as log:
        result = subprocess.run(command, check=False, stdout=log, stderr=subprocess.STDOUT)
    if result.returncode:
        last = (folder / "log.txt").read_text().splitlines()[-1:]
        raise ValueError(f"{folder}/log.txt: the run failed: {' '.join(last)}")


def check_options(variant: str, seed: int, folder: Path) -> None:
    """ValueError if a kept run was made with other options than it would be made with now."""
    kept = json.loads((folder / "config.json").read_text())
    _, config = observe_r1.parse_arguments(arguments(variant, seed, folder))
    for name, value in asdict(config).items():
        if name not in UNCHECKED and kept.get(name, value) != value:
            found = f"--{name} {kept[name]}, not {value}"
            raise ValueError(f"{folder} was run with {found}: delete it or name another --output")


def read_run(variant: str, seed: int, folder: Path) -> dict:
    """What the table and the figures need of a finished run: its summary and accuracy by step."""
    summary = json.loads((folder / "summary.json").read_text())
    summary = {name: round(value, 4) for name, value in summary.items()}
    summary.pop("seconds")  # of whatever else the machine did
    curve = {0: summary["accuracy_before"]}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        if metrics.get("eval_accuracy") is not None:
            curve[metrics["step"]] = round(metrics["eval_accuracy"], 4)
    curve[metrics["step"]] = summary["accuracy_after"]
    accuracy = [list(point) for point in sorted(curve.items())]
    return {"variant": variant, "seed": seed, **summary, "accuracy": accuracy}


def finished_runs(output: Path) -> list[dict]:
    """Every finished run of a known variant under `output`, variant by variant, seed by seed."""
    runs = []
    for variant in VARIANTS:
        prefix = run_folder(variant, "", output).name
        seeds = [
            int(file.parent.name.removeprefix(prefix))
            for file in output.glob(f"{prefix}*/summary.json")
            if file.parent.name.removeprefix(prefix).isdecimal()
        ]
        for seed in sorted(seeds):
            runs.append(read_run(variant, seed, run_folder(variant, seed, output)))
    return runs


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def paired_difference(values: list[float], others: list[float]) -> tuple[float, float]:
    """Mean of the differences, seed by seed, and half the width of its 95 % t interval.

    The interval of a single seed is unknown: infinite.
    """
    gaps = [a - b for a, b in zip(values, others, strict=True)]
    if len(gaps) == 1:
        return gaps[0], math.inf
    degrees = min(len(gaps) - 1, len(T_95))
    half = T_95[degrees - 1] * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return statistics.mean(gaps), half


def make_table(runs: dict[str, list[dict]]) -> str:
    """Markdown; the difference to the full method is paired by seed, with its 95 % t interval."""
    names = "variant, seeds, accuracy before, after, paired difference to full, length after"
    columns = names.split(", ")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for variant, results in runs.items():
        before = [result["accuracy_before"] for result in results]
        after = [result["accuracy_after"] for result in results]
        length = [result["response_length_after"] for result in results]

        difference = "-"
        if "full" in runs and variant != "full":
            full = [result["accuracy_after"] for result in runs["full"]]
            mean, half = paired_difference(after, full)
            difference = f"{mean:+.3f} ± {half:.3f}"
        cells = [
            variant,
            str(len(results)),
            f"{statistics.mean(before):.3f}",
            f"{statistics.mean(after):.3f} ± {spread(after):.3f}",
            difference,
            f"{statistics.mean(length):.1f} ± {spread(length):.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def sampled(model: Path, output: Path) -> list[dict]:
    """Four responses of a model to each held-out problem."""
    options = ["--config", HERE / "config.json", "--model", model, "--output_dir", output]
    options += ["--data", HERE / "heldout.parquet", "--num_samples", 4]
    command = [sys.executable, HERE.parent / "observe_r1.py", "eval", *options]
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    lines = (output / "responses.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def compare(problems: list[dict], before: list[dict], after: list[dict]) -> list[dict]:
    """Problems with their pictures as data URIs, and the responses of both models, as they came."""
    rows = []
    for problem, *sides in zip(problems, before, after, strict=True):
        data = base64.b64encode(problem["images"][0]["bytes"]).decode()
        row = {
            "question": problem["question"],
            "answer": problem["answer"],
            "pictures": [f"data:image/png;base64,{data}"],
        }
        for name, side in zip(("before", "after"), sides):
            row[name] = []
            for response in side["responses"]:
                row[name].append({"text": response["text"], "accuracy": response["accuracy"]})
        rows.append(row)
    return rows


def habit(text: str) -> str:
    """The way of a response; make_toy.py taught the model all four."""
    if "<think>" not in text:
        return "answers at once"
    if "<observe>" not in text:
        return "thinks without observing"
    return "observes, thinks, checks" if "again:" in text else "observes, thinks"


def habit_table(before: list[dict], after: list[dict]) -> str:
    """Markdown: each habit's share of the responses and the share of these that are right."""
    sides = []
    for rows in (before, after):
        right = {}  # habit -> accuracies
        for row in rows:
            for response in row["responses"]:
                right.setdefault(habit(response["text"]), []).append(response["accuracy"])
        sides.append(right)
    lines = [
        "| habit | before | of these right | after | of these right |",
        "|---|---|---|---|---|",
    ]
    for name in sorted(sides[0] | sides[1]):
        cells = [name]
        for right in sides:
            values = right.get(name, [])
            cells.append(f"{len(values) / sum(map(len, right.values())):.3f}")
            cells.append(f"{statistics.mean(values):.2f}" if values else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def rollouts(output: Path, trained: Path) -> list[dict]:
    """Responses to the problems in SHOWN, chosen by their place in the file and nothing else."""
    problems = datasets.Dataset.from_parquet(str(HERE / "heldout.parquet")).select(SHOWN)
    problems = problems.cast_column("images", datasets.List(datasets.Image(decode=False)))
    sides = []
    for model, name in ((HERE / "model", "eval-before"), (trained, "eval-after")):
        sides.append(sampled(model, output / name))
    print(habit_table(*sides))
    shown = [[rows[place] for place in SHOWN] for rows in sides]
    return compare(list(problems), *shown)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", nargs="?", default="runs", choices=["runs", "rollouts"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/ablate"))
    parser.add_argument("--trained", type=Path, default=Path("runs/toy/final"))
    parser.add_argument("--results", type=Path, default=HERE, help="folder of the JSON files")
    args = parser.parse_args()

    if args.what == "rollouts":
        if not args.trained.exists():
            raise ValueError(f"{args.trained} is missing: python observe_r1.py trains it")
        rows = rollouts(args.output, args.trained)
        (args.results / "rollouts.json").write_text(json.dumps(rows, indent=1) + "\n")
        return

    runs = {}
    for variant in args.variants:
        runs[variant] = []
        for seed in args.seeds:
            folder = run_folder(variant, seed, args.output)
            if not (folder / "summary.json").exists():
                train(variant, seed, folder)
            check_options(variant, seed, folder)
            runs[variant].append(read_run(variant, seed, folder))
            last = runs[variant][-1]
            print(f"{variant}, seed {seed}: {last['accuracy_before']} to {last['accuracy_after']}")
            sys.stdout.flush()

    (args.output / "table.md").write_text(make_table(runs))
    found = finished_runs(args.output)
    for run in found:
        folder = run_folder(run["variant"], run["seed"], args.output)
        check_options(run["variant"], run["seed"], folder)
    lines = ",\n".join(json.dumps(run) for run in found)  # a run a line, for people to read
    text = f'{{"source": "toy/ablate.py", "runs": [\n{lines}\n]}}\n'
    (args.results / "ablations.json").write_text(text)
    print(make_table(runs))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"ablate: {error}")
