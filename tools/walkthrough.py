"""One training step of Observe-R1 under the microscope: each number, with its equation.

    python tools/walkthrough.py                        # a problem of the toy, about ten seconds
    python tools/walkthrough.py --problem train-316    # another one
    python tools/walkthrough.py --data mine.jsonl --problem 7 --model runs/toy/final
    python tools/walkthrough.py --html step.html       # the same as a page, beside the source

The step is real: `train` of observe_r1.py runs on two problems, the one that is followed and the
one before it in the data, with an optimiser step for each. A trace function looks on and notes what
the functions are given and return. Nothing is computed by a copy of them, except what is named
"by hand". All options of `observe_r1.py train` are understood; without --config they are the toy's.
--html needs pygments (pip install pygments).
"""

import argparse
import ast
import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import itertools
import math
import os
import re
import statistics
import sys
import tempfile
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import datasets
import numpy as np
import report
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError

import observe_r1
import rewards

DEFAULT_PROBLEM = "train-321"  # half solved by the toy's model at seed 0, and the bonus is paid
FOLLOWED = 1  # its place in the rollout; problem 0 has the first optimiser step
SHADES = " .:-=+*#%@"
WIDTH = 95  # of a line, before it is indented
MOST = 8  # numbers of a tensor that the page shows


# ---------------------------------------------------------------------------------- looking on
# Python calls a trace function before each line and at each return of the functions that we name.
# What a line has computed is read from its function's variables when the next line begins.

ENDS = {observe_r1: "# The method ends here", rewards: "# ----"}  # what follows is not shown


@dataclass
class Function:
    """A function of the method, with its lines in the file and the statements on them."""

    name: str
    start: int  # the line of its def
    lines: dict[int, str]  # line number -> text
    statements: dict[int, ast.stmt]  # line number -> the innermost statement there


@dataclass
class Call:
    """One call: arguments, result, and beside each statement what it computed, as HTML."""

    function: Function
    arguments: dict
    result: object = None
    notes: dict = dataclasses.field(default_factory=dict)  # line -> {label: [count, first, last]}
    executed: set = dataclasses.field(default_factory=set)  # first lines of statements that ran

    def note(self, statement, variables):
        """Write down what the statement has just set."""
        self.executed.add(statement.lineno)
        for node in written_by(statement):
            with contextlib.suppress(KeyError, AttributeError, TypeError):
                self.write(statement.lineno, ast.unparse(node), value_of(node, variables))

    def write(self, line, label, value):
        shown = describe(value)
        entry = self.notes.setdefault(line, {}).setdefault(label, [0, shown, shown])
        entry[0] += 1
        entry[2] = shown

    def is_about(self, name):
        """Whether an argument is the problem of this id, or a list with it."""
        for value in self.arguments.values():
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, dict) and item.get("id") == name:
                    return True
        return False


def written_by(statement):
    """The names, attributes and fields that a statement sets, as nodes."""
    targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
    if isinstance(statement, ast.With):
        targets = [item.optional_vars for item in statement.items]
    call = getattr(statement, "value", None)
    if isinstance(statement, ast.Expr) and isinstance(call, ast.Call):  # such as norms.append(…)
        targets = [getattr(call.func, "value", None)]
    found = []
    for target in targets:
        nodes = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
        for node in nodes:
            while isinstance(node, ast.Subscript) and not is_field(node):
                node = node.value  # an element was set: show the whole
            found.append(node)
    return [node for node in found if isinstance(node, (ast.Name, ast.Attribute, ast.Subscript))]


def is_field(node):
    return isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str)


def value_of(node, variables):
    """The value of a name, an attribute or a field; nothing is evaluated."""
    if isinstance(node, ast.Name):
        return variables[node.id]
    if isinstance(node, ast.Attribute):
        return getattr(value_of(node.value, variables), node.attr)
    return value_of(node.value, variables)[node.slice.value]


def functions_of(module):
    """The functions of a module that belong to the method."""
    source = Path(module.__file__).read_text()
    lines = source.splitlines()
    length = source.partition(ENDS[module])[0].count("\n")
    functions = []
    for node in ast.parse(source).body:
        is_class = isinstance(node, ast.ClassDef)
        prefix = f"{node.name}." if is_class else ""
        for inner in node.body if is_class else [node]:
            if isinstance(inner, ast.FunctionDef) and inner.end_lineno < length:
                functions.append(read_function(inner, prefix, lines))
    return functions


def read_function(node, prefix, lines):
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    statements = {}
    for inner in ast.walk(node):  # from the outermost to the innermost
        if isinstance(inner, ast.stmt) and inner is not node:
            numbers = range(inner.lineno, inner.end_lineno + 1)
            statements.update(dict.fromkeys(numbers, inner))
    text = {number: lines[number - 1] for number in range(first, node.end_lineno + 1)}
    return Function(prefix + node.name, node.lineno, text, statements)


