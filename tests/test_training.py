"""A whole run: what it logs."""

import pytest
from conftest import TOY, read_jsonl, run_config, toy_rows, write_parquet

import observe_r1
from observe_r1 import group_advantages, rollout, score_rollouts


def test_the_logs_of_a_run(tmp_path):
    """Means over all responses; of each step two groups, those that teach most; held-out ones."""
    held_out = write_parquet(tmp_path / "held_out.parquet", toy_rows("heldout", [7, 11, 23]))
    calls, options = [], {"num_samples": 0, "eval_steps": 2, "eval_data": held_out, "max_steps": 3}
    config = run_config(TOY / "ladder.parquet", tmp_path / "run", num_generations=8, **options)

    def recorded(model, processor, problems, config):
        calls.append((problems, rollout(model, processor, problems, config), config))
        return calls[-1][1]

    summary = observe_r1.train(config, recorded)
    metrics, logged = (
        read_jsonl(tmp_path / "run" / f"{log}.jsonl") for log in ("metrics", "rollouts")
    )
    steps, measured = iter(metrics), []
    for problems, rollouts, how in calls:
        scores = score_rollouts(rollouts, problems, how)
        if how.num_generations == 1:  # held-out problems
            measured.append((how.temperature, scores["accuracy"].mean().item()))
            continue
        line = next(steps)
        for name, values in scores.items():
            assert line[name] == pytest.approx(values.double().mean().item(), rel=1e-6), name
        assert line["zero_weight_fraction"] == (scores["weight"] == 0).double().mean()
        scores["advantage"] = group_advantages(scores["reward"], scores["weight"])
        rows = [row for row in logged if row["step"] == line["step"]]
        assert [row["weight"] for row in rows] == sorted(scores["weight"].tolist())[:1:-1]
        for row in rows:
            b = [problem["row"] for problem in problems].index(row["row"])
            assert row["responses"] == rollouts.texts[b] and row["answer"] == problems[b]["answer"]
            for name, values in scores.items():
                assert row[name] == pytest.approx(values[b].tolist()), name
    assert [line["optimizer_step"] for line in metrics] == [2, 4, 6]
    accuracies = (
        summary["accuracy_before"],
        metrics[1]["eval_accuracy"],
        summary["accuracy_after"],
    )
    assert measured == [(0, pytest.approx(accuracy, abs=1e-4)) for accuracy in accuracies]
