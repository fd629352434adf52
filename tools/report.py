"""The page of a folder that observe_r1.py wrote: curves, real responses, their rewards.

    python tools/report.py runs/toy       # a training run; writes runs/toy/report.html
    python tools/report.py runs/ladder    # a ladder: its stages, and what was never solved
    python tools/report.py runs/eval      # an evaluation: accuracy, pass@k, responses

While a run goes on, the page shows what it has written so far. Pictures are read from the Parquet
file that the run's config.json names. The page itself needs nothing else.
Needs matplotlib (pip install matplotlib).
"""

import argparse
import base64
import html
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas
import pyarrow.dataset
from PIL import Image

SHOWN = 8  # responses or problems of a kind, at most, that the page shows

# Colours of the drawings in the light scheme. `DARK` gives each its counterpart: style sheets of
# the page, and of each figure, replace them where the reader's system is dark.
INK, FAINT, CARD, GREY = "#1f2328", "#b6bec8", "#fdfdfe", "#6e7781"
BLUE, VIOLET, GOLD, GREEN, RED = "#1f6feb", "#8250df", "#d29a00", "#1a7f37", "#cf222e"
DARK = {INK: "#e6edf3", FAINT: "#4a535e", CARD: "#12171e", GREY: "#9aa4af", BLUE: "#58a6ff"}
DARK |= {VIOLET: "#b692ff", GOLD: "#e3b341", GREEN: "#3fb950", RED: "#ff7b72"}
COLOURS = (BLUE, VIOLET, GOLD, GREEN, RED)
REWARDS = ["accuracy", "format", "bonus"]  # of which a response's reward is the sum


# ------------------------------------------------------------------------------- drawing with SVG


def new_figure(width, height):
    """An empty matplotlib figure of this size in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("the curves are drawn by matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def dark_style():
    """Style rules that exchange the light scheme's colours inside a drawing for the dark one's."""
    rules = ""
    for light, dark in DARK.items():
        for part in ("fill", "stroke"):
            rules += f'[style*="{part}: {light}"] {{ {part}: {dark} !important }}\n'
    return f"@media (prefers-color-scheme: dark) {{\n{rules}}}\n"


def svg_text(figure, name):
    """The figure as an SVG element with its text as text; the same bytes for the same figure.

    `name` keeps the ids of several drawings on one page apart.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"(?s)<metadata>.*?</metadata>|<!--.*?-->\n?", "", svg)
    svg = re.sub(r' id="(?:figure|axes|patch|text|line2d|\w+Collection|\w+tick)[^"]*"', "", svg)
    svg = re.sub(r"'DejaVu Sans Mono'[^;\"]*", "ui-monospace, Menlo, Consolas, monospace", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    # A hundredth of a point is finer than any screen. Text between tags is not touched.
    svg = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d+\.\d\d)\d+", r"\1", tag[0]), svg)
    return re.sub(r"[ \t]+\n", "\n", svg)


def style_axes(axes):
    """Thin axes, a faint grid, small type."""
    axes.grid(color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8, length=2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set(color=INK, fontsize=9)


def draw_curves(title, table):
    """The columns of a table over its index; numbers that are missing leave a gap."""
    figure = new_figure(3.3, 1.9)
    axes = figure.subplots()
    axes.set_prop_cycle(color=COLOURS)
    axes.plot(table.index, table, marker=".")
    style_axes(axes)
    axes.set_xlabel(table.index.name)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    return svg_text(figure, title)


def draw_ladder(axes, difficulty, stage):
    """Stages by level: as wide as a stage is long, as high as the level's share of it."""
    from matplotlib import colormaps

    places = (stage, np.rint(8 * np.asarray(difficulty)))
    counts = np.histogram2d(*places, bins=(range(10), range(10)))[0].astype(int)  # [stage,level]
    left = 0
    for s, row in enumerate(counts):
        size, bottom = row.sum(), 0
        for level, share in enumerate(row / max(1, size)):
            # From easy to hard, in colours that are read on light and on dark ground.
            colour = colormaps["viridis"](0.97 - 0.82 * level / 8)
            axes.bar(
                left, share, size, bottom, color=colour, edgecolor=CARD, linewidth=0.6, align="edge"
            )
            bottom += share
        if size:
            text = f"{s + 1}\n{size}"
            axes.text(left + size / 2, 1.02, text, ha="center", fontsize=8, color=INK)
        left += size
    handles = [axes.patches[level] for level in reversed(range(9))]
    labels = [f"{level / 8:g}" for level in reversed(range(9))]
    legend = axes.legend(
        handles,
        labels,
        title="difficulty",
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        fontsize=8,
        labelcolor=INK,
    )
    legend.get_title().set(color=INK, fontsize=8)
    style_axes(axes)
    axes.grid(visible=False)
    axes.set(xlim=(0, left), ylim=(0, 1), ylabel="share of the stage")


# -------------------------------------------------------------------------------- a run's files


def read_rows(file):
    """The whole lines of a .jsonl file; the last one may still be being written."""
    text = file.read_bytes() if file.exists() else b""
    return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]