def check_unchanged(module, function):
    """ValueError if the file was edited since Python read it: lines and values would not fit."""
    loaded = functools.reduce(getattr, function.name.split("."), module)
    if inspect.unwrap(loaded).__code__.co_firstlineno != min(function.lines):
        raise ValueError(f"{module.__file__} has changed since the start: start again")


class Trace:
    """Inside, each call of a function of the method is noted.

    `calls` holds all calls of the functions in `kept`. `shown` holds one call of each function: the
    last one about the problem, or else the last one; it is filled only if `by_line` is set.
    """

    def __init__(self, problem, kept, by_line):
        self.problem = problem
        self.by_line = by_line
        self.calls = {name: [] for name in kept}
        self.shown = {}
        self.owners = {}  # (file, line) -> Function
        self.running = {}  # function's name -> its call in progress
        for module in ENDS:
            for function in functions_of(module):
                check_unchanged(module, function)
                for line in function.lines:
                    self.owners[module.__file__, line] = function

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.enter)
        return self

    def __exit__(self, *error):
        sys.settrace(self.before)

    def enter(self, frame, event, argument):
        """A function is called: Python asks whether its lines are to be traced."""
        code = frame.f_code
        function = self.owners.get((code.co_filename, code.co_firstlineno))
        if function is None or code.co_name.startswith(("<", "__")):
            return None
        is_inner = code.co_name != function.name.rpartition(".")[2]
        if is_inner:
            call = self.running.get(function.name)
        else:
            call = Call(function, dict(frame.f_locals))
            self.running[function.name] = call
            self.shown.setdefault(function.name, call)  # keeps the order of the first calls
            for name, value in frame.f_locals.items() if self.by_line else ():
                if name not in ("self", "__class__"):
                    call.write(function.start, name, value)
        frame.f_trace_lines = self.by_line
        return self.follow(call, is_inner) if call else None

    def follow(self, call, is_inner):
        latest = None  # the statement that is running

        def look(frame, event, argument):
            nonlocal latest
            following = None
            if event == "line":
                following = call.function.statements.get(frame.f_lineno)
            if latest is not None and latest is not following:  # it has ended
                call.note(latest, frame.f_locals)
            if event == "return":
                if isinstance(latest, ast.Return) and latest.value:
                    call.write(latest.lineno, "returns", argument)
                if not is_inner:
                    call.result = argument
                    self.finish(call)
            latest = following
            return look

        return look

    def finish(self, call):
        name = call.function.name
        if name in self.calls:
            self.calls[name].append(call)
        if call.is_about(self.problem) or not self.shown[name].is_about(self.problem):
            self.shown[name] = call


# ------------------------------------------------------------------------------------- the step

KEPT = ("rollout", "score_rollouts", "group_advantages", "update", "pack_group")
KEPT += ("grpo_loss", "scale_and_step")


@dataclass
class Step:
    """What the step computed, and the same problem sampled after it."""

    config: observe_r1.Config
    source: str  # the file of the problem
    problem: dict
    trace: Trace
    run: report.Run  # the files that the step wrote
    processor: object
    rollouts: observe_r1.Rollouts
    scores: dict  # accuracy, format, bonus, reward [G] and the weight
    advantages: torch.Tensor  # [G]
    after: observe_r1.Rollouts
    after_scores: dict

    @property
    def texts(self):
        return self.rollouts.texts[FOLLOWED]

    @property
    def lengths(self):
        return self.rollouts.mask[FOLLOWED].sum(-1).tolist()

    def loss_call(self):
        """The arguments of `grpo_loss` for this group, and the sum of what it returned.

        A group longer than --token_budget takes several calls; it is the last one of the step.
        """
        calls = []
        left = len(self.advantages)
        while left > 0:
            calls.insert(0, self.trace.calls["grpo_loss"][-1 - len(calls)])
            left -= len(calls[0].arguments["advantages"])
        inputs = dict(calls[0].arguments)
        for name in ("log_probs", "old_log_probs", "ref_log_probs", "advantages", "mask"):
            parts = [call.arguments[name] for call in calls]
            inputs[name] = None if parts[0] is None else torch.cat(parts).tolist()
        return inputs, sum(call.result[0].item() for call in calls)


