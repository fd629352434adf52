"""Tests of rewards.py: golden numbers by hand, the rules of the method, and safety."""

import ast
import doctest
import itertools
import json
import math
import random
import re
import sys
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest

import rewards
from rewards import (
    accuracy_reward,
    answers_match,
    bonus_rewards,
    dynamic_weight,
    extract_answer,
    format_reward,
)

HERE = Path(__file__).parent
GOOD = "<observe>a circle</observe>\n<think>half of 24</think> <answer>12</answer>"


def test_doctests():
    assert doctest.testmod(rewards).failed == 0


# ---------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize(
    "response, answer",
    [
        ("<answer>12</answer>", "12"),
        ("<answer>11</answer> no, <answer>12</answer>", "12"),
        ("<answer>11</answer> no, <answer>12", "11"),  # the last complete one
        ("<answer>13<answer>12</answer>13</answer>", "12"),
        ("<answer>13</answer> \\boxed{12}", "13"),
        ("<think><answer>12</answer></think><answer>13</answer>", "13"),
        ("<answer>12</answer><answer></answer>", ""),
        ("so <answer>12", None),  # cut
        (r"so <answer>\boxed{12}", "12"),
        (r"so \boxed{\frac{1}{2}} or \boxed{12}", "12"),
        (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"so \boxed{12", None),
        (r"<think>so \boxed{12}", None),  # a guess
        (r"<think>so \boxed{12}</think> hm", None),
        (r"so \boxed{12}</think> hm", None),  # the prompt opened the thought
        (r"\boxed{12} <think>\boxed{13}</think> <think>\boxed{14}", "12"),
        ("</answer>12<answer>", None),
        ("<ANSWER>12</ANSWER> the answer is 12}", None),
        ("", None),
    ],
)
def test_extract_answer(response, answer):
    assert extract_answer(response) == answer
    assert accuracy_reward(response, "12") == (answer == "12")


def pairs_by_heading():
    """{"a range: different": [(answer, gold), ...]} of tests/answer_pairs.txt."""
    sections = (HERE / "tests" / "answer_pairs.txt").read_text().split("\n# ")[1:]
    pairs = {}
    for section in sections:
        heading, *lines = section.strip().splitlines()
        pairs[heading] = [tuple(line.split(" ¦ ")) for line in lines]
    return pairs


PAIRS = pairs_by_heading()


@pytest.mark.parametrize("heading", PAIRS)
def test_pairs(heading):
    same = heading.endswith("same")
    assert [pair for pair in PAIRS[heading] if answers_match(*pair) != same] == []
    assert [gold for _, gold in PAIRS[heading] if same and not answers_match(gold, gold)] == []


def rows(*path):
    return [json.loads(line) for line in HERE.joinpath(*path).open()]


TOYS = rows("toy", "answers.jsonl")
FAULTS = rows("tests", "answer_faults.jsonl") + rows("tests", "answer_faults_3.jsonl")


@pytest.mark.parametrize("row", TOYS, ids=lambda row: f"{row['kind']}: {row['gold']}")
def test_pairs_as_they_occur_in_data(row):
    if not row.get("debatable"):
        assert accuracy_reward(row["response"], row["gold"]) == row["match"]
    assert format_reward(row["response"]) == 0.5 * row["format_ok"]


@pytest.mark.parametrize("row", FAULTS, ids=lambda row: f"{row['kind']}: {row['gold'][:20]}")
def test_faults_of_earlier_checkers(row):
    started = time.process_time()
    if "response" in row:
        assert accuracy_reward(row["response"], row["gold"]) == row["match"]
    else:
        assert answers_match(row["answer"], row["gold"]) is row["match"]
    assert time.process_time() - started < 0.05


def test_what_the_pairs_cannot_hold():
    assert not answers_match("", "") and not answers_match("5", "") and not answers_match("", "12")
    assert not answers_match("", "B. 12 cm")
    assert not answers_match("1+" * 300 + "1", "301")  # too long to be computed
    assert not answers_match("Word " * 90, "word " * 90)  # too long to be cleaned
    assert answers_match("B. " + "so " * 200, "B") and not answers_match("x " * 300 + "is B", "B")
    value = rewards._at(rewards._parse("x"))  # the value of x at the first point
    assert value is not None and not answers_match(f"({value})", "x")


