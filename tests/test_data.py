"""One file format: what is refused by name, what is read, and what a first step warns of."""

import copy
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import transformers
from conftest import TOY, run_config, toy_config, write_parquet
from PIL import Image, ImageFile

import observe_r1
import rewards
from observe_r1 import check_problem, encode_prompts, load_problems, read_problems


def picture(mode="L", size=(56, 56), kind="PNG"):
    """An encoded picture, as a file of problems holds it."""
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return {"bytes": file.getvalue(), "path": None}


def damaged():
    """A picture whose header is whole and whose second half is missing."""
    noise = np.random.default_rng(0).integers(0, 255, (200, 300), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG")
    return {"bytes": file.getvalue()[:9000], "path": None}


GOOD = {"images": [picture()], "question": "How many?", "answer": "3"}


@pytest.fixture
def load(tmp_path, processor):
    """Load rows from a file."""

    def load(rows, **options):
        file = write_parquet(tmp_path / "raw.parquet", rows)
        return load_problems(file, processor, toy_config(output_dir=str(tmp_path), **options))

    return load


# ------------------------------------------------------------------------------------------ columns


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"answer": None}, r"columns \['answer'\] are missing, unknown or not text"),
        ({"images": None, "image": "a.png"}, r"columns \['image', 'images'\] are missing"),
        ({"image": "a.png", "options": "A"}, r"columns \['image', 'options'\] are "),
        ({"answer": 3}, "are missing, unknown or not text"),
        ({"answer": 1.1}, "are missing, unknown or not text"),
        ({"question": [{"text": "q"}]}, "cast"),
        ({"difficulty": "hard"}, "hard"),
    ],
)
def test_other_columns_are_refused_by_name(changes, why, load):
    row = {name: value for name, value in {**GOOD, **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=f"(?s)raw.parquet: .*{why}.*tools/convert.py"):
        load([row])


@pytest.mark.parametrize("content", ["", "question,answer\n1,2\n"])
def test_what_is_no_parquet_is_refused(content, tmp_path, processor):
    (tmp_path / "raw.csv").write_text(content)
    with pytest.raises(ValueError, match=r"raw.csv: .*tools/convert.py"):
        load_problems(str(tmp_path / "raw.csv"), processor, toy_config())


def test_columns_that_may_be_there_are_read(load):
    more = {"id": "x", "category": "c", "difficulty": 0.5, "complexity": 9.0, "stage": 4.0}
    (row,) = load([{**GOOD, **more}])
    assert {name: row[name] for name in more} == more


# -------------------------------------------------------------------------------------- single rows


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"answer": " "}, "a score of the ladder is empty"),
        ({"answer": None}, "a score of the ladder is empty"),
        ({"question": ""}, "a score of the ladder is empty"),
        ({"images": None}, "a score of the ladder is empty"),
        ({"question": "<image> and <image>?"}, "2 marks <image> for 1 pictures"),
        ({"question": "<image>?", "images": []}, "1 marks <image> for 0 pictures"),
        ({"question": "<image>?", "images": [picture()] * 2}, "1 marks <image> for 2 pictures"),
        ({"question": "What <|im_end|> is it?"}, "control tokens ['<|im_end|>']"),
        ({"question": "What <|image_pad|> is it?"}, "control tokens ['<|image_pad|>']"),
        ({"images": [{"bytes": b"none", "path": None}]}, "cannot identify image file"),
        ({"images": [{"bytes": None, "path": "a.png"}]}, "cannot identify image file"),
        ({"images": [picture(size=(1, 300))]}, "aspect ratio"),
        ({"images": [picture(size=(2000, 11))]}, "so thin that --max_pixels leaves nothing"),
        ({"question": "long " * 300}, "; a smaller --max_pixels makes it shorter"),
        *[({"images": [picture(mode)]}, f"a picture in {mode}, ") for mode in ("RGBA", "P", "1")],
        *[({"images": [picture(mode)]}, f"a picture in {mode}, ") for mode in ("LA", "I;16")],
        ({"images": [picture(), picture("CMYK", kind="JPEG")]}, "a picture in CMYK, "),
    ],
)
def test_a_row_that_would_train_wrong_is_named(changes, why, load):
    with pytest.raises(ValueError) as error:
        load([GOOD, {**GOOD, **changes}], max_prompt_tokens=300)
    first, line = str(error.value).splitlines()
    assert first.endswith("raw.parquet: 1 unusable rows") and why in line
    assert line.startswith("  row 1: ")


def test_a_missing_score_and_an_enormous_picture_are_named(load, monkeypatch):
    with pytest.raises(ValueError, match="row 1: .* a score of the ladder is empty"):
        load([{**GOOD, "difficulty": 0.5}, {**GOOD, "difficulty": None}])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match="row 0: Image size .* exceeds limit"):
        load([GOOD])