def take_step(config, name, by_line):
    """Train on the problem of this id, or the default one, and on its neighbour."""
    problems = observe_r1.load_problems(config.data, config.split, config)
    ids = problems["id"][:]
    name = name or (DEFAULT_PROBLEM if DEFAULT_PROBLEM in ids else ids[0])
    if name not in ids:
        known = ", ".join(ids[:5]) + (" …" if len(ids) > 5 else "")
        raise ValueError(f"--problem {name}: {config.data} has no such id, but {known}")
    number = ids.index(name)
    neighbour = number - 1 if number else min(1, len(ids) - 1)
    pair = problems.select([neighbour, number])
    missing = [column for column in pair.column_names if None in pair[column][:]]
    pair = pair.remove_columns([*missing, "digest", "fault", "pictures"])

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pair.parquet"
        pair.to_parquet(file)
        paths = {"data": str(file), "split": "train", "subset": "", "output_dir": folder}
        small = replace(config, **paths, **ONE_STEP)
        with Trace(name, KEPT, by_line) as trace, silence():
            if by_line and None not in problems["difficulty"][:]:
                levels = (problems["difficulty"][:], problems["complexity"][:])
                observe_r1.mix_ladder(*levels, config.seed)
            observe_r1.train(small)
        run = report.Run(Path(folder))
        run.read()

    state = trace.calls["update"][0].arguments["state"]
    both = trace.calls["rollout"][0].arguments["problems"]
    observe_r1.set_seed(small.seed, 0, 0)  # the random numbers that the step had
    after = observe_r1.rollout(state.policy.model, state.processor, both, small)
    scores = [trace.calls["score_rollouts"][0].result]
    scores.append(observe_r1.score_rollouts(after, both, small))
    before, later = ({n: v[FOLLOWED] for n, v in one.items()} for one in scores)
    return Step(
        small,
        config.data,
        both[FOLLOWED],
        trace,
        run,
        state.processor,
        trace.calls["rollout"][0].result,
        before,
        trace.calls["group_advantages"][0].result[FOLLOWED],
        after,
        later,
    )


ONE_STEP = {"prompts_per_step": 2, "minibatch_prompts": 1, "order": "ladder", "max_steps": 0}
ONE_STEP |= {
    "warmup_ratio": 0.0,
    "eval_data": "",
    "eval_steps": 0,
    "save_steps": 0,
    "resume": False,
}


@contextlib.contextmanager
def silence():
    """Keep off the screen what training says of its two problems and of its folder."""
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


# ------------------------------------------------------------------------------------- the text
# A part yields blocks: a string is a paragraph, a list holds lines that stay as they are.


def problem_part(step):
    problem = step.problem
    yield (
        "The *policy* is the model that learns. Given pictures and text, it gives every possible "
        "next token a probability. It is trained on problems like this one: a picture, a question "
        "and the *gold*, which is the right answer. The policy never sees the gold."
    )
    yield [
        f"problem   {plain(problem['id'])} of {plain(Path(step.source).name)}",
        *labelled("question  ", problem["question"]),
        *labelled("gold      ", problem["answer"]),
    ]
    for picture in problem["images"]:
        yield [f"picture, {picture.width} x {picture.height} pixels", *picture_lines(picture)]


def labelled(label, text):
    """Lines of a long text behind its label."""
    indent = " " * len(label)
    return textwrap.wrap(plain(text), WIDTH, initial_indent=label, subsequent_indent=indent)


