"""What each part of the method is worth on the toy: the full method, five ablations, and LoRA.

    python toy/ablate.py                                  # all of them with three seeds: 21 runs
    python toy/ablate.py --variants full --seeds 0 1 2    # fewer of them
    python toy/ablate.py rollouts                         # responses before and after training
    python tools/figures.py                               # draws what these have written

Runs are kept in runs/ablate and not repeated: an interrupted series goes on where it stopped.
A kept run that was made with other options is refused.
The table is printed. toy/ablations.json gets the held-out accuracy of the runs that were asked for.
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
from dataclasses import asdict
from pathlib import Path

import pandas
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
SHOWN = (2, 5)  # held-out problems for rollouts.json: the first of three digits, the first of six

# The 97.5 % quantiles of Student's t for 1 to 9 degrees of freedom. With more than 9 the last one
# is a little too wide, never too narrow.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def run_folder(variant, seed):
    return Path("runs/ablate") / f"{variant.replace(' ', '-').replace('/', '-')}-{seed}"


def arguments(variant, seed, folder):
    """What a run gives to observe_r1.py."""
    options = ["--config", HERE / "config.json", "--eval_steps", 0, "--seed", seed]
    options += ["--output_dir", folder, *VARIANTS[variant].split()]
    return ["train", *map(str, options)]


def train(variant, seed, folder):
    """One run of observe_r1.py into this folder; what it prints goes into a .log beside it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, HERE.parent / "observe_r1.py", *arguments(variant, seed, folder)]
    with open(f"{folder}.log", "w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)


def check_options(variant, seed, folder):
    """ValueError if a kept run was made with other options than it would be made with now."""
    kept = json.loads((folder / "config.json").read_text())
    _, config = observe_r1.parse_arguments(arguments(variant, seed, folder))
    for name, value in asdict(config).items():
        if name not in UNCHECKED and kept.get(name, value) != value:
            found = f"--{name} {kept[name]}, not {value}"
            raise ValueError(f"{folder} was run with {found}: delete it")


def read_run(variant, seed, folder):
    """What the table and the figures need of a finished run: accuracy by step, and length."""
    check_options(variant, seed, folder)
    summary = json.loads((folder / "summary.json").read_text())
    curve = {0: summary["accuracy_before"]}
    for metrics in observe_r1.read_log(folder / "metrics.jsonl"):
        if metrics.get("eval_accuracy") is not None:
            curve[metrics["step"]] = metrics["eval_accuracy"]
    curve[summary["steps"]] = summary["accuracy_after"]
    accuracy = [[step, round(value, 4)] for step, value in sorted(curve.items())]
    run = {"variant": variant, "seed": seed, "accuracy": accuracy}
    return run | {"response_length_after": round(summary["response_length_after"], 4)}


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
    """A row a variant: means and standard deviations over seeds, and the paired difference."""
    rows = []
    after = {variant: [run["accuracy"][-1][1] for run in own] for variant, own in runs.items()}
    for variant, own in runs.items():
        lengths = pandas.Series([run["response_length_after"] for run in own])
        row = {
            "variant": variant,
            "before": statistics.mean(run["accuracy"][0][1] for run in own),
            "after": statistics.mean(after[variant]),
            "sd": pandas.Series(after[variant]).std(),
            "length": lengths.mean(),
            "sd of length": lengths.std(),
        }
        if "full" in after:
            row["to full"], row["±"] = paired_difference(after[variant], after["full"])
        rows.append(row)
    return pandas.DataFrame(rows).round(3).to_string(index=False)


def habit(text):
    """The way of a response; make_toy.py taught the model all four."""
    if "<think>" not in text:
        return "answers at once"
    if "<observe>" not in text:
        return "thinks without observing"
    return "observes, thinks, checks" if "again:" in text else "observes, thinks"


def habit_table(before, after):
    """Each habit's share of the responses and the share of these that are right."""
    columns = {}
    for when, rows in (("before", before), ("after", after)):
        habits = [habit(text) for row in rows for text in row["responses"]]
        right = pandas.Series([one for row in rows for one in row["accuracy"]]).groupby(habits)
        columns[when] = right.size() / len(habits)
        columns[f"{when}: of these right"] = right.mean()
    return pandas.DataFrame(columns).round(3)


def rollouts(folder):
    """Responses to the problems in SHOWN, chosen by their place in the file and nothing else."""
    last = json.loads((folder / "summary.json").read_text())["steps"]
    before, after = (observe_r1.read_log(folder / f"held_out-{step}.jsonl") for step in (0, last))
    print(habit_table(before, after).to_string())
    config = json.loads((folder / "config.json").read_text())
    pictures = pyarrow.parquet.read_table(config["eval_data"])["images"].to_pylist()
    shown = []
    for place in SHOWN:
        row = {name: before[place][name] for name in ("question", "answer")}
        uris = [base64.b64encode(stored["bytes"]).decode() for stored in pictures[place]]
        row["pictures"] = [f"data:image/png;base64,{uri}" for uri in uris]
        for when, side in (("before", before[place]), ("after", after[place])):
            pairs = zip(side["responses"], side["accuracy"])
            row[when] = [{"text": text, "accuracy": accuracy} for text, accuracy in pairs]
        shown.append(row)
    return shown


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("what", nargs="?", default="runs", choices=["runs", "rollouts"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()

    if args.what == "rollouts":
        text = json.dumps(rollouts(Path("runs/toy")), indent=1) + "\n"
        (HERE / "rollouts.json").write_text(text)
        return

    runs = {}
    for variant in args.variants:
        runs[variant] = []
        for seed in args.seeds:
            folder = run_folder(variant, seed)
            if not (folder / "summary.json").exists():
                train(variant, seed, folder)
            runs[variant].append(read_run(variant, seed, folder))
            print(runs[variant][-1])
    print(make_table(runs))
    lines = ",\n".join(json.dumps(run) for own in runs.values() for run in own)  # a run a line
    (HERE / "ablations.json").write_text(f'{{"source": "toy/ablate.py", "runs": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
