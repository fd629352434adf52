"""Reading problems: every accepted form, and everything that would train silently wrong."""

import hashlib
import io
import json
import math
import re
import threading
from dataclasses import replace

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import run_config, write_jsonl, write_parquet
from PIL import Image, ImageFile

import observe_r1
from observe_r1 import (
    Config,
    encode_prompts,
    load_problems,
    prompt_length,
    read_problems,
)

GOOD = {"question": "q", "answer": "1"}


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Two pictures, a truncated JPEG whose header is whole, and a place for files of rows."""
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (56, 56), (255, 0, 0)).save(tmp_path / "pictures/a.png")
    Image.new("L", (28, 84)).save(tmp_path / "pictures/b.jpg")
    noise = np.random.default_rng(0).integers(0, 255, (200, 300), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), "JPEG")
    (tmp_path / "pictures/cut.jpg").write_bytes(content[: len(content) // 2])
    return tmp_path


def load(folder, rows, name="data.jsonl", config=None, **options):
    return load_problems(write_jsonl(folder / name, rows), config=config, **options)


def refused(folder, rows, why, **options):
    """The error says which row it is, and why."""
    with pytest.raises(ValueError, match=why) as error:
        load(folder, rows, **options)
    return str(error.value)


# ------------------------------------------------------------------------------ accepted forms


@pytest.mark.parametrize(
    "row, question, answer, pictures",
    [
        ({"image": "pictures/a.png", "question": "How many?", "answer": 3}, "How many?", "3", 1),
        (
            {"images": ["pictures/a.png", "pictures/b.jpg"], "problem": "Sum?", "solution": "4"},
            "Sum?",
            "4",
            2,
        ),
        ({"image": "pictures/a.png", "images": [], **GOOD}, "q", "1", 1),
        ({"image": None, "images": ["pictures/a.png"], **GOOD}, "q", "1", 1),
        ({"question": "2 + 2?", "answer": " 4\n"}, "2 + 2?", "4", 0),
        ({"image": None, "question": "<b>?", "answer": True}, "<b>?", "True", 0),
        ({"question": "q", "answer": 0.5, "solution": "long"}, "q", "0.5", 0),
        ({"question": "q", "answer": 0}, "q", "0", 0),
    ],
)
@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "DATA.JSONL"])
def test_rows_of_a_file(folder, row, question, answer, pictures, name):
    rows = [row, row]
    file = folder / name
    file.write_text(json.dumps(rows) if name == "data.json" else "\n".join(map(json.dumps, rows)))
    problems = load_problems(str(file))
    assert (problems[0]["question"], problems[0]["answer"]) == (question, answer)
    assert problems[0]["id"] == "0" and problems[1]["id"] == "1"
    assert [image.size for image in problems[1]["images"]] == [(56, 56), (28, 84)][:pictures]


def test_rows_that_differ(folder, capsys):
    """Numbers and texts, one, two and no picture, with an id and without, in one file."""
    rows = [
        {"id": "r", "image": "pictures/a.png", "question": "q", "answer": 3},
        {"id": 7, "image": ["pictures/a.png", "pictures/b.jpg"], "question": "q", "answer": "x"},
        {"question": "q", "answer": 1.5, "category": "sums"},
    ]
    problems = load(folder, rows)
    assert problems["answer"][:] == ["3", "x", "1.5"] and problems["id"][:] == ["r", "7", "2"]
    assert [len(row["images"]) for row in problems] == [1, 2, 0]
    assert problems["category"][:] == ["", "", "sums"]
    assert "3 problems with 3 pictures" in capsys.readouterr().out


def test_csv(folder):
    text = "question,answer,image\nHow many?,3,pictures/a.png\nWho?,Ann,pictures/b.jpg\nWhy?,4,\n"
    (folder / "data.csv").write_text(text)
    problems = load_problems(str(folder / "data.csv"))
    assert problems["answer"][:] == ["3", "Ann", "4"]
    assert [len(row["images"]) for row in problems] == [1, 1, 0]


def test_parquet_holds_pictures_or_their_paths(folder):
    red = (folder / "pictures/a.png").read_bytes()
    inside = [{**GOOD, "image": {"bytes": red, "path": None}}]
    several = [{**GOOD, "images": [{"bytes": red}, {"bytes": red}]}, {**GOOD, "images": []}]
    for rows, sizes in ((inside, [1]), (several, [2, 0])):
        marked = load_problems(write_parquet(folder / "marked.parquet", rows))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "plain.parquet")
        plain = load_problems(str(folder / "plain.parquet"))
        for problems in (marked, plain):
            assert [len(row["images"]) for row in problems] == sizes
            assert problems[0]["images"][0].getpixel((0, 0)) == (255, 0, 0)
        assert marked["digest"][:] == plain["digest"][:]
    paths = [{**GOOD, "image": {"bytes": None, "path": "pictures/a.png"}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(paths), folder / "paths.parquet")
    assert load_problems(str(folder / "paths.parquet"))[0]["images"][0].size == (56, 56)


def test_a_folder_of_pictures_and_one_of_files(folder):
    (folder / "pictures/cut.jpg").unlink()
    rows = [{"file_name": name, **GOOD} for name in ("a.png", "b.jpg")]
    write_jsonl(folder / "pictures/metadata.jsonl", rows)
    assert load_problems(str(folder / "pictures"))[1]["images"][0].size == (28, 84)
    (folder / "rows").mkdir()
    Image.new("L", (10, 20)).save(folder / "rows/c.png")
    write_jsonl(folder / "rows/train.jsonl", [{**GOOD, "image": "c.png"}])
    write_jsonl(folder / "rows/test.jsonl", [{**GOOD, "answer": "2"}] * 3)
    (folder / "rows/c.png").rename(folder / "c.png")  # next to rows/ the library sees a picture
    write_jsonl(folder / "rows/train.jsonl", [{**GOOD, "image": "../c.png"}])
    assert load_problems(str(folder / "rows"))[0]["images"][0].size == (10, 20)
    assert len(load_problems(str(folder / "rows"), "test")) == 3


def test_paths_start_at_the_file_or_at_the_root(folder, monkeypatch):
    rows = [{**GOOD, "image": "pictures/a.png"}]
    rows.append({**GOOD, "image": str(folder / "pictures/b.jpg")})
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    write_jsonl(folder / "data.jsonl", rows)
    assert len(load_problems("../data.jsonl")) == 2


@pytest.mark.parametrize("name", ["a [1].jsonl", "b*?.jsonl", "c{x,y}.jsonl", "d é.jsonl"])
def test_file_names_are_no_patterns(folder, name):
    assert len(load(folder, [GOOD], name)) == 1


def test_a_mended_picture_is_looked_at_again(folder):
    rows = [{**GOOD, "image": "pictures/late.png"}]
    refused(folder, rows, "late.png")
    Image.new("RGB", (30, 30)).save(folder / "pictures/late.png")
    first = load(folder, rows)
    assert first[0]["images"][0].size == (30, 30)
    Image.new("RGB", (30, 30), (9, 9, 9)).save(folder / "pictures/late.png")
    assert load(folder, rows)["digest"][0] != first["digest"][0]


def test_the_digest_tells_question_answer_and_pictures_apart(folder):
    rows = [GOOD, {**GOOD, "answer": "2"}, {**GOOD, "question": "Q"}]
    rows += [{**GOOD, "image": "pictures/a.png"}, {**GOOD, "image": "pictures/b.jpg"}]
    problems = load(folder, [*rows, {**GOOD, "id": "another", "category": "c"}])
    assert len(set(problems["digest"][:5])) == 5
    assert problems["digest"][5] == problems["digest"][0]
    content = b"q\0001" + (folder / "pictures/a.png").read_bytes()
    assert problems["digest"][3] == hashlib.sha256(content).hexdigest()


# -------------------------------------------------------------------------- refused by name


@pytest.mark.parametrize(
    "bad, why",
    [
        ({"image": "pictures/none.png"}, "none.png"),
        ({"image": "pictures"}, "directory"),
        ({"image": "data.jsonl"}, "cannot identify"),
        ({"image": {"bytes": None, "path": None}}, "no path of a picture"),
        ({"image": {"url": "x"}}, "no path of a picture"),
        ({"image": [[1, 2], [3, 4]]}, "no path of a picture"),
        ({"images": ["pictures/a.png", None]}, "no path of a picture"),
        ({"image": "https://example.org/a.png"}, "No such file"),
        ({"image": "pictures/a.png", "images": ["pictures/b.jpg"]}, "both"),
        ({"answer": " "}, "empty"),
        ({"answer": None}, "empty"),
        ({"question": ""}, "empty"),
        ({"question": [{"type": "text", "text": "q"}]}, "is no text"),
        ({"question": {"text": "q"}}, "is no text"),
        ({"answer": ["4"]}, "is no text"),
        ({"answer": {"value": 4}}, "is no text"),
    ],
)
def test_bad_rows_are_named(folder, bad, why):
    file = folder / "data.jsonl"
    message = refused(folder, [GOOD, {"id": "x", **GOOD, **bad}], why)
    assert re.search(rf"{file}: row 1 \(id x\): .*{why}", message) and "--skip_bad" in message


def test_bytes_without_a_name_are_refused(folder):
    rows = [{**GOOD, "image": (folder / "pictures/a.png").read_bytes()}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data.parquet")
    with pytest.raises(ValueError, match=r"row 0 \(id 0\): .* no path of a picture; .*convert.py"):
        load_problems(str(folder / "data.parquet"))


def test_all_bad_rows_are_listed_and_skip_bad_leaves_them_out(folder, capsys):
    rows = [{**GOOD, "answer": "" if k % 3 == 0 else str(k)} for k in range(9)]
    message = refused(folder, rows, "3 rows cannot be used")
    assert [int(row) for row in re.findall(r"row (\d+) ", message)] == [0, 3, 6]
    problems = load(folder, rows, config=Config(skip_bad=True))
    assert problems["answer"][:] == ["1", "2", "4", "5", "7", "8"]
    assert "3 rows cannot be used" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds no problems"):
        load(folder, [{**GOOD, "answer": ""}], config=Config(skip_bad=True))


@pytest.mark.parametrize(
    "name",
    [
        "image_list",
        "image_paths",
        "img_path",
        "image_url",
        "picture",
        "Image",
        "video",
        "photos",
        "imgs",
        "decoded_image",
        "options",
        "choices",
        "option",
        "A",
        "file_name",
        "figure",
        "diagram",
        "media",
        "jpg",
        "frame",
        "path",
    ],
)
def test_columns_of_pictures_or_options_that_would_be_ignored(folder, name):
    """A picture column of an unknown name is found by its name or by what it holds."""
    refused(folder, [GOOD, {**GOOD, name: "pictures/a.png"}], rf"columns \['{name}'\] would be")


def test_columns_of_pictures_are_found_by_their_type(folder):
    red = {"bytes": (folder / "pictures/a.png").read_bytes(), "path": None}
    table = datasets.Dataset.from_list([{**GOOD, "scene": red}])
    table.cast_column("scene", datasets.Image()).to_parquet(folder / "data.parquet")
    with pytest.raises(ValueError, match=r"columns \['scene'\] would be ignored; .*convert.py"):
        load_problems(str(folder / "data.parquet"))
    rows = [{**GOOD, "scene": red["bytes"]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data.parquet")
    with pytest.raises(ValueError, match=r"columns \['scene'\]"):
        load_problems(str(folder / "data.parquet"))


def test_other_columns_are_ignored_aloud(folder, capsys):
    rows = [{**GOOD, "topic": "sums", "source": "MathVista", "difficulty": "hard", "level": 3}]
    assert load(folder, rows)["difficulty"][:] == [None]
    assert "ignores the columns difficulty, level, source, topic" in capsys.readouterr().out


@pytest.mark.parametrize("names", [["question"], ["answer"], ["Question", "Answer"], ["messages"]])
def test_missing_columns_are_named(folder, names):
    refused(folder, [dict.fromkeys(names, "x")], "no column '(question|answer)' among .*convert.py")


@pytest.mark.parametrize(
    "question, pictures, why",
    [
        ("<image>q", 0, "1 marks <image> in the question for 0 pictures"),
        ("<image><image>q", 1, "2 marks"),
        ("<image>q", 2, "1 marks"),
        ("<image 1> q", 1, "'<image 1>'.* is no <image>; .*convert"),
        ("<image1> q", 0, "is no <image>"),
        ("<IMAGE> q", 1, "is no <image>"),
        ('<img src="a.png"/> q', 0, "is no <image>"),
        ("<image>, <image 2>", 2, "is no <image>"),
        ("<video> q", 0, "is no <image>"),
        ("![](a.png) q", 0, "is no <image>"),
    ],
)
def test_marks_and_pictures_must_agree(folder, question, pictures, why):
    row = {**GOOD, "question": question, "images": ["pictures/a.png"] * pictures}
    refused(folder, [row], f"row 0 .*{why}")


def test_a_picture_stands_where_its_mark_stands(folder, processor, config):
    """The text around the vision tokens of the encoded prompt, and which picture stands where."""
    question = "Compare <image> with <image>, please."
    row = {**GOOD, "question": question, "images": ["pictures/a.png", "pictures/b.jpg"]}
    (problem,) = load(folder, [row, row], config=config, processor=processor).select([0])
    prompt = encode_prompts([problem], processor, config)
    text = processor.decode(prompt["input_ids"][0])
    said = re.search(r"user\n(.*)<\|im_end\|>", text, re.DOTALL)[1]
    vision = r"<\|vision_start\|>((?:<\|image_pad\|>)+)<\|vision_end\|>"
    match = re.fullmatch(rf"Compare {vision} with {vision}, please\.", said)
    tokens = [match[k].count("<|image_pad|>") for k in (1, 2)]
    assert tokens == [4, 3] == (prompt["image_grid_thw"].prod(-1) // 4).tolist()
    problem["question"] = "Compare."
    said = processor.decode(encode_prompts([problem], processor, config)["input_ids"][0])
    assert re.search(rf"user\n{vision}{vision}Compare\.<", said)


@pytest.mark.parametrize(
    "gold",
    [
        "<answer> 3 </answer>",
        "so it is \\boxed{4}.",
        "16 / 4 = 4\n#### 4",
        "['4']",
        '["4"]',
        "{'answer': '4'}",
        "<think>2 + 2</think> 4",
        "The answer is 4.",
        "**Answer**: 4",
        "Final answer: 4",
    ],
)
def test_golds_that_hold_more_than_an_answer(folder, gold):
    refused(folder, [{**GOOD, "answer": gold}], "row 0 .*holds more than an answer; .*convert.py")


@pytest.mark.parametrize("gold", ["[1, 2)", "x < 3", "{1, 2}", "$\\frac{1}{2}$", "B. 4", "answers"])
def test_golds_that_hold_an_answer_alone(folder, gold):
    assert load(folder, [{**GOOD, "answer": gold}])["answer"][0] == gold


def test_golds_that_never_match_are_counted(folder, capsys):
    rows = [{**GOOD, "answer": answer} for answer in ("4", "N/A", "nan", "Ann")]
    assert len(load(folder, rows)) == 4
    assert "2 answers can never be matched, for example 'N/A'" in capsys.readouterr().out
    load(folder, rows[:1])
    assert "can never" not in capsys.readouterr().out


LEVELS = {"difficulty": 0.5, "complexity": 30.0, "stage": 4}


@pytest.mark.parametrize(
    "name, value",
    [
        ("difficulty", "hard"),
        ("difficulty", 3),
        ("difficulty", -0.1),
        ("difficulty", None),
        ("difficulty", math.nan),
        ("complexity", "long"),
        ("complexity", None),
        ("complexity", math.nan),
        ("complexity", -1.0),
        ("stage", "late"),
        ("stage", None),
    ],
)
def test_columns_of_a_ladder_are_whole_or_refused(folder, name, value):
    good = {**GOOD, **LEVELS}
    refused(folder, [good, {**good, name: value}], r"row 1 \(id 1\)")
    refused(folder, [{**good, name: value}], r"row 0 \(id 0\)")  # a whole column of it


def test_columns_of_a_ladder_are_read(folder, capsys):
    problems = load(folder, [{**GOOD, **LEVELS}, {**GOOD, **LEVELS, "difficulty": 1}])
    assert problems["difficulty"][:] == [0.5, 1] and problems["stage"][:] == [4, 4]
    assert problems["complexity"][:] == [30, 30] and "ignores" not in capsys.readouterr().out
    assert load(folder, [{**GOOD, "difficulty": 3}])["difficulty"][:] == [None]
    assert "ignores the columns difficulty" in capsys.readouterr().out


def test_control_tokens_in_a_question(folder, processor, config):
    for token in ("<|im_end|>", "<|image_pad|>", "<|vision_start|>"):
        row = {**GOOD, "question": f"What {token} is it?"}
        refused(folder, [row], "row 0 .*control tokens", config=config, processor=processor)
    row = {**GOOD, "question": "Is <observe> a tag, and <|this|> none?"}
    assert len(load(folder, [row], config=config, processor=processor)) == 1


# ----------------------------------------------------------------------------- whole sources


@pytest.mark.parametrize(
    "name, content, why",
    [
        ("data.jsonl", "", "is empty"),
        ("data.csv", "", "is empty"),
        ("data.parquet", "", "is empty"),
        ("data.json", "[]", "cannot be read"),
        ("data.jsonl", "\n\n", "cannot be read|holds no|no column"),
        ("data.jsonl", '{"question": ', "cannot be read"),
        ("data.parquet", "PAR1 and so on", "cannot be read"),
        ("data.csv", "question;answer\nq;1\n", "no column 'question'.*convert.py"),
        ("data.csv", "question, answer\nq, 1\n", "no column 'answer'.*convert.py"),
        ("data.json", '{"rows": [{"question": "q", "answer": 1}]}', "no column"),
        ("data.txt", "q 1", "none of .parquet.*convert.py"),
        ("data.tsv", "question\tanswer", "none of .parquet.*convert.py"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, why):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}: .*({why})"):
        load_problems(str(tmp_path / name))


def test_a_file_in_latin_1_is_refused(tmp_path):
    (tmp_path / "data.csv").write_bytes("question,answer\nwie groß,1\n".encode("latin-1"))
    with pytest.raises(ValueError, match="cannot be read: .*utf-8"):
        load_problems(str(tmp_path / "data.csv"))


def test_a_parquet_without_rows(tmp_path):
    table = pyarrow.table({name: pyarrow.array([], "string") for name in GOOD})
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    with pytest.raises(ValueError, match="data.parquet: "):
        load_problems(str(tmp_path / "data.parquet"))


@pytest.mark.parametrize(
    "source", ["nothing.jsonl", "data/nothing", "nothing", "./a/b", "../x", "a/b/c", "data/x.csv"]
)
def test_a_mistyped_path(source, tmp_path, monkeypatch):
    """Said at once: a path whose folder exists is no hub id."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match="there is no such file or folder"):
        load_problems(source)