def plain(text):
    """Text for a terminal: control characters are shown, not obeyed."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in str(text))


def picture_lines(picture):
    """The picture in characters, the rarer of light and dark as ink."""
    grey = picture.convert("L")
    scale = min(64 / grey.width, 28 / grey.height)
    width, height = (max(1, round(side * scale)) for side in grey.size)
    small = grey.resize((width, (height + 1) // 2), Image.Resampling.BOX)
    values = list(small.tobytes())
    if statistics.mean(values) > 127:
        values = [255 - value for value in values]
    low, high = min(values), max(values) + 1
    ink = "".join(SHADES[(value - low) * len(SHADES) // (high - low)] for value in values)
    return [f"|{ink[i : i + width]}|" for i in range(0, len(ink), width)]


def prompt_part(step):
    prompt = observe_r1.slice_prompts(step.rollouts.prompt, [FOLLOWED])
    ids = prompt["input_ids"]
    text = step.processor.tokenizer.decode(ids[0])
    text = re.sub(r"(<\|image_pad\|>)+", count_pads, text)
    yield "The chat template makes one row of tokens of system prompt, picture and question."
    lines = textwrap.wrap(plain(text.replace("\n", " ")), WIDTH)
    yield [*lines, f"input_ids {shape(ids)}: P = {ids.shape[1]} prompt tokens"]
    if "pixel_values" not in prompt:
        return
    pixels, grid = prompt["pixel_values"], prompt["image_grid_thw"]
    merged = step.processor.image_processor.merge_size**2
    lines = [f"pixel_values {shape(pixels)}: a row of numbers for each patch of a picture"]
    for t, h, w in grid.tolist():
        visual = t * h * w // merged
        lines.append(f"{t} x {h} x {w} = {t * h * w} patches / {merged} = {visual} visual token(s)")
    yield lines
    yield "The vision tower turns the patches into vectors, which replace the <|image_pad|> tokens."


def count_pads(found):
    return f"<|image_pad|> x {found[0].count('<|image_pad|>')} "


def shape(tensor):
    return "[" + ",".join(map(str, tensor.shape)) + "]"


def rollout_part(step):
    G, T = step.rollouts.mask.shape[1:]
    yield (
        f"A *rollout* is what the policy, as it is now, writes: G = {G} responses to each problem, "
        "its group, drawn token by token. A response ends with the stop token, or is cut at --max_new_tokens "
        f"({step.config.max_new_tokens})."
    )
    yield [
        f"token ~ softmax(logits / temperature), temperature = {step.config.temperature:g}",
        f"response_ids, mask {shape(step.rollouts.mask)}: 2 problems, {G} responses, T = {T} tokens",
    ]
    yield response_lines(step, step.rollouts)


def response_lines(step, rollouts):
    """The responses to the followed problem, numbered, with their lengths."""
    lines = ["   tokens  response"]
    lengths = rollouts.mask[FOLLOWED].sum(-1).tolist()
    for number, (text, length) in enumerate(zip(rollouts.texts[FOLLOWED], lengths), start=1):
        cut = " cut" if length >= step.config.max_new_tokens else ""
        lines += labelled(f"{number:<3}{f'{length}{cut}':<7} ", text.strip() or "(empty)")
    return lines


def rewards_part(step):
    c, scores = step.config, step.scores
    yield (
        "A *reward* is a number that a rule gives to a response; no second model judges. The floor "
        "of the bonus keeps the policy from learning to skip the reasoning. If the shortest "
        "correct response is not longer than the floor, nobody in the group gets the bonus."
    )
    yield [
        "r = accuracy + format + bonus",
        "accuracy  1 if the answer matches the gold, else 0",
        "format    0.5 if the blocks stand as the system prompt asks, else 0",
        f"bonus     {c.bonus:g} to the shortest correct response, if longer than {c.min_length} tokens",
    ]
    lines = ["   accuracy  format  bonus  reward  why"]
    for i in range(len(step.advantages)):
        values = [scores[name][i].item() for name in ("accuracy", "format", "bonus", "reward")]
        columns = "{:<3}{:<10g}{:<8g}{:<7g}{:<8g}".format(i + 1, *values)
        reasons = [accuracy_reason(step, i), format_reason(step, i), bonus_reason(step, i)]
        lines += labelled(columns, "; ".join(filter(None, reasons)))
    yield lines


def accuracy_reason(step, i):
    answer = rewards.extract_answer(step.texts[i])
    if answer is None:
        return "no answer"
    return f"answer {answer.strip()[:60] or '(blank)'}, gold {step.problem['answer'][:60]}"


def format_reason(step, i):
    """What is wrong with the blocks of a response; empty if they stand as asked."""
    if step.scores["format"][i] > 0:
        return ""
    text = step.texts[i]
    names = ("observe", "think", "answer") if step.config.observe else ("think", "answer")
    tags = [f"<{slash}{name}>" for name in names for slash in ("", "/")]
    missing = [f"no {tag}" for tag in tags if tag not in text]
    repeated = [f"{text.count(tag)} x {tag}" for tag in tags if text.count(tag) > 1]
    return ", ".join(missing + repeated) or "blocks blank, out of order or with text between them"


def bonus_reason(step, i):
    """Why the shortest correct response has the bonus or not; empty for the others."""
    correct = [i for i, value in enumerate(step.scores["accuracy"].tolist()) if value == 1]
    if not correct or i != min(correct, key=lambda i: step.lengths[i]):
        return ""
    length, floor = step.lengths[i], step.config.min_length
    if length > floor:
        return f"shortest correct, and {length} tokens are more than {floor}"
    return f"shortest correct, but {length} tokens are not more than {floor}"


def advantages_part(step):
    scores, sigma = step.scores, step.config.sigma
    solved, G = int((scores["accuracy"] == 1).sum()), len(step.advantages)
    reward = scores["reward"].tolist()
    mean, std = statistics.mean(reward), statistics.stdev(reward)
    weight = scores["weight"].item()
    p = solved / G
    yield (
        "The responses of one group are compared with each other: that is the idea of GRPO, group "
        "relative policy optimisation. The *advantage* says how much better a response is than its "
        "siblings. The dynamic weight lets half-solved groups count most; groups that are all "
        "right or all wrong weigh 0."
    )
    equation = "1 (--dynamic_weight false)"
    if step.config.dynamic_weight:
        equation = f"4 sigma p (1 - p) = 4 * {sigma:g} * {p:g} * {1 - p:g} = {weight:.4f}"
    yield [
        f"share solved  p = {solved} / {G} = {p:g}",
        f"weight        w = {equation}",
        f"rewards       mean = {mean:.4f}, std = {std:.4f} (with n - 1)",
        "advantage     A = w (r - mean) / (std + 0.000001)",
    ]
    values = zip(reward, step.advantages.tolist())
    yield [f"{i}  r = {r:<4.3g}  A = {a:+.4f}" for i, (r, a) in enumerate(values, start=1)]


def packed_part(step):
    yield (
        "The update needs the probability of each response token. The prompt and its pictures are "
        "the same for the whole group, so they stand in the row once, and the responses follow end "
        "to end. A token sees the prompt and its own response so far, nothing else."
    )
    row, predecessors = step.trace.calls["pack_group"][-1].result
    visible = row["attention_mask"][0, 0].bool().cpu()  # [query,key]
    responses = step.trace.calls["pack_group"][-1].arguments["mask"].sum(-1).tolist()
    sizes = [len(visible) - len(predecessors), *responses]
    names = ["prompt", *(f"resp. {i}" for i in range(1, len(sizes)))]
    lines = [" " * 12 + " ".join(f"{name:<8}" for name in names)]
    for name, queries in zip(names, visible.split(sizes)):
        cells = [block_picture(block) for block in queries.split(sizes, dim=1)]
        lines.append(f"{name:<12}" + " ".join(f"{cell:<8}" for cell in cells))
    parts = " + ".join(map(str, sizes))
    yield [
        f"input_ids {shape(row['input_ids'])}: {parts} tokens",
        f"mask {shape(visible)}: which token (row) sees which (column)",
        "all: every token there; so far: itself and those before it; . : nothing",
    ]
    yield [line.rstrip() for line in lines]


def block_picture(block):
    """What the tokens of one block see of those of another, in a word."""
    if not block.any():
        return "."
    if block.shape[0] == block.shape[1] and block.equal(torch.ones_like(block).tril()):
        return "so far"
    return "all" if block.all() else "some"


def by_hand(inputs):
    """GRPO of each token in Python's own numbers (64 bits): a list of tokens for each response."""
    clip, beta = inputs["clip_range"], inputs["kl_coef"]
    group = []
    for i, advantage in enumerate(inputs["advantages"]):
        tokens = []
        for t in range(sum(inputs["mask"][i])):
            new, old = inputs["log_probs"][i][t], inputs["old_log_probs"][i][t]
            reference = inputs["ref_log_probs"][i][t] if inputs["ref_log_probs"] else None
            ratio = math.exp(new - old)
            clipped = min(max(ratio, 1 - clip), 1 + clip)
            objective = min(ratio * advantage, clipped * advantage)
            q = 0 if reference is None else reference - new
            kl = math.exp(q) - q - 1
            token = {"response": i, "place": t, "old": old, "new": new, "reference": reference}
            token |= {"A": advantage, "ratio": ratio, "clipped": clipped, "objective": objective}
            token |= {"kl": kl, "cost": beta * kl - objective}
            tokens.append(token)
        group.append(tokens)
    return group