def read_object(file):
    """A JSON file's object; empty if the run has not written it yet."""
    return json.loads(file.read_text()) if file.exists() else {}


def picture_html(picture):
    """A picture in the page itself, reduced if it is large."""
    picture = picture.convert("RGB")
    picture.thumbnail((640, 640))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=90)
    code = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="picture" src="data:image/webp;base64,{code}">'


def add_pictures(rows, file):
    """Give rows the pictures of their problems, which the run has read from this Parquet file."""
    numbers = [row["row"] for row in rows]
    try:
        table = pyarrow.dataset.dataset(file).take(numbers, columns=["question", "images"])
        problems = table.to_pylist()
    except (OSError, IndexError):
        problems = [{}] * len(rows)
    for row, problem in zip(rows, problems):
        row["pictures"] = note(f"{file} has this problem's pictures no longer")
        if problem.get("question") == row["question"]:
            stored = [Image.open(io.BytesIO(picture["bytes"])) for picture in problem["images"]]
            row["pictures"] = "".join(map(picture_html, stored))
    return rows


def evenly(rows, count=SHOWN):
    """At most so many rows, from the first to the last."""
    places = np.linspace(0, len(rows) - 1, min(count, len(rows)))
    return [rows[i] for i in places.round().astype(int)]


def mean(rows, name):
    """The mean over the responses of each row, then over the rows."""
    return np.mean([np.mean(row[name]) for row in rows])


# ------------------------------------------------------------------------------------ the page

STYLE = f"""
:root {{ color-scheme: light dark; --ink: {INK}; --paper: #ffffff; --card: #f6f8fa; --line: #d0d7de;
  --quiet: #59636e; --blue: {BLUE}; --violet: {VIOLET}; --gold: {GOLD}; --green: {GREEN};
  --red: {RED}; --grey: {GREY}; --observe: #0a6a8a; --think: #7d4e00 }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: {DARK[INK]}; --paper: #0d1117;
  --card: #161b22; --line: #30363d; --quiet: #9aa4af; --blue: {DARK[BLUE]};
  --violet: {DARK[VIOLET]}; --gold: {DARK[GOLD]}; --green: {DARK[GREEN]}; --red: {DARK[RED]};
  --grey: {DARK[GREY]}; --observe: #76cdea; --think: #e0b060 }} }}
"""
STYLE += """
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1080px; margin: 0 auto; padding: 1em; overflow-wrap: anywhere }
h1 { font-size: 1.05em; color: var(--quiet); font-weight: 500; margin: 0 }
h2 { font-size: 1.3em; margin: 1.8em 0 .5em } h3 { font-size: 1em; margin: 0 }
small, figcaption { font-size: 12.5px; color: var(--quiet); font-weight: 400 }
.tiles { display: flex; flex-wrap: wrap; gap: .6em 2.5em; align-items: flex-end; margin: .4em 0 }
.tiles div { line-height: 1.3 }
.tiles b { display: block; font-size: 1.3em; font-weight: 600; white-space: nowrap }
.tiles :first-child b { font-size: clamp(2.3em, 9vw, 3.6em); line-height: 1.1 }
details { margin: .6em 0 } summary { cursor: pointer }
.options { columns: 17em; font-size: 13px }
.note { border-left: 3px solid var(--gold); padding-left: .7em }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 1.4em }
figure { margin: 0 } figure svg { width: 100%; height: auto; display: block }
.key { font-size: 12.5px; margin-right: .9em }
.key::before { content: ""; display: inline-block; width: .8em; height: .8em; margin-right: .35em;
  border-radius: 2px; background: var(--colour) }
.card { border: 1px solid var(--line); border-radius: 8px; background: var(--card);
  padding: .8em 1em; margin: .8em 0 }
.card img { image-rendering: pixelated; min-height: 64px; max-width: 100%; max-height: 220px;
  border-radius: 4px; margin: .4em .4em 0 0 }
.card p { margin: .3em 0 }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1.6em }
.response { display: grid; grid-template-columns: 18em 1fr; gap: .1em 1.1em;
  border-top: 1px solid var(--line); padding: .55em 0; align-items: start }
.pair .response { grid-template-columns: 1fr }
.text { font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; max-height: 15em; overflow: auto;
  white-space: pre-wrap }
.observe { color: var(--observe) } .think { color: var(--think) } .answer { color: var(--green) }
.up { color: var(--green) } .down { color: var(--red) }
@media (max-width: 700px) { .response, .pair { grid-template-columns: 1fr } }
"""