def test_a_hub_id_without_a_network_is_said_at_once(tmp_path):
    with pytest.raises(ValueError, match="nobody/nothing: cannot be read: .*Hub"):
        load_problems("nobody/nothing")


def test_splits_and_subsets(folder, capsys):
    with pytest.raises(ValueError, match='Unknown split "test"'):
        load(folder, [GOOD], split="test")
    assert len(load(folder, [GOOD] * 4, split="train[:3]")) == 3
    load(folder, [GOOD], config=Config(subset="Math"))
    assert "--subset is for hub data sets and ignored" in capsys.readouterr().out


def test_a_subset_of_a_data_set_with_configurations(tmp_path):
    """As on the hub: a README that names configurations, here in a folder."""
    card = "---\nconfigs:\n"
    for number, name in enumerate(("Art", "Math")):
        write_jsonl(tmp_path / f"{name}.jsonl", [{**GOOD, "answer": str(number)}])
        card += f"- config_name: {name}\n  data_files: {name}.jsonl\n"
    (tmp_path / "README.md").write_text(card + "---\n")
    assert load_problems(str(tmp_path), config=Config(subset="Math"))["answer"][:] == ["1"]
    for subset in ("", "Maths"):
        with pytest.raises(ValueError, match="Art.*Math"):
            load_problems(str(tmp_path), config=Config(subset=subset))


