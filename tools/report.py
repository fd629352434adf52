"""The page of a run: what training reached, its curves, and real responses with their rewards.

    python tools/report.py runs/toy             # writes runs/toy/report.html, which needs nothing else
    python tools/report.py runs/toy --follow    # while it trains: again after every logged step

Reads config.json, metrics.jsonl, rollouts.jsonl and summary.json of the run's folder.
Needs matplotlib for the curves (pip install matplotlib), and nothing else beside Python.
"""

import argparse
import html
import io
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

FORMAT_REWARD = 0.5  # what a well-formed response earns: a mean of 0.496 says that 99 % are
MOST_POINTS = 300  # points of a curve that show their value under the pointer
SMOOTHED = 24  # from so many points on, a curve also shows its moving mean
CARDS_BETWEEN = 6  # groups shown between the first and the last step

# Colours of the drawings in the light scheme. `DARK` gives each its counterpart: style sheets of
# the page, and of each figure, replace them where the reader's system is dark.
INK, FAINT, CARD = "#1f2328", "#b6bec8", "#fdfdfe"
BLUE, VIOLET, GOLD, GREEN, RED, GREY = (
    "#1f6feb",
    "#8250df",
    "#d29a00",
    "#1a7f37",
    "#cf222e",
    "#6e7781",
)
DARK = {
    INK: "#e6edf3",
    FAINT: "#4a535e",
    CARD: "#12171e",
    BLUE: "#58a6ff",
    VIOLET: "#b692ff",
    GOLD: "#e3b341",
    GREEN: "#3fb950",
    RED: "#ff7b72",
    GREY: "#9aa4af",
}


# ------------------------------------------------------------------------------- drawing with SVG