def page(title, body, style=""):
    """A whole page, which loads nothing from elsewhere."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{dark_style()}{style}</style></head>"
        f"<body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )


def escape(value):
    """Text for the page: whatever a model or a file wrote is shown, never run."""
    return html.escape(str(value))


def coloured(text):
    """A response, escaped, with its blocks set apart; what has no closing tag stays plain."""
    block = r"(?s)&lt;(observe|think|answer)&gt;.*?&lt;/\1&gt;"
    return re.sub(block, r'<span class="\1">\g<0></span>', escape(text))


def note(text):
    return f'<p class="note">{escape(text)}</p>'


def folded(title, parts):
    """Parts of the page that open at a click; nothing if there are none."""
    return f"<details><summary>{title}</summary>{''.join(parts)}</details>" if parts else ""


def tiles(values):
    """The most important numbers, {label: text}, the first in large type."""
    shown = "".join(f"<div><b>{b}</b><small>{escape(a)}</small></div>" for a, b in values.items())
    return f'<div class="tiles">{shown}</div>'


def change(before, after):
    return f"{before:.3g} → {after:.3g}"


def figure_html(title, svg, caption="", labels=()):
    keys = ""
    for label, colour in zip(labels, COLOURS):
        keys += f'<span class="key" style="--colour:{colour}">{escape(label)}</span>'
    title, caption = f"<h3>{escape(title)}</h3>", f"<figcaption>{escape(caption)}</figcaption>"
    return f"<figure>{title}{keys}{svg}{caption}</figure>"


def curves_html(title, caption, table):
    """A figure of curves; of a single one the heading says where it begins and ends."""
    labels = table.columns
    if len(labels) == 1:
        title, labels = f"{title} {change(*table.iloc[[0, -1], 0])}", ()
    return figure_html(title, draw_curves(title, table), caption, labels)


def problem_html(row):
    gold = f"<b>Answer: {escape(row['answer'])}</b>"
    return f"{row.get('pictures', '')}<p>{escape(row['question'])} {gold}</p>"


def solved(row):
    return f"{sum(row['accuracy']):g} of {len(row['responses'])} right"


def group_html(row, title):
    """A problem and its responses with rewards and, where they were trained on, advantages."""
    body, facts = "", solved(row)
    for name in ("difficulty", "weight"):
        if row.get(name) is not None:
            facts += f", {name} {row[name]:.3g}"
    advantages = row.get("advantage", [0] * len(row["responses"]))
    for i in np.argsort(advantages)[::-1]:
        earned = [f"{name} {row[name][i]:.3g}" for name in REWARDS if row[name][i]]
        score = f"<b>reward {row['reward'][i]:.3g}</b>: {', '.join(earned) or 'nothing earned'}"
        if "advantage" in row:
            way = "up" if advantages[i] > 0 else "down"
            score = f'<b class="{way}">advantage {advantages[i]:+.2f}</b>, {score}'
        score += f"<br>{row['response_length'][i]} tokens"
        text = f'<div class="text">{coloured(row["responses"][i])}</div>'
        body += f'<div class="response"><div>{score}</div>{text}</div>'
    heading = f"<h3>{escape(title)} <small>{facts}</small></h3>"
    return f'<section class="card">{heading}{problem_html(row)}{body}</section>'


def pair_html(before, after):
    """A held-out problem's responses before and after, side by side."""
    columns = ""
    for when, row in (("before training", before), ("after it", after)):
        columns += f"<div><p><b>{when}</b> <small>{solved(row)}</small></p>"
        for text, correct in zip(row["responses"], row["accuracy"]):
            mark = '<b class="up">✓</b>' if correct else '<b class="down">✗</b>'
            columns += f'<div class="response text"><div>{mark} {coloured(text)}</div></div>'
        columns += "</div>"
    return (
        f'<section class="card">{problem_html(before)}<div class="pair">{columns}</div></section>'
    )


