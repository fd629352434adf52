"""Tests of rewards.py: golden numbers by hand, the rules of the method, and safety."""

import ast
import doctest
import json
import random
import re
import sys
import time
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
        ("so <answer>12", "12"),
        ("<answer>12</answer></answer>", "12"),
        (r"so \boxed{\frac{1}{2}} or \boxed{12}", "12"),
        (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"so \boxed{12", None),
        ("</answer>12<answer>", ""),
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
    """x takes the value -400/211 or so at the first point; no number is x."""
    value = rewards._evaluate("x", 0)
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


@pytest.mark.parametrize(
    "piece",
    [
        "<observe>",
        "</think>",
        "<think><observe>",
        "<answer>1</answer>",
        r"\boxed{",
        "{",
        "((",
        "9^",
        "1,",
        "A. ",
    ],
)
def test_time_is_linear_in_what_a_looping_policy_writes(piece):
    # The released regex takes over 20 s on 1.5 kB of repeated tags.
    for size in (10_000, 100_000):
        text = piece * (size // len(piece))
        started = time.perf_counter()
        format_reward(text)
        accuracy_reward(text, "12")
        accuracy_reward(f"<answer>{text}</answer>", "12")
        assert time.perf_counter() - started < 0.15


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
    for _ in range(3000):
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
    for correct, lengths in (([], []), ([True], [1, 2]), ([True], [-1])):
        with pytest.raises(ValueError, match="one length"):
            bonus_rewards(correct, lengths)


# ------------------------------------------------------------------------ for other people's code


PAIRS = [json.loads(line) for line in (HERE / "toy" / "answers.jsonl").open()]


def test_pairs_as_they_occur_in_data():
    wrong = [
        (row["response"], row["gold"])
        for row in PAIRS
        if not row.get("debatable")
        and accuracy_reward(row["response"], row["gold"]) != row["match"]
    ]
    assert not wrong
    assert all(format_reward(row["response"]) == 0.5 * row["format_ok"] for row in PAIRS)


def readme_block(sign):
    """The functions of the README's code block that holds `sign`."""
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    (block,) = [block for block in blocks if sign in block]
    scope = {}
    exec(block, scope)
    return scope


def test_adapter_for_trl():
    """Called as GRPOTrainer._calculate_rewards does: all by keyword, the columns, extras."""
    reward = readme_block("def observe_r1_reward")["observe_r1_reward"]
    short, wrong = GOOD, GOOD.replace(">12<", ">13<")
    rewards = reward(
        prompts=["p"] * 3 + [[{"role": "user", "content": "q"}]] * 2,
        completions=[short, short, wrong] + [[{"role": "assistant", "content": short}]] * 2,
        completion_ids=[[0] * 300, [0] * 150, [0] * 120, [0] * 90, [0] * 200],
        answer=["12"] * 5,
        trainer_state=None,
        log_metric=print,
    )
    assert rewards == pytest.approx([1.5, 1.7, 0.5, 1.5, 1.5])


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
    exec("\n\n".join(map(ast.unparse, imports + parts)), scope)
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
    texts, times = list(random_strings(6000)), []
    for answer, gold in zip(texts, reversed(texts)):
        started = time.perf_counter()
        assert answers_match(answer, gold) in (True, False)
        times.append(time.perf_counter() - started)
        surrounded = format_reward("Sure: " + answer + " Bye")
        if not re.search("[<>]", answer):
            assert surrounded == format_reward(answer) == 0.0
    assert max(times) < 0.05 and sorted(times)[3000] < 0.0002


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
    numbers = [text for text, _ in readable_numbers(1500)]
    matches = 0
    for a, b in zip(numbers, numbers[1:] + numbers[:1]):
        assert answers_match(a, a)
        assert answers_match(a, b) == answers_match(b, a), (a, b)
        matches += answers_match(a, b)
    for text, _ in readable_numbers(200):
        assert not answers_match(text, f"({text})+1")


def test_growth_is_linear():
    """Four times the input takes about four times the time; a quadratic rule would take 16."""
    for piece in ("<think>", "</answer>", r"\boxed{", "(1+", "A) ", "<observe>x</observe>"):
        seconds = []
        for size in (100_000, 200_000, 400_000):  # doubled, and doubled again
            text = piece * (size // len(piece))
            seconds.append(
                min(
                    timed(lambda: (format_reward(text), accuracy_reward(f"<answer>{text}", "12")))
                    for _ in range(5)
                )
            )
        assert seconds[2] < 8 * seconds[0] + 0.01, (piece, seconds)


def timed(work):
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