def new_figure(width: float, height: float, layout: str | None = "constrained"):
    """An empty matplotlib figure of this size in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("the curves are drawn by matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout=layout)


def dark_style() -> str:
    """Style rules that exchange the light scheme's colours inside a drawing for the dark one's."""
    rules = []
    for light, dark in DARK.items():
        for part in ("fill", "stroke"):
            rules.append(f'[style*="{part}: {light}"] {{ {part}: {dark} !important }}')
    return "@media (prefers-color-scheme: dark) {\n" + "\n".join(rules) + "\n}\n"


def svg_text(figure, name: str) -> str:
    """The figure as an SVG element with its text as text; the same bytes for the same figure.

    `name` keeps the ids of several drawings on one page apart.
    """
    import matplotlib

    options = {"svg.fonttype": "none", "svg.hashsalt": name}
    buffer = io.StringIO()
    with matplotlib.rc_context(options):
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\n?", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="hover[^"]*"', ' class="hover"', svg)
    svg = re.sub(
        r' id="(?:figure|axes|patch|text|line2d|[a-zA-Z]+tick|matplotlib\.)[^"]*"', "", svg
    )
    svg = re.sub(r"'DejaVu Sans Mono'[^;\"]*", "ui-monospace, Menlo, Consolas, monospace", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    svg = re.sub(r"<[^>]+>", shorten_numbers, svg)
    return re.sub(r"[ \t]+\n", "\n", svg)


def shorten_numbers(tag: re.Match) -> str:
    """A hundredth of a point is finer than any screen. What stands between tags is not touched."""
    return re.sub(r"(\d+\.\d\d)\d+", r"\1", tag[0])


def style_axes(axes) -> None:
    """Thin axes, a faint grid, small type."""
    axes.grid(color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8, length=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set_color(INK)
        text.set_fontsize(9)


# -------------------------------------------------------------------------------- a run's files


class Log:
    """The rows of a growing JSON-lines file. `read_new` reads only what has been appended."""

    def __init__(self, file: Path):
        self.file = file
        self.forget()

    def forget(self) -> None:
        self.rows = []
        self.offset = 0  # bytes that have been read as whole lines
        self.last_line = b""
        self.half_written = False

    def read_new(self) -> bool:
        """Add the new whole lines to `rows`; say whether anything changed.

        A last line without its end is still being written and waits for the next call. A file that
        was cut or replaced (a run that was resumed or started anew) is read again from the start.
        """
        if not self.file.exists():
            changed = bool(self.rows)
            self.forget()
            return changed

        with open(self.file, "rb") as stream:
            stream.seek(self.offset - len(self.last_line))
            replaced = stream.read(len(self.last_line)) != self.last_line
            if replaced:
                self.forget()
                stream.seek(0)
            added = stream.read()

        end = added.rfind(b"\n") + 1
        self.half_written = end < len(added)
        self.offset += end
        lines = added[:end].splitlines(keepends=True)
        for line in lines:
            self.last_line = line
            if line.strip():
                self.rows.append(self.parse(line))
        return replaced or bool(lines)

    def parse(self, line: bytes) -> dict:
        try:
            row = json.loads(line)
            usable = isinstance(row["step"], int)
        except (ValueError, TypeError, KeyError):
            usable = False
        if not usable:
            place = f"{self.file}, line {len(self.rows) + 1}"
            start = line[:60].decode(errors="replace").strip()
            raise ValueError(f"{place}: no JSON object with a step, but {start}")
        return row


class Run:
    """The files of a run's folder, as far as they are there."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.metrics = Log(self.folder / "metrics.jsonl")
        self.rollouts = Log(self.folder / "rollouts.jsonl")
        self.config = None
        self.summary = None

    def read(self) -> bool:
        """Read what is new; say whether anything changed. ValueError if this is no run's folder."""
        if not self.metrics.file.exists():
            what = "is missing: give the folder that `train` wrote, its --output_dir"
            raise ValueError(f"{self.metrics.file} {what}")
        before = (self.config, self.summary)
        self.config = read_object(self.folder / "config.json")
        self.summary = read_object(self.folder / "summary.json")
        new_metrics = self.metrics.read_new()
        new_rollouts = self.rollouts.read_new()
        return new_metrics or new_rollouts or before != (self.config, self.summary)

    @property
    def steps(self) -> list[dict]:
        """The metrics of the training steps; a line of step 0 is the evaluation before them."""
        return [row for row in self.metrics.rows if row["step"] > 0]

    @property
    def last_step(self) -> int:
        return self.metrics.rows[-1]["step"] if self.metrics.rows else 0

    @property
    def total_steps(self) -> int | None:
        """How many steps the run has, where its files say so."""
        if self.summary and self.summary.get("steps"):
            return self.summary["steps"]
        if self.metrics.rows and is_number(self.metrics.rows[-1].get("total_steps")):
            return self.metrics.rows[-1]["total_steps"]
        wanted = (self.config or {}).get("max_steps") or 0
        return wanted if wanted > 0 else None

    def step_name(self, step: int) -> str:
        return f"step {step} of {self.total_steps}" if self.total_steps else f"step {step}"

    def notes(self) -> list[str]:
        """What is missing or was left out, for the reader to know."""
        notes = []
        for name in ("config.json", "rollouts.jsonl"):
            if not (self.folder / name).exists():
                notes.append(f"{name} is missing: its part of the page is empty.")
        for name in ("config.json", "summary.json"):
            if (self.folder / name).exists() and read_object(self.folder / name) is None:
                notes.append(f"{name} is no whole JSON object and was left out.")
        for log in (self.metrics, self.rollouts):
            if log.half_written:
                notes.append(f"The last line of {log.file.name} is half written: left out.")
        return notes

    def held_out_accuracy(self) -> list[tuple[int, float]]:
        """(step, accuracy) of every evaluation, the one before training at step 0."""
        points = dict(series(self.metrics.rows, "eval_accuracy"))
        summary = self.summary or {}
        if summary.get("accuracy_before") is not None:
            points.setdefault(0, summary["accuracy_before"])
        if summary.get("accuracy_after") is not None:
            points.setdefault(self.last_step, summary["accuracy_after"])
        return sorted(points.items())