def options_html(config):
    rows = "".join(f"<div>{escape(a)} <b>{escape(b)}</b></div>" for a, b in config.items())
    return folded("Configuration", [f'<div class="options">{rows}</div>'])


# --------------------------------------------------------------------------------- kinds of runs

CAPTIONS = {
    "response_length": "mean tokens of a response",
    "truncated_fraction": "share of responses that were cut at the limit",
    "weight": "mean of a group; highest where half the responses are right",
    "zero_weight_fraction": "share of groups of weight 0: they teach nothing about being right",
    "kl": "distance from the starting model, nats a token",
    "clip_fraction": "share of tokens at which the clip stops the push",
    "grad_norm": "before it is scaled down",
    "learning_rate": "of the step's last update",
    "seconds": "of sampling, update and evaluation",
}
TOGETHER = {  # numbers that are drawn in one figure
    "where the reward comes from": (REWARDS, "means of a response"),
    "the ladder": (
        ["accuracy", "difficulty"],
        "problems get harder, so that accuracy may fall while the policy improves",
    ),
}
# Drawn elsewhere, or telling nothing: mean advantages are 0 by construction.
NOT_ALONE = [*REWARDS, "optimizer_step", "reward", "difficulty", "eval_accuracy"]
NOT_ALONE += ["advantage", "skipped_updates"]


def training_page(folder, config):
    """Training: held-out accuracy first, then responses, then a curve of each logged number."""
    log, summary = read_rows(folder / "metrics.jsonl"), read_object(folder / "summary.json")
    if not log:
        return note("No step has been logged yet.")
    steps = pandas.DataFrame(log).set_index("step").astype(float)
    first, last = steps.iloc[0], steps.iloc[-1]
    done = [0, *(row["step"] for row in log if "eval_accuracy" in row), summary.get("steps", 0)]
    files = {step: folder / f"held_out-{step}.jsonl" for step in done}
    held_out = {step: rows for step, file in files.items() if (rows := read_rows(file))}

    facts = {}
    if held_out:
        (start, before), *_, (end, after) = [*held_out.items()] * 2
        label = f"of held-out responses are right, step {start} and {end}"
        if "interval_after" in summary:
            label += "; 95 % interval of the last {:.2f} to {:.2f}".format(
                *summary["interval_after"]
            )
        facts[label] = change(mean(before, "accuracy"), mean(after, "accuracy"))
    for name in ("accuracy", "format", "response_length"):
        label = f"{name.replace('_', ' ')}, first and last step"
        facts[label] = change(first[name], last[name])
    facts["steps" if summary else "steps so far: running, or stopped early"] = steps.index[-1]
    body = tiles(facts)
    if last["skipped_updates"]:
        body += note(f"{last['skipped_updates']:g} updates skipped: NaN or infinite gradients.")

    if len(held_out) > 1:
        pairs = evenly([*zip(before, after)])
        add_pictures([before for before, _ in pairs], config["eval_data"])
        cards = [pair_html(*pair) for pair in pairs]
        body += "<h2>Held-out problems, before and after</h2>" + cards[0]
        body += folded("More of them, evenly over the file", cards[1:])
    groups = read_rows(folder / "rollouts.jsonl")
    taught = add_pictures(evenly([row for row in groups if any(row["advantage"])]), config["data"])
    cards = [group_html(row, f"Step {row['step']}") for row in taught]
    body += "<h2>What was trained on: first and last step</h2>"
    body += "".join(cards[:1] + cards[1:][-1:]) or note("No group in the log was trained on.")
    body += folded("In between", cards[1:-1])
    return f'{body}<h2>Curves</h2><div class="charts">{charts(steps, held_out, summary)}</div>'


