"""One training step of Observe-R1 under the microscope: each number, with its equation.

    python tools/walkthrough.py                      # a problem of the toy, about ten seconds
    python tools/walkthrough.py --problem 316        # another row of the data
    python tools/walkthrough.py --model runs/mine/final --data mine.parquet --problem 7
    python tools/walkthrough.py --html step.html     # the same as a page, beside the source

The step is real: `train` of observe_r1.py runs on two problems, the row that is followed and the
one before it, with an optimiser step for each. A trace function looks on and notes what the
functions are given and return. Nothing is computed by a copy of them, except what is named "by
hand". All options of `observe_r1.py train` are understood, but a group is always a single pass,
whatever --token_budget says.
"""

import argparse
import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import re
import statistics
import sys
import tempfile
import textwrap
from dataclasses import dataclass, field, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import numpy as np
import pandas
import pyarrow.dataset
import pyarrow.parquet
import report
import torch
from PIL import Image
from report import escape
from safetensors import SafetensorError

import observe_r1
import rewards

TOY = HERE.parent / "toy"
# Of the toy's ladder: the first row from 321 on whose group, with seed 0, is half solved, with a
# bonus and a clipped token.
DEFAULT_PROBLEM = 330
FOLLOWED = 1  # place of the followed problem in the rollout; problem 0 has the first update
WIDTH = 95  # of a line, before it is indented
MOST = 8  # numbers of a tensor that the page shows


# ---------------------------------------------------------------------------------- looking on
# Python calls a trace function before each line and at each return of the functions that we name.
# What a line has set are the variables that hold something else when the next line begins.


@dataclass
class Call:
    """One call: arguments, result, and for each line what it set."""

    arguments: dict
    result: object = None
    notes: dict = field(default_factory=dict)  # line -> {variable: HTML of first and last value}

    def note(self, line, variable, value):
        values = self.notes.setdefault(line, {}).setdefault(variable, [])
        values[1:] = [describe(value)]


class Trace:
    """Notes calls of the method's functions, of each the first and the last."""

    def __init__(self, by_line):
        self.by_line = by_line  # also what each line sets
        functions = map(inspect.unwrap, itertools.chain(*(part[2] for part in PARTS)))
        self.functions = {function.__code__: function for function in functions}
        self.calls = {function.__qualname__: [] for function in self.functions.values()}

    def enter(self, frame, event, argument):
        """A function is called: Python asks how its lines are to be traced."""
        function = self.functions.get(frame.f_code)
        if function is None:
            return None
        calls = self.calls[function.__qualname__]
        del calls[1:]
        call = Call(dict(frame.f_locals))
        calls.append(call)
        frame.f_trace_lines = self.by_line
        line, known = frame.f_lineno, {}

        def look(frame, event, result):
            nonlocal line
            for name, value in frame.f_locals.items():
                version = getattr(value, "_version", 0)  # counts what is put into a tensor
                before = known.get(name, (None, -1))
                if value is not before[0] or version != before[1]:
                    call.note(line, name, value)
                known[name] = (value, version)
            if event == "return":
                call.result = result
                call.note(line, "returns", result)
            line = frame.f_lineno
            return look

        return look


# ------------------------------------------------------------------------------------- the step


ONE_STEP = {
    "prompts_per_step": 2,
    "minibatch_prompts": 1,
    "shuffle": False,
    "max_steps": 0,
    "warmup_ratio": 0.0,
    "token_budget": 10**9,
    "eval_data": "",
    "eval_steps": 0,
    "save_steps": 0,
    "resume": False,
}


@dataclass
class Step:
    """What the step computed, and the same problem sampled after it."""

    config: observe_r1.Config
    name: str  # of the problem
    problem: dict
    trace: Trace
    processor: object
    rollouts: list  # before and after the step
    scores: list  # accuracy, format, bonus, reward [G] and the weight, before and after
    advantages: torch.Tensor  # [G]

    @property
    def texts(self):
        return self.rollouts[0].texts[FOLLOWED]

    @property
    def lengths(self):
        return self.scores[0]["response_length"].tolist()

    @functools.cached_property
    def group(self):
        return by_hand(self.last("grpo_loss").arguments)

    def last(self, name):
        """The last call of a function: it was about the followed problem."""
        return self.trace.calls[name][-1]


