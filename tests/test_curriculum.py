"""The ladder and the order of training, against the paper's figure and obvious recounts."""

from itertools import pairwise

import pytest
import torch
from conftest import TOY

from observe_r1 import (
    Config,
    load_problems,
    mix_ladder,
    select_problems,
    training_order,
)

# Read off the paper's figure: how many of the problems stand in each level; the share of five
# neighbouring levels in each stage, from the lowest of them; the sizes of the stages per 1,000.
FIGURE = [0.015, 0.035, 0.05, 0.075, 0.135, 0.15, 0.15, 0.2, 0.19]
SHARES = [
    (0, [0.29, 0.18, 0.19, 0.19, 0.17]),
    (0, [0.05, 0.50, 0.15, 0.155, 0.15]),
    (0, [0.02, 0.08, 0.51, 0.17, 0.23]),
    (1, [0.03, 0.07, 0.505, 0.21, 0.19]),
    (2, [0.03, 0.07, 0.58, 0.19, 0.14]),
    (3, [0.03, 0.10, 0.575, 0.15, 0.15]),
    (4, [0.05, 0.12, 0.54, 0.18, 0.12]),
    (4, [0.02, 0.055, 0.10, 0.685, 0.14]),
    (4, [0.02, 0.05, 0.07, 0.15, 0.72]),
]
STAGES = [42, 42, 54, 80, 112, 132, 155, 178, 206]


def levels(counts):
    return [level / 8 for level, count in enumerate(counts) for _ in range(count)]


def check_ladder(difficulty, complexity, order, stage):
    """Each problem once, stages in order, no level beyond the neighbours, short ones first."""
    assert sorted(order) == list(range(len(difficulty)))
    assert stage == sorted(stage) and set(stage) <= set(range(9))
    for problem, s in zip(order, stage):
        lowest = SHARES[s][0]
        assert lowest <= round(8 * difficulty[problem]) <= lowest + 4
    for s in set(stage):
        for level in range(9):
            members = [problem for problem, t in zip(order, stage) if t == s]
            lengths = [complexity[i] for i in members if round(8 * difficulty[i]) == level]
            assert lengths == sorted(lengths)


def test_mix_ladder_reproduces_the_figure():
    difficulty = levels([round(share * 10_000) for share in FIGURE])
    complexity = torch.rand(len(difficulty), generator=torch.Generator().manual_seed(0)).tolist()
    order, stage = mix_ladder(difficulty, complexity, seed=1)
    check_ladder(difficulty, complexity, order, stage)
    for s, (lowest, shares) in enumerate(SHARES):
        mine = [round(8 * difficulty[i]) for i, t in zip(order, stage) if t == s]
        assert len(mine) / 10 == pytest.approx(STAGES[s], abs=2)
        for level, share in enumerate(shares, start=lowest):
            assert mine.count(level) / len(mine) == pytest.approx(share / sum(shares), abs=0.02)


def test_a_level_is_spread_over_its_whole_stage():
    """The own level of the last stage fills each tenth of it alike, not its beginning or end."""
    difficulty = levels([round(share * 10_000) for share in FIGURE])
    order, stage = mix_ladder(difficulty, [1.0] * len(difficulty))
    last = [difficulty[i] for i, s in zip(order, stage) if s == 8]
    tenth = len(last) // 10
    shares = [last[k * tenth : (k + 1) * tenth].count(1.0) / tenth for k in range(10)]
    assert max(shares) - min(shares) < 0.05


@pytest.mark.parametrize(
    "counts",
    [
        [100] * 9,
        [0, 0, 300, 0, 0, 100, 0, 0, 600],
        [900, 0, 0, 0, 0, 0, 0, 0, 90],
        [10, 20, 40, 80, 160, 160, 210, 150, 130],
    ],
)
def test_mix_ladder_elsewhere(counts):
    difficulty = levels(counts)
    complexity = [float(i % 17) for i in range(len(difficulty))]
    order, stage = mix_ladder(difficulty, complexity)
    check_ladder(difficulty, complexity, order, stage)
    tenths = torch.tensor([difficulty[i] for i in order]).chunk(10)
    means = [tenth.mean().item() for tenth in tenths]
    assert all(b >= a - 0.03 for a, b in pairwise(means)) and means[-1] > means[0]