def is_clipped(token):
    return token["objective"] < token["ratio"] * token["A"]


def three_tokens(group):
    """A clipped token, if there is one, and those that moved most in good and in bad responses."""
    tokens = sorted(itertools.chain(*group), key=lambda token: -abs(token["ratio"] - 1))
    chosen = [token for token in tokens if is_clipped(token)][:1]
    for sign in (1, -1):
        chosen += [token for token in tokens if sign * token["A"] > 0 and token not in chosen][:1]
    chosen += [token for token in tokens if token not in chosen]
    return sorted(chosen[:3], key=lambda token: (token["response"], token["place"]))


def token_name(step, token):
    """Response, place and text of a token, in a column."""
    i, t = token["response"], token["place"]
    text = step.processor.tokenizer.decode([step.rollouts.response_ids[FOLLOWED, i, t]])
    return f"{i + 1:<6}{t + 1:<7}{plain(repr(text))[:17]:<18}"


def log_probs_part(step):
    inputs, _ = step.loss_call()
    yield (
        "Three models give the same tokens a log-probability: *old* is the policy that sampled "
        "them, *new* is the policy now, after the optimiser step on the other problem of this "
        "rollout, and the *reference* is the model before training. In the first rollout of a run "
        "old and reference are the same model."
    )
    if len(step.trace.calls["scale_and_step"]) == 1:
        yield "The other problem taught nothing here, so new is still old and every ratio is 1."
    yield [
        "log p(token) = z[token] - log sum exp z, z = logits / temperature",
        f"old, new, reference: each {shape(step.rollouts.mask[FOLLOWED])}, responses by tokens",
    ]
    lines = ["resp. token  text              log p old  log p new  reference"]
    for token in three_tokens(by_hand(inputs)):
        numbers = [token[name] for name in ("old", "new", "reference")]
        columns = ["none" if value is None else f"{value:.5f}" for value in numbers]
        lines.append(token_name(step, token) + "".join(f"{column:>9}  " for column in columns))
    yield [line.rstrip() for line in lines]


