"""Tests of rewards.py: golden numbers by hand, the rules of the method, and safety."""

import ast
import doctest
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
        ("so <answer>12", None),  # cut
        ("<answer>12</answer></answer>", "12"),
        (r"so \boxed{\frac{1}{2}} or \boxed{12}", "12"),
        (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"so \boxed{12", None),
        ("</answer>12<answer>", None),
        ("the answer is 12", None),
        ("", None),
    ],
)
def test_extract_answer(response, answer):
    assert extract_answer(response) == answer


@pytest.mark.parametrize(
    "prediction, gold, same",
    [
        # what the released code gets wrong
        ("whatever", "Yes", False),
        ("yes", "Yes", True),
        ("whatever", "(1,2)", False),
        ("(1, 2)", "(1,2)", True),
        ("whatever", "blue", False),
        ("Blue", "blue", True),
        ("Odd", "D", False),
        ("B. 12 cm", "B", True),
        ("B", "D", False),
        ("", "", False),
        ("5", "", False),
        ("12", "N/A", False),
        ("N/A", "N/A", False),
        # numbers
        ("12.0", "12", True),
        ("1,345", "1345", True),
        ("1/2", "0.5", True),
        (r"\frac{1}{2}", "0.5", True),
        ("3 4", "12", False),
        ("11/2", "1 1/2", False),
        ("3/2", "1 1/2", True),
        ("-12", "12", False),
        ("3.14", r"\pi", True),
        ("3.15", "3.14", False),
        ("0.3", "1/3", False),
        ("A, B", "B", False),
        ("(b)", "B", True),
        ("(A) or (C)", "C", False),
    ],
)
def test_answers_match(prediction, gold, same):
    assert answers_match(prediction, gold) is same


