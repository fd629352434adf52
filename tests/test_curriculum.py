"""The ladder and the order of training: the paper's figure, then properties of random mixtures."""

import numpy as np
import pyarrow.parquet
import pytest
from conftest import TOY

from observe_r1 import Config, mix_ladder, select_problems, training_steps

# Read off the paper's figure: how many of 1,000 problems are of each level; the share of five
# neighbouring levels in each stage, from the lowest of them; the sizes of the stages per 1,000.
FIGURE = np.array([15, 35, 50, 75, 135, 150, 150, 200, 190])
SHARES = [
    [0.29, 0.18, 0.19, 0.19, 0.17],
    [0.05, 0.50, 0.15, 0.155, 0.15],
    [0.02, 0.08, 0.51, 0.17, 0.23],
    [0.03, 0.07, 0.505, 0.21, 0.19],
    [0.03, 0.07, 0.58, 0.19, 0.14],
    [0.03, 0.10, 0.575, 0.15, 0.15],
    [0.05, 0.12, 0.54, 0.18, 0.12],
    [0.02, 0.055, 0.10, 0.685, 0.14],
    [0.02, 0.05, 0.07, 0.15, 0.72],
]
STAGES = [42, 42, 54, 80, 112, 132, 155, 178, 206]


def lowest(stage):
    """The first of the five levels that a stage may hold: its own and the four nearest."""
    return min(max(stage - 2, 0), 4)


def level_of(wrong, G):
    """0: always solved, 8: never solved; between them seven levels of equal width."""
    return 0 if wrong == 0 else 8 if wrong == G else 1 + 7 * wrong // G


def contents(level, order, stage):
    """How many problems of each level stand in each stage, [stage,level]."""
    counts = np.zeros((9, 9))
    np.add.at(counts, (stage, level[order]), 1)
    return counts


def test_mix_ladder_reproduces_the_figure():
    level = np.repeat(np.arange(9), 10 * FIGURE)
    order, stage = mix_ladder(level / 8, np.ones(len(level)))
    counts = contents(level, order, stage)
    assert counts.sum(1) == pytest.approx(np.multiply(STAGES, 10), abs=10)
    for s, shares in enumerate(SHARES):
        mine = counts[s, lowest(s) : lowest(s) + 5] / counts[s].sum()
        assert mine == pytest.approx(np.divide(shares, sum(shares)), abs=0.02)
    # The own level fills each tenth of its stage alike, not the beginning or the end.
    tenths = [np.mean(part == 8) for part in np.array_split(level[order[stage == 8]], 10)]
    assert max(tenths) - min(tenths) < 0.05


def random_mixture(random):
    """Problems of any number, G and mixture of levels: how many of G were wrong, mean lengths."""
    n, G = int(np.exp(random.uniform(0, 8))), int(random.integers(2, 17))
    share = random.dirichlet(np.full(G + 1, random.choice([0.1, 0.5, 2])))
    if random.random() < 0.3:  # the paper's levels, or those of a model that solves much
        G, share = 8, FIGURE[:: random.choice([1, -1])] / 1000
    return random.choice(G + 1, n, p=share), G, random.integers(1, 50, n).astype(float)


@pytest.mark.parametrize("seed", range(300))
def test_any_mixture_becomes_a_ladder(seed):
    wrong, G, complexity = random_mixture(np.random.default_rng(seed))
    order, stage = mix_ladder(wrong / G, complexity, seed)
    level, n = np.array([level_of(w, G) for w in wrong]), len(wrong)
    counts, level_size = contents(level, order, stage), np.bincount(level, minlength=9)
    size = counts.sum(1)
    assert (np.diff(stage) >= 0).all() and (counts.sum(0) == level_size).all()
    for s in range(9):
        assert counts[s, lowest(s) : lowest(s) + 5].sum() == size[s]
    for k in range(9):  # each problem of a level once, short ones first
        members = sorted(np.flatnonzero(level == k), key=lambda i: (complexity[i], i))
        assert order[level[order] == k].tolist() == members
    assert (size <= 1.6 * level_size + n / 20).all()
    assert (size > 0)[level_size >= 0.035 * n].all()
    means = (counts @ np.arange(9) / 8 / size.clip(1))[size >= 0.03 * n]
    assert (np.diff(means) >= -0.02).all()


