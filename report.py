"""The picture of a run: curves and rollouts as one HTML file that needs nothing else."""

import base64
import html
import io
import json
import re
from pathlib import Path

CURVES = (  # metric, what it is
    ("reward", "mean reward of a response: accuracy + format + bonus"),
    ("accuracy", "share of correct responses"),
    ("format", "mean format reward, at most 0.5"),
    ("bonus", "mean bonus of a response, at most 0.2 / G"),
    ("eval_accuracy", "share of correct responses to held-out problems"),
    ("response_length", "mean tokens of a response"),
    ("difficulty", "mean share of wrong responses to the step's problems when they were scored"),
    ("weight", "mean weight of a group, at most sigma"),
    ("zero_weight_fraction", "share of groups that teach nothing"),
    ("kl", "KL divergence from the reference, nats a token"),
    ("grad_norm", "gradient norm before clipping"),
)
STYLE = """
:root { color-scheme: light dark; --line: #8886; --blue: #2a7de1; --green: #2da44e; --red: #d1434b }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1060px; margin: 1em auto; padding: 0 1em }
.row { display: flex; flex-wrap: wrap; gap: 1em } .row > * { flex: 1 1 290px; min-width: 0 }
figure { margin: 0; max-width: 340px } figcaption, small { font-size: 12px; opacity: .8 }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .6em 1em; margin: 1em 0;
        break-inside: avoid } .card h3 { margin: 0 } .row > .card { flex-basis: 440px; margin: 0 }
.card img { image-rendering: pixelated; min-height: 56px; max-width: 100% }
.response { border-top: 1px solid var(--line); padding: .3em 0; overflow-wrap: anywhere }
.response p { margin: 0; font: 13px/1.5 ui-monospace, monospace }
.observe { color: #0a7ea4 } .think { color: #9a6700 } .answer { color: var(--green) }
.bar { display: inline-block; height: .7em; margin-right: .4em }
@media (prefers-color-scheme: dark) { .observe { color: #6cc7e8 } .think { color: #e0b050 } }
"""


def rollout_row(step: int, problem: dict, texts: list[str], numbers: dict) -> dict:
    """A line of rollouts.jsonl: a problem, its responses, `numbers` ([G] each, weight alone)."""
    pictures = []
    for image in problem["images"]:
        image, buffer = image.convert("RGB"), io.BytesIO()
        image.thumbnail((256, 256))
        image.save(buffer, "PNG")
        pictures.append("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
    weight, numbers = numbers["weight"], {k: v for k, v in numbers.items() if k != "weight"}
    responses = [
        {"text": text, **{name: values[g] for name, values in numbers.items()}}
        for g, text in enumerate(texts)
    ]
    row = {name: problem.get(name) for name in ("id", "question", "answer", "difficulty")}
    return {"step": step, **row, "weight": weight, "pictures": pictures, "responses": responses}


def _curve(name: str, caption: str, points: list[tuple[int, float]]) -> str:
    """One metric by step, with the value of a step where the pointer rests."""
    if not points:
        return ""
    low, high = min(y for _, y in points), max(y for _, y in points)
    last, span = max(points[-1][0], 1), (high - low) or 1.0
    places = [(40 + 254 * x / last, 100 - 88 * (y - low) / span, x, y) for x, y in points]
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py, _, _ in places)
    hover = "".join(
        f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5" fill="transparent"><title>step {x}: {y:.4g}'
        "</title></circle>"
        for px, py, x, y in places
    )
    return (
        f'<figure><svg viewBox="0 0 300 118" role="img" aria-label="{name}"><path d="M40,8V100H298"'
        f' fill="none" stroke="currentColor" opacity=".4"/><polyline points="{path}" fill="none" '
        f'stroke="var(--blue)" stroke-width="1.5"/><g font-size="10" fill="currentColor">'
        f'<text x="37" y="14" text-anchor="end">{high:.3g}</text><text x="37" y="102" '
        f'text-anchor="end">{low:.3g}</text><text x="40" y="114">0</text><text x="298" y="114" '
        f'text-anchor="end">step {last}</text></g>{hover}</svg><figcaption><b>{name}</b>: {caption}'
        "</figcaption></figure>"
    )


def _coloured(text: str) -> str:
    """A response, escaped, with its blocks set apart; unclosed tags stay plain text."""
    text = html.escape(text)
    for name in ("observe", "think", "answer"):
        block = rf"(&lt;{name}&gt;.*?&lt;/{name}&gt;)"
        text = re.sub(block, rf'<span class="{name}">\1</span>', text, flags=re.S)
    return text


def _card(row: dict) -> str:
    """One group: picture, question, gold, and the responses with rewards and advantages."""
    pictures = "".join(f'<img src="{html.escape(picture)}" alt="">' for picture in row["pictures"])
    responses = ""
    for r in row["responses"]:
        colour = "var(--green)" if r["advantage"] > 0 else "var(--red)"
        bonus = f" + bonus {r['bonus']:g} ★" if r["bonus"] else ""
        responses += (
            f'<div class="response"><p>{_coloured(r["text"])}</p><small><span class="bar" style="'
            f'width:{24 * abs(r["advantage"]):.0f}px;background:{colour}"></span>advantage '
            f"{r['advantage']:+.2f} · accuracy {r['accuracy']:g} + format {r['format']:g}{bonus} · "
            f"{r['length']} tokens</small></div>"
        )
    return (
        f'<section class="card"><h3>Step {row["step"]}</h3>{pictures}<p>'
        f"{html.escape(row['question'])} <b>{html.escape(row['answer'])}</b><br><small>weight of "
        f"the group {row['weight']:.2f}</small></p>{responses}</section>"
    )


def _read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_report(output: Path) -> None:
    """Write report.html from the config, metrics, rollouts and, if there, summary of a run."""
    output = Path(output)
    metrics, rows = _read(output / "metrics.jsonl"), _read(output / "rollouts.jsonl")
    values = {
        name: [(m["step"], m[name]) for m in metrics if m.get(name) is not None]
        for name, _ in CURVES
    }
    if (output / "summary.json").exists():
        before = json.loads((output / "summary.json").read_text()).get("accuracy_before")
        values["eval_accuracy"][:0] = [] if before is None else [(0, before)]
    curves = "".join(_curve(name, caption, values[name]) for name, caption in CURVES)
    ends = "".join(map(_card, [rows[0], rows[-1]] if rows else []))
    between = "".join(map(_card, rows[1:-1][:: max(1, len(rows) // 5)]))
    details = ""
    for file in (output / "summary.json", output / "config.json"):
        if file.exists():
            items = ", ".join(
                f"{k} <b>{v}</b>"
                for k, v in json.loads(html.escape(file.read_text(), quote=False)).items()
                if v != ""
            )
            details += f"<p>{items}</p>"
    (output / "report.html").write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>Observe-R1</title><style>{STYLE}</style>'
        f"<h1>Observe-R1: {len(metrics)} steps</h1><small>{details}</small>"
        f'<h2>Curves</h2><div class="row">{curves}</div><h2>First and last step</h2>'
        f'<div class="row">{ends}</div><h2>In between</h2>{between}</html>',
        encoding="utf-8",
    )