def read_object(file: Path) -> dict | None:
    """A JSON file's object; None if it is missing or not written to its end yet."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_broken(value) -> bool:
    """Whether a number was logged that nobody can draw: NaN or infinite."""
    return is_number(value) and not math.isfinite(value)


def series(rows: list[dict], field: str, scale: float = 1.0) -> list[tuple[int, float]]:
    """(step, value / scale) of the rows that have a finite number in this field."""
    points = []
    for row in rows:
        value = row.get(field)
        if is_number(value) and math.isfinite(value):
            points.append((row["step"], value / scale))
    return points


# ------------------------------------------------------------------------------------- curves


@dataclass(frozen=True)
class Chart:
    """One small drawing: `lines` are (label, field of metrics.jsonl, divided by)."""

    title: str
    caption: str
    lines: tuple[tuple[str, str, float], ...]
    stacked: bool = False


def single(field: str, title: str, caption: str) -> Chart:
    return Chart(title, caption, ((title, field, 1.0),))


PARTS = (("accuracy", "accuracy", 1.0), ("format", "format", 1.0), ("bonus", "bonus", 1.0))
SHARES = (
    ("answered correctly", "accuracy", 1.0),
    ("difficulty of the problems", "difficulty", 1.0),
)
SHAPES = (("well-formed", "format", FORMAT_REWARD), ("cut off", "truncated_fraction", 1.0))
EVALUATION = single(
    "eval_accuracy",
    "held-out accuracy",
    "share of correct responses to problems that are never trained on",
)
CHARTS = (
    Chart("where the reward comes from", "mean of a response, its parts stacked", PARTS, True),
    Chart(
        "the ladder",
        "problems get harder from step to step, so the share of right responses may fall while the "
        "policy improves; difficulty is the share of wrong responses when the ladder was built",
        SHARES,
    ),
    Chart(
        "shape of the responses",
        "share with all blocks in order (the format reward over 0.5), and share cut at the limit",
        SHAPES,
    ),
    single("response_length", "response length", "mean tokens of a response"),
    single("bonus", "bonus", "mean of a response; one response of a group can get it"),
    single("weight", "weight of a group", "mean; highest where half the responses are right"),
    single(
        "zero_weight_fraction", "groups that teach nothing", "share of groups: all advantages 0"
    ),
    single("kl", "KL", "distance from the starting model, nats a token"),
    single("clip_fraction", "clipped", "share of tokens at which the ratio's clip stops the push"),
    single("grad_norm", "gradient norm", "before clipping"),
    single("learning_rate", "learning rate", "of the step's last update"),
    single("seconds", "seconds a step", "sampling, update and evaluation"),
)
COLOURS = (BLUE, VIOLET, GOLD)


def all_charts(steps: list[dict]) -> list[Chart]:
    """The known charts, then one for each further number that the run has logged."""
    known = {"step", "optimizer_step", "total_steps", "reward", "eval_accuracy"}
    for chart in CHARTS:
        known |= {field for _, field, _ in chart.lines}
    others = []
    for row in steps:
        others += [name for name, value in row.items() if is_number(value) and name not in known]
    further = [single(name, name, "as logged") for name in dict.fromkeys(others)]
    return [*CHARTS, *further]


def moving_mean(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Mean over a twelfth of the run around each point, so that noisy curves show their course."""
    reach = len(points) // 24
    means = []
    for i, (step, _) in enumerate(points):
        near = points[max(0, i - reach) : i + reach + 1]
        means.append((step, sum(value for _, value in near) / len(near)))
    return means