# ------------------------------------------------------------------------------------ format

TAGS = ["<observe>", "</observe>", "<think>", "</think>", "<answer>", "</answer>"]


@pytest.mark.parametrize(
    "response, value",
    [
        (GOOD, 0.5),
        ("Sure!\n" + GOOD + "\nBye", 0.5),
        ("<think>look <observe>a circle</observe> half of 24</think><answer>12</answer>", 0.5),
        ("<think><observe>a circle</observe></think><answer>12</answer>", 0.0),  # no thought
        (GOOD + "</answer>", 0.0),
        ("<observe>a</observe> and <think>b</think><answer>c</answer>", 0.0),
        ("<think>b</think><answer>c</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_format(response, value):
    assert format_reward(response) == value


def slow_format(text, names):
    """The definition, one condition after the other."""
    tags = [tag for name in names for tag in (f"<{name}>", f"</{name}>")]
    if any(text.count(tag) != 1 for tag in tags):
        return 0.0
    at = {tag: text.index(tag) for tag in tags}

    def blank(start, end):
        """Whether nothing but white space stands between two tags, which come in this order."""
        return at[start] < at[end] and not text[at[start] + len(start) : at[end]].strip()

    def filled(start, end):
        inner = text[at[start] + len(start) : at[end]]
        return bool(inner.strip()) and not any(tag in inner for tag in tags)

    if not filled("<answer>", "</answer>") or not blank("</think>", "<answer>"):
        return 0.0
    if names[0] == "think":
        return 0.5 * filled("<think>", "</think>")
    if not filled("<observe>", "</observe>"):
        return 0.0
    if at["</observe>"] < at["<think>"]:
        return 0.5 * (filled("<think>", "</think>") and blank("</observe>", "<think>"))
    if not at["<think>"] < at["<observe>"] < at["</observe>"] < at["</think>"]:
        return 0.0
    return 0.0 if blank("<think>", "<observe>") and blank("</observe>", "</think>") else 0.5


@pytest.mark.parametrize("observe", [True, False])
def test_format_is_its_slow_definition_and_ignores_text_around_it(observe):
    rng = random.Random(1)
    names = ["observe", "think", "answer"][0 if observe else 1 :]
    tags = [tag for tag in TAGS if tag.strip("</>") in names]
    orders = [[0, 1, 2, 3, 4, 5], [2, 0, 1, 3, 4, 5]] if observe else [[0, 1, 2, 3]]
    rewarded = 0
    for _ in range(4000):
        picked = [tags[i] for i in rng.choice(orders)]
        if rng.random() < 0.4:
            i, j = rng.randrange(len(tags)), rng.randrange(len(tags))
            picked[i] = rng.choice([picked[j], "", "<x>", picked[i] * 2])
        if rng.random() < 0.2:
            rng.shuffle(picked)
        text = picked[0] + "".join(rng.choice(["", " \n", "x", "x y"]) + tag for tag in picked[1:])
        assert format_reward(text, observe) == slow_format(text, names), text
        assert format_reward(f"Hm. {text}\nDone.", observe) == format_reward(text, observe), text
        rewarded += format_reward(text, observe) > 0
    assert rewarded > 40


# -------------------------------------------------------------------------- bonus and weight


def test_bonus_is_its_slow_definition():
    assert bonus_rewards([True], [100]) == [0.0]  # as long as the floor, not longer
    assert bonus_rewards([True], [101]) == [0.2]
    rng = random.Random(2)
    for _ in range(2000):
        group = [(rng.random() < 0.5, rng.randint(0, 9)) for _ in range(rng.randint(1, 6))]
        floor, bonus = rng.randint(0, 9), rng.random()
        expected = []
        for i, (right, length) in enumerate(group):
            rivals = [(other, j) for j, (correct, other) in enumerate(group) if correct]
            wins = right and length > floor and all((length, i) <= rival for rival in rivals)
            expected.append(bonus if wins else 0.0)
        assert bonus_rewards(*zip(*group), floor, bonus) == expected


@pytest.mark.parametrize("size", range(1, 17))
def test_weights_of_every_group_of_any_size(size):
    for solved in range(size + 1):
        group = random.Random(solved).sample([True] * solved + [False] * (size - solved), size)
        for sigma in (Fraction(9, 5), Fraction(1, 3)):
            exact = 4 * sigma * solved * (size - solved) / size**2
            assert dynamic_weight(group, float(sigma)) == pytest.approx(float(exact), abs=1e-12)
        assert (dynamic_weight(group) == 0) == (solved in (0, size))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: dynamic_weight([]), "at least one response"),
        (lambda: bonus_rewards([], []), "at least one response"),
        (lambda: bonus_rewards([True], [1, 2]), "1 responses, but 2 lengths"),
        (lambda: bonus_rewards([True], [-1]), "negative: -1"),
    ],
)
def test_what_is_no_group_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------ for other people's code


