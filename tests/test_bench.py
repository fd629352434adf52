"""tools/bench.py and tools/gpu_check.sh, as far as a CPU can tell."""

import re
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import observe_r1

sys.path.insert(0, str(ROOT / "tools"))
import bench


@pytest.fixture
def thin(monkeypatch):
    """One shape alone, with two layers, as an option."""
    monkeypatch.setattr(bench, "SHAPES", {"thin": (2048, 11008, 2, 16, 2, 151936)})
    monkeypatch.setattr(bench, "TOWER", {**bench.TOWER, "depth": 2, "fullatt_block_indexes": [1]})
    return options(model="thin")


def options(**changes):
    return SimpleNamespace(**{"model": "toy", "pictures": [16], "repeats": 1, **changes})


def settings(*words):
    return observe_r1.parse_arguments([*bench.WORDS, "--prompts_per_step=2", *words])[1]


def printed(capsys):
    """The cells of each row of the table that was printed last."""
    lines = capsys.readouterr().out.rpartition("--- |\n")[2].splitlines()
    return [line.strip("| ").split(" | ") for line in lines]


def test_shapes_are_those_of_the_published_models():
    sizes = {name: bench.make_model(name, device="fake").num_parameters() for name in bench.SHAPES}
    assert sizes == {"3b": 3_754_622_976, "7b": 8_292_166_656}


@pytest.mark.parametrize("around", [nullcontext, bench.as_before])
def test_flops_of_a_linear_layer_and_of_attention_by_hand(thin, around):
    """4 of attention a pair of tokens and channel: all pairs, or each part on what it may see."""
    P, lengths, heads, size = 3, [4, 2], 2, 8
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    inputs = {"input_ids": torch.ones(1, P, dtype=torch.long)}
    inputs["position_ids"] = torch.arange(P).expand(3, 1, -1)
    with around(bench.make_model("thin", device="fake")):
        row, _ = observe_r1.join_rows([observe_r1.pack_group(inputs, mask.long(), mask)])
    with bench.FAKE:
        x = torch.empty(1, heads, P + sum(lengths), size)
        weight = torch.empty(5, size)
    module = SimpleNamespace(num_key_value_groups=1, is_causal=True)
    seen = row["attention_mask"]["full_attention"]
    with bench.Counter().counting() as counter:
        output, _ = observe_r1.packed_attention(module, x, x, x, seen, scaling=1.0)
        torch.nn.functional.linear(output, weight)
    pairs = 9 * 9 if around is bench.as_before else 3 * 3 + 4 * 7 + 2 * 5
    linear = 2 * 9 * heads * size * 5
    assert counter.numbers[1] == 4 * pairs * heads * size + linear


def test_peak_and_bytes_are_those_of_what_lives():
    with bench.FAKE:
        x = torch.empty(1000)
    with bench.Counter().counting() as counter:
        y = x + 1
        z = y[:10]  # a view: nothing is launched
        del y
        z = z * 2  # what the view held is free now
        x.add_(1)
    launches, _, moved = counter.numbers
    assert launches == 3
    assert counter.peak == 4000 + 40
    assert counter.held == 40
    assert moved == 2 * 4000 + 2 * 40 + 2 * 4000


def test_both_forms_of_an_update_agree(capsys, monkeypatch):
    monkeypatch.setattr(bench, "LENGTHS", [(30, 8)])
    bench.update(options(), settings())  # compares them itself
    ((what, _),) = printed(capsys)
    assert what == "P = 94, T = 8"


def test_generate_and_the_other_samplers_run_on_the_toy(capsys):
    few = settings("--max_new_tokens=4")
    bench.rollout(options(), few)
    ((_, _, rate),) = printed(capsys)
    assert rate.endswith("tokens/s")
    bench.samplers(options(), few)
    names = [name for name, *_ in printed(capsys)][:3]
    assert names == ["observe_r1.py", "graph_rollout.py", "transformers' generate"]


def test_counted_before_and_after(thin, capsys):
    """With two layers: fewer launches for a picture, fewer FLOPs for an update."""
    bench.count(thin, settings())
    counts = {tuple(row[1:3]): row[3:] for row in printed(capsys)}
    for what, column in (("a picture of 2.56 MP", 0), ("update of a group", 1)):
        before, after = (counts[what, form][column] for form in ("before", "after"))
        assert float(after.replace(",", "")) < 0.8 * float(before.replace(",", "")), what


def test_the_estimate_is_near_what_a_step_holds(thin, capsys):
    words = ("--max_new_tokens=64", "--gradient_checkpointing=true", "--kl_coef=0")
    bench.step(thin, settings(*words))
    (cells,) = printed(capsys)
    assert float(cells[-1]) == pytest.approx(1, abs=0.15)


def test_the_check_for_a_card_ends_in_nine_minutes():
    file = ROOT / "tools" / "gpu_check.sh"
    limits = [int(limit) for limit in re.findall(r"(?m)^ *part \w+ (\d+) ", file.read_text())]
    assert len(limits) == 6
    assert sum(limits) <= 9 * 60
    assert subprocess.run(["bash", "-n", file], check=False).returncode == 0
