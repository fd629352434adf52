"""Tests of rewards.py: golden numbers by hand, the rules of the method, and safety."""

import doctest
import random
import time

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

GOOD = "<observe>a circle</observe>\n<think>half of 24</think> <answer>12</answer>"


def test_doctests():
    assert doctest.testmod(rewards).failed == 0


# ---------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("response, answer", [
    ("<answer>12</answer>", "12"),
    ("<answer>11</answer> no, <answer>12</answer>", "12"),
    ("<answer>11</answer> no, <answer>12", "11"),  # the last complete one
    ("so <answer>12", "12"),
    (r"so \boxed{\frac{1}{2}} or \boxed{12}", "12"),
    (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"so \boxed{12", None),
    ("</answer>12<answer>", ""),
    ("the answer is 12", None),
    ("", None),
])
def test_extract_answer(response, answer):
    assert extract_answer(response) == answer


@pytest.mark.parametrize("prediction, gold, same", [
    # the rows of method.md section 7: what the released code gets wrong
    ("whatever", "Yes", False), ("yes", "Yes", True),
    ("whatever", "(1,2)", False), ("(1, 2)", "(1,2)", True),
    ("whatever", "blue", False), ("Blue", "blue", True),
    ("Odd", "D", False), ("B. 12 cm", "B", True), ("B", "D", False),
    ("", "", False), ("5", "", False), ("12", "N/A", False), ("N/A", "N/A", False),
    # numbers
    ("12.0", "12", True), ("1,345", "1345", True), ("1/2", "0.5", True), (r"\frac{1}{2}", "0.5", True),
    ("3 4", "12", False), ("11/2", "1 1/2", False), ("3/2", "1 1/2", True), ("-12", "12", False),
    ("3.14", r"\pi", True), ("3.15", "3.14", False), ("0.3", "1/3", False),
    ("A, B", "B", False), ("(b)", "B", True), ("(A) or (C)", "C", False),
])
def test_answers_match(prediction, gold, same):
    assert answers_match(prediction, gold) is same


def test_accuracy_needs_an_answer_and_does_not_look_elsewhere():
    assert accuracy_reward(GOOD, "12") == 1.0
    assert accuracy_reward("the answer is 12", "12") == 0.0
    assert accuracy_reward("<think>12</think><answer>13</answer>", "12") == 0.0


# ------------------------------------------------------------------------------------ format


@pytest.mark.parametrize("response, value", [
    (GOOD, 0.5),
    ("Sure!\n" + GOOD + "\nBye", 0.5),
    ("<think>look <observe>a circle</observe> half of 24</think><answer>12</answer>", 0.5),
    ("<think><observe>a circle</observe></think><answer>12</answer>", 0.0),  # no thought of its own
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
    ("<think>b</think><answer>c</answer>", 0.0),
    ("", 0.0),
])
def test_format(response, value):
    assert format_reward(response) == value


def test_format_of_the_ablation_asks_for_think_and_answer_alone():
    assert format_reward("<think>b</think> <answer>c</answer>", observe=False) == 0.5
    assert format_reward("<answer>c</answer><think>b</think>", observe=False) == 0.0
    assert format_reward("<answer>c</answer>", observe=False) == 0.0


@pytest.mark.parametrize("piece", ["<observe>", "</think>", "<think><observe>", "<answer>1</answer>",
                                   r"\boxed{", "{", "((", "9^", "1,", "A. "])
def test_time_is_linear_in_what_a_looping_policy_writes(piece):
    # The released regex takes over 20 s on 1.5 kB of repeated tags.
    for size in (10_000, 100_000):
        text = piece * (size // len(piece))
        started = time.perf_counter()
        format_reward(text)
        accuracy_reward(text, "12")
        accuracy_reward(f"<answer>{text}</answer>", "12")
        assert time.perf_counter() - started < 0.15


def test_nothing_a_policy_writes_raises():
    rng = random.Random(0)
    pieces = ["<observe>", "</observe>", "<think>", "</think>", "<answer>", "</answer>", r"\boxed{", "}",
              r"\frac", r"\sqrt", "{", "(", ")", "[", "^", "9**9**9", "1e999", "nan", "inf", "\x00", "٣",
              "½", "²", "A", "B.", "x", "=", "<", ",", ":", "%", "°", "12", ".", " ", "|", "±", "-", "/"]
    for _ in range(3000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 12)))
        gold = "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 6)))
        assert accuracy_reward(f"<answer>{text}</answer>", gold) in (0.0, 1.0)
        assert format_reward(text) in (0.0, 0.5)


# -------------------------------------------------------------------------- bonus and weight


@pytest.mark.parametrize("correct, lengths, winner", [
    ([1, 1, 0, 0, 0, 0, 1, 0], [300, 200, 150, 120, 400, 500, 600, 700], 1),  # the golden case
    ([0] * 8, [200] * 8, None),  # the released code gives it to response 0
    ([1, 1, 1], [150, 90, 200], None),  # the shortest correct one is under the floor: nobody
    ([1, 1], [100, 300], None),  # longer than the floor, not as long
    ([1, 1], [101, 300], 0),
    ([1, 1, 1], [200, 150, 150], 1),  # ties go to the first
    ([0, 1], [110, 500], 1),
])
def test_bonus(correct, lengths, winner):
    expected = [0.2 if i == winner else 0.0 for i in range(len(correct))]
    assert bonus_rewards([bool(c) for c in correct], lengths) == expected


def test_weights_of_every_group_of_eight():
    weights = [dynamic_weight([True] * k + [False] * (8 - k)) for k in range(9)]
    assert weights == pytest.approx([0, 0.7875, 1.35, 1.6875, 1.8, 1.6875, 1.35, 0.7875, 0], abs=1e-12)


def test_bad_groups_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        dynamic_weight([])
    for correct, lengths in (([], []), ([True], [1, 2]), ([True], [-1])):
        with pytest.raises(ValueError, match="one length"):
            bonus_rewards(correct, lengths)