def readme_block(sign):
    """The functions of the code block that holds `sign`, in the README or in that of tools/."""
    blocks = []
    for file in (HERE / "README.md", HERE / "tools" / "README.md"):
        text = file.read_text() if file.exists() else ""
        blocks += re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (block,) = {block for block in blocks if sign in block}
    scope = {}
    exec(block, scope)  # noqa: S102
    return scope


def test_adapter_for_trl():
    """Called as GRPOTrainer._calculate_rewards does: all by keyword, the columns, extras.

    Two neighbouring problems have the same words and other pictures: they are two groups.
    """
    reward = readme_block("def observe_r1_reward")["observe_r1_reward"]
    short, wrong = GOOD, GOOD.replace(">12<", ">13<")
    chat = [[{"role": "assistant", "content": short}]]
    call = {"answer": ["12"] * 16, "trainer_state": None, "log_metric": print}
    call["prompts"] = ["p"] * 8 + [[{"role": "user", "content": "p"}]] * 8
    call["completions"] = [short, short, wrong] + [short] * 5 + chat * 8
    call["completion_ids"] = [[0] * n for n in (300, 150, 120, *[200] * 5, 110, *[105] * 7)]
    rewards = reward(**call)
    assert rewards == pytest.approx([1.5, 1.7, 0.5] + [1.5] * 6 + [1.7] + [1.5] * 6)
    call["prompts"] = ["p"] * 16
    assert reward(**call) == rewards
    with pytest.raises(ValueError, match="5 responses are no groups of 8"):
        reward(**{**call, "prompts": ["p"] * 5})


def test_adapter_for_easyr1():
    score = readme_block("def compute_score")["compute_score"]
    rows = [
        {"response": GOOD, "response_length": 30, "ground_truth": "12"},
        {"response": "12", "response_length": 2, "ground_truth": "12"},
    ]
    assert score(rows) == [
        {"overall": 1.5, "accuracy": 1.0, "format": 0.5},
        {"overall": 0.0, "accuracy": 0.0, "format": 0.0},
    ]


def test_adapter_for_openrlhf():
    """Called as SingleTurnExecutor._fetch_rewards_via_func does; the prompt asks for the tags."""
    reward = readme_block("def reward_func")["reward_func"]
    asked = "<|im_start|>system\nUse <observe> </observe> <answer>5</answer><|im_end|>\n"
    for response, rewarded in ((GOOD, [1.5, 1.0, 0.5]), ("12", [0.0, 0.0, 0.0])):
        prompt = asked + "<|im_start|>user\n<|image_pad|>?<|im_end|>\n<|im_start|>assistant\n"
        query = prompt.replace("<|image_pad|>", "<|image_pad|>" * 9) + response + "<|im_end|>"
        result = reward([query], [prompt], ["12"])
        assert result["rewards"].tolist() == rewarded[:1] and result["scores"].item() == rewarded[1]
        assert result["extra_logs"]["format"].tolist() == rewarded[2:]


def test_math_verify_can_be_plugged_in(monkeypatch):
    """Whether or not it is installed: what it says decides the accuracy."""
    said = SimpleNamespace(parse=lambda text: text, verify=lambda gold, answer: (gold, answer))
    monkeypatch.setitem(sys.modules, "math_verify", said)
    monkeypatch.setattr(rewards, "answers_match", None)
    readme_block("import math_verify")
    assert rewards.answers_match("1", "2") == ("$2$", "$1$")
    said.verify = lambda gold, answer: answer == "$x$"
    assert accuracy_reward("<answer>x</answer>", "2") == 1.0
    assert accuracy_reward("<answer>2</answer>", "2") == 0.0