# --------------------------------------------------------------------------------- pictures


def shown(image, processor, config):
    """What the model sees of a picture: its mean brightness, 0 to 1, and its patches."""
    batch = encode_prompts([{"images": [image], "question": "q"}], processor, config)
    mean = torch.tensor(processor.image_processor.image_mean).mean()
    std = torch.tensor(processor.image_processor.image_std).mean()
    return (batch["pixel_values"].mean() * std + mean).item(), batch["image_grid_thw"].tolist()


GREY = Image.new("L", (56, 56), 128)
PALETTE = Image.new("P", (56, 56), 0)
PALETTE.putpalette([0, 0, 0] * 256)


@pytest.mark.parametrize(
    "image, kind, brightness",
    [
        (GREY, "PNG", 0.5),
        (GREY.convert("RGB").convert("CMYK"), "JPEG", 0.5),
        (Image.fromarray(np.full((56, 56), 128 * 257, np.uint16)), "PNG", 0.5),
        (Image.fromarray(np.full((56, 56), 128 * 257, np.uint16)), "TIFF", 0.5),
        (Image.new("1", (56, 56), 1), "PNG", 1),
        (Image.new("RGBA", (56, 56), (0, 0, 0, 0)), "PNG", 1),
        (Image.new("LA", (56, 56), (0, 0)), "PNG", 1),
        (PALETTE, "GIF", 0),
        (GREY, "WEBP", 0.5),
        (GREY, "BMP", 0.5),
    ],
)
def test_brightness_of_pictures_of_every_kind(folder, processor, config, image, kind, brightness):
    """Grey of half brightness stays so in every mode and format; what is transparent is white."""
    (folder / "picture").write_bytes(encoded(image, kind))
    problems = load(folder, [{**GOOD, "image": "picture"}], config=config, processor=processor)
    found = shown(problems[0]["images"][0], processor, config)[0]
    assert found == pytest.approx(brightness, abs=0.02), image.mode