def draw_chart(chart: Chart, lines: list[list[tuple[int, float]]], markers: bool = False) -> str:
    """The chart as an SVG; a point says its step and value where the pointer rests."""
    figure = new_figure(3.3, 1.9)
    axes = figure.subplots()
    axes.margins(y=0.1)
    hover = []
    floor = [0.0] * len(lines[0])

    for points, colour in zip(lines, COLOURS):
        steps = [step for step, _ in points]
        values = [value for _, value in points]
        heights = values
        if chart.stacked:
            heights = [low + value for low, value in zip(floor, values)]
            axes.fill_between(steps, floor, heights, color=colour, alpha=0.75, linewidth=0)
            floor = heights
        elif len(points) < SMOOTHED:
            axes.plot(steps, values, color=colour, linewidth=1.5, marker="o" if markers else None)
        else:
            axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.55)
            axes.plot(*zip(*moving_mean(points)), color=colour, linewidth=1.8)

        stride = math.ceil(len(points) / MOST_POINTS)
        places = list(zip(steps, heights))[::stride]
        axes.plot(*zip(*places), "o", color=colour, markersize=9, alpha=0, gid=f"hover{len(hover)}")
        hover += [f"step {step}: {value:.4g}" for step, value in points[::stride]]

    style_axes(axes)
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if chart.stacked or min(value for points in lines for _, value in points) >= 0:
        axes.set_ylim(bottom=0)

    svg = svg_text(figure, chart.title)
    titles = iter(hover)

    def name_points(group: re.Match) -> str:
        return re.sub(
            r"(<use [^>]*?)/>",
            lambda use: f"{use[1]}><title>{next(titles)}</title></use>",
            group[0],
        )

    return re.sub(r'<g class="hover">.*?</g>\s*</g>', name_points, svg, flags=re.DOTALL)


def chart_html(chart: Chart, rows: list[dict], points=None) -> str:
    """One figure of the page, or nothing if no row has its fields."""
    fields = [field for _, field, _ in chart.lines]
    if chart.stacked:  # only steps that have all the parts can be stacked
        rows = [row for row in rows if all(is_number(row.get(field)) for field in fields)]
        usable = [row for row in rows if all(math.isfinite(row[field]) for field in fields)]
    else:
        usable = rows

    lines = []
    labels = []
    for label, field, scale in chart.lines:
        line = points or series(usable, field, scale)
        if line:
            lines.append(line)
            colour = NAMES[COLOURS[len(labels)]]
            labels.append(f'<span class="key" style="--colour:{colour}">{escape(label)}</span>')
    broken = [row for row in rows if any(is_broken(row.get(field)) for field in fields)]
    caption = chart.caption
    if broken:
        caption += f"; {len(broken)} of {len(rows)} steps are NaN or infinite and not drawn"
    if not lines:
        return f"<figure><h3>{escape(chart.title)}</h3>{escape(caption)}</figure>" if broken else ""

    ends = f"{lines[0][0][1]:.3g} → {lines[0][-1][1]:.3g}" if len(lines) == 1 else ""
    key = " ".join(labels) if len(lines) > 1 else ""
    svg = draw_chart(chart, lines, markers=points is not None)
    return (
        f"<figure><h3>{escape(chart.title)} <small>{ends}</small></h3>{key}{svg}"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


# ------------------------------------------------------------------------------------ the page

NAMES = {BLUE: "var(--blue)", VIOLET: "var(--violet)", GOLD: "var(--gold)"}
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
h2 { font-size: 1.3em; margin: 1.8em 0 .5em }
h3 { font-size: 1em; margin: 0 }
small, figcaption { font-size: 12.5px; color: var(--quiet); font-weight: 400 }
.result { display: flex; flex-wrap: wrap; gap: .6em 2.5em; align-items: flex-end; margin: .4em 0 }
.result div { line-height: 1.3 }
.result b { display: block; font-size: 1.3em; font-weight: 600; white-space: nowrap }
.result .main b { font-size: clamp(2.3em, 9vw, 3.6em); line-height: 1.1 }
.result .main b span { color: var(--green) }
progress { width: 100%; height: 10px; accent-color: var(--blue) }
details { margin: .6em 0 } summary { cursor: pointer }
.options { columns: 17em; font-size: 13px; margin: .5em 0 }
.options div { break-inside: avoid } .options b { font-weight: 600 }
.note { border-left: 3px solid var(--gold); padding-left: .7em }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 1.4em }
figure { margin: 0 } figure svg { width: 100%; height: auto; display: block }
.hover use { pointer-events: all }
.key { font-size: 12.5px; margin-right: .9em }
.key::before { content: ""; display: inline-block; width: .8em; height: .8em; margin-right: .35em;
  border-radius: 2px; background: var(--colour) }