def needed(name, tree):
    """Names at the top of the module that a function needs, with what these need in turn."""
    places = {}
    for node in tree.body:
        names = [getattr(node, "name", None)]
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets]
        for each in names:
            places[each] = node
    found, queue = set(), [name]
    while queue:
        each = queue.pop()
        if each in places and each not in found:
            found.add(each)
            queue += [n.id for n in ast.walk(places[each]) if isinstance(n, ast.Name)]
    return found, [node for node in tree.body if node in [places[each] for each in found]]


PUBLIC = [
    "extract_answer",
    "answers_match",
    "accuracy_reward",
    "format_reward",
    "bonus_rewards",
    "dynamic_weight",
]


@pytest.mark.parametrize("name", PUBLIC)
def test_each_function_runs_when_pasted_alone(name):
    tree = ast.parse(Path(rewards.__file__).read_text())
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in imports}
    assert {module.split(".")[0] for module in modules} <= set(sys.stdlib_module_names)
    _, parts = needed(name, tree)
    scope = {"__name__": "pasted"}
    exec("\n\n".join(map(ast.unparse, imports + parts)), scope)  # noqa: S102
    runner, finder = doctest.DocTestRunner(), doctest.DocTestFinder(recurse=False)
    for test in finder.find(scope[name], name, globs=scope):
        assert test.examples
        assert runner.run(test).failed == 0


# ------------------------------------------------------------------ hostile input: values and time

PIECES = [
    *re.findall(
        r"\S+",
        r"""
    \boxed{ } \frac \frac{1} \sqrt \sqrt[3]{ \sqrt[0]{2} √ { \{ \{1, ( (( (1, ) [ ^ 9^ 9^9^9 9**9**9 1e999
    1e9 100! nan inf ∞-∞ 0/0 \frac{1}{0} ٣ ½ ² A A. A) (A) [A] B. A, AB x x+ -x- x_1 ab = x= a=b= <x 1<x,
    < , : 1: 1:2: 12:30 % 12% ° 12cm cm2 3hours 12 .5 .. . | |x| ± \pm1 - / 1/ 1 ' ! or, and, yes, ** * `
    ~ ∪ (1,2)∪ 16-20, \sin( sin \text{a} & \begin{pmatrix} \\ \left( \ log_2 \cup <answer> </answer>
    <answer>x <think> </think> <think>\boxed{1} <b> <b </b> is 's area= Abc: sqrt 选 和 个 度 平方 不是 10x
    word""",
    ),
    *[" ", "x ", "is ", "is a ", "are in ", "a = ", ": ", "\x00", "\u202e", "root 3 "],
]
PROSE = "so the smallest wedge drawn in the whole diagram represents about a third of it "
GOLDS = ["12", "B", "x+1", "B. 12 cm", "2:3", "x<1 or x>2"]


def seconds(text, repeats=2):
    """The shortest time of the processor for all golds, nothing remembered."""
    times = []
    for _ in range(repeats):
        for function in (rewards._parse, rewards._leaves, rewards._letter):
            function.cache_clear()
        started = time.process_time()
        format_reward(text)
        extract_answer(text)
        for gold in GOLDS:
            assert accuracy_reward(f"<answer>{text}</answer>", gold) in (0.0, 1.0)
        times.append(time.process_time() - started)
    return min(times)


@pytest.mark.parametrize("piece", [*PIECES, PROSE])
def test_time_is_bounded_and_linear(piece):
    """A released format regex takes over 20 s on 1.5 kB of repeated tags."""
    for text in ((piece * 400)[:400], "x is " + (piece * 400)[:390], ((piece + " ") * 400)[:400]):
        assert seconds(text) < 0.09  # six golds
    for size in (100, 10_000):  # a quadratic rule takes 16 times as long for four times the text
        times = [seconds((piece * n)[:n]) for n in (size, 4 * size)]
        assert times[1] < 10 * times[0] + 0.015, times