def test_a_transparent_palette_is_white(folder, processor, config):
    (folder / "picture").write_bytes(encoded(PALETTE, "PNG", transparency=0))
    problems = load(folder, [{**GOOD, "image": "picture"}])
    assert shown(problems[0]["images"][0], processor, config)[0] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pictures_without_a_white_are_refused(folder, kind):
    (folder / "picture").write_bytes(encoded(Image.fromarray(np.ones((9, 9), kind)), "TIFF"))
    refused(folder, [{**GOOD, "image": "picture"}], "row 0 .*which number is white .*convert.py")


def test_turned_moving_thin_and_enormous_pictures(folder, processor, config):
    def load_one(name):
        row = {**GOOD, "image": name}
        return load(folder, [row], config=config, processor=processor)[0]["images"][0]

    turned = Image.new("L", (56, 28))
    exif = turned.getexif()
    exif[0x0112] = 6  # taken with the camera on its side
    turned.save(folder / "turned.jpg", exif=exif)
    assert load_one("turned.jpg").size == (28, 56)
    frames = [Image.new("L", (56, 28), value) for value in (0, 255)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    assert shown(load_one("moving.gif"), processor, config)[0] == pytest.approx(0, abs=0.02)
    Image.new("L", (2000, 8)).save(folder / "thin.png")
    with pytest.raises(ValueError, match=r"row 0 .* aspect ratio"):
        load_one("thin.png")
    Image.new("1", (20000, 20000)).save(folder / "bomb.png")
    with pytest.raises(ValueError, match=r"row 0 .* decompression bomb"):
        load_one("bomb.png")


@pytest.mark.parametrize(
    "size",
    [(1, 1), (27, 29), (2, 300), (700, 5), (56, 56), (199, 1), (640, 480), (1024, 1024)]
    + [(3000, 2000), (333, 2111)],
)
@pytest.mark.parametrize("pixels", [(3136, 2560000), (784, 50176)])
def test_prompt_length_is_that_of_the_encoded_prompt(processor, size, pixels):
    config = Config(min_pixels=pixels[0], max_pixels=pixels[1])
    problem = {"images": [Image.new("L", size)] * 2, "question": "What is <image>, or <image>?"}
    length = encode_prompts([problem], processor, config)["input_ids"].shape[1]
    assert prompt_length(problem, processor, config) == length


def test_prompt_length_with_texts_of_every_kind(processor, config, problems):
    question = "How much is ∫√x dx, 三角形, <observe>, \n\n  and <|this|>?"
    for problem in (*problems, {"images": [], "question": question}):
        for chosen in (config, replace(config, observe=False), replace(config, system_prompt="y")):
            length = encode_prompts([problem], processor, chosen)["input_ids"].shape[1]
            assert prompt_length(problem, processor, chosen) == length


def test_prompts_that_are_too_long_are_refused(folder, processor, config):
    rows = [GOOD, {**GOOD, "image": "pictures/a.png"}]
    lengths = []
    for problem in load(folder, rows):
        lengths.append(encode_prompts([problem], processor, config)["input_ids"].shape[1])
    config.max_prompt_tokens = lengths[0]
    why = rf"row 1 .*has {lengths[1]} tokens, --max_prompt_tokens is {lengths[0]}; .*--max_pixels"
    refused(folder, rows, why, config=config, processor=processor)
    config.max_prompt_tokens = lengths[1]
    assert len(load(folder, rows, config=config, processor=processor)) == 2


# ------------------------------------------------------------------- damaged pictures, --check


def test_loading_decodes_no_picture(folder, processor, config, monkeypatch):
    decoded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append(image))
    rows = [{**GOOD, "image": "pictures/a.png"}, {**GOOD, "image": "pictures/cut.jpg"}]
    assert len(load(folder, rows, config=config, processor=processor)) == 2
    assert not decoded