.card { border: 1px solid var(--line); border-radius: 8px; background: var(--card);
  padding: .8em 1em; margin: .8em 0 }
.card img { image-rendering: pixelated; min-height: 64px; max-width: 100%; max-height: 220px;
  border-radius: 4px; margin: .4em .4em 0 0; vertical-align: middle }
.card p { margin: .3em 0 }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1.6em }
.response { display: grid; grid-template-columns: 110px 285px 1fr; gap: .1em 1.1em;
  border-top: 1px solid var(--line); padding: .55em 0; align-items: start }
.head { padding: .2em 0; border: 0 }
.shortest { background: color-mix(in srgb, var(--gold) 9%, transparent) }
.pair .response { grid-template-columns: 1.2em 1fr; gap: .4em }
.text { font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; max-height: 15em; overflow: auto;
  white-space: pre-wrap }
.observe { color: var(--observe) } .think { color: var(--think) } .answer { color: var(--green) }
.axis { display: block; position: relative; height: 9px; margin-top: 3px;
  background: linear-gradient(var(--grey), var(--grey)) center / 1px 100% no-repeat }
.axis span { position: absolute; top: 1px; bottom: 1px; border-radius: 2px }
.stack { display: flex; height: 12px; margin: 5px 0 3px; border-radius: 2px; overflow: hidden;
  background: color-mix(in srgb, var(--grey) 22%, transparent) }
.up { color: var(--green) } .down { color: var(--red) }
.axis .up { background: var(--green) } .axis .down { background: var(--red) }
.star { display: inline-block; border: 1px solid var(--gold); border-radius: 9px; padding: 0 .5em;
  font-size: 12.5px; color: var(--ink); background: color-mix(in srgb, var(--gold) 28%, transparent) }
@media (max-width: 700px) {
  .response { grid-template-columns: 105px 1fr } .response .text { grid-column: 1 / -1 }
  .head :last-child { display: none }
  .pair { grid-template-columns: 1fr }
  .pair .response .text { grid-column: auto }
}
"""


def escape(value) -> str:
    """Text for the page: whatever a model or a file wrote is shown, never run."""
    return html.escape(str(value))


def number(value, pattern: str) -> str:
    return format(value, pattern) if is_number(value) else "–"


def value_of(response: dict, name: str) -> float:
    """A number of a response, 0 where it has none."""
    value = response.get(name)
    return value if is_number(value) else 0.0


def coloured(text: str) -> str:
    """A response, escaped, with its blocks set apart; what has no closing tag stays plain."""
    text = escape(text)
    for name in ("observe", "think", "answer"):
        block = rf"(&lt;{name}&gt;.*?&lt;/{name}&gt;)"
        text = re.sub(block, rf'<span class="{name}">\1</span>', text, flags=re.DOTALL)
    return text


def advantage_html(advantage, largest: float) -> str:
    """The number, and a bar that starts in the middle: up to the right, down to the left."""
    if not is_number(advantage):
        return "–"
    way = "up" if advantage > 0 else "down"
    width = 50 * min(abs(advantage) / largest, 1)
    left = 50 if advantage > 0 else 50 - width
    colour = way if advantage else ""
    return (
        f'<b class="{colour}">{advantage:+.2f}</b><span class="axis">'
        f'<span class="{way}" style="left:{left:.1f}%;width:{width:.1f}%"></span></span>'
    )


def reward_html(response: dict, highest: float) -> str:
    """A stacked bar of the reward's parts, the same as a sum, and the star of the bonus."""
    colours = {"accuracy": "--blue", "format": "--violet", "bonus": "--gold", "other": "--grey"}
    parts = {name: value_of(response, name) for name in ("accuracy", "format", "bonus")}
    reward = response.get("reward", sum(parts.values()))
    rest = value_of({"rest": reward}, "rest") - sum(parts.values())
    if abs(rest) > 1e-4:  # a reward that somebody has added
        parts["other"] = rest

    bar = ""
    terms = []
    for name, value in parts.items():
        width = 100 * max(value, 0) / highest
        if value:
            bar += f'<span style="width:{width:.1f}%;background:var({colours[name]})"></span>'
            terms.append(f"{name} {value:.3g}")
    star = '<span class="star">★ bonus: shortest correct</span>' if parts["bonus"] > 0 else ""
    total = f"<b>{number(reward, '.3g')}</b>"
    terms = " + ".join(terms) or "nothing earned"
    return f'<span class="stack">{bar}</span><small>{total} = {terms}</small> {star}'