def charts(steps, held_out, summary):
    """Held-out accuracy and pass@k, the reward's parts, the ladder, then each other number."""
    body = ""
    if held_out:
        accuracy = {step: mean(rows, "accuracy") for step, rows in held_out.items()}
        caption = "share of right responses to problems that are never trained on"
        table = pandas.DataFrame({"": accuracy}).rename_axis("step")
        body += curves_html("held-out accuracy", caption, table)
    body += pass_html({when: summary.get(f"pass_at_k_{when}") for when in ("before", "after")})
    for title, (names, caption) in TOGETHER.items():
        if {*names} <= {*steps}:
            body += curves_html(title, caption, steps[names])
    for name in steps.columns.difference(NOT_ALONE, sort=False):
        if steps[name].notna().any():
            body += curves_html(name, CAPTIONS.get(name, "as logged"), steps[[name]])
    return body


def pass_html(curves):
    """pass@k as eval.json has it, {label: {k: share}}; nothing where there is one sample alone."""
    curves = {label: values or {} for label, values in curves.items()}
    table = pandas.DataFrame(curves).rename(index=int).rename_axis("k")
    caption = "share of problems that at least one of k responses solves"
    return curves_html("pass@k", caption, table) if len(table) > 1 else ""


def evaluation_page(folder, config):
    """An evaluation: accuracy with its interval, pass@k, responses evenly over the problems."""
    rows, result = read_rows(folder / "responses.jsonl"), read_object(folder / "eval.json")
    if not rows:
        return note("No response has been logged yet.")
    label = f"of the responses to {len(rows)} problems are right"
    if result:
        label += ", 95 % interval {:.3f} to {:.3f}".format(*result["interval"])
    facts = {label: f"{mean(rows, 'accuracy'):.3f}"}
    facts["format"] = f"{mean(rows, 'format'):.3g}"
    facts["tokens a response"] = f"{mean(rows, 'response_length'):.3g}"
    body = tiles(facts) + ("" if result else note("So far: it is running, or stopped early."))
    body += f'<div class="charts">{pass_html({"": result.get("pass_at_k")})}</div>'
    shown = add_pictures(evenly(rows), config["data"])
    return body + "".join(group_html(row, f"Problem {row['row']}") for row in shown)


def ladder_page(folder, config):
    """A ladder: how many problems each sieve left, the stages, what was never solved."""
    summary = read_object(folder / "summary.json")
    if not summary:
        return note(f"{len(read_rows(folder / 'scores.jsonl'))} problems are scored so far.")
    names = ("ladder", "raw", "checkable", "not_solved_without_reasoning", "never_solved")
    body = tiles({name.replace("_", " "): summary[name] for name in names})
    table = pandas.read_parquet(folder / "ladder.parquet", columns=["difficulty", "stage"])
    figure = new_figure(7.4, 3.0)
    draw_ladder(figure.subplots(), table["difficulty"], table["stage"])
    caption = "From left to right as training reads it; above, number and size of each stage."
    body += figure_html("Nine stages", svg_text(figure, "ladder"), caption)
    never = evenly(read_rows(folder / "never_solved.jsonl"), 5 * SHOWN)
    body += f"<h2>Never solved</h2><p>{summary['never_solved']} problems: is the answer wrong?</p>"
    for row in add_pictures(never, config["data"]):
        said = f"<p>The commonest answer was <b>{escape(row['commonest'])}</b>.</p>"
        body += f'<section class="card">{problem_html(row)}{said}</section>'
    return body


KINDS = {  # the file that tells a folder's kind
    "metrics.jsonl": training_page,
    "clean.jsonl": ladder_page,
    "responses.jsonl": evaluation_page,
}


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("folder", type=Path, help="a run's --output_dir")
    folder = parser.parse_args().folder
    try:
        kinds = [kind for file, kind in KINDS.items() if (folder / file).exists()]
        if not kinds:
            raise ValueError(
                f"{folder} holds none of {', '.join(KINDS)}: give a run's --output_dir"
            )
        config = read_object(folder / "config.json")
        body = kinds[0](folder, config) + options_html(config)
        file = folder / "report.html"
        file.write_text(page(f"Observe-R1: {folder.resolve().name}", body), encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.exit(f"report: {error}")
    print(file)


if __name__ == "__main__":
    main()