def ratio_part(step):
    inputs, _ = step.loss_call()
    group = by_hand(inputs)
    tokens, clip = three_tokens(group), inputs["clip_range"]
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
    ]
    lines = ["resp. token  text              ratio    clip(ratio)  A        objective  KL"]
    for token in tokens:
        mark = "  clipped" if is_clipped(token) else ""
        lines.append(
            f"{token_name(step, token)}{token['ratio']:<9.5f}{token['clipped']:<13.5f}"
            f"{token['A']:<+9.4f}{token['objective']:<+11.5f}{token['kl']:.6f}{mark}"
        )
    count = sum(is_clipped(token) for tokens in group for token in tokens)
    yield [*lines, f"clipped in this group: {count} of {sum(map(len, group))} tokens"]
    if not count:
        yield made_up_token(clip)


def made_up_token(clip):
    """One clipped token as `grpo_loss` sees it, for a step that has none."""
    log_prob = torch.tensor([[math.log(1.5)]], requires_grad=True)
    one = torch.ones(1, 1)
    loss, _ = observe_r1.grpo_loss(log_prob, 0 * one, None, one[0], one, clip)
    loss.backward()
    return [
        "no token of this step is clipped; a made-up one with ratio 1.5 and A = 1:",
        f"grpo_loss gives it the objective {-loss.item():g} and the gradient {log_prob.grad.item():g}",
    ]


def loss_part(step):
    inputs, loss = step.loss_call()
    beta, count = inputs["kl_coef"], inputs["num_responses"]
    yield (
        "What a response costs is a mean over its own tokens, so that long responses count no more "
        "than short ones. The loss is the mean over the responses of the optimiser step."
    )
    yield [
        f"cost = mean over tokens of ({beta:g} KL - objective)",
        f"L    = sum of costs / {count}",
    ]
    total = 0.0
    lines = ["   tokens  A        mean objective  mean KL    cost"]
    for number, tokens in enumerate(by_hand(inputs), start=1):
        means = [statistics.mean(token[name] for token in tokens) for name in ("objective", "kl")]
        cost = statistics.mean(token["cost"] for token in tokens)
        total += cost
        columns = f"{number:<3}{len(tokens):<8}{tokens[0]['A']:<+9.4f}"
        lines.append(columns + f"{means[0]:<+16.5f}{means[1]:<11.6f}{cost:+.5f}")
    yield lines
    calls = step.trace.calls["scale_and_step"]
    norm, limit = calls[-1].result, step.config.max_grad_norm
    scaled = f"longer than {limit:g}: scaled down to it" if norm > limit else f"at most {limit:g}"
    yield [
        f"L by hand        {total / count:+.6f}",
        f"L by grpo_loss   {loss:+.6f}",
        f"gradient norm    {norm:.4f}, {scaled}",
        f"optimiser steps  {len(calls)}, then the next rollout",
    ]
    yield (
        "Near its start the loss is about 0 whatever the policy has learnt: ratios are near 1 and "
        "advantages sum to 0. What teaches is its gradient."
    )


def after_part(step):
    G = len(step.advantages)
    yield (
        "The same problem, sampled again by the updated policy with the same random numbers. One "
        "step on two problems changes little and can go wrong; training takes many."
    )
    lines = []
    for when, scores in (("before", step.scores), ("after", step.after_scores)):
        right = int((scores["accuracy"] == 1).sum())
        lines.append(f"{when:<7} {right} of {G} right, mean reward {scores['reward'].mean():.4f}")
    yield lines
    yield response_lines(step, step.after)


PARTS = {
    "The problem": problem_part,
    "The prompt": prompt_part,
    "The rollout": rollout_part,
    "Rewards": rewards_part,
    "Weight and advantages": advantages_part,
    "The packed row": packed_part,
    "Log-probabilities": log_probs_part,
    "Ratio, clipping, KL": ratio_part,
    "The loss and its gradient": loss_part,
    "After the step": after_part,
}


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
    for number, (title, part) in enumerate(PARTS.items(), start=1):
        lines += ["", f"{number}  {title}", ""]
        for block in blocks_of(step, part):
            if isinstance(block, str):
                lines += [f"   {line}" for line in textwrap.wrap(block, WIDTH)]
            else:
                lines += [f"     {line}" for line in block]
    return "\n".join(lines)


HEADLINE = """One training step of Observe-R1, computed by observe_r1.py with seed {c.seed}:
2 problems, {c.num_generations} responses to each, then an optimiser step for each problem.
Below is the second problem. A real run takes more problems at a time and warms up."""


# ------------------------------------------------------------------------------------- the page