def problem_html(row: dict) -> str:
    pictures = ""
    for picture in row.get("pictures") or []:
        if str(picture).startswith("data:image/"):  # nothing is ever loaded from elsewhere
            pictures += f'<img src="{escape(picture)}" alt="picture of the problem">'
    question = escape(row.get("question", ""))
    return f"{pictures}<p>{question} <b>Answer: {escape(row.get('answer', ''))}</b></p>"


def group_html(run: Run, row: dict) -> str:
    """One group: picture, question, and its responses with rewards and advantages."""
    responses = row.get("responses") or []
    solved = sum(value_of(response, "accuracy") > 0 for response in responses)
    facts = [f"{solved} of {len(responses)} right"]
    if is_number(row.get("difficulty")):
        facts.append(f"difficulty {row['difficulty']:.3g}")
    if is_number(row.get("weight")):
        facts.append(f"weight {row['weight']:.3g}")
    if not was_trained(row):
        facts.append("all advantages 0: this group teaches nothing")

    largest = max([abs(value_of(response, "advantage")) for response in responses] + [1.0])
    highest = max([value_of(response, "reward") for response in responses] + [1.7])
    body = "<small>advantage</small><small>reward</small><small>response</small>"
    body = f'<div class="response head">{body}</div>'
    by_advantage = sorted(responses, key=lambda r: value_of(r, "advantage"), reverse=True)
    for response in by_advantage:
        length = number(response.get("length"), "g")
        shortest = " shortest" if value_of(response, "bonus") > 0 else ""
        body += (
            f'<div class="response{shortest}">'
            f"<div>{advantage_html(response.get('advantage'), largest)}"
            f"<small>{length} tokens</small></div><div>{reward_html(response, highest)}</div>"
            f'<div class="text">{coloured(response.get("text", ""))}</div></div>'
        )
    step = run.step_name(row["step"])
    step = step[0].upper() + step[1:]
    title = f"<h3>{step} <small>{escape(' · '.join(facts))}</small></h3>"
    return f'<section class="card">{title}{problem_html(row)}{body}</section>'


def pair_html(run: Run, before: dict, after: dict) -> str:
    """A held-out problem's responses early and late, side by side."""
    columns = ""
    for row in (before, after):
        responses = row.get("responses") or []
        solved = sum(value_of(response, "accuracy") > 0 for response in responses)
        when = "before training" if row["step"] == 0 else f"after {run.step_name(row['step'])}"
        columns += f"<div><p><b>{when}</b> <small>{solved} of {len(responses)} right</small></p>"
        for response in responses:
            right = value_of(response, "accuracy") > 0
            mark = '<b class="up">✓</b>' if right else '<b class="down">✗</b>'
            text = coloured(response.get("text", ""))
            columns += f'<div class="response">{mark}<div class="text">{text}</div></div>'
        columns += "</div>"
    return (
        f'<section class="card">{problem_html(before)}<div class="pair">{columns}</div></section>'
    )


def was_trained(row: dict) -> bool:
    """Whether the group moved the model: some advantage is not 0."""
    advantages = [value_of(response, "advantage") for response in row.get("responses") or []]
    return not row.get("held_out") and any(advantages)