def take_step(config, number, by_line):
    """Train on the row of this number and on its neighbour."""
    Path(config.data).stat()  # OSError if it is not there
    problems = pyarrow.dataset.dataset(config.data)
    last = problems.count_rows() - 1
    if not 0 <= number <= last:
        raise ValueError(f"--problem {number}: {config.data} has the rows 0 to {last}")
    neighbour = number - 1 if number else min(1, last)
    file_name = Path(config.data).name
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"rows {neighbour} and {number} of {file_name}")
        pyarrow.parquet.write_table(problems.take([neighbour, number]), file)
        small = replace(config, data=str(file), output_dir=f"{folder}/run", **ONE_STEP)
        trace, before = Trace(by_line), sys.gettrace()
        sys.settrace(trace.enter)
        try:
            observe_r1.train(small)
        finally:
            sys.settrace(before)

    state = trace.calls["update"][-1].arguments["state"]
    both = trace.calls["rollout"][0].arguments["problems"]
    observe_r1.set_seed(small.seed, 0, 0)  # the random numbers that the step had
    after = observe_r1.rollout(state.policy.model, state.processor, both, small)
    scores = (
        trace.calls["score_rollouts"][0].result,
        observe_r1.score_rollouts(after, both, small),
    )
    return Step(
        small,
        f"row {number} of {file_name}",
        both[FOLLOWED],
        trace,
        state.processor,
        [trace.calls["rollout"][0].result, after],
        [{name: values[FOLLOWED] for name, values in one.items()} for one in scores],
        trace.calls["group_advantages"][-1].result[FOLLOWED],
    )


# ------------------------------------------------------------------------------------- the text
# A part yields blocks: a string is a paragraph, a list holds lines that stay as they are.


