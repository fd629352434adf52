"""The picture of a run: curves and rollouts as one HTML file that needs nothing else."""

import base64
import html
import io
import json
from pathlib import Path

CURVES = (  # metric, what it is
    ("reward", "mean reward of a response: accuracy + format + bonus"),
    ("accuracy", "share of correct responses"),
    ("eval_accuracy", "share of correct responses to held-out problems"),
    ("format", "mean format reward, at most 0.5"),
    ("bonus", "mean bonus of a response"),
    ("response_length", "mean length of a response in tokens"),
    ("weight", "mean weight of a group, at most sigma"),
    ("zero_weight_fraction", "share of groups that teach nothing"),
    ("kl", "KL divergence from the reference per token"),
    ("grad_norm", "gradient norm before clipping"),
)
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em;
       color-scheme: light dark; background: Canvas; color: CanvasText }
figure { display: inline-block; margin: .5em; width: 300px } figcaption { font-size: 12px }
svg { background: color-mix(in srgb, CanvasText 6%, Canvas) }
td { border-top: 1px solid #8888; padding: .2em .6em; vertical-align: top } td:first-child {
 font-family: monospace; word-break: break-word }
img { image-rendering: pixelated; min-height: 56px }
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
    return {
        "step": step,
        "id": problem["id"],
        "question": problem["question"],
        "answer": problem["answer"],
        "weight": weight,
        "pictures": pictures,
        "responses": responses,
    }


def _curve(name: str, caption: str, metrics: list[dict]) -> str:
    points = [(row["step"], row[name]) for row in metrics if name in row]
    if not points:
        return ""
    low, high = min(y for _, y in points), max(y for _, y in points)
    last, span = points[-1][0], (high - low) or 1.0
    places = [(20 + 270 * x / last, 110 - 95 * (y - low) / span) for x, y in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return (
        f'<figure><svg viewBox="0 0 300 125" width="300" role="img" aria-label="{name}">'
        f'<polyline points="{path}" fill="none" stroke="#2a7de1" stroke-width="1.5"/>'
        f'<g font-size="10" fill="currentColor"><text x="2" y="12">{high:.3g}</text>'
        f'<text x="2" y="120">{low:.3g}</text><text x="298" y="122" text-anchor="end">step {last}'
        f"</text></g></svg><figcaption><b>{name}</b>: {caption}</figcaption></figure>"
    )


def _group(row: dict) -> str:
    pictures = "".join(f'<img src="{picture}" alt="">' for picture in row["pictures"])
    cells = "".join(
        f"<tr><td>{html.escape(r['text'])}</td><td>{r['accuracy']:g} + {r['format']:g} + "
        f"{r['bonus']:g}"
        f"</td><td>{r['advantage']:+.2f}</td><td>{r['length']}</td></tr>"
        for r in row["responses"]
    )
    return (
        f"<h3>Step {row['step']}, weight {row['weight']:.2f}</h3>{pictures}<p>"
        f"{html.escape(row['question'])} <b>{html.escape(row['answer'])}</b></p><table><tr>"
        f"<th>response<th>accuracy + format + bonus<th>advantage<th>tokens</tr>{cells}</table>"
    )


def write_report(output: Path) -> None:
    """Write report.html from the config, metrics, rollouts and, if there, summary of a run."""
    output = Path(output)
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (output / "rollouts.jsonl").read_text().splitlines()]
    chosen = [rows[i] for i in sorted({0, len(rows) // 2, len(rows) - 1})] if rows else []
    summary = output / "summary.json"
    texts = [path.read_text() for path in (summary, output / "config.json") if path.exists()]
    body = "".join(_curve(*curve, metrics) for curve in CURVES) + "".join(map(_group, chosen))
    details = "".join(f"<pre>{html.escape(text)}</pre>" for text in texts)
    (output / "report.html").write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>Observe-R1</title><style>{STYLE}</style>'
        f"<h1>Observe-R1</h1>{body}<details><summary>Result and options</summary>{details}"
        "</details>",
        encoding="utf-8",
    )