def test_mix_ladder_follows_its_seed():
    difficulty, complexity = levels([30] * 9), [1.0] * 270
    first = mix_ladder(difficulty, complexity, seed=3)
    assert mix_ladder(difficulty, complexity, seed=3) == first
    assert mix_ladder(difficulty, complexity, seed=4) != first


def test_mix_ladder_of_tiny_sets():
    assert mix_ladder([], []) == ([], [])
    assert mix_ladder([0.5], [3.0])[0] == [0]
    order, _ = mix_ladder([1.0, 0.0], [1.0, 1.0])
    assert order == [1, 0]


def test_select_problems():
    """Of difficulty 0 those below the median length go: 2 of 2, 23 and 56; harder ones all stay."""
    difficulty, complexity = [0, 0, 0, 0.5, 1, 1], [2.0, 23.0, 56.0, 1.0, 9.0, 1.0]
    assert select_problems(difficulty, complexity) == [1, 2, 3, 4, 5]
    assert select_problems([0.0], [5.0]) == [0]
    assert select_problems([1.0, 0.125], [1.0, 1.0]) == [0, 1]
    assert select_problems([], []) == []


@pytest.fixture(scope="module")
def ladder():
    return load_problems(str(TOY / "ladder.parquet"))


def test_training_order(ladder):
    n = len(ladder)
    assert training_order(ladder, Config()) == list(range(n))
    shuffled = training_order(ladder, Config(order="random", seed=3))
    assert sorted(shuffled) == list(range(n)) != shuffled
    assert training_order(ladder, Config(order="random", seed=4)) != shuffled
    difficulty, complexity = list(ladder["difficulty"]), list(ladder["complexity"])
    ranks = [(difficulty[i], complexity[i]) for i in training_order(ladder, Config(order="sorted"))]
    assert ranks == sorted(ranks)


@pytest.mark.parametrize("max_steps", [1, 4, 7])
def test_max_steps_thins_evenly_and_keeps_the_hard_end(ladder, max_steps):
    n, wanted = len(ladder), 16 * max_steps
    thin = training_order(ladder, Config(max_steps=max_steps, prompts_per_step=16))
    assert len(thin) == wanted and thin == sorted(set(thin)) and thin[-1] >= n - n // wanted
    gaps = {b - a for a, b in pairwise(thin)}
    assert max(gaps) - min(gaps) <= 1


def test_more_steps_than_problems_read_each_once(ladder):
    few = ladder.select(range(10))
    assert training_order(few, Config(max_steps=9, prompts_per_step=16)) == list(range(10))


def test_order_sorted_needs_the_columns_of_a_ladder():
    problems = load_problems(str(TOY / "heldout.parquet"))
    with pytest.raises(ValueError, match="--order sorted needs the columns"):
        training_order(problems, Config(order="sorted"))


def test_the_toy_keeps_its_promises(ladder):
    """Held-out pictures are unseen, difficulty rises, the files stay small."""
    held_out = load_problems(str(TOY / "heldout.parquet"))
    pictures = []
    for problems in (ladder, held_out):
        pictures.append({image.tobytes() for row in problems for image in row["images"]})
    assert not pictures[0] & pictures[1]
    quarters = torch.tensor(list(ladder["difficulty"])).chunk(4)
    means = [quarter.mean().item() for quarter in quarters]
    assert means == sorted(means) and len({round(8 * d) for d in ladder["difficulty"]}) >= 6
    files = [*TOY.glob("*.parquet"), *TOY.glob("model/*")]
    size = {path.name: path.stat().st_size for path in files}
    assert size["model.safetensors"] < 5e6
    assert size["ladder.parquet"] + size["heldout.parquet"] < 3e6