def plain(text):
    """Text for a terminal: control characters are shown, not obeyed."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in str(text))


def table(*rows):
    """Lines of columns; the last one is wrapped."""
    rows = [[plain(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) + 2 for column in list(zip(*rows))[:-1]]
    lines = []
    for *cells, last in rows:
        label = "".join(cell.ljust(width) for cell, width in zip(cells, widths))
        wrapped = textwrap.wrap(
            last, WIDTH, initial_indent=label, subsequent_indent=" " * len(label)
        )
        lines += wrapped or [label.rstrip()]
    return lines


def shape(tensor):
    return f"[{','.join(map(str, tensor.shape))}]"


def problem_part(step):
    yield (
        "The *policy* is the model that learns. Given pictures and text, it gives every possible "
        "next token a probability. It is trained on problems like this one: a picture, a question "
        "and the *gold*, which is the right answer. The policy never sees the gold."
    )
    question, gold = step.problem["question"], step.problem["answer"]
    yield table(("problem", step.name), ("question", question), ("answer", gold))
    sizes = [f"{picture.width} x {picture.height}" for picture in step.problem["images"]]
    yield [f"pictures, in pixels: {', '.join(sizes) or 'none'}"]


def prompt_part(step):
    prompt = step.rollouts[0].prompts[FOLLOWED]
    ids = prompt["input_ids"]
    text = step.processor.decode(ids[0]).replace("\n", " ")
    text = re.sub(
        r"(<\|image_pad\|>)+", lambda pads: f"<|image_pad|> x {len(pads[0]) // 13} ", text
    )
    yield "The chat template makes one row of tokens of system prompt, picture and question."
    yield [*table((text,)), f"input_ids {shape(ids)}: P = {ids.shape[1]} prompt tokens"]
    if "pixel_values" in prompt:
        yield [f"pixel_values {shape(prompt['pixel_values'])}: a row of numbers for each patch"]
        yield (
            "The vision tower turns the patches into vectors, one for every four of them, which "
            "replace the <|image_pad|>."
        )


def rollout_part(step):
    c, mask = step.config, step.rollouts[0].mask
    yield (
        f"A *rollout* is what the policy, as it is now, writes: G = {mask.shape[1]} responses to "
        "each problem, its group, drawn token by token. A response ends with the stop token, or is "
        f"cut at --max_new_tokens ({c.max_new_tokens})."
    )
    yield [f"token ~ softmax(logits / temperature), temperature = {c.temperature:g}"]
    yield response_lines(step, 0)


def response_lines(step, when):
    """The responses to the followed problem, numbered, with their lengths."""
    rows = [("", "tokens", "response")]
    cut = step.scores[when]["truncated_fraction"]
    lengths = step.scores[when]["response_length"]
    for i, text in enumerate(step.rollouts[when].texts[FOLLOWED]):
        length = f"{lengths[i]} cut" if cut[i] else lengths[i].item()
        rows.append((i + 1, length, text))
    return table(*rows)


def rewards_part(step):
    c, scores = step.config, step.scores[0]
    yield (
        "A *reward* is a number that a rule gives to a response; no second model judges. The floor "
        "of the bonus keeps the policy from learning to skip the reasoning. If the shortest "
        "correct response is not longer than the floor, nobody in the group gets the bonus."
    )
    yield [
        "r = accuracy + format + bonus",
        "accuracy  1 if the answer matches the gold, else 0",
        "format    0.5 if the blocks stand as the system prompt asks, else 0",
        f"bonus     {c.bonus:g} to the shortest correct response, if above {c.min_length} tokens",
    ]
    names = ("accuracy", "format", "bonus", "reward")
    rows = [("", *names, "why")]
    for i in range(len(step.texts)):
        values = [f"{scores[name][i].item():.4g}" for name in names]
        rows.append((i + 1, *values, reasons(step, i)))
    yield table(*rows)


def reasons(step, i):
    """What the checker reads, and what is wrong with the blocks; who has the bonus, or why not."""
    text, scores = step.texts[i], step.scores[0]
    answer = rewards.extract_answer(text)
    said = "no answer found" if answer is None else f"answer {answer.strip()[:60]!r}"
    found = [f"{said}, gold {step.problem['answer'][:60]!r}"]
    if not scores["format"][i]:
        names = ("observe", "think", "answer") if step.config.observe else ("think", "answer")
        tags = [f"<{slash}{name}>" for name in names for slash in ("", "/")]
        wrong = [f"{text.count(tag)} x {tag}" for tag in tags if text.count(tag) != 1]
        found.append(", ".join(wrong) or "blocks blank, out of order or with text between them")
    correct = [j for j, value in enumerate(scores["accuracy"]) if value]
    if correct and i == min(correct, key=lambda j: step.lengths[j]):
        found.append(f"shortest correct, of {step.lengths[i]} tokens")
    return "; ".join(found)


def advantages_part(step):
    scores, c, G = step.scores[0], step.config, len(step.texts)
    reward, weight = scores["reward"].tolist(), scores["weight"].item()
    solved, mean, std = (
        int(scores["accuracy"].sum()),
        statistics.mean(reward),
        statistics.stdev(reward),
    )
    yield (
        "The responses of one group are compared with each other: that is the idea of GRPO, group "
        "relative policy optimisation. The *advantage* says how much better a response is than its "
        "siblings."
    )
    p = solved / G
    equation = f"4 sigma p (1 - p) = 4 * {c.sigma:g} * {p:g} * {1 - p:g} = {weight:.4f}"
    yield [
        f"share solved  p = {solved} / {G} = {p:g}",
        f"weight        w = {equation if c.dynamic_weight else '1 (--dynamic_weight false)'}",
        f"rewards       mean = {mean:.4f}, std = {std:.4f} (with n - 1)",
        "advantage     A = w (r - mean) / (std + 0.000001)",
    ]
    values = zip(reward, step.advantages.tolist())
    yield [f"{i}  r = {r:<4.3g}  A = {a:+.4f}" for i, (r, a) in enumerate(values, start=1)]
    if std:
        yield (
            f"std and weight together: dividing by std stretches the differences {1 / std:.2f} "
            f"times, the weight multiplies that by {weight:.2f}. Dividing by std alone makes the "
            "rare success of a hard group loudest; the weight turns such groups down, where luck "
            "or a wrong gold decides, and half-solved ones up. With rewards of 0 and 1 alone:"
        )
        rows = [("right", "(r - mean) / std of a right one", "w", "A")]
        for right in sorted({1, G // 2, G - 1}):
            correct = [i < right for i in range(G)]
            w = rewards.dynamic_weight(correct, c.sigma)
            both = torch.tensor(correct).float().repeat(2, 1)
            scaled = observe_r1.group_advantages(both, torch.tensor([1.0, w]))[:, 0].tolist()
            rows.append((f"{right} of {G}", f"{scaled[0]:+.4f}", f"{w:.4f}", f"{scaled[1]:+.4f}"))
        yield table(*rows)


def packed_part(step):
    yield (
        "The update needs the probability of each response token. The prompt and its pictures are "
        "the same for the whole group, so they stand in the row once, and the responses follow end "
        "to end. The row carries no mask, but lengths: attention cuts it there, and lets the "
        "prompt look at itself, each response at the prompt and at itself so far."
    )
    P = step.rollouts[0].prompts[FOLLOWED]["input_ids"].shape[1]
    sizes = [P, *step.lengths]
    seen = P * (P + 1) // 2 + sum(T * P + T * (T + 1) // 2 for T in step.lengths)
    row, _ = step.last("pack_group").result
    yield [
        f"input_ids {shape(row['input_ids'])}: {' + '.join(map(str, sizes))} tokens",
        f"pairs of tokens that attention compares: {seen}, of {sum(sizes) ** 2} in the row",
    ]


def by_hand(arguments):
    """GRPO of each token with NumPy, in 64 bits: a row of the table for each token."""
    mask, clip, beta = (arguments[name] for name in ("mask", "clip_range", "kl_coef"))
    names = ("log_probs", "old_log_probs", "ref_log_probs")
    new, old, reference = (np.array(arguments[name][mask].tolist()) for name in names)
    response, token = mask.nonzero().T.tolist()
    A = np.array(arguments["advantages"].tolist())[response]
    ratio = np.exp(new - old)
    clipped = ratio.clip(1 - clip, 1 + clip)
    q = reference - new
    kl = np.exp(q) - q - 1
    objective = np.minimum(ratio * A, clipped * A)
    push = np.where(objective < ratio * A, 0, ratio * A) - beta * (1 - np.exp(q))
    return pandas.DataFrame(
        {
            "response": response,
            "token": token,
            "old": old,
            "new": new,
            "reference": reference,
            "A": A,
            "q": q,
            "ratio": ratio,
            "clipped": clipped,
            "kl": kl,
            "objective": objective,
            "push": push,
        }
    )


def is_clipped(tokens):
    return tokens["objective"] < tokens["ratio"] * tokens["A"]


def three_tokens(group):
    """A clipped token, one as far out that is not clipped, and those that moved most."""
    # The same token at the same place of several responses is one move.
    moves = group.assign(rewarded=group["A"] > 0).drop_duplicates(
        ["ratio", "rewarded"], keep="last"
    )
    moves = moves.sort_values("ratio", key=lambda ratio: -abs(ratio - 1), kind="stable")
    clipped = is_clipped(moves)
    chosen = pandas.concat([moves[clipped][:1], moves[~clipped]])[:3]
    return chosen.sort_values(["response", "token"]).to_dict("records")


def token_table(step, columns):
    """Three tokens of the group: where they stand, what they are, and these numbers."""
    rows = [("response", "token", "text", *columns)]
    for token in three_tokens(step.group):
        i, t = token["response"], token["token"]
        text = step.processor.decode([step.rollouts[0].response_ids[FOLLOWED, i, t]])
        numbers = (f"{token[name]:+.5f}" for name in columns)
        rows.append((i + 1, t + 1, repr(text)[:17], *numbers))
    return table(*rows)


def log_probs_part(step):
    yield (
        "Three models give the same tokens a log-probability: *old* is the policy that sampled "
        "them, *new* is the policy now, after the optimiser step on the other problem of this "
        "rollout, and the *reference* is the model before training. In the first rollout of a run "
        "old and reference are the same model."
    )
    if not step.trace.calls["optimizer_step"][0].result:  # the gradient's norm
        yield "The other problem taught nothing here, so new is still old and every ratio is 1."
    yield ["log p(token) = z[token] - log sum exp z, z = logits / temperature"]
    yield token_table(step, ("old", "new", "reference"))


def ratio_part(step):
    group, clip, beta = step.group, step.config.clip_range, step.config.kl_coef
    yield (
        "The *ratio* says how much likelier a token has become since it was sampled. ratio * A is "
        "what we want to be large. *Clipping* takes away the reason to go further once a token has "
        f"moved by {clip:.0%} in the wanted direction: its gradient is 0 then. The *KL* penalty "
        "(Kullback-Leibler divergence) grows as the policy leaves the reference; this estimate of "
        "it is called k3. Both keep a step from going too far."
    )
    yield [
        "ratio     = exp(log p new - log p old)",
        f"objective = min(ratio A, clip(ratio, {1 - clip:g}, {1 + clip:g}) A)",
        "KL        = exp(q) - q - 1, q = log p reference - log p new",
        f"push      = ratio A, 0 if clipped, - {beta:g} (1 - exp(q)): the gradient",
    ]
    yield token_table(step, ("ratio", "clipped", "A", "objective", "kl", "push"))
    for token in three_tokens(group):
        way = "up" if token["q"] > 0 else "down"
        back = f" KL draws it {way}, to the reference." if beta * token["q"] else ""
        place = f"Response {token['response'] + 1}, token {token['token'] + 1}"
        yield f"{place}: {verdict(token, clip)}{back}"
    yield [f"clipped in this group: {is_clipped(group).sum()} of {len(group)} tokens"]


def verdict(token, clip):
    """In words, what ratio, clip and minimum do to a token."""
    ratio, A = token["ratio"], token["A"]
    wish = "likelier" if A > 0 else "less likely"
    text = f"A wants it {wish}; it is now {ratio:.2f} times as likely as when it was sampled. "
    terms = f"ratio A = {ratio * A:+.3f}, clip(ratio) A = {token['clipped'] * A:+.3f}"
    if is_clipped(token):
        text += f"That is far enough: of {terms} the minimum is the second, a constant, so that A "
        text += "pushes no more: clipped."
    elif abs(ratio - 1) > clip:
        text += (
            f"It went the other way: of {terms} the minimum is the first, although the ratio is "
        )
        text += "out of range, so that the push stays on and brings it back: not clipped."
    else:
        text += "That is within the range: clip changes nothing, the push is ratio A."
    return text


def loss_part(step):
    call, c = step.last("grpo_loss"), step.config
    count = call.arguments["num_responses"]
    yield (
        "What a response costs is a mean over its own tokens, so that long responses count no more "
        "than short ones. The loss is the mean over the responses of the optimiser step."
    )
    yield [f"L = sum of costs / {count}, cost = mean over tokens of ({c.kl_coef:g} KL - objective)"]
    means = step.group.groupby("response")[["A", "objective", "kl"]].mean()
    means["cost"] = c.kl_coef * means["kl"] - means["objective"]
    rows = [("", "tokens", "A", "mean objective", "mean KL", "cost")]
    for i, values in enumerate(means.to_numpy()):
        rows.append((i + 1, step.lengths[i], *(f"{value:+.5f}" for value in values)))
    yield table(*rows)
    norm = step.last("optimizer_step").result
    yield [
        f"L by hand        {means['cost'].sum() / count:+.6f}",
        f"L by grpo_loss   {call.result[0].item():+.6f}",
        f"gradient norm    {norm:.4f}, scaled to at most {c.max_grad_norm:g}",
    ]
    yield (
        "Near its start the loss is about 0 whatever the policy has learnt: ratios are near 1 and "
        "advantages sum to 0. What teaches is its gradient."
    )


def after_part(step):
    yield (
        "The same problem, sampled again by the updated policy with the same random numbers. One "
        "step on two problems changes little and can go wrong; training takes many."
    )
    for when, scores in zip(("before", "after "), step.scores):
        right, reward = int(scores["accuracy"].sum()), scores["reward"].mean()
        yield [f"{when}  {right} of {len(step.texts)} right, mean reward {reward:.4f}"]
    yield response_lines(step, 1)


PARTS = (  # title, text, functions whose source the page shows
    ("The problem", problem_part, ()),
    ("The prompt", prompt_part, (observe_r1.chat_messages, observe_r1.encode_prompts)),
    ("The rollout", rollout_part, (observe_r1.rollout, observe_r1.sample)),
    (
        "Rewards",
        rewards_part,
        (observe_r1.score_rollouts, rewards.format_reward, rewards.bonus_rewards),
    ),
    (
        "Weight and advantages",
        advantages_part,
        (rewards.dynamic_weight, observe_r1.group_advantages),
    ),
    ("The packed row", packed_part, (observe_r1.pack_group, observe_r1.packed_attention)),
    (
        "Log-probabilities",
        log_probs_part,
        (observe_r1.Policy.forward, observe_r1.token_log_probs),
    ),
    ("Ratio, clipping, KL", ratio_part, (observe_r1.grpo_loss,)),
    ("The loss and its gradient", loss_part, (observe_r1.update, observe_r1.optimizer_step)),
    ("After the step", after_part, (observe_r1.train,)),
)
NEED_A_LOSS = (packed_part, log_probs_part, ratio_part, loss_part)
NOT_TAUGHT = (
    "All advantages of this group are 0: `update` skips it, and it changes nothing. Another --seed "
    "or --problem may give a group that is neither all right nor all wrong."
)


def blocks_of(step, part):
    """The paragraphs and lines of a part."""
    if part in NEED_A_LOSS and not step.advantages.any():
        return [NOT_TAUGHT]
    return list(part(step))


def text_of(step):
    """All parts as plain text of at most 100 columns."""
    lines = [HEADLINE.format(c=step.config)]
    for number, (title, part, _) in enumerate(PARTS, start=1):
        lines += ["", f"{number}  {title}", ""]
        for block in blocks_of(step, part):
            is_text = isinstance(block, str)
            block = textwrap.wrap(block, WIDTH) if is_text else block
            lines += [("   " if is_text else "     ") + line for line in block]
    return "\n".join(lines)


HEADLINE = """One training step of Observe-R1, computed by observe_r1.py with seed {c.seed}:
2 problems, {c.num_generations} responses to each, then an optimiser step for each problem.
Below is the second problem. A real run takes more problems at a time."""


# ------------------------------------------------------------------------------------- the page


def describe(value, depth=0):
    """A value as a little HTML: shape and first numbers, pictures as pictures."""
    if isinstance(value, (list, tuple)) and all(isinstance(one, (int, float)) for one in value):
        value = np.array(value)
    if isinstance(value, (torch.Tensor, np.ndarray)):
        numbers = [short(one) for one in value.reshape(-1)[: MOST + 1].tolist()]
        return f"<i>{shape(value)}</i> {' '.join(numbers[:MOST])}{' …' * (len(numbers) > MOST)}"
    if isinstance(value, Image.Image):
        return report.picture_html(value)
    if isinstance(value, (str, int, float, np.number, type(None))):
        return short(value)
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if hasattr(value, "items") and depth < 2:
        entries = [f"{escape(name)}: {describe(one, depth + 1)}" for name, one in value.items()]
        return report.folded(f"{len(entries)} entries", [f"<div>{line}</div>" for line in entries])
    if isinstance(value, (list, tuple)) and depth < 2:
        return f"<i>{len(value)} values</i>, the first: {describe(value[0], depth + 1)}"
    return f"<i>{escape(type(value).__name__)}</i>"


def short(value):
    text = f"{value:.4g}" if isinstance(value, float) else repr(value)
    return escape(textwrap.shorten(text, 160, placeholder=" …"))


def function_html(function, call):
    """A function's source, beside each line what it set."""
    lines, first = inspect.getsourcelines(function)
    body = ""
    for number, code in enumerate(lines, first):
        values = ""
        for name, shown in call.notes.get(number, {}).items():
            last = f"<div>last: {shown[-1]}</div>" if shown[-1] != shown[0] else ""
            values += f"<div><b>{escape(name)}</b> {shown[0]}{last}</div>"
        code = f"<code>{escape(code)}</code>"
        body += f'<div class="line">{code}<div class="values">{values}</div></div>\n'
    name = function.__qualname__
    return f'<section id="{name}"><h3>{name}</h3>{body}</section>\n'