def test_a_damaged_picture_is_named_or_left_out_where_it_is_read(folder, capsys):
    rows = [{**GOOD, "id": f"n{k}", "image": "pictures/a.png"} for k in range(5)]
    rows[0]["answer"] = ""  # left out when loading, so that numbers of rows shift
    rows[3]["image"] = "pictures/cut.jpg"
    config = Config(skip_bad=True)
    problems = load(folder, rows, config=config)
    capsys.readouterr()
    place = re.escape(f"{folder}/data.jsonl: row 3 (id n3): ")
    with pytest.raises(ValueError, match=rf"{place}.*truncated"):
        read_problems(problems, [3, 2, 1], Config())
    assert [row["id"] for row in read_problems(problems, [3, 2, 1], config)] == ["n4", "n2"]
    assert re.search(rf"1 rows cannot be used:\n  {place}", capsys.readouterr().out)


def test_check_lists_all_damaged_rows(folder):
    """In several processes, each of which sees a part of the rows."""
    rows = [{**GOOD, "image": "pictures/a.png", "answer": str(k)} for k in range(7)]
    for k in (1, 2, 6):
        rows[k]["image"] = "pictures/cut.jpg"
    message = refused(folder, rows, "3 rows cannot be used", config=Config(check=True))
    assert re.findall(r"row (\d+) .*truncated", message) == ["1", "2", "6"]
    problems = load(folder, rows, config=Config(check=True, skip_bad=True))
    assert problems["answer"][:] == ["0", "3", "4", "5"]
    assert problems[3]["images"][0].size == (56, 56)