def describe(value, depth=0):
    """A value as a little HTML: shape and first numbers, pictures as pictures."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        value = torch.from_numpy(value)
    if isinstance(value, torch.Tensor):
        numbers = value.detach().flatten()[:MOST].tolist()
        more = " …" if value.numel() > MOST else ""
        dims = f"<i>{shape(value)}</i> " if value.dim() else ""
        return dims + " ".join(map(short, numbers)) + more
    if isinstance(value, Image.Image):
        return f'<img alt="{value.width} x {value.height}" src="{observe_r1.data_uri(value)}">'
    if isinstance(value, (torch.device, Path)):
        value = str(value)
    if value is None or isinstance(value, (str, int, float, range, slice)):
        return short(value)
    if dataclasses.is_dataclass(value):
        fields = {one.name: getattr(value, one.name) for one in dataclasses.fields(value)}
        return f"<i>{type(value).__name__}</i>" + entries(fields, depth)
    if hasattr(value, "items"):
        return f"<i>{len(value)} entries</i>" + entries(dict(value), depth)
    if isinstance(value, (list, tuple, set)):
        return list_html(list(value), depth)
    return f"<i>{report.escape(type(value).__name__)}</i>"


def short(value):
    if isinstance(value, float):
        return f"{value:.4g}"
    text = repr(value)
    return report.escape(text if len(text) <= 160 else text[:160] + " …")


def list_html(values, depth):
    if all(value is None or isinstance(value, (bool, int, float)) for value in values):
        more = " …" if len(values) > MOST else ""
        return f"<i>{len(values)}</i> [" + ", ".join(map(short, values[:MOST])) + more + "]"
    if depth > 1:
        return f"<i>{len(values)} values</i>"
    first = f", the first: {describe(values[0], depth + 1)}" if len(values) > 1 else ""
    return f"<i>{len(values)}</i>{first or ': ' + describe(values[0], depth + 1)}"


def entries(fields, depth):
    """The entries of a dictionary or an object, folded if they are many."""
    if depth > 1:
        return ""
    lines = ""
    for name, value in fields.items():
        lines += f"<div>{report.escape(name)}: {describe(value, depth + 1)}</div>"
    if len(fields) <= 6:
        return lines
    return f"<details><summary>{', '.join(map(report.escape, list(fields)[:3]))} …</summary>{lines}</details>"


def values_html(call, line):
    """What the statement that begins on this line computed: once, or the first and last time."""
    is_loop = isinstance(call.function.statements.get(line), (ast.For, ast.With))
    shown = ""
    for label, (count, first, last) in call.notes.get(line, {}).items():
        times = f" <small>{count} times</small>" if count > 1 and not is_loop else ""
        values = first if first == last else f"{first}<div>last: {last}</div>"
        shown += f"<div><b>{report.escape(label)}</b>{times} {values}</div>"
    return shown


def function_html(call):
    """A function's source, beside each line its values; lines that did not run are pale."""
    function = call.function
    coloured = coloured_lines("\n".join(function.lines.values()))
    rows = []  # [code, values]: a line with values and those without any that follow it
    for number, code in zip(function.lines, coloured):
        statement = function.statements.get(number)
        ran = statement is None or statement.lineno in call.executed or is_docstring(statement)
        values = values_html(call, number)
        if values or not rows:
            rows.append(["", values])
        rows[-1][0] += f'<code class="{"ran" if ran else "idle"}">{code}\n</code>'
    body = ""
    for code, values in rows:
        body += f'<div class="line"><div>{code}</div><div class="values">{values}</div></div>\n'
    return f'<section id="{function.name}"><h3>{function.name}</h3>{body}</section>\n'


def coloured_lines(source):
    """Python source as lines of HTML."""
    lexer = pygments_module("pygments.lexers").PythonLexer(stripnl=False)
    formatter = pygments_module("pygments.formatters").HtmlFormatter(nowrap=True)
    return pygments_module("pygments").highlight(source, lexer, formatter).split("\n")


def pygments_module(name):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError("--html colours code by pygments: pip install pygments") from error


def is_docstring(statement):
    value = getattr(statement, "value", None)
    return isinstance(statement, ast.Expr) and isinstance(value, ast.Constant)


def part_html(step, title):
    """A part of the text for the page, or a mere heading."""
    if title not in PARTS:
        return f"<h2>{title}</h2>\n"
    number = list(PARTS).index(title) + 1
    page = f"<h2>{number} {title}</h2>\n"
    for block in blocks_of(step, PARTS[title]):
        if isinstance(block, str):
            page += "<p>" + re.sub(r"\*(\w+)\*", r"<b>\1</b>", report.escape(block)) + "</p>\n"
        else:
            page += "<pre>" + report.escape("\n".join(block)) + "</pre>\n"
    return page


def figure_html(name):
    """A committed figure, in the page itself."""
    file = HERE.parent / "toy" / "figures" / f"{name}.svg"
    if not file.exists():
        raise ValueError(f"{file} is missing: `python tools/figures.py {name}` draws it")
    svg = file.read_text(encoding="utf-8")
    return f"<figure>{svg}<figcaption>{CAPTIONS[name]}</figcaption></figure>\n"