SAME = [
    ("12 square centimeters", "12 cm^2"),
    ("x=2,y=3", "(2,3)"),
    ("x = -3 or x = 3", "3,-3"),
    ("2(x+1)", "2x+2"),
    ("\\frac{\\sqrt{3}}{2}", "sqrt(3)/2"),
    ("(x+1)^2", "x^2+2x+1"),
    ("-x", "x*(-1)"),
    ("10^{3}", "1000"),
    ("2^10", "1024"),
    ("5 cm", "5cm"),
    ("5cm", "5"),
    ("$5", "5"),
    ("5%", "0.05"),
    ("1.50", "3/2"),
    ("three", "3"),
    ("A", "(A)"),
    ("(D)", "D"),
    ("Option C", "C"),
    ("Answer: B", "B"),
    ("B: 12", "B"),
    ("-1/2", "-0.5"),
    ("1 1/2", "1.5"),
    ("1\\frac{1}{2}", "3/2"),
    ("\\frac12", "1/2"),
    ("2:3", "2 : 3"),
    ("x>=5", "x \\ge 5"),
    ("1<x<3", "3>x>1"),
    ("{1,2,3}", "{3,2,1}"),
    ("\\{x | x > 0\\}", "\\{x | x > 0\\}"),
    ("(-∞, 3]", "(-\\infty,3]"),
    ("45°", "45"),
    ("45^{\\circ}", "45°"),
    ("3.0 m/s", "3 m/s"),
    ("The answer is $\\frac{3}{4}$.", "0.75"),
    ("2.0", "2"),
    ("100,000", "100000"),
    ("2\\pi", "6.28"),
    ("3/4 cup", "3/4"),
    ("y = 2x + 1", "y=2x+1"),
    ("y=2x+1", "2x - y + 1 = 0"),
    ("isosceles", "Isosceles."),
    ("\\text{Yes}", "yes"),
    ("No, it is not", "No"),
    ("triangle ABC", "Triangle ABC"),
    ("50\\%", "50%"),
    ("x^2-1", "(x-1)(x+1)"),
    ("(2, 3)", "\\left(2,3\\right)"),
    ("2 and 3", "3, 2"),
    ("5 hours 30", "5 hours 30"),
    ("12 apples", "12"),
    ("\\sqrt{2}/2", "\\frac{1}{\\sqrt{2}}"),
    ("0", "0"),
    ("-3", "−3"),
    ("1e3", "1000"),
    ("6\\sqrt{2}\\text{ cm}", "6\\sqrt{2}"),
    ("30 degrees", "30^\\circ"),
    ("\\frac{5}{6} \\pi", "5π/6"),
    ("a", "a"),
    ("AC", "AC"),
    ("3x", "3*x"),
    ("log_2 8", "log_2 8"),
    ("90°", r"\frac{\pi}{2}"),
    (r"\tan 45^\circ", "1"),
    ("3, 2, 2", "2, 3, 2"),
    (r"\sin(30°)", "0.5"),
    (r"\cos(\frac{\pi}{3})", "0.5"),
]
DIFFERENT = [
    ("2,3", "(3,2)"),
    ("12 cm", "12 m"),
    ("1/3", "1/2"),
    ("0.33", "1/3"),
    ("A", "B"),
    ("A and B", "A"),
    ("A or B", "B"),
    ("-5", "5"),
    ("x+1", "x-1"),
    ("2x", "x^2"),
    ("yes", "no"),
    ("not yes", "yes"),
    ("(1,2]", "[1,2]"),
    ("x<5", "x>5"),
    ("1.5", "15"),
    ("3 or 4", "3"),
    ("between 3 and 5", "3"),
    ("at least 5", "5"),
    ("5 or more", "5"),
    ("3.141", "3.142"),
    ("12", "12x"),
    ("abc", "acb"),
    ("north", "south"),
    ("AB", "BA"),
    ("4", "D"),
    ("D", "4"),
    ("I", "1"),
    ("The", "T"),
    ("", "12"),
    ("12 or 13", "12"),
    ("2^3", "2*3"),
    ("5", "5,6"),
    ("√2", "2"),
    ("10:30", "10:03"),
    ("x=3", "x=4"),
    ("x=y", "y=x+1"),
    ("5 km", "5 m"),
    ("50", "50.5"),
    ("undefined", "0"),
    ("10 m", "10 m/s"),
    ("60", "60.1"),
    ("1/0", "1/0x"),
    ("100", "1e3"),
    ("12.01", "12"),
    ("2.01", "2"),
    ("17/12", r"\sqrt{2}"),
    ("2, 2, 3", "2, 3, 3"),
    ("{1, 1, 2}", "{1, 2, 2}"),
    ("{,}", "{1,}"),
    ("?", "?"),
    ("-", "-"),
    ("A. 5 or C. 6", "A"),
    ("A. 5 or C. 6", "C"),
    ("90°", r"\pi"),
    ("1+" * 300 + "1", "301"),  # too long to be computed
]


@pytest.mark.parametrize("prediction, gold", SAME)
def test_equal_answers(prediction, gold):
    assert answers_match(prediction, gold) and answers_match(gold, gold)


@pytest.mark.parametrize("prediction, gold", DIFFERENT)
def test_different_answers(prediction, gold):
    assert not answers_match(prediction, gold)


def test_equal_at_one_point_is_not_equal():
    """The value that x takes at the first point is a number; no number is x."""
    value = rewards._at(rewards._parse("x"))
    assert value is not None and not answers_match(f"({value})", "x")


def test_accuracy_needs_an_answer_and_does_not_look_elsewhere():
    assert accuracy_reward(GOOD, "12") == 1.0
    assert accuracy_reward("the answer is 12", "12") == 0.0
    assert accuracy_reward("<think>12</think><answer>13</answer>", "12") == 0.0


# ------------------------------------------------------------------------------------ format