def test_nothing_that_a_policy_writes_raises():
    rng = random.Random(0)
    times = []
    for _ in range(2400):
        answer = "".join(rng.choices(PIECES, k=rng.randint(1, 14)))
        gold = "".join(rng.choices(PIECES, k=rng.randint(1, 5)))
        started = time.process_time()
        assert answers_match(answer, gold) in (True, False)
        assert accuracy_reward(answer, gold) in (0.0, 1.0)
        times.append(time.process_time() - started)
    assert max(times) < 0.05 and sorted(times)[1200] < 0.001
    for _ in range(80):
        text = " ".join(rng.choices(PROSE.split(), k=rng.randint(1, 60))) + rng.choice([".", "(1)"])
        assert not answers_match(text, "12") and answers_match(text, text)


def test_nothing_is_too_deep_for_a_caller_that_is_deep_itself():
    def deep(calls, text):
        return deep(calls - 1, text) if calls else answers_match(text, "12 x")

    for piece in ("%", "x", "(", "-", "\\frac", "sin ", "1+", "2^", "|", "a="):
        assert not deep(400, "5" + (piece * 390)[:390])


# ---------------------------------------------------------------------- expressions of known value


def random_tree(rng, depth):
    """(value, LaTeX, plain): the value is computed here, as the text is put together."""
    kind = rng.choice("nnnnnfdmpi" if depth == 0 else "+-*/^rnfs+-*/")
    n, d = rng.randint(1, 40), rng.randint(2, 12)
    if depth == 0 or kind in "nf":
        return {
            "n": (Fraction(n), f"{n}", f"{n}.0"),
            "f": (Fraction(n, d), rf"\dfrac{{{n}}}{{{d}}}", f"({n}/{d})"),
            "d": (Fraction(n, 100), f".{n:02}", f"0.{n:02}0"),
            "m": (n + Fraction(1, d), rf"{n}\frac{{1}}{{{d}}}", f"({n} 1/{d})"),
            "p": (n * math.pi, rf"{n}\pi", f"({n}*pi)"),
            "i": (Fraction(-n), f"({-n})", f"(−{n})"),
        }[kind]
    value, latex, plain = random_tree(rng, depth - 1)
    if kind == "^":
        return value**2, rf"\left({latex}\right)^{{2}}", f"({plain})²"
    if kind == "r":
        return math.sqrt(abs(value)), rf"\sqrt{{|{latex}|}}", f"sqrt(|{plain}|)"
    if kind == "s":
        return math.sin(value), rf"\sin({latex})", f"sin({plain})"
    other, latex_b, plain_b = random_tree(rng, depth - 1)
    if kind == "/" and other:
        return value / other, rf"\frac{{{latex}}}{{{latex_b}}}", f"({plain})/({plain_b})"
    if kind == "*":
        return value * other, rf"({latex})({latex_b})", f"({plain})×({plain_b})"
    if kind == "-":
        return value - other, rf"({latex}-({latex_b}))", f"(({plain}) − ({plain_b}))"
    return value + other, rf"({latex}+{latex_b})", f"({plain_b} + {plain})"


@pytest.mark.parametrize("seed", range(4))
def test_values_are_those_of_fractions_and_math(seed):
    rng = random.Random(seed)
    for _ in range(120):
        value, latex, plain = random_tree(rng, rng.randrange(4))
        if not 1e-3 < abs(value) < 1e9:
            continue
        gold = str(value) if isinstance(value, Fraction) else f"{value:.6f}"
        for right in (latex, plain, f"The area is ${latex}$ square units.", f"Area = {plain}"):
            assert answers_match(right, gold), (right, gold)
        assert answers_match(latex, plain) and answers_match(plain, latex), (latex, plain)
        for wrong in (f"{latex}+1", f"2({latex})", f"-({latex})", rf"\frac{{{latex}}}{{3}}"):
            assert not answers_match(wrong, gold), (wrong, gold)
            assert not answers_match(gold, wrong) and not answers_match(wrong, plain), wrong
        assert not answers_match(f"The area is not {plain}", gold)
        assert not answers_match(f"The area is {plain} or 7", gold)


