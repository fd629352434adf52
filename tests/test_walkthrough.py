"""The walkthrough (tools/walkthrough.py): what it prints equals an independent calculation."""

import html
import inspect
import math
import re
import statistics
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TOY, toy_config, write_jsonl

sys.path.insert(0, str(ROOT / "tools"))
import walkthrough

import observe_r1
import rewards

FORMAT = r"\s*<observe>.+</observe>\s*<think>.+</think>\s*<answer>.+</answer>\s*"
OPTIONS = {"num_generations": 8, "max_new_tokens": 128}


def walk(**options):
    """One step, as text and as a page."""
    problem = options.pop("problem", None)
    config = toy_config(**{**OPTIONS, **options})
    step = walkthrough.take_step(config, problem, by_line=True)
    text = walkthrough.text_of(step)
    return SimpleNamespace(step=step, text=text, page=walkthrough.page_html(step))


@pytest.fixture(scope="module")
def toy():
    return walk()


def part(text, number):
    return re.split(r"\n\d+  [A-Z].*\n", text)[number]


def rows(text, number, pattern):
    """The columns of the lines of a part that match, as text."""
    found = re.findall(rf"^ {{5}}{pattern}", part(text, number), re.MULTILINE)
    assert found
    return found


def reward_table(toy):
    return [list(map(float, row)) for row in rows(toy.text, 4, r"\d" + r" +([\d.]+)" * 4)]


def printed_tokens(toy):
    """What parts 7 and 8 say of three tokens, side by side."""
    name = r"(\d) +(\d+) +'.*?' +"
    number = r"(-?\+?[\d.]+) *"
    before = rows(toy.text, 7, name + number * 3)
    after = rows(toy.text, 8, name + number * 5 + "(clipped)?")
    assert [one[:2] for one in before] == [one[:2] for one in after]
    names = (
        "response",
        "place",
        "old",
        "new",
        "reference",
        "ratio",
        "clip",
        "A",
        "objective",
        "kl",
    )
    tokens = []
    for left, right in zip(before, after):
        token = dict(zip(names, map(float, left + right[2:7])))
        tokens.append(token | {"clipped": right[7] == "clipped"})
    return tokens


def test_rewards_follow_from_the_printed_responses(toy):
    gold = re.search(r"gold +(\d+)", toy.text)[1]
    texts = toy.step.texts
    lengths = [int(length) for length in rows(toy.text, 3, r"\d +(\d+) +<")]
    squeezed = re.sub(r"\s+", "", toy.text)
    table = reward_table(toy)
    answers = [re.findall(r"<answer>(.*?)</answer>", text) for text in texts]
    correct = [bool(found) and found[-1] == gold for found in answers]
    shortest = min((i for i in range(8) if correct[i]), key=lambda i: lengths[i])
    for i, text in enumerate(texts):
        assert re.sub(r"\s+", "", text) in squeezed
        is_formed = bool(re.fullmatch(FORMAT, text))
        bonus = 0.2 if i == shortest and lengths[i] > 20 else 0
        expected = [float(correct[i]), 0.5 * is_formed, bonus]
        assert table[i] == pytest.approx([*expected, sum(expected)])


def test_default_problem_is_half_solved_with_a_bonus_and_a_clipped_token(toy):
    accuracy, _, bonus, _ = zip(*reward_table(toy))
    assert sum(accuracy) == 4
    assert sum(bonus) == pytest.approx(0.2)
    assert any(token["clipped"] for token in printed_tokens(toy))


def test_reasons_say_what_is_missing_and_why_no_bonus_is_paid(toy):
    def reasons(text, length):
        config = toy_config(min_length=20)
        scores = {"accuracy": torch.tensor([1.0]), "format": torch.tensor([0.0])}
        problem = {"answer": "13"}
        step = SimpleNamespace(config=config, scores=scores, texts=[text], lengths=[length])
        step.problem = problem
        found = (walkthrough.accuracy_reason, walkthrough.format_reason, walkthrough.bonus_reason)
        return [reason(step, 0) for reason in found]

    assert reasons("<observe>a</observe><think>b<answer>12</answer>", 18) == [
        "answer 12, gold 13",
        "no </think>",
        "shortest correct, but 18 tokens are not more than 20",
    ]
    assert reasons("12", 21) == [
        "no answer",
        "no <observe>, no </observe>, no <think>, no </think>, no <answer>, no </answer>",
        "shortest correct, and 21 tokens are more than 20",
    ]
    assert "2 x <answer>" in reasons("<answer>1</answer><answer>", 3)[1]


