"""tools/bench.py, tools/gpu_check.sh and tools/vllm_rollout.py, as far as a CPU can tell."""

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_python

import observe_r1


def load_tool(name):
    specification = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)
    return tool


@pytest.fixture(scope="module")
def bench():
    return load_tool("bench")


# ------------------------------------------------------------------------------------------ engine


class Engine:
    """Stands in for vllm.LLM: notes what it is given and answers with the responses of `ours`."""

    ours = None
    seen = None

    def __init__(self, model, **options):
        self.seen.update(options, multiprocessing=os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"])

    def apply_model(self, function):
        def load_weights(named):
            self.seen["weights"] = dict(named)

        function(SimpleNamespace(load_weights=load_weights))

    def generate(self, requests, settings, use_tqdm):
        self.seen.update(requests=requests, settings=settings)
        outputs = []
        for ids, mask in zip(self.ours.response_ids, self.ours.mask):
            group = [
                SimpleNamespace(token_ids=row[on.bool()].tolist()) for row, on in zip(ids, mask)
            ]
            outputs.append(SimpleNamespace(outputs=group))
        return outputs


@pytest.fixture
def engine(monkeypatch):
    fake = SimpleNamespace(LLM=Engine, SamplingParams=lambda **options: options)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    Engine.seen = {}
    return load_tool("vllm_rollout")


def test_the_engine_gives_the_rollouts_of_the_script(engine, model, processor, problems, config):
    torch.manual_seed(0)
    Engine.ours = ours = observe_r1.rollout(model, processor, problems, config)
    theirs = engine.vllm_rollout(model, processor, problems, config)
    assert torch.equal(theirs.response_ids, ours.response_ids)
    assert torch.equal(theirs.mask, ours.mask)
    assert theirs.texts == ours.texts
    assert theirs.prompt.keys() == ours.prompt.keys()
    for name, values in ours.prompt.items():
        assert torch.equal(theirs.prompt[name], values), name

    seen = Engine.seen
    assert seen["multiprocessing"] == "0"
    assert seen["weights"].keys() == dict(model.named_parameters()).keys()
    settings = seen["settings"]
    assert len(settings) == len(seen["requests"]) == len(problems)
    assert len({one["seed"] for one in settings}) == len(problems)  # no two prompts share noise
    for one in settings:
        assert one["n"] == config.num_generations
        assert one["max_tokens"] == config.max_new_tokens
        assert one["stop_token_ids"] == sorted(model.generation_config.eos_token_id)
        assert set(one["logit_bias"]) == set(observe_r1.vision_tokens(model))
    side = processor.image_processor.patch_size * processor.image_processor.merge_size
    for request, problem in zip(seen["requests"], problems):
        pictures = request["multi_modal_data"].get("image", [])
        assert request["prompt"].count("<|image_pad|>") == len(pictures) == len(problem["images"])
        assert request["prompt"].count(problem["question"]) == 1
        # Already of the size that the script's own prompt has: the engine changes nothing more.
        tokens = sum(picture.width * picture.height // side**2 for picture in pictures)
        encoded = observe_r1.encode_prompts([problem], processor, config)
        assert tokens == (encoded["input_ids"] == model.config.image_token_id).sum()


def test_the_engine_refuses_what_it_cannot_do(
    engine, model, processor, problems, config, monkeypatch
):
    with pytest.raises(ValueError, match="lora_rank"):
        engine.vllm_rollout(model, processor, problems, replace(config, lora_rank=4))
    crowded = {**problems[0], "images": problems[0]["images"] * 9}
    with pytest.raises(ValueError, match="more than 8 pictures"):
        engine.vllm_rollout(model, processor, [crowded], config)
    monkeypatch.setattr(observe_r1, "WORLD", 2)
    with pytest.raises(ValueError, match="torchrun"):
        engine.vllm_rollout(model, processor, problems, config)


def test_without_vllm_one_line_says_so(tmp_path):
    run = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "vllm_rollout.py"), "--model", "nowhere"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert run.stderr == "vllm_rollout: tools/vllm_rollout.py needs vllm: pip install vllm\n"


# ----------------------------------------------------------------------------------------- measures


def test_shapes_are_those_of_the_published_models(bench):
    sizes = {name: bench.random_model(name, "meta").num_parameters() for name in ("3b", "7b")}
    assert sizes == {"3b": 3_754_622_976, "7b": 8_292_166_656}


def test_products_in_bf16_and_their_gradients(bench, monkeypatch):
    """Against fp32 with the same rounded factors: forward pass, and gradients of all three."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8).bfloat16().requires_grad_()
    weight = torch.randn(40000, 8).bfloat16().requires_grad_()  # wider than one piece
    bias = torch.randn(40000).bfloat16().requires_grad_()
    exact = [values.detach().float().requires_grad_() for values in (x, weight, bias)]
    upstream = torch.randn(2, 5, 40000).bfloat16()
    ours = bench.Product.apply(x, weight, bias)
    theirs = torch.nn.functional.linear(*exact)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), theirs, atol=0.05, rtol=0.02)
    ours.backward(upstream)
    theirs.backward(upstream.float())
    for values, expected in zip((x, weight, bias), exact):
        scale = expected.grad.abs().max()
        torch.testing.assert_close(
            values.grad.float() / scale, expected.grad / scale, atol=0.02, rtol=0
        )
    monkeypatch.setattr(bench.Product, "real", False)
    nothing = bench.Product.apply(x, weight, None)
    assert nothing.shape == ours.shape and nothing.dtype == ours.dtype and not nothing.any()


def test_like_a_card_is_undone(bench):
    before = torch.nn.functional.linear, observe_r1.compute_dtype
    with bench.like_a_card():
        assert observe_r1.compute_dtype(torch.device("cpu")) == torch.bfloat16
        assert torch.nn.functional.linear is not before[0]
    assert (torch.nn.functional.linear, observe_r1.compute_dtype) == before


PHASES = """
import sys
sys.path.insert(0, {tools!r})
import bench, torch
peaks = {{}}
with bench.phase("nothing", peaks):
    pass
with bench.phase("a quarter of a GiB", peaks):
    block = torch.ones(2**26)
    del block
print(*peaks["nothing"][:2], *peaks["a quarter of a GiB"][:2])
"""


def test_the_peak_of_a_phase_is_what_it_held(tmp_path):
    """In a fresh process, because one that grew may reuse what it freed."""
    result = run_python("-c", PHASES.format(tools=str(ROOT / "tools")), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    peak, rest, higher, left = map(float, result.stdout.splitlines()[-1].split())
    assert higher - peak == pytest.approx(0.25, abs=0.03)
    assert left == pytest.approx(rest, abs=0.03)


def test_rows_for_a_card_run_on_the_cpu(bench, capsys):
    options = SimpleNamespace(
        model="small",
        layers=1,
        tokens=4,
        picture=16,
        batches=[8],
        repeats=1,
        bandwidth=1e10,
        flops=1e11,
    )
    bench.gpu(options)
    rollout, update = capsys.readouterr().out.splitlines()[-2:]
    assert "8 responses of 4 tokens" in rollout and "nan" not in rollout
    assert "tokens/s" in update and "nan" not in update


def test_the_check_for_a_card_ends_in_nine_minutes():
    text = (ROOT / "tools" / "gpu_check.sh").read_text()
    limits = [int(limit) for limit in re.findall(r"^ *part \w+ (\d+) ", text, re.MULTILINE)]
    assert len(limits) == 6
    assert sum(limits) <= 9 * 60
    assert (
        subprocess.run(["bash", "-n", ROOT / "tools" / "gpu_check.sh"], check=False).returncode == 0
    )