@pytest.mark.parametrize(
    "response, value",
    [
        (GOOD, 0.5),
        ("Sure!\n" + GOOD + "\nBye", 0.5),
        ("<think>look <observe>a circle</observe> half of 24</think><answer>12</answer>", 0.5),
        (
            "<think><observe>a circle</observe></think><answer>12</answer>",
            0.0,
        ),  # no thought of its own
        (GOOD + GOOD, 0.0),
        (GOOD + "</answer>", 0.0),
        ("<think>a</think>" + GOOD, 0.0),
        ("<observe> </observe><think>b</think><answer>c</answer>", 0.0),
        ("<observe>a</observe><think>\n</think><answer>c</answer>", 0.0),
        ("<observe>a</observe><think>b</think><answer></answer>", 0.0),
        ("<observe>a</observe> and <think>b</think><answer>c</answer>", 0.0),
        ("<observe>a</observe><think>b</think> and <answer>c</answer>", 0.0),
        ("<observe>a<think>b</observe>c</think><answer>d</answer>", 0.0),
        ("<think>b</think><observe>a</observe><answer>c</answer>", 0.0),
        ("<answer>c</answer><observe>a</observe><think>b</think>", 0.0),
        ("<observe>a</observe><answer>c</answer><think>b</think>", 0.0),
        ("</observe>a<observe><think>b</think><answer>c</answer>", 0.0),
        ("<think>a <observe>b</observe> c</think> so <answer>d</answer>", 0.0),
        ("<think>b</think><answer>c</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_format(response, value):
    assert format_reward(response) == value


def test_format_of_the_ablation_asks_for_think_and_answer_alone():
    assert format_reward("<think>b</think> <answer>c</answer>", observe=False) == 0.5
    assert format_reward("<answer>c</answer><think>b</think>", observe=False) == 0.0
    assert format_reward("<answer>c</answer>", observe=False) == 0.0


PIECES = [
    "<observe>",
    "</observe>",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    r"\boxed{",
    "}",
    r"\frac",
    r"\sqrt",
    "{",
    "(",
    ")",
    "[",
    "^",
    "9**9**9",
    "1e999",
    "nan",
    "inf",
    "\x00",
    "٣",
    "½",
    "²",
    "A",
    "B.",
    "x",
    "=",
    "<",
    ",",
    ":",
    "%",
    "°",
    "12",
    ".",
    " ",
    "|",
    "±",
    "-",
    "/",
]


def test_nothing_a_policy_writes_raises():
    rng = random.Random(0)
    for _ in range(1000):
        text = "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 12)))
        gold = "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 6)))
        assert accuracy_reward(f"<answer>{text}</answer>", gold) in (0.0, 1.0)
        assert format_reward(text) in (0.0, 0.5)


# -------------------------------------------------------------------------- bonus and weight


@pytest.mark.parametrize(
    "correct, lengths, winner",
    [
        ([1, 1, 0, 0, 0, 0, 1, 0], [300, 200, 150, 120, 400, 500, 600, 700], 1),  # the golden case
        ([0] * 8, [200] * 8, None),  # the released code gives it to response 0
        ([1, 1, 1], [150, 90, 200], None),  # the shortest correct one is under the floor: nobody
        ([1, 1], [100, 300], None),  # longer than the floor, not as long
        ([1, 1], [101, 300], 0),
        ([1, 1, 1], [200, 150, 150], 1),  # ties go to the first
        ([0, 1], [110, 500], 1),
    ],
)
def test_bonus(correct, lengths, winner):
    expected = [0.2 if i == winner else 0.0 for i in range(len(correct))]
    assert bonus_rewards([bool(c) for c in correct], lengths) == expected


def test_weights_of_every_group_of_eight():
    weights = [dynamic_weight([True] * k + [False] * (8 - k)) for k in range(9)]
    assert weights == pytest.approx(
        [0, 0.7875, 1.35, 1.6875, 1.8, 1.6875, 1.35, 0.7875, 0], abs=1e-12
    )


def test_bad_groups_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        dynamic_weight([])
    for correct, lengths, message in (
        ([], [], "at least one"),
        ([True], [1, 2], "1 responses, but 2 lengths"),
        ([True], [-1], "negative"),
    ):
        with pytest.raises(ValueError, match=message):
            bonus_rewards(correct, lengths)


# ------------------------------------------------------------------------ for other people's code


PAIRS = [json.loads(line) for line in (HERE / "toy" / "answers.jsonl").open()]
FAULTS = [json.loads(line) for line in (HERE / "tests" / "answer_faults.jsonl").open()]
CASES_3 = [json.loads(line) for line in (HERE / "tests" / "answer_faults_3.jsonl").open()]


@pytest.mark.parametrize("row", CASES_3, ids=lambda row: f"{row['kind']}: {row['gold'][:20]}")
def test_cases_of_fourteen_kinds(row):
    response = row.get("response") or f"<answer>{row['answer']}</answer>"
    assert accuracy_reward(response, row["gold"]) == row["match"]


@pytest.mark.parametrize("row", PAIRS, ids=lambda row: f"{row['kind']}: {row['gold']}")
def test_pairs_as_they_occur_in_data(row):
    if not row.get("debatable"):
        assert accuracy_reward(row["response"], row["gold"]) == row["match"]
    assert format_reward(row["response"]) == 0.5 * row["format_ok"]


@pytest.mark.parametrize("row", FAULTS, ids=lambda row: f"{row['kind']}: {row['answer'][:20]}")
def test_faults_of_an_earlier_checker(row):
    started = time.process_time()
    assert answers_match(row["answer"], row["gold"]) is row["match"]
    assert time.process_time() - started < 0.05


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


# ------------------------------------------------------------------------------------- properties


def random_strings(count, seed=0):
    """What a policy may write: tags, LaTeX, digits of other scripts, control characters, powers."""
    rng = random.Random(seed)
    pieces = [
        *PIECES,
        "9^9^9",
        "100!",
        "1e99999",
        "\\frac{1}{0}",
        "\\sqrt[0]{2}",
        "∞-∞",
        "0/0",
        "\u202e",
    ]
    for _ in range(count):
        yield "".join(rng.choices(pieces, k=rng.randrange(1, 15)))


def test_values_and_time_on_thousands_of_strings():
    """0 or 1, never an exception, none over 50 ms; typically under 0.1 ms."""
    texts, times = list(random_strings(2400)), []
    for answer, gold in zip(texts, reversed(texts)):
        started = time.process_time()
        assert answers_match(answer, gold) in (True, False)
        times.append(time.process_time() - started)
        surrounded = format_reward("Sure: " + answer + " Bye")
        if not re.search("[<>]", answer):
            assert surrounded == format_reward(answer) == 0.0
    assert max(times) < 0.05 and sorted(times)[1200] < 0.0005


def test_format_does_not_depend_on_text_around_it():
    rng = random.Random(1)
    tags = ["<observe>", "</observe>", "<think>", "</think>", "<answer>", "</answer>"]
    for _ in range(3000):
        picked = tags if rng.random() < 0.5 else rng.choices(tags, k=6)
        text = "".join(tag + rng.choice(["", " ", "x"]) for tag in picked).rstrip("x ")
        assert format_reward(text) == format_reward("Hm. " + text + "\nDone.")


def readable_numbers(count):
    rng = random.Random(2)
    for _ in range(count):
        a, b, c = (rng.randint(1, 99) for _ in range(3))
        forms = [f"{a}", f"-{a}", f"{a}.{b}", f"{a}/{b}", rf"\frac{{{a}}}{{{b}}}", f"{a}%"]
        forms += [
            rf"{a}\sqrt{{{b}}}",
            rf"\frac{{{a}\pi}}{{{b}}}",
            f"{a},{b:03}",
            f"{a} {b}/{b + c}",
        ]
        yield rng.choice(forms + [f"{a}^{{{b % 5}}}", f"{a}e{b % 9}", f"({a}+{b})*{c}"]), a / b


def test_reflexive_and_symmetric_on_numbers():
    numbers = [text for text, _ in readable_numbers(600)]
    matches = 0
    for a, b in zip(numbers, numbers[1:] + numbers[:1]):
        assert answers_match(a, a)
        assert answers_match(a, b) == answers_match(b, a), (a, b)
        matches += answers_match(a, b)
    for text, _ in readable_numbers(200):
        assert not answers_match(text, f"({text})+1")


# ------------------------------------------------------------------------------------------- time


PROSE = re.findall(
    r"\S+", "so the smallest wedge drawn in the whole diagram represents about a third of it"
)
TOKENS = re.findall(
    r"\S+",
    r"""1 1, 1/ .5 12% 9^ x x+ -x- ab sin \sin( \frac \frac{1} \sqrt \sqrt[3]{ √ | |x| ( ) (( [ {
    \{ {1, (1, ± \pm1, = x= <x 1<x, : 1: ∪ (1,2)∪ 16-20, ° $ 12cm 3hours \text{a} \boxed{ &
    \begin{pmatrix} \\ ½ ² x_1 ' ! A. A) (A) or, and, yes, ** * ` \left( \ .. 1e9 log_2 \cup
    <answer> </think> word""",
)


def seconds(work, repeats=3):
    """The shortest time of the processor: other programs do not count."""
    times = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


def grade(text):
    rewards._parse.cache_clear()
    format_reward(text)
    for gold in ("12", "B", "yes", "x+1", "\\{1,2\\}"):
        assert accuracy_reward(f"<answer>{text}</answer>", gold) in (0.0, 1.0)


def grade_of(text):
    return lambda: grade(text)


@pytest.mark.parametrize("piece", [*TOKENS, " ".join(PROSE)])
def test_time_of_400_characters_and_of_100_kilobytes(piece):
    """Five golds each. A released format regex takes over 20 s on 1.5 kB of repeated tags."""
    for text in ((piece * 400)[:400], (piece + " ") * (400 // (len(piece) + 1))):
        assert seconds(grade_of(text)) < 0.1
    assert seconds(grade_of((piece * 100_000)[:100_000]), repeats=2) < 0.25


@pytest.mark.parametrize("piece", [*TOKENS, " ".join(PROSE)])
def test_doubling_the_input_doubles_the_time(piece):
    """Twice within what is computed, twice beyond it; a quadratic rule would take 16 times."""
    for size in (100, 50_000):
        times = [seconds(grade_of((piece * n)[:n]), 3) for n in (size, 4 * size)]
        assert times[1] < 10 * times[0] + 0.01, times


def test_prose_is_read_at_once():
    rng = random.Random(3)
    for _ in range(80):
        text = " ".join(rng.choices(PROSE, k=rng.randrange(1, 60))) + rng.choice(
            ["", ".", "(1)", "%."]
        )
        assert seconds(grade_of(text), 2) < 0.05
        assert not answers_match(text, "12") and answers_match(text, text)


# ---------------------------------------------------------------------------------------- attacks

ATTACKS = {
    "several answers": [
        ("12, 13", "12"),
        ("12 and 13", "12"),
        ("12 or 13", "12"),
        ("12; 13", "12"),
        ("12 13", "12"),
        (r"\boxed{12} \boxed{13}", "12"),
        (r"\boxed{12}\boxed{13}", "156"),
        ("x=12 or 13", "12"),
        ("3 or 4", "3"),
        ("12/13", "12"),
        ("12:13", "12"),
        ("12 = 13", "12"),
        ("x = 12 = 13", "12"),
        ("12 ≈ 13", "12"),
        ("12 ± 1", "12"),
        (r"\pm 12", "12"),
    ],
    "several letters": [
        ("A or B", "A"),
        ("A, B", "A"),
        ("A and B", "B"),
        ("A/B", "A"),
        ("AB", "A"),
        ("A. B.", "A"),
        ("(A)(B)", "A"),
        ("A. 5 or C. 6", "A"),
        ("A. first; B. second", "A"),
        ("(A) or B or C", "A"),
        ("A. or b.", "A"),
        ("B. No, C.", "B"),
        ("B, no wait, C", "B"),
        ("B or maybe C", "B"),
        ("not A", "A"),
        ("A is wrong", "A"),
    ],
    "both verdicts": [
        ("Yes, no", "Yes"),
        ("Yes, no", "no"),
        ("yes and no", "yes"),
        ("Yes or no", "no"),
        ("Yes, it is not", "Yes"),
        ("true, maybe", "true"),
        ("not true", "true"),
        ("true/false", "true"),
    ],
    "a hedge": [
        ("12 maybe 13", "12"),
        ("12 (or 13)", "12"),
        ("about 12 or 13", "12"),
        ("17 is wrong it is 19", "17"),
        ("not 5", "5"),
        ("5 not 6", "5"),
        ("at least 12", "12"),
        ("12...", "12"),
        ("12,...", "12"),
        ("12?13", "12"),
        ("12 of 13", "12"),
        ("12 out of 13", "12"),
    ],
    "a list where one is asked": [
        ("1,2,3", "2"),
        ("{1,2}", "2"),
        ("(1,2)", "1"),
        ("[12,13]", "12"),
        ("[1,2]", "1,2"),
        ("1,2", "[1,2)"),
        ("1,2,3,4,5", "1,2"),
        ("1,2", "1,2,3"),
    ],
    "a range": [
        ("16-20", "11-15"),
        ("16-20", "-4"),
        ("20-16", "4"),
        ("16-20", "16"),
        ("12 to 13", "12"),
        ("10-15", "10 to 14"),
        ("$5-$10", "$10-$15"),
        ("5%-10%", "-5%"),
        ("1990–1999", "1980–1989"),
    ],
    "an identity": [
        ("x=x", "5"),
        ("0=0", "5"),
        ("0=0", "x=5"),
        ("x=x", "x^2=4"),
        ("t-t=0", "3x+4y=20"),
        ("t-t=0", "x=0"),
        ("x+y=y+x", "x^2+y^2=49"),
        ("0x=0", "2x=0"),
        ("3=3", "4=4"),
        ("3<5", "2<4"),
        (r"\sin^2 x + \cos^2 x = 1", "x = 1"),
    ],
    "an infinity": [
        (r"\infty", "42"),
        (r"-\infty", r"\frac{3}{8}"),
        (r"\infty", r"-\infty"),
        (r"\infty", r"\infty+1"),
        ("1/0", "5"),
        ("1/0", r"\infty"),
        ("42", r"\infty"),
        ("0", r"\infty"),
        ("9^9^9^9", "5"),
        ("1e999", r"\infty"),
        ("1e400", "5"),
        ("nan", "5"),
        ("0/0", "0"),
    ],
    "numbers of the question": [
        ("The legs are 3 and 4, the sum is 7", "7"),
        ("AB = 5, BC = 12, AC = 13", "13"),
        ("3 4 5", "5"),
        ("3+4=7, 3*4=12", "12"),
        ("7 12 5", "7"),
    ],
    "coarser than the gold": [
        ("3.1", "3.14"),
        ("3", "3.14"),
        ("3.0", "3.14"),
        ("12.0", "12.04"),
        ("10.95", "10.9"),
        ("0.16", "0.160257708151404"),
        ("0.33", "1/3"),
        ("0.3", "1/3"),
        ("1.4", r"\sqrt{2}"),
        ("36.0", "36.04"),
        ("(36)(38)+1", "(36.0)(38.0)"),
    ],
    "letters that look alike": [
        ("А", "A"),
        ("В", "B"),
        ("Β", "B"),
        ("х", "x"),
        ("А. 12", "A"),
        ("A'", "A"),
        ("A1", "A"),
        ("l", "1"),
        ("O", "0"),
        ("١٢", "12"),
    ],
    "the rest of it is no unit": [
        ("12 is", "12"),
        ("12 percent", "12 cm"),
        (r"\pi r^2", r"\pi r^2 h"),
        ("2", "2 g h"),
        ("4", "4 a"),
        (r"\frac{1}{2}", r"\frac{1}{2} m v^2"),
        ("7b-63", "7b-63m"),
        ("a", "a point"),
        ("2 hours 40 minutes", "42"),
        ("5 m", "5 m^2"),
        ("$12", "12 cents"),
        ("12 apples", "12 oranges"),
    ],
    "another operation": [
        ("5!", "5"),
        ("|x|", "x"),
        (".5", "5"),
        ("-2^2", "4"),
        ("2^3^2", "64"),
        ("4(3)^2", "144"),
        ("1\\frac12", "0.5"),
        ("1 1/2", "11/2"),
        ("x_1", "x_2"),
        ("43_7", "43"),
        (r"0.\overline{3}", "0"),
        (r"\log_2 x", r"\log_3 x"),
        ("x<1 and x>6", "x<1 or x>6"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
        (r"\begin{pmatrix}2&1\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
    ],
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_not_rewarded(attack):
    rewarded = [pair for pair in ATTACKS[attack] if answers_match(*pair)]
    assert not rewarded


@pytest.mark.parametrize(
    "response",
    [
        "<answer>13<answer>12</answer>13</answer>",
        "<answer>13</answer> \\boxed{12}",
        "<think><answer>12</answer></think><answer>13</answer>",
        "<answer><think>12</think></answer>",
        "<answer>12</answer><answer></answer>",
        "<answer></answer>12",
        "<ANSWER>12</ANSWER>",
        "<answer>12, 13</answer>",
        "\\boxed{12} and \\boxed{13}",
    ],
)
def test_tags_inside_tags(response):
    assert accuracy_reward(response, "12") == 0.0 or response.startswith("<answer>13<answer>")
    assert format_reward(response) == 0.0


@pytest.mark.parametrize(
    "answer, gold",
    [
        (r"\pi", "3.14"),
        ("3.14159", "3.14"),
        ("2/3", "0.67"),
        ("0.125", "0.13"),
        ("12.04", "12.0"),
        ("1 m", "100 cm"),
        ("1 hour", "60 minutes"),
        ("2.5 hours", "2 hours 30 minutes"),
        (r"\$1.50", "150 cents"),
        ("30 miles per hour", "30 mph"),
        ("12 square centimetres", "12 cm^2"),
        ("16 to 20", "16–20"),
        (r"\sec^2 y", r"\tan^2 y + 1"),
        (r"\log_{2} 8", "3"),
        (r"(p,q)=(3,2)", "(3, 2)"),
        ("x > 5", r"(5, \infty)"),
        (r"x \in [1, 3)", r"1 \le x < 3"),
        ("-x > -1", "x < 1"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"),
        (r"\{1 \pm \sqrt5\}", r"1-\sqrt{5}, 1+\sqrt{5}"),
        ("B, because the slope is positive", "B"),
        (r"\textbf{(B) } 12", "B"),
        ("３½", "3.5"),
        ("two-thirds", "2/3"),
        (r"m\angle 1 = 58^\circ", "58"),
    ],
)
def test_decisions_for_a_reward(answer, gold):
    assert answers_match(answer, gold)


# ---------------------------------------------------------------------- expressions of known value


def random_tree(rng, depth):
    """(value, LaTeX, plain): the value is computed here, as the text is put together."""
    kind = rng.choice("nnnnnfdmpi" if depth == 0 else "+-*/^rnfs+-*/")
    n, d = rng.randint(1, 40), rng.randint(2, 12)
    if kind == "n":
        return Fraction(n), f"{n}", f"{n}.0"
    if kind == "f":
        return Fraction(n, d), rf"\dfrac{{{n}}}{{{d}}}", f"({n}/{d})"
    if kind == "d":
        return Fraction(n, 100), f".{n:02}", f"0.{n:02}0"
    if kind == "m":
        return n + Fraction(1, d), rf"{n}\frac{{1}}{{{d}}}", f"({n} 1/{d})"
    if kind == "p":
        return n * math.pi, rf"{n}\pi", f"({n}*pi)"
    if kind == "i":
        return Fraction(-n), f"({-n})", f"(−{n})"
    value, latex, plain = random_tree(rng, depth - 1)
    if kind == "^":
        return value**2, rf"\left({latex}\right)^{{2}}", f"({plain})²"
    if kind == "r":
        return math.sqrt(abs(value)), rf"\sqrt{{|{latex}|}}", f"√(|{plain}|)"
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
        assert answers_match(latex, gold) and answers_match(plain, gold), (latex, plain, gold)
        assert answers_match(latex, plain) and answers_match(plain, latex), (latex, plain)
        for wrong in (f"{latex}+1", f"2({latex})", f"-({latex})", rf"\frac{{{latex}}}{{3}}"):
            assert not answers_match(wrong, gold), (wrong, gold)
            assert not answers_match(gold, wrong) and not answers_match(wrong, plain), wrong


def random_polynomial(rng):
    """Two spellings of one polynomial in two letters, factored and expanded, and a third that differs."""
    x, y = rng.sample("abcdkpqtuvwxz", 2)
    a, b, c = (rng.randint(2, 9) for _ in range(3))
    factored = f"({a}{x}+{b})({x}-{c}{y})"
    expanded = rf"{a}{x}^2 - {a * c}{x}{y} + {b}{x} - {b * c}{y}"
    return factored, expanded, expanded.replace(f"- {b * c}{y}", f"+ {b * c}{y}"), (x, y)


def test_polynomials():
    rng = random.Random(5)
    for _ in range(80):
        factored, expanded, other, (x, y) = random_polynomial(rng)
        assert answers_match(factored, expanded) and answers_match(expanded, factored)
        assert not answers_match(other, expanded) and not answers_match(expanded, other)
        swapped = expanded.translate(str.maketrans(x + y, y + x))
        assert not answers_match(swapped, expanded), swapped
        assert answers_match(f"{factored}=0", f"3({expanded})=0")
        assert not answers_match(f"{factored}=0", f"{other}=0")
        assert not answers_match(f"{factored}-({expanded})=0", f"{expanded}=0")  # an identity


def test_lists_of_known_values():
    rng = random.Random(6)
    for _ in range(80):
        numbers = rng.sample(range(-30, 60), rng.randint(2, 6))
        shuffled = rng.sample(numbers, len(numbers))
        written = [rng.choice([f"{n}", f"{n}.0", rf"\frac{{{2 * n}}}{{2}}"]) for n in numbers]
        assert answers_match(", ".join(written), ",".join(map(str, shuffled)))
        assert answers_match(rf"\{{{', '.join(written)}\}}", f"{{{','.join(map(str, shuffled))}}}")
        ordered = answers_match(f"({', '.join(written)})", f"({','.join(map(str, shuffled))})")
        assert ordered == (numbers == shuffled)
        assert not answers_match(", ".join(written[1:]), ",".join(map(str, numbers)))
        assert not answers_match(", ".join(written + ["61"]), ",".join(map(str, numbers)))


# ------------------------------------------------------------------------------------- mutations


def mutations(text, rng):
    """The text with one character dropped, doubled, swapped or put in."""
    for _ in range(2):
        i = rng.randrange(len(text) + 1)
        yield text[:i] + text[i + 1 :]
        yield text[:i] + text[i : i + 1] * 2 + text[i + 1 :]
        yield text[:i] + rng.choice("0123456789+-*/^(){}[]|\\,.:;=<> $%°ABxy") + text[i:]


CASES = [(row["answer"], row["gold"]) for row in FAULTS] + [(row["gold"],) * 2 for row in PAIRS]


def test_mutated_cases_never_raise_and_a_readable_gold_matches_itself():
    rng = random.Random(8)
    for answer, gold in CASES:
        for mutated in mutations(answer, rng):
            assert answers_match(mutated, gold) in (True, False)
            both = answers_match(mutated, mutated), answers_match(f" {mutated} ", mutated)
            assert both[0] == both[1]
        readable = re.search(r"\w|∅|∞", gold) and gold not in ("N/A", "")
        assert answers_match(gold, gold) == bool(readable), gold


def test_a_digit_more_or_less_is_another_number():
    rng = random.Random(9)
    for text, _ in readable_numbers(300):
        digits = [i for i, c in enumerate(text) if c.isdigit() and c != "0"]
        i = rng.choice(digits)
        other = text[:i] + str(int(text[i]) % 9 + 1) + text[i + 1 :]
        if other != text and "^" not in text and "e" not in text:
            assert not answers_match(other, text), (other, text)
