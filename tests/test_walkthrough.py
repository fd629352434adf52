"""The walkthrough (tools/walkthrough.py): what it prints equals an independent calculation."""

import html
import inspect
import itertools
import math
import re
import statistics
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, toy_config, toy_rows, write_parquet

sys.path.insert(0, str(ROOT / "tools"))
import walkthrough

import observe_r1
import rewards


def walk(number=walkthrough.DEFAULT_PROBLEM, by_line=True, **options):
    """One step, as text and as a page."""
    config = toy_config(**{"num_generations": 8, "max_new_tokens": 128, **options})
    step = walkthrough.take_step(config, number, by_line)
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
    name, number = r"(\d) +(\d+) +'.*?' +", r"([-+][\d.]+) *"
    before, after = rows(toy.text, 7, name + number * 3), rows(toy.text, 8, name + number * 6)
    names = ("old", "new", "reference", "ratio", "clip", "A", "objective", "kl", "push")
    tokens = []
    for (response, token, *first), (*_, a, b, c, d, e, f) in zip(before, after, strict=True):
        numbers = map(float, (*first, a, b, c, d, e, f))
        tokens.append({"place": (int(response) - 1, int(token) - 1), **dict(zip(names, numbers))})
    return tokens


def test_responses_and_their_rewards(toy):
    gold = re.search(r"answer +(\d+)\n", toy.text)[1]
    squeezed, texts = re.sub(r"\s+", "", toy.text), toy.step.texts
    assert all(re.sub(r"\s+", "", text) in squeezed for text in texts)
    lengths = list(map(int, rows(toy.text, 3, r"\d +(\d+) +<")))
    correct = [rewards.accuracy_reward(text, gold) for text in texts]
    forms = [rewards.format_reward(text) for text in texts]
    bonus = rewards.bonus_rewards(correct, lengths, 20)
    for row, *parts in zip(reward_table(toy), correct, forms, bonus):
        assert row == pytest.approx([*parts, sum(parts)])


def test_the_default_shows_what_the_minimum_does(toy):
    """Half solved, with a bonus; one ratio above the range, clipped for A > 0, free for A < 0."""
    accuracy, _, bonus, _ = zip(*reward_table(toy))
    assert sum(accuracy) == 4 and sum(bonus) == pytest.approx(0.2)
    free, _, clipped = printed_tokens(toy)
    assert free["ratio"] == clipped["ratio"] > 1.2 and free["A"] < 0 < clipped["A"]
    said = [re.sub(r"\s+", " ", text) for text in part(toy.text, 8).split("Response ")[1:]]
    assert "the minimum is the first, although" in said[0] and "within the range" in said[1]
    assert "the minimum is the second, a constant" in said[2]


def test_reasons_say_what_is_missing_and_what_the_checker_reads():
    def reasons(text):
        scores = {"accuracy": torch.tensor([1.0]), "format": torch.tensor([0.0])}
        step = {"config": toy_config(), "scores": [scores], "texts": [text], "lengths": [18]}
        return walkthrough.reasons(SimpleNamespace(problem={"answer": "13"}, **step), 0)

    shortest = "; shortest correct, of 18 tokens"
    expected = f"answer '12', gold '13'; 0 x </think>{shortest}"
    assert reasons("<observe>a</observe><think>b<answer>12</answer>") == expected
    found = "no answer found, gold '13'; 0 x <observe>, 0 x </observe>, 2 x <think>"
    assert reasons("<think><think>").startswith(found)


def test_weight_and_advantages(toy):
    table = reward_table(toy)
    reward = [row[3] for row in table]
    p = sum(row[0] for row in table) / 8
    weight = 4 * 1.8 * p * (1 - p)
    assert float(re.search(r"w = .* = ([\d.]+)\n", toy.text)[1]) == pytest.approx(weight, abs=1e-4)
    mean, std = statistics.mean(reward), statistics.stdev(reward)
    printed = [float(value) for value in rows(toy.text, 5, r"\d  r = .* A = (\S+)")]
    assert printed == pytest.approx([weight * (r - mean) / std for r in reward], abs=6e-5)
    for right, *printed in rows(toy.text, 5, r"(\d) of 8 +(\S+) +(\S+) +(\S+)"):
        p = int(right) / 8
        scaled, weight = math.sqrt((1 - p) / p * 7 / 8), 4 * 1.8 * p * (1 - p)
        expected = [scaled, weight, weight * scaled]
        assert list(map(float, printed)) == pytest.approx(expected, abs=1e-4)