PAGE_STYLE = """
.line { display: grid; grid-template-columns: minmax(0, 62fr) minmax(0, 38fr); gap: 0 1.2em }
.line:hover { background: color-mix(in srgb, var(--blue) 9%, transparent) }
.line code, .values, pre { font: 12px/1.5 ui-monospace, Menlo, Consolas, monospace }
.line code { white-space: pre-wrap; padding-left: 2em; text-indent: -2em }
.values { color: var(--quiet); border-left: 2px solid var(--line); padding-left: .7em;
  max-height: 6em; overflow: auto }
.values div div { padding-left: .8em } .values details { margin: 0; display: inline }
.values b { color: var(--ink) } .values i { color: var(--violet); font-style: normal }
.values img { image-rendering: pixelated; height: 42px; max-width: 100%; vertical-align: middle }
section { border: 1px solid var(--line); border-radius: 8px; padding: .8em 1em; margin: 1em 0 }
pre { overflow-x: auto; background: var(--card); padding: .7em 1em; border-radius: 8px }
nav { columns: 12em; font-size: 13px }
nav a { display: block; color: var(--blue) }
"""
LEGEND = (
    "The source is that of observe_r1.py and rewards.py. Beside each line stands what it set in "
    "this step: shape and first numbers, of a function's last call, of a loop's first and last "
    "round."
)