def held_out_pairs(rows: list[dict]) -> list[tuple[dict, dict]]:
    """The first and the last rollout of each held-out problem that was sampled more than once."""
    by_problem = {}
    for row in rows:
        if row.get("held_out"):
            by_problem.setdefault(str(row.get("id")), []).append(row)
    pairs = []
    for versions in by_problem.values():
        first = min(versions, key=lambda row: row["step"])
        last = max(versions, key=lambda row: row["step"])
        if first["step"] < last["step"]:
            pairs.append((first, last))
    return pairs


def first_and_last(rows: list[dict]) -> list[dict]:
    """A trained group of the first and of the last step that show one, of one problem if possible."""
    trained = [row for row in rows if was_trained(row)]
    if not trained:
        return []
    steps = [row["step"] for row in trained]
    first = [row for row in trained if row["step"] == min(steps)]
    last = [row for row in trained if row["step"] == max(steps)]
    if min(steps) == max(steps):
        return first[:1]
    for row in first:
        for later in last:
            if row.get("id") is not None and row.get("id") == later.get("id"):
                return [row, later]
    return [first[0], last[0]]


def change(before, after, pattern: str) -> str:
    """`0.42 → 0.88`, or the one number that there is."""
    ends = [number(value, pattern) for value in (before, after) if is_number(value)]
    return " → ".join(ends) or "–"


def result_html(run: Run) -> str:
    """The result in large type; while a run goes on, how far it has come."""
    points = run.held_out_accuracy()
    summary = run.summary or {}
    steps = run.steps
    first, last = (steps[0], steps[-1]) if steps else ({}, {})

    if points:
        start = f"{points[0][1]:.2f} → " if len(points) > 1 else ""
        main = f"{start}<span>{points[-1][1]:.2f}</span>"
        where = "before training" if points[0][0] == 0 else f"at step {points[0][0]}"
        label = f"of held-out responses are right, {where}"
        label += f" and after step {points[-1][0]}" if len(points) > 1 else ""
    else:
        main = change(first.get("accuracy"), last.get("accuracy"), ".2f")
        label = "of training responses are right, first and last step (other problems)"
    tiles = f'<div class="main"><b>{main}</b><small>{label}</small></div>'

    def tile(field: str, name: str, pattern: str, scale: float = 1.0) -> str:
        ends = [summary.get(f"{field}_before"), summary.get(f"{field}_after")]
        where = "held-out"
        if not any(is_number(end) for end in ends):
            ends = [first.get(field), last.get(field)]
            where = "first and last step"
        ends = [end / scale if is_number(end) else None for end in ends]
        text = change(*ends, pattern)
        return f"<div><b>{text}</b><small>{name} ({where})</small></div>"

    tiles += tile("format", "well-formed responses", ".0%", FORMAT_REWARD)
    tiles += tile("response_length", "tokens a response", ".0f")
    seconds = summary.get("seconds", sum(value for _, value in series(steps, "seconds")))
    tiles += f"<div><b>{seconds:.0f} s</b><small>training time</small></div>"

    state = "" if run.summary else ": running, or stopped early"
    position = run.step_name(run.last_step)
    difficulty = last.get("difficulty")
    if is_number(difficulty):
        position += f" · difficulty of its problems {difficulty:.2f}"
    done = ""
    if run.total_steps:
        done = f'<progress value="{run.last_step}" max="{run.total_steps}"></progress>'
    return (
        f"<h1>Observe-R1 · {escape(run.folder.resolve().name)}{state}</h1>"
        f'<div class="result">{tiles}</div>{done}<small>Position on the ladder: {position}</small>'
    )


def options_html(config: dict | None) -> str:
    if not config:
        return ""
    rows = ""
    for name, value in config.items():
        value = "not set" if value in ("", None) else value
        rows += f"<div>{escape(name)} <b>{escape(value)}</b></div>"
    return f'<details><summary>Configuration</summary><div class="options">{rows}</div></details>'