def test_the_packed_row_is_counted(toy):
    (sizes,) = rows(toy.text, 6, r"input_ids .*: (.*) tokens")
    sizes = torch.tensor([int(size) for size in sizes.split(" + ")])
    assert sizes[1:].tolist() == toy.step.lengths
    owner = torch.arange(9).repeat_interleave(sizes)
    sees = ((owner == 0) | (owner == owner[:, None])).tril()
    assert f"compares: {sees.sum()}, of {sees.numel()} in" in toy.text


def test_log_probabilities_ratio_clipping_and_kl(toy, model):
    rollouts, config = toy.step.rollouts[0], toy.step.config
    expected = observe_r1.response_log_probs(model, rollouts, config)[1]  # of the untrained model
    for token in printed_tokens(toy):
        old = expected[token["place"]].item()
        ratio = math.exp(token["new"] - old)
        clip = min(max(ratio, 0.8), 1.2)
        objective = min(ratio * token["A"], clip * token["A"])
        kl = 1 / ratio - math.log(1 / ratio) - 1
        by_hand = {"old": old, "reference": old, "ratio": ratio, "clip": clip, "kl": kl}
        by_hand["objective"] = objective
        assert {name: token[name] for name in by_hand} == pytest.approx(by_hand, abs=1e-4)


def test_push_is_the_gradient_of_grpo_loss(toy):
    arguments = dict(toy.step.last("grpo_loss").arguments)
    arguments["log_probs"] = arguments["log_probs"].detach().requires_grad_()
    observe_r1.grpo_loss(**arguments)[0].backward()
    mask = arguments["mask"]
    weighed = arguments["log_probs"].grad * -8 * mask.sum(-1, keepdim=True)  # a token's own part
    assert toy.step.group["push"].tolist() == pytest.approx(
        weighed[mask].tolist(), rel=1e-4, abs=1e-5
    )


def test_loss_is_the_mean_of_costs(toy):
    costs = []
    for objective, kl, cost in rows(toy.text, 9, r"\d +\d+ +\S+ +(\S+) +(\S+) +(\S+)$"):
        assert float(cost) == pytest.approx(0.01 * float(kl) - float(objective), abs=2e-5)
        costs.append(float(cost))
    losses = [float(loss) for loss in re.findall(r"L by \w+ +(\S+)", toy.text)]
    assert losses == pytest.approx([sum(costs) / 8] * 2, abs=1e-5)


def test_text_fits_the_screen_and_looking_on_changes_nothing(toy):
    assert max(map(len, toy.text.splitlines())) <= 100
    before = sys.gettrace()
    assert walk(by_line=False).text == toy.text and sys.gettrace() is before


def test_page_holds_the_source_and_what_it_computed(toy):
    values = {}
    for function in map(inspect.unwrap, itertools.chain(*(part[2] for part in walkthrough.PARTS))):
        name = function.__qualname__
        section = re.search(rf'(?s)<section id="{name}">.*?</section>', toy.page)[0]
        code = "".join(re.findall(r"(?s)<code>(.*?)</code>", section))
        assert html.unescape(re.sub("<[^>]+>", "", code)) == inspect.getsource(function)
        values[name] = "".join(re.findall(r'(?s)<div class="values">(.*?)</div></div>\n', section))
    assert f"{toy.step.last('grpo_loss').result[0].item():.4g}" in values["grpo_loss"]
    assert "<b>returns</b> 1.8" in values["dynamic_weight"]
    assert "<b>lengths</b> <i>[2,8]</i> " in values["rollout"]  # also after lengths[chunk] = ...
    assert "data:image/webp;base64," in values["chat_messages"]
    assert not re.search('src="(?!data:)', toy.page)


def test_hostile_text_is_shown_and_a_group_without_rewards_is_explained(tmp_path):
    row = toy_rows("ladder", [0])[0]
    row |= {"images": [], "question": "<script>alert(1)</script>\x1b[31m?", "answer": "<u>7</u>"}
    seen = walk(0, data=write_parquet(tmp_path / "mine.parquet", [row]), max_new_tokens=2)
    assert "<script>" not in seen.page and "&lt;script&gt;alert(1)" in seen.page
    assert "\x1b" not in seen.text and r"\x1b[31m" in seen.text
    assert all(walkthrough.NOT_TAUGHT[:40] in part(seen.text, number) for number in (6, 7, 8, 9))


@pytest.mark.parametrize(
    "words, said",
    [
        (["--problem", "960"], "--problem 960: .* has the rows 0 to 959"),
        (["--data", "nowhere.parquet"], "No such file .*nowhere.parquet"),
    ],
)
def test_mistakes_end_in_one_line(words, said, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["walkthrough.py", *words])
    with pytest.raises(SystemExit, match=said) as end:
        walkthrough.main()
    assert "\n" not in str(end.value.code)