def test_weight_and_advantages(toy):
    table = reward_table(toy)
    reward = [row[3] for row in table]
    p = sum(row[0] for row in table) / 8
    weight = 4 * 1.8 * p * (1 - p)
    assert float(re.search(r"w = .* = ([\d.]+)\n", toy.text)[1]) == pytest.approx(weight, abs=1e-4)
    mean, std = statistics.mean(reward), statistics.stdev(reward)
    printed = [float(value) for value in rows(toy.text, 5, r"\d  r = .* A = (\S+)")]
    expected = [weight * (r - mean) / (std + 1e-6) for r in reward]
    assert printed == pytest.approx(expected, abs=6e-5)


def test_mask_picture(toy):
    lines = rows(toy.text, 6, r"(?:prompt  |resp\. \d) (.*)")[-9:]
    cells = [re.findall(r"so far|all|\.", line) for line in lines]
    for query in range(9):
        expected = ["."] * 9
        expected[0] = "all"
        expected[query] = "so far"
        assert cells[query] == expected


def test_reference_log_probabilities_equal_those_of_a_plain_forward_pass(toy, model, processor):
    """No packing, no cache: the whole prompt and one response, in 64 bits."""
    step = toy.step
    prompt = observe_r1.encode_prompts([step.problem], processor, step.config)
    P = prompt["input_ids"].shape[1]
    for token in printed_tokens(toy):
        i, t = int(token["response"]) - 1, int(token["place"]) - 1
        response = step.rollouts.response_ids[1, i, : t + 1][None]
        inputs = {name: prompt[name] for name in ("pixel_values", "image_grid_thw")}
        inputs["input_ids"] = torch.cat([prompt["input_ids"], response], 1)
        kinds = torch.cat([prompt["mm_token_type_ids"], torch.zeros_like(response)], 1)
        with torch.no_grad():
            logits = model(**inputs, mm_token_type_ids=kinds).logits[0, P + t - 1].double()
        logits[observe_r1.vision_tokens(model)] = -math.inf
        expected = logits.log_softmax(-1)[response[0, t]].item()
        assert token["reference"] == pytest.approx(expected, abs=5e-5)
        assert token["old"] == pytest.approx(expected, abs=5e-5)


def test_ratio_clipping_and_kl(toy):
    for token in printed_tokens(toy):
        ratio = math.exp(token["new"] - token["old"])
        clip = min(max(ratio, 0.8), 1.2)
        objective = min(ratio * token["A"], clip * token["A"])
        q = token["reference"] - token["new"]
        assert token["ratio"] == pytest.approx(ratio, abs=3e-5)
        assert token["clip"] == pytest.approx(clip, abs=3e-5)
        assert token["objective"] == pytest.approx(objective, abs=1e-4)
        assert token["kl"] == pytest.approx(math.exp(q) - q - 1, abs=3e-5)
        assert token["clipped"] == (objective < ratio * token["A"] - 1e-4)


def test_loss_is_the_mean_of_costs_and_the_norm_is_the_logged_one(toy):
    table = rows(toy.text, 9, r"\d +(\d+) +(\S+) +(\S+) +(\S+) +(\S+)$")
    costs = []
    for length, advantage, objective, kl, cost in table:
        assert float(cost) == pytest.approx(0.01 * float(kl) - float(objective), abs=2e-5)
        costs.append(float(cost))
    for name in ("hand", "grpo_loss"):
        printed = float(re.search(rf"L by {name} +(\S+)", toy.text)[1])
        assert printed == pytest.approx(sum(costs) / 8, abs=1e-5)
    norm = float(re.search(r"gradient norm +([\d.]+)", toy.text)[1])
    other = toy.step.trace.calls["scale_and_step"][0].result
    logged = toy.step.run.steps[-1]["grad_norm"]  # the mean of both optimiser steps
    assert (norm + other) / 2 == pytest.approx(logged, abs=1e-4)