BEFORE = {  # headings and parts of the text that stand before a function
    "mix_ladder": ("The order of the problems",),
    "train": ("The whole step, then what it calls",),
    "rollout": ("The prompt", "The rollout"),
    "score_rollouts": ("Rewards",),
    "dynamic_weight": ("Weight and advantages",),
    "pack_group": ("The packed row",),
    "token_log_probs": ("Log-probabilities",),
    "grpo_loss": ("Ratio, clipping, KL", "The loss and its gradient"),
}
BEHIND = {  # the figure that stands behind a function
    "mix_ladder": "ladder",
    "dynamic_weight": "weight",
    "group_advantages": "group",
    "pack_group": "mask",
    "grpo_loss": "clip",
}
CAPTIONS = {
    "ladder": "The ladder at the paper's level sizes: nine stages, each mostly of its own level.",
    "weight": "The weight of a group of eight. It is highest where half the responses are right.",
    "group": "Another group, from rewards to advantages.",
    "mask": "The mask of a short packed row: which token sees which.",
    "clip": "The objective of a token by its ratio, as grpo_loss computes it.",
    "accuracy": "What all the steps of the toy do: held-out accuracy while it trains.",
    "ablations": "The toy without one part of the method at a time.",
    "rollouts": "Responses of the toy to held-out problems, before training and after it.",
}
PAGE_STYLE = """
.line { display: grid; grid-template-columns: minmax(0, 62fr) minmax(0, 38fr); gap: 0 1.2em }
.line:hover { background: color-mix(in srgb, var(--blue) 9%, transparent) }
.line code, .values, pre { font: 12px/1.5 ui-monospace, Menlo, Consolas, monospace }
.line code { display: block; white-space: pre-wrap; min-height: 1.5em; background: none;
  padding-left: 2em; text-indent: -2em }
.values { color: var(--quiet); border-left: 2px solid var(--line); padding-left: .7em }
.values div div { padding-left: .8em } .values details { margin: 0 }
.values b { color: var(--ink) } .values i { color: var(--violet); font-style: normal }
.values img { image-rendering: pixelated; height: 42px; max-width: 100%; vertical-align: middle }
.idle { opacity: .45 }
section[id] { border: 1px solid var(--line); border-radius: 8px; padding: .8em 1em; margin: 1em 0 }
section[id] h3 { margin-bottom: .5em }
pre { overflow-x: auto; background: var(--card); padding: .7em 1em; border-radius: 8px }
figure { max-width: 720px; margin: 1em auto } nav { columns: 12em; font-size: 13px }
nav a { display: block; color: var(--blue) }
@media (max-width: 700px) {
  .line { grid-template-columns: 1fr } .values:empty { display: none }
  .values { margin: .1em 0 .5em 1.2em }
}
"""


def page_html(step):
    """The page: what the step was, then each function in the order of the first calls."""
    calls = step.trace.shown
    body = part_html(step, "The problem") + report.group_html(step.run, logged_group(step))
    for name, call in calls.items():
        body += "".join(part_html(step, title) for title in BEFORE.get(name, ()))
        body += function_html(call)
        body += figure_html(BEHIND[name]) if name in BEHIND else ""
    body += part_html(step, "After the step")
    body += "<h2>Many steps</h2>" + "".join(map(figure_html, ("accuracy", "rollouts", "ablations")))

    styles = pygments_module("pygments.formatters").HtmlFormatter
    dark = styles(style="github-dark").get_style_defs(".line code")
    colours = styles(style="default").get_style_defs(".line code")
    colours += "@media (prefers-color-scheme: dark) {" + dark + "}"
    links = "".join(f'<a href="#{name}">{name}</a>' for name in calls)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<title>Observe-R1: one training step</title>"
        f"<style>{report.STYLE}{report.dark_style()}{colours}{PAGE_STYLE}</style></head><body>"
        f"<h1>Observe-R1: one training step, line by line</h1><p>{HEADLINE.format(c=step.config)}</p>"
        f"<p>{LEGEND}</p><nav>{links}</nav>{body}</body></html>\n"
    )


LEGEND = (
    "The source is that of observe_r1.py and rewards.py. Beside each line stands what it set in "
    "this step: shape and first numbers. Of several calls the last one about this problem is "
    "shown, of several rounds of a loop the first and the last. Pale lines did not run."
)


def logged_group(step):
    """The group's line in rollouts.jsonl."""
    texts = step.texts
    for row in step.run.rollouts.rows:
        if [one["text"] for one in row["responses"]] == texts:
            return row
    raise ValueError("the step has not logged the group that is followed")


# ------------------------------------------------------------------------------- command line


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--problem", metavar="ID", help="id of the problem to follow")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the page as well")
    args, options = parser.parse_known_args()
    if not any(option.startswith("--config") for option in options):
        options += ["--config", str(observe_r1.TOY)]
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    try:
        if args.html:
            pygments_module("pygments")
        _, config = observe_r1.parse_arguments(["train", *options])
        step = take_step(config, args.problem, by_line=bool(args.html))
        print(text_of(step))
        if args.html:
            args.html.write_text(page_html(step), encoding="utf-8")
            print(f"\n{args.html}")
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(f"walkthrough: {error}")


if __name__ == "__main__":
    main()