def test_polynomials():
    rng = random.Random(5)
    for _ in range(80):
        x, y = rng.sample("abcdkpqtuvwxz", 2)
        a, b, c = (rng.randint(2, 9) for _ in range(3))
        factored = f"({a}{x}+{b})({x}-{c}{y})"
        expanded = rf"{a}{x}^2 - {a * c}{x}{y} + {b}{x} - {b * c}{y}"
        other = expanded.replace(f"- {b * c}{y}", f"+ {b * c}{y}")
        assert answers_match(factored, expanded) and answers_match(expanded, factored)
        assert not answers_match(other, expanded) and not answers_match(expanded, other)
        swapped = expanded.translate(str.maketrans(x + y, y + x))
        assert not answers_match(swapped, expanded), swapped
        assert answers_match(f"{factored}=0", f"3({expanded})=0")
        assert not answers_match(f"{factored}=0", f"{other}=0")
        assert not answers_match(f"{factored}-({expanded})=0", f"{expanded}=0")  # an identity


def test_lists_ratios_and_options_of_known_values():
    rng = random.Random(6)
    for _ in range(80):
        numbers = rng.sample(range(-30, 60), rng.randint(2, 6))
        shuffled = rng.sample(numbers, len(numbers))
        written = [rng.choice([f"{n}", f"{n}.0", rf"\frac{{{2 * n}}}{{2}}"]) for n in numbers]
        bare, plain = ", ".join(written), ",".join(map(str, shuffled))
        assert answers_match(bare, plain) and answers_match(rf"\{{{bare}\}}", f"{{{plain}}}")
        assert answers_match(f"({bare})", f"({plain})") == (numbers == shuffled)
        assert not answers_match(", ".join(written[1:]), plain)
        assert not answers_match(f"{bare}, 61", plain)
        positive = [abs(n) + 25 for n in numbers]  # 25 is no hour
        tripled = ":".join(str(3 * n) for n in positive)
        assert answers_match(tripled, ":".join(map(str, positive)))
        assert not answers_match(tripled + "1", ":".join(map(str, positive)))
        letters = sorted(rng.sample("ABCDEFGH", rng.randint(2, 5)))
        mixed = rng.sample(letters, len(letters))
        for answer in (", ".join(mixed), " and ".join(mixed), f"({'), ('.join(mixed)})"):
            assert answers_match(answer, "".join(letters)), (answer, letters)
        assert not answers_match(", ".join(mixed[1:]), "".join(letters))


# ------------------------------------------------------------------------------------- mutations


def test_a_readable_gold_matches_itself_and_white_space_does_not_count():
    """Of each answer some with one character dropped, doubled or put in."""
    rng = random.Random(8)
    for answer, gold in itertools.chain(*PAIRS.values()):
        i = rng.randrange(len(answer) + 1)
        put_in = rng.choice("0123456789+-*/^(){}[]|\\,.:;=<> $%°ABxy")
        for middle in ("", answer[i : i + 1] * 2, put_in):
            mutated = answer[:i] + middle + answer[i + 1 :]
            assert answers_match(mutated, gold) in (True, False)
            assert answers_match(mutated, mutated) == answers_match(f" {mutated} ", mutated)
        readable = re.search(r"\w|∅|∞", gold) and gold != "N/A"
        assert answers_match(gold, gold) == bool(readable), gold


def test_numbers_match_themselves_alone_and_in_both_directions():
    rng = random.Random(9)
    texts = []
    for _ in range(600):
        a, b, c = (rng.randint(1, 99) for _ in range(3))
        forms = (
            f"{a} -{a} {a}.{b} {a}/{b} {a}% {a},{b:03} ({a}+{b})*{c} {a}e{b % 9} {a}^{{{b % 5}}}"
        )
        texts.append(rng.choice([*forms.split(), rf"{a}\sqrt{{{b}}}", f"{a} {b}/{b + c}"]))
    for text, other in itertools.pairwise(texts):
        assert answers_match(text, text) and not answers_match(text, f"({text})+1")
        assert answers_match(text, other) == answers_match(other, text), (text, other)
        i = rng.choice([i for i, c in enumerate(text) if c.isdigit() and c != "0"])
        changed = text[:i] + str(int(text[i]) % 9 + 1) + text[i + 1 :]
        if not {"^", "e"} & {*text}:
            assert not answers_match(changed, text), (changed, text)
