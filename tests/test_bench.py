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


def options(**changes):
    small = {"model": "3b", "layers": 1, "lora_rank": 0, "prompts": 1, "tokens": 4}
    return SimpleNamespace(**{**small, "pictures": [16], "repeats": 1, **changes})


def test_shapes_are_those_of_the_published_models():
    sizes = {
        name: bench.random_model(name, device="fake").num_parameters() for name in bench.SHAPES
    }
    assert sizes == {"3b": 3_754_622_976, "7b": 8_292_166_656}


@pytest.mark.parametrize("around", [nullcontext, bench.as_before])
def test_flops_of_a_linear_layer_and_of_attention_by_hand(around):
    """4 of attention a pair of tokens and channel: all pairs under a mask, else what is seen."""
    P, lengths, heads, size = 3, [4, 2], 2, 8
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    inputs = {"input_ids": torch.ones(1, P, dtype=torch.long)}
    inputs["position_ids"] = torch.arange(P).expand(3, 1, -1)
    with around(bench.random_model("3b", device="fake", layers=1)):
        row, _ = observe_r1.pack_group(inputs, mask.long(), mask)
        with bench.FAKE:
            x = torch.empty(1, heads, P + sum(lengths), size)
            weight = torch.empty(5, size)
        module = SimpleNamespace(num_key_value_groups=1, is_causal=True)
        seen = row["attention_mask"]["full_attention"]
        with bench.Counter().counting() as counter:
            output, _ = observe_r1.packed_attention(module, x, x, x, seen, scaling=1.0)
            torch.nn.functional.linear(output, weight)
    pairs = 9 * 9 if around is bench.as_before else 6 + (4 * 3 + 10) + (2 * 3 + 3)
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
    monkeypatch.setattr(bench, "LENGTHS", [(100, 8)])
    bench.update(options(model=None))  # compares them itself
    assert capsys.readouterr().out.splitlines()[-1].startswith("| P = ")


def test_rows_for_a_card_run_on_the_toy(capsys):
    bench.rollout(options(model=None))
    bench.step(options(model=None))
    lines = capsys.readouterr().out.splitlines()
    assert sum("tokens/s" in line for line in lines) == 2


def test_counted_before_and_after(capsys):
    """With two layers: fewer launches for a picture, fewer FLOPs for an update."""
    bench.count(options(layers=2))
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[-8:]]
    counts = {tuple(row[1:3]): row[3:] for row in rows}
    for what, column in (("a picture of 2.56 MP", 0), ("update of a group", 1)):
        before, after = (counts[what, form][column] for form in ("before", "after"))
        assert float(after.replace(",", "")) < 0.8 * float(before.replace(",", "")), what


def test_the_estimate_is_near_what_a_step_holds(monkeypatch, capsys):
    monkeypatch.setattr(bench, "CASES", [("3b", 64, {"kl_coef": 0.0})])
    bench.memory(options(layers=2))
    ratio = capsys.readouterr().out.splitlines()[-1].split(" | ")[-1]
    assert float(ratio.strip(" |")) == pytest.approx(1, abs=0.1)


def test_the_check_for_a_card_ends_in_nine_minutes():
    file = ROOT / "tools" / "gpu_check.sh"
    limits = [int(limit) for limit in re.findall(r"(?m)^ *part \w+ (\d+) ", file.read_text())]
    assert len(limits) == 6
    assert sum(limits) <= 9 * 60
    assert subprocess.run(["bash", "-n", file], check=False).returncode == 0