def page_html(step):
    """The parts of the text, behind each the functions that it is about."""
    body, links = "", ""
    for number, (title, part, functions) in enumerate(PARTS, start=1):
        body += f"<h2>{number} {title}</h2>\n"
        for block in blocks_of(step, part):
            if isinstance(block, str):
                body += "<p>" + re.sub(r"\*(\w+)\*", r"<b>\1</b>", escape(block)) + "</p>\n"
            else:
                body += "<pre>" + escape("\n".join(block)) + "</pre>\n"
        for function in map(inspect.unwrap, functions):
            name = function.__qualname__
            if step.trace.calls[name]:
                body += function_html(function, step.last(name))
                links += f'<a href="#{name}">{name}</a>'
    head = f"<p>{HEADLINE.format(c=step.config)}</p><p>{LEGEND}</p><nav>{links}</nav>"
    return report.page("Observe-R1: one training step", head + body, PAGE_STYLE)


# ------------------------------------------------------------------------------- command line


def main():
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.add_argument("--problem", type=int, help="row of the problem to follow")
    parser.add_argument("--html", type=Path, help="write the page as well")
    args, options = parser.parse_known_args()
    screen = io.StringIO()  # for what training says of its two problems
    try:
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
            _, config = observe_r1.parse_arguments(["train", *options])
            number = args.problem
            if number is None:
                number = DEFAULT_PROBLEM if Path(config.data) == TOY / "ladder.parquet" else 0
            step = take_step(config, number, by_line=bool(args.html))
        print(text_of(step))
        if args.html:
            args.html.write_text(page_html(step), encoding="utf-8")
            print(f"\n{args.html}")
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(f"walkthrough: {error}")


if __name__ == "__main__":
    main()