def test_mixing_is_not_left_off_without_need():
    """A model that solves much, nine equal levels: each stage but the first is mixed as asked."""
    for counts in ([400, 200, 100, 80, 70, 50, 40, 30, 30], [111] * 9):
        level = np.repeat(np.arange(9), counts)
        own = contents(level, *mix_ladder(level / 8, np.ones(len(level)))).diagonal()
        assert (own[1:] < 0.8 * np.array(counts[1:])).all()


@pytest.mark.parametrize("G", range(2, 17))
def test_levels_of_any_number_of_responses(G):
    """A problem alone stands in the stage of its own level."""
    for wrong in range(G + 1):
        for difficulty in (wrong / G, 1 - (G - wrong) / G):
            assert mix_ladder([difficulty], [1.0])[1].tolist() == [level_of(wrong, G)]


def test_mix_ladder_follows_its_seed():
    level = np.repeat(np.arange(9), 30)
    orders = [mix_ladder(level / 8, np.ones(270), seed)[0].tolist() for seed in (3, 3, 4)]
    assert orders[0] == orders[1] != orders[2]


def test_select_problems():
    """Of difficulty 0 the half with the shorter responses goes; of equal ones the first."""
    random = np.random.default_rng(0)
    for _ in range(100):
        n = random.integers(0, 40)
        difficulty, complexity = random.integers(0, 3, n) / 2, random.integers(1, 8, n)
        easy = sorted(np.flatnonzero(difficulty == 0), key=lambda i: (complexity[i], i))
        left = set(range(n)) - set(easy[: len(easy) // 2])
        assert select_problems(difficulty, complexity).tolist() == sorted(left)


def test_training_steps():
    """All problems or so many, easy to hard or shuffled, in steps of nearly equal size."""
    random = np.random.default_rng(0)
    for _ in range(200):
        n, B, steps = (int(random.integers(1, top)) for top in (1000, 40, 50))
        config = Config(prompts_per_step=B, max_steps=int(random.choice([0, steps])))
        thinned = 0 < config.max_steps * B < n
        parts = training_steps(range(n), config)
        rows, sizes = np.concatenate(parts), [len(part) for part in parts]
        assert len(rows) == (config.max_steps * B if thinned else n)
        assert len(parts) == (config.max_steps if thinned else -(-n // B))
        assert max(sizes) <= B and max(sizes) - min(sizes) <= 1
        gaps = np.diff(rows)
        assert rows[0] == 0 and (rows[-1] == n - 1 or len(rows) == 1)
        assert (gaps > 0).all() and np.ptp(gaps) <= 1 if len(gaps) else True
        config.shuffle, config.seed = True, 3
        shuffled = np.concatenate(training_steps(range(n), config))
        assert len(set(shuffled)) == len(rows) and set(shuffled) <= set(range(n))
    order = np.concatenate(training_steps(range(100), Config(shuffle=True, seed=3)))
    assert not np.array_equal(order, np.arange(100))
    other = np.concatenate(training_steps(range(100), Config(shuffle=True, seed=4)))
    assert not np.array_equal(order, other)


@pytest.mark.parametrize("seed", range(3))
def test_thinning_keeps_the_mixture_of_each_stage(seed):
    """An even stride must not beat against even places: random thinning gives 1.6 to 2.1."""
    level = np.repeat(np.arange(9), 54 * FIGURE)
    order, stage = mix_ladder(level / 8, np.ones(len(level)), seed)
    rows = np.concatenate(training_steps(order, Config(max_steps=42, prompts_per_step=128)))
    whole = contents(level, order, stage)
    thin = contents(level, order[rows], stage[rows])
    n = thin.sum(1)
    distance = abs(thin / n[:, None] - whole / whole.sum(1)[:, None]).sum(1) / 2
    assert (distance * np.sqrt(n)).max() <= 2.3


def test_the_toy_keeps_its_promises():
    """Held-out pictures are unseen, difficulty rises, the files stay small."""
    files = [TOY / "ladder.parquet", TOY / "heldout.parquet"]
    ladder, held_out = (pyarrow.parquet.read_table(file).to_pylist() for file in files)
    seen = {picture["bytes"] for row in ladder for picture in row["images"]}
    assert not any(picture["bytes"] in seen for row in held_out for picture in row["images"])
    means = [part.mean() for part in np.array_split([row["difficulty"] for row in ladder], 4)]
    assert means == sorted(means)
    assert sum(file.stat().st_size for file in files) < 3e6
    assert (TOY / "model" / "model.safetensors").stat().st_size < 5e6