def rollouts_html(run: Run) -> str:
    """Held-out pairs, then the first and the last trained group, then some in between."""
    rows = run.rollouts.rows
    page = ""
    pairs = [pair_html(run, *pair) for pair in held_out_pairs(rows)]
    if pairs:
        page += f"<h2>The same held-out problem, early and late</h2>{pairs[0]}"
    if len(pairs) > 1:
        more = "".join(pairs[1:])
        page += (
            f"<details><summary>More held-out problems: {len(pairs) - 1}</summary>{more}</details>"
        )

    groups = [row for row in rows if not row.get("held_out")]
    if not groups:
        return page
    ends = first_and_last(groups)
    keys = "".join(
        f'<span class="key" style="--colour:var(--{colour})">{name}</span>'
        for name, colour in (("accuracy", "blue"), ("format", "violet"), ("bonus", "gold"))
    )
    page += f"<h2>What was trained on: first and last step</h2><p>{keys}</p>"
    if not ends:
        page += '<p class="note">No group that the log shows was trained on.</p>'
    elif ends[0]["step"] > groups[0]["step"]:
        page += (
            f'<p class="note">Before step {ends[0]["step"]} none of the logged groups taught.</p>'
        )
    if ends and ends[-1]["step"] < groups[-1]["step"]:
        page += (
            f'<p class="note">After step {ends[-1]["step"]} none of the logged groups taught.</p>'
        )
    page += "".join(group_html(run, row) for row in ends)

    between = [row for row in groups if row not in ends]
    stride = math.ceil(len(between) / CARDS_BETWEEN) or 1
    cards = "".join(group_html(run, row) for row in between[::stride])
    if cards:
        count = len(between[::stride])
        title = f"In between: {count} of {len(between)} logged groups"
        page += f"<details><summary>{title}</summary>{cards}</details>"
    return page


def page_html(run: Run, refresh: int = 0) -> str:
    """The whole page. With `refresh` a browser loads it again every so many seconds."""
    curves = ""
    points = run.held_out_accuracy()
    if points:
        curves += chart_html(EVALUATION, [], points)
    for chart in all_charts(run.steps):
        curves += chart_html(chart, run.steps)
    if not curves:
        curves = '<p class="note">No step has been logged yet.</p>'

    key = "Rest the pointer on a curve to read its value."
    if len(run.steps) >= SMOOTHED:
        key += " Thin lines are single steps, thick ones a mean over a twelfth of the run."
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in run.notes())
    again = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
    title = f"Observe-R1: {run.folder.resolve().name}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{again}'
        f"<title>{escape(title)}</title><style>{STYLE}{dark_style()}</style></head><body>"
        f"{result_html(run)}{notes}{options_html(run.config)}{rollouts_html(run)}"
        f'<h2>Curves</h2><p><small>{key}</small></p><div class="charts">{curves}</div></body></html>\n'
    )


def write_page(run: Run, refresh: int = 0) -> Path:
    """Write report.html into the run's folder, whole or not at all."""
    target = run.folder / "report.html"
    draft = run.folder / "report.html.part"
    draft.write_text(page_html(run, refresh), encoding="utf-8")
    os.replace(draft, target)
    return target


def follow(run: Run, every: int = 5) -> None:
    """Write the page after every change, until the summary says that the run has ended."""
    print(f"following {run.folder}; Ctrl-C ends it, the training goes on", flush=True)
    try:
        while not run.metrics.file.exists():
            time.sleep(every)
        while not run.summary:
            if run.read() and not run.summary:
                write_page(run, refresh=every)
                print(f"{run.step_name(run.last_step)}: {run.folder / 'report.html'}", flush=True)
            if not run.summary:
                time.sleep(every)
    except KeyboardInterrupt:
        print()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a run's --output_dir")
    parser.add_argument("--follow", action="store_true", help="rewrite the page while it trains")
    args = parser.parse_args()

    run = Run(args.folder)
    try:
        new_figure(1, 1)  # says at once if matplotlib is missing
        if args.follow:
            follow(run)
        run.read()
        page = write_page(run)
    except (ValueError, OSError) as error:
        sys.exit(f"report: {error}")
    for note in run.notes():
        print(f"note: {note}")
    print(page)


if __name__ == "__main__":
    main()