def test_rows_of_an_earlier_start_are_replaced(tmp_path):
    """With and without --check, which writes several files, into the same folder."""
    for count, check in ((6, True), (4, False), (5, True)):
        file = tmp_path / "data.jsonl"
        write_jsonl(file, [{**GOOD, "answer": str(k)} for k in range(count)])
        problems = load_problems(str(file), config=Config(check=check), folder=tmp_path / "rows")
        assert problems["answer"][:] == [str(k) for k in range(count)]


def test_loading_takes_little_memory(tmp_path):
    """400 rows of 1 MP, 110 MB of JPEG: neither they nor their pixels are held together."""
    noise = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise).resize((1024, 1024)), "JPEG", quality=85)
    rows = [{**GOOD, "image": {"bytes": content + bytes([k % 256])}} for k in range(400)]
    file = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=30)
    del rows
    assert file.stat().st_size > 1e8
    held, running = [], threading.Event()

    def watch():
        while not running.wait(0.005):
            held.append(pyarrow.total_allocated_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert len(load_problems(str(file))) == 400
    running.set()
    watcher.join()
    assert len(held) > 10 and max(held) - held[0] < 75e6


# ------------------------------------------------------------------------- held-out problems


class ModelIsLoaded(Exception):
    """Everything before the model has been looked at."""


@pytest.fixture
def started(monkeypatch, tmp_path, capsys):
    """What a run says before it loads a model."""

    def refuse(*arguments, **options):
        raise ModelIsLoaded

    def start(data, **options):
        monkeypatch.setattr(observe_r1, "load_model", refuse)
        with pytest.raises(ModelIsLoaded):
            observe_r1.train(run_config(data, tmp_path / "run", **options))
        return capsys.readouterr().out

    return start


def test_held_out_problems_that_are_trained_on(folder, started):
    rows = [{**GOOD, "answer": str(k), "image": "pictures/a.png"} for k in range(8)]
    data = write_jsonl(folder / "data.jsonl", rows)
    held_out = write_jsonl(folder / "held_out.jsonl", [{"id": "x", **row} for row in rows[5:]])
    text = started(data, eval_data=held_out)
    assert "warning: 3 held-out problems are training problems as well" in text
    write_jsonl(folder / "held_out.jsonl", [{**row, "question": "Q"} for row in rows])
    assert "warning" not in started(data, eval_data=held_out)


def test_held_out_problems_have_a_split_of_their_own(folder, started):
    (folder / "rows").mkdir()
    write_jsonl(folder / "rows/train.jsonl", [{**GOOD, "answer": str(k)} for k in range(8)])
    write_jsonl(folder / "rows/test.jsonl", [{**GOOD, "answer": str(k)} for k in range(8, 13)])
    source = str(folder / "rows")
    text = started(source, eval_data=source, eval_split="test")
    assert "8 problems" in text and "5 problems" in text and "warning" not in text
    text = started(source, eval_data=source)
    assert "warning: 8 held-out problems" in text