def test_text_fits_the_screen_and_defines_each_term_once(toy):
    assert max(map(len, toy.text.splitlines())) <= 100
    titles = re.findall(r"^\d+(?=  [A-Z])", toy.text, re.MULTILINE)
    assert titles == [str(number) for number in range(1, 11)]
    terms = (
        "policy",
        "gold",
        "rollout",
        "reward",
        "advantage",
        "reference",
        "ratio",
        "Clipping",
        "KL",
    )
    assert [toy.text.count(f"*{term}*") for term in terms] == [1] * len(terms)


def test_looking_on_changes_nothing(toy):
    step = walkthrough.take_step(toy_config(**OPTIONS), None, by_line=False)
    assert walkthrough.text_of(step) == toy.text
    assert sys.gettrace() is toy.step.trace.before


def code_of(page, name):
    section = re.search(rf'<section id="{re.escape(name)}">.*?</section>', page, re.DOTALL)[0]
    lines = re.findall(r"<code class=\"\w+\">(.*?)</code>", section, re.DOTALL)
    values = re.findall(r'<div class="values">(.*?)</div></div>\n', section, re.DOTALL)
    return html.unescape(re.sub("<[^>]+>", "", "".join(lines))), "".join(values)


def test_page_holds_the_source_and_what_it_computed(toy):
    shown = toy.step.trace.shown
    for name in ("train", "rollout", "sample", "update", "pack_group", "grpo_loss", "mix_ladder"):
        assert name in shown
    for name in shown:
        function = rewards if hasattr(rewards, name) else observe_r1
        for word in name.split("."):
            function = getattr(function, word)
        assert code_of(toy.page, name)[0] == inspect.getsource(inspect.unwrap(function))

    _, loss = toy.step.loss_call()
    assert f"{loss:.4g}" in code_of(toy.page, "grpo_loss")[1]
    mean = statistics.mean(row[3] for row in reward_table(toy))
    centred = [f"{row[3] - mean:.4g}" for row in reward_table(toy)]
    weights = code_of(toy.page, "dynamic_weight")[1]
    assert "<b>share_solved</b> 0.5" in weights and "<b>returns</b> 1.8" in weights
    assert centred[0] in walkthrough.describe(toy.step.scores["reward"] - mean)
    assert "data:image/png;base64," in code_of(toy.page, "chat_messages")[1]
    for name in walkthrough.CAPTIONS:
        assert (TOY / "figures" / f"{name}.svg").read_text() in toy.page
    assert not re.search(
        r'(src|href)="(?!data:|#)', re.sub("<svg.*?</svg>", "", toy.page, flags=16)
    )


def test_script_that_was_edited_meanwhile_is_refused():
    """Otherwise values would stand beside other lines than those that computed them."""
    train = next(f for f in walkthrough.functions_of(observe_r1) if f.name == "train")
    walkthrough.check_unchanged(observe_r1, train)
    train.lines = {number + 1: text for number, text in train.lines.items()}
    with pytest.raises(ValueError, match="has changed since the start"):
        walkthrough.check_unchanged(observe_r1, train)


def test_hostile_text_is_shown_and_never_run(tmp_path):
    row = {"id": "a<b>", "question": "<script>alert(1)</script>\x1b[31m?", "answer": "<u>7</u>"}
    seen = walk(data=write_jsonl(tmp_path / "mine.jsonl", [row]), problem="a<b>")
    assert "<script>" not in seen.page and "<u>" not in seen.page
    assert html.escape(row["question"]) in seen.page
    assert "\x1b" not in seen.text and r"\x1b[31m" in seen.text
    if not seen.step.advantages.any():
        assert walkthrough.NOT_TAUGHT.split(":")[0] in part(seen.text, 9)
    assert len(re.findall(r"^\d+  [A-Z]", seen.text, re.MULTILINE)) == 10


def run_main(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["walkthrough.py", *words])
    with pytest.raises(SystemExit) as end:
        walkthrough.main()
    return str(end.value.code)


def test_unknown_problem_ends_in_one_line(monkeypatch):
    message = run_main(monkeypatch, "--problem", "nowhere")
    assert "\n" not in message
    assert "--problem nowhere" in message and "train-" in message


def test_missing_pygments_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pygments", None)
    message = run_main(monkeypatch, "--html", str(tmp_path / "page.html"))
    assert "pip install pygments" in message