def test_rows_that_are_fine(load):
    rows = [GOOD, {**GOOD, "images": [picture("RGB", kind="JPEG")], "question": "See <image>."}]
    rows.append({**GOOD, "images": [], "question": "Is <observe> a tag, and <|this|> none?"})
    assert [len(row["images"]) for row in load(rows)] == [1, 1, 0]


@pytest.mark.parametrize("limits", [(3136, 2560000), (784, 50176)])
def test_the_length_of_a_prompt_is_exact(limits, processor, problems):
    """By arithmetic as encoded: random sizes, up to three pictures, texts of every kind."""
    config = toy_config(min_pixels=limits[0], max_pixels=limits[1])
    size = {"shortest_edge": limits[0], "longest_edge": limits[1]}
    processor = transformers.AutoProcessor.from_pretrained(TOY / "model", size=size)
    random = np.random.default_rng(0)
    texts = ["How much is ∫√x dx, 三角形, <observe>, \n\n  and <|this|>?", "What is 3+4?"]
    for case in range(12):
        sizes = np.exp(random.uniform(np.log(9), np.log(1200), (case % 4, 2))).astype(int)
        stored = [picture("RGB", size) for size in sizes.tolist()]
        problem = {"images": stored, "question": texts[case % 2], "answer": "1"}
        seen = {**problem, "images": [Image.open(io.BytesIO(one["bytes"])) for one in stored]}
        length = encode_prompts([seen], processor, config)[0]["input_ids"].shape[1]
        check_problem(problem, processor, replace(config, max_prompt_tokens=length))
        with pytest.raises(ValueError, match=f"has {length} tokens"):
            check_problem(problem, processor, replace(config, max_prompt_tokens=length - 1))


def test_a_picture_stands_where_its_mark_stands(processor, config):
    images = [Image.new("L", (56, 56)), Image.new("L", (28, 84))]
    vision = r"<\|vision_start\|>((?:<\|image_pad\|>)+)<\|vision_end\|>"
    for question, wanted in (
        ("Compare <image> with <image>, please.", rf"Compare {vision} with {vision}, please\."),
        ("Compare.", rf"{vision}{vision}Compare\."),
    ):
        problem = {"images": images, "question": question}
        (prompt,) = encode_prompts([problem], processor, config)
        text = processor.decode(prompt["input_ids"][0])
        match = re.search(rf"user\n{wanted}<\|im_end\|>", text)
        assert [match[k].count("<|image_pad|>") for k in (1, 2)] == [4, 3]


# ------------------------------------------------------------------------------ pictures and models


def test_loading_decodes_no_picture_and_a_damaged_one_is_named_when_read(load, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", None)
        problems = load([GOOD, {**GOOD, "images": [damaged()]}])
    (row,) = read_problems(problems, [0])
    assert row["row"] == 0 and row["images"][0].size == (56, 56)
    with pytest.raises(ValueError, match="row 1: a picture cannot be decoded: .*truncated"):
        read_problems(problems, [0, 1])


def test_a_template_that_begins_the_response_is_refused(processor, config):
    prefilled = copy.copy(processor)
    for tag in ("<think>", "<think>\n", "<observe>"):
        end = f"assistant\n{tag}{{% endif %}}"
        prefilled.chat_template = re.sub(
            r"assistant\n\{% endif %\}", lambda _, end=end: end, processor.chat_template
        )
        with pytest.raises(ValueError, match="the chat template begins the response"):
            check_problem(GOOD, prefilled, config)


# ----------------------------------------------------------------------------------- the first step


@pytest.mark.filterwarnings("error:Mean of empty slice")  # in steps that move nothing
@pytest.mark.parametrize("missing", ["accuracy", "format"])
def test_a_first_step_that_earns_nothing_is_shown(missing, few, tmp_path, capsys):
    """The run says what the checker reads, and goes on."""
    texts = {
        "accuracy": "<observe> a </observe> <think> b </think> <answer> 31415 </answer>",
        "format": "It is \\boxed{4}.",
    }

    def rollout(*arguments):
        rollouts = observe_r1.rollout(*arguments)
        rollouts.texts = [[texts[missing]] * 2 for _ in rollouts.texts]
        return rollouts

    def right(response, gold):
        return float("4}" in response)

    options = {"num_generations": 2, "max_new_tokens": 4, "prompts_per_step": 8, "save_steps": 0}
    config = run_config(few, tmp_path / "run", max_steps=2, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards, "accuracy_reward", right)
        summary = observe_r1.train(config, rollout)
    screen = capsys.readouterr().out
    assert "warning: 1 answers can never be matched, for example 'N/A'" in screen
    assert screen.count(f"earned anything for {missing}") == 1 == screen.count("earned anything")
    assert texts[missing] in screen and "tools/walkthrough.py --problem 0" in screen
    assert f"reads {rewards.extract_answer(texts[missing])!r}, the answer is " in screen
    assert summary["steps"] == 2
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
