"""tools/convert.py: every layout that it reads, every fault that it names; fixtures made by hand."""

import base64
import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import convert


def encoded(kind="PNG", color=(255, 0, 0), size=(6, 4), mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, kind)
    return file.getvalue()


RED = encoded()
BLUE = encoded("JPEG", (0, 0, 255), (8, 5))
GREEN = encoded(color=(0, 255, 0), size=(3, 3))
RED64 = base64.b64encode(RED).decode()


@pytest.fixture
def folder(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "red.png").write_bytes(RED)
    (pictures / "blue.jpg").write_bytes(BLUE)
    (pictures / "green.png").write_bytes(GREEN)
    large = encoded(size=(300, 300), color=(1, 2, 3))
    (pictures / "cut.png").write_bytes(large[: len(large) // 2])
    (pictures / "a [1] é*?.png").write_bytes(GREEN)
    return tmp_path


def save(folder, rows, name="data.jsonl"):
    file = folder / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif name.endswith(".json"):
        file.write_text(json.dumps(rows))
    else:
        file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def run(capsys, source, *options):
    """Exit status, what was printed, and the rows written (None without a file)."""
    output = Path(source).parent / "out.parquet"
    output.unlink(missing_ok=True)
    status = convert.main([str(source), str(output), *map(str, options)])
    printed = capsys.readouterr()
    assert not output.with_name("out.parquet.part").exists()
    rows = pyarrow.parquet.read_table(output).to_pylist() if output.exists() else None
    assert (status == 0) == (rows is not None)
    return status, printed.out + printed.err, rows


def one(capsys, folder, row, *options, name="data.jsonl"):
    """A row as it is after conversion: question, answer, and its pictures' bytes."""
    status, text, rows = run(capsys, save(folder, [row], name), *options)
    assert status == 0, text
    assert len(rows) == 1
    return rows[0]["question"], rows[0]["answer"], [image["bytes"] for image in rows[0]["images"]]


def refusal(capsys, folder, row, *options, name="data.jsonl"):
    status, text, rows = run(capsys, save(folder, [row], name), *options)
    assert status == 1, rows
    assert "Traceback" not in text
    assert "row 0 (id" in text
    assert "nothing is written" in text
    return text


# --------------------------------------------------------------------------------------- layouts

PICTURE = {"bytes": RED, "path": "red.png"}
CHAT = [
    {"role": "system", "content": "Be good."},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "Compare "},
            {"type": "image", "image": "pictures/red.png"},
            {"type": "text", "text": " with "},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{RED64}"}},
            {"type": "text", "text": "."},
        ],
    },
]
LAYOUTS = {  # a row, then id, question, answer, category, pictures
    "MathVista": (
        {
            "pid": "1",
            "question": "How tall?",
            "image": "images/1.jpg",
            "decoded_image": PICTURE,
            "choices": ["10 cm", "12 cm"],
            "unit": "cm",
            "precision": 1.0,
            "answer": "12 cm",
            "question_type": "multi_choice",
            "answer_type": "text",
            "metadata": {"category": "math-targeted-vqa", "split": "testmini"},
            "query": "Hint: Please answer.",
        },
        ("1", "How tall?\n(A) 10 cm\n(B) 12 cm", "B", "math-targeted-vqa", 1),
    ),
    "MathVision": (
        {
            "id": "4",
            "question": "Which?\n<image1>",
            "options": ["A", "B", "C"],
            "image": "images/4.jpg",
            "decoded_image": PICTURE,
            "answer": "C",
            "solution": None,
            "level": 2,
            "subject": "topology",
        },
        ("4", "Which?\n<image>\n(A) A\n(B) B\n(C) C", "C", "topology", 1),
    ),
    "MathVision, one picture for all marks": (
        {
            "id": "5",
            "question": "The ant <image1> walks home <image2>.",
            "options": [],
            "image": "images/5.jpg",
            "decoded_image": PICTURE,
            "answer": "7",
            "subject": "logic",
        },
        ("5", "<image>The ant picture 1 walks home picture 2.", "7", "logic", 1),
    ),
    "MathVerse": (
        {
            "sample_index": "1",
            "problem_index": "1",
            "problem_version": "Text Dominant",
            "question": "Find x.\nChoices:\nA:1\nB:2",
            "image": PICTURE,
            "answer": "A",
            "question_type": "multi-choice",
            "metadata": {"source": "G", "subject": "Plane Geometry"},
            "query_wo": "w",
            "query_cot": "c",
        },
        ("1", "Find x.\nChoices:\nA:1\nB:2", "A", "Plane Geometry", 1),
    ),
    "MathVerse, vision only": (
        {
            "sample_index": "5",
            "question": "",
            "image": PICTURE,
            "answer": "A",
            "query_wo": "According to the picture, answer.",
        },
        ("5", "According to the picture, answer.", "A", "", 1),
    ),
    "We-Math": (
        {
            "ID": "3steps_1",
            "split": "testmini",
            "knowledge concept": "Area",
            "question": "How large?",
            "option": "A. 3; B. 12 cm; C. No correct answer",
            "answer": "B",
            "image_path": PICTURE,
            "key": "1",
            "question number": 1,
            "knowledge concept description": "d",
        },
        ("3steps_1", "How large?\n(A) 3\n(B) 12 cm\n(C) No correct answer", "B", "Area", 1),
    ),
    "MMMU": (
        {
            "id": "validation_Math_1",
            "question": "<image 2> Which of <image 1>?",
            "options": "['it\\'s <image 3>', \"6\"]",
            "explanation": "",
            "image_1": PICTURE,
            "image_2": {"bytes": BLUE, "path": None},
            "image_3": {"bytes": GREEN, "path": None},
            "image_4": None,
            "img_type": "['Plots']",
            "answer": "A",
            "topic_difficulty": "Easy",
            "question_type": "multiple-choice",
            "subfield": "Calculus",
        },
        (
            "validation_Math_1",
            "<image> Which of <image>?\n(A) it's <image>\n(B) 6",
            "A",
            "Calculus",
            [BLUE, RED, GREEN],
        ),
    ),
    "MMMU, open": (
        {
            "id": "validation_Math_2",
            "question": "<image 1> How many?",
            "options": "[]",
            "image_1": PICTURE,
            "image_2": None,
            "img_type": "['Plots']",
            "answer": "['8', '8.0']",
            "question_type": "open",
            "subfield": "Calculus",
        },
        ("validation_Math_2", "<image> How many?", "8", "Calculus", 1),
    ),
    "MMStar": (
        {
            "index": 0,
            "question": "Which?\nOptions: A: red, B: blue",
            "image": PICTURE,
            "answer": "A",
            "category": "logic",
            "l2_category": "code",
            "meta_info": {"source": "M", "image_path": "images/0.jpg"},
        },
        ("0", "Which?\nOptions: A: red, B: blue", "A", "logic", 1),
    ),
    "Geometry3K": (
        {"images": [PICTURE], "problem": "<image>Find $x$.", "answer": "2 \\sqrt { 221 }"},
        ("0", "<image>Find $x$.", "2 \\sqrt { 221 }", "", 1),
    ),
    "verl": (
        {
            "data_source": "hiyouga/geometry3k",
            "prompt": [{"role": "user", "content": "<image>Find x. You FIRST think in \\boxed{}."}],
            "images": [PICTURE],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "3"},
            "extra_info": {"split": "train", "index": 7, "answer": "3", "question": "<image>Find x."},
        },
        ("7", "<image>Find x.", "3", "math", 1),
    ),
    "ScienceQA": (
        {
            "image": PICTURE,
            "question": "Which is longer?",
            "choices": ["the pen", "the cup"],
            "answer": 0,
            "hint": "Look at the table.",
            "subject": "natural science",
            "lecture": "",
            "solution": "",
        },
        ("0", "Look at the table.\nWhich is longer?\n(A) the pen\n(B) the cup", "A",
         "natural science", 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_benchmarks_in_parquet(folder, capsys, name):
    row, (identity, question, answer, category, pictures) = LAYOUTS[name]
    status, text, rows = run(capsys, save(folder, [row], "data.parquet"))
    assert status == 0, text
    expected = pictures if isinstance(pictures, list) else [RED] * pictures
    assert [image["bytes"] for image in rows[0]["images"]] == expected
    del rows[0]["images"]
    assert rows[0] == {
        "id": identity,
        "question": question,
        "answer": answer,
        "category": category,
    }


def test_the_library_reads_the_output_and_a_second_pass_changes_nothing(folder, capsys):
    rows = [
        LAYOUTS[name][0] for name in ("MMMU", "MMMU, open", "Geometry3K", "We-Math", "ScienceQA")
    ]
    for row in rows:
        before = run(capsys, save(folder, [row], "data.parquet"))[2]
        cache = str(folder / "cache")
        data = datasets.load_dataset(
            "parquet", data_files=str(folder / "out.parquet"), split="train", cache_dir=cache
        )
        assert [image.size for image in data[0]["images"]][-1] in {(6, 4), (8, 5), (3, 3)}
        (folder / "out.parquet").rename(folder / "again.parquet")
        _, text, after = run(capsys, folder / "again.parquet")
        assert after == before
        assert "golds made" not in text


LLAVA = {
    "id": 1,
    "image": "pictures/red.png",
    "conversations": [
        {"from": "human", "value": "<image>What number of balls?"},
        {"from": "gpt", "value": "<answer> 3 </answer>"},
    ],
}


@pytest.mark.parametrize(
    "row, question, answer, pictures",
    [
        (LLAVA, "<image>What number of balls?", "3", [RED]),
        (
            LLAVA | {"image": ["pictures/red.png", "pictures/blue.jpg"], "conversations": [
                {"from": "human", "value": "<image><image>Sum?"}, {"from": "gpt", "value": 4}]},
            "<image><image>Sum?", "4", [RED, BLUE],
        ),
        ({"messages": CHAT, "answer": 5}, "Compare <image> with <image>.", "5", [RED, RED]),
        ({"message": json.dumps(CHAT), "answer": "$5$"}, "Compare <image> with <image>.", "$5$",
         [RED, RED]),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text":
             "q"}]}, {"role": "assistant", "content": "6"}], "images": ["pictures/blue.jpg"]},
            "<image>q", "6", [BLUE],
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "input_text", "text": "a"},
             {"type": "input_image", "image_url": "pictures/red.png"}]}], "answer": "1"},
            "a<image>", "1", [RED],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "base64",
             "media_type": "image/png", "data": RED64}}, {"type": "text", "text": "q"}]}],
             "answer": "1"},
            "<image>q", "1", [RED],
        ),
        ({"question": "2 + 2?", "answer": "4"}, "2 + 2?", "4", []),
        ({"image": None, "question": "2 + 2?", "answer": 4.0}, "2 + 2?", "4", []),
        ({"images": [], "image": "pictures/red.png", "question": "q", "answer": 0.5}, "q", "0.5",
         [RED]),
    ],
)  # fmt: skip
def test_messages_and_plain_rows(folder, capsys, row, question, answer, pictures):
    assert one(capsys, folder, row) == (question, answer, pictures)


def test_conversations_of_several_turns_are_refused(folder, capsys):
    turns = LLAVA["conversations"]
    text = refusal(capsys, folder, LLAVA | {"conversations": turns + turns})
    assert "several questions and replies" in text
    part = {"type": "video", "video": "a.mp4"}
    text = refusal(capsys, folder, {"messages": [{"role": "user", "content": [part]}], "answer": 1})
    assert "'video'" in text


# -------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    "name",
    ["image", "images", "img", "image_path", "image_paths", "img_path", "image_list", "image_url"]
    + ["picture", "Image", "decoded_image", "file_name", "file", "image_1", "IMAGES", "pictures"],
)
def test_picture_columns_of_many_names(folder, capsys, name):
    row = {name: "pictures/red.png", "question": "q", "answer": "1"}
    assert one(capsys, folder, row) == ("q", "1", [RED])
    assert one(capsys, folder, row | {name: ["pictures/red.png"]}) == ("q", "1", [RED])


@pytest.mark.parametrize(
    "value, expected",
    [
        ("pictures/a [1] é*?.png", [GREEN]),
        ("./pictures/red.png", [RED]),
        ("pictures\\red.png", [RED]),
        ("file://pictures/red.png", [RED]),
        ("pictures/red.png;pictures/blue.jpg", [RED, BLUE]),
        ("['pictures/red.png', 'pictures/blue.jpg']", [RED, BLUE]),
        ('["pictures/red.png", "pictures/blue.jpg"]', [RED, BLUE]),
        (f"data:image/png;base64,{RED64}", [RED]),
        (RED64, [RED]),
        (RED64.rstrip("="), [RED]),
        ("\n".join([RED64[:40], RED64[40:]]), [RED]),
        ({"path": "pictures/red.png"}, [RED]),
        ({"bytes": None, "path": "pictures/red.png"}, [RED]),
        ({"bytes": RED64, "path": "elsewhere/gone.png"}, [RED]),
        ({"url": "pictures/red.png"}, [RED]),
        (repr(RED), [RED]),
        (repr({"bytes": RED, "path": None}), [RED]),
        (json.dumps({"bytes": RED64}), [RED]),
        (list(RED), [RED]),
        ({"bytes": list(RED)}, [RED]),
        ([[["pictures/red.png"]], ["pictures/blue.jpg", None]], [RED, BLUE]),
        ([{"bytes": RED64}, "pictures/blue.jpg"], [RED, BLUE]),
    ],
)
def test_pictures_in_json(folder, capsys, value, expected):
    assert one(capsys, folder, {"image": value, "question": "q", "answer": "1"})[2] == expected


def test_absolute_paths_and_a_folder_of_pictures(folder, capsys):
    red = folder / "pictures/red.png"
    for value in (str(red), red.as_uri(), (folder / "pictures/a [1] é*?.png").as_uri()):
        row = {"image": value, "question": "q", "answer": "1"}
        assert one(capsys, folder, row)[2] in ([RED], [GREEN])
    row = {"image": "red.png", "question": "q", "answer": "1"}
    assert "no such picture file" in refusal(capsys, folder, row)
    assert one(capsys, folder, row, "--image_folder", folder / "pictures")[2] == [RED]


@pytest.mark.parametrize("value", [RED, {"bytes": RED}, [RED], RED64.encode(), [{"bytes": RED}]])
def test_pictures_in_parquet(folder, capsys, value):
    row = {"image": value, "question": "q", "answer": "1"}
    assert one(capsys, folder, row, name="data.parquet")[2] == [RED]


def test_numbered_pictures_come_in_natural_order(folder, capsys):
    row = {f"image_{n}": "pictures/red.png" for n in (1, 2, 10)}
    row |= {"image_10": "pictures/blue.jpg", "question": "q", "answer": "1"}
    assert one(capsys, folder, row)[2] == [RED, RED, BLUE]
    marked = row | {"question": "<image 10> <image 1> <image 2> <image 10>"}
    question, _, pictures = one(capsys, folder, marked)
    assert question == "<image> <image> <image> <image>"
    assert pictures == [BLUE, RED, RED, BLUE]


def grey_of(data):
    image = Image.open(io.BytesIO(data))
    assert image.mode in ("L", "RGB", "RGBA")
    return np.asarray(image.convert("L")).mean() / 255


HALF = np.full((4, 6), 0.5)


@pytest.mark.parametrize(
    "pixels",
    [
        HALF,
        np.full((4, 6, 3), 0.5),
        np.full((3, 4, 6), 0.5),
        np.full((4, 6, 1), 0.5, np.float32),
        (HALF * 255).astype(np.uint8),
        (HALF * 65535).astype(int),
    ],
)
def test_arrays_keep_their_brightness(folder, capsys, pixels):
    row = {"image": pixels.tolist(), "question": "q", "answer": "1"}
    for name in ("data.jsonl", "data.parquet"):
        (data,) = one(capsys, folder, row, name=name)[2]
        assert grey_of(data) == pytest.approx(0.5, abs=0.01)
        assert Image.open(io.BytesIO(data)).size == (6, 4)


@pytest.mark.parametrize(
    "pixels, kind",
    [
        (np.full((4, 6), 128 * 257, np.uint16), "PNG"),
        (np.full((4, 6), 128 * 257, np.uint16), "TIFF"),
        (np.full((4, 6), 128 * 257, np.int32), "TIFF"),
        (np.full((4, 6), 128, np.int32), "TIFF"),
        (np.full((4, 6), 0.5, np.float32), "TIFF"),
        (np.full((4, 6), 127.5, np.float32), "TIFF"),
    ],
)
def test_deep_grey_is_not_black(folder, capsys, pixels, kind):
    Image.fromarray(pixels).save(folder / "deep", kind)
    (data,) = one(capsys, folder, {"image": "deep", "question": "q", "answer": "1"})[2]
    assert grey_of(data) == pytest.approx(0.5, abs=0.01)


def test_images_of_pillow_and_other_modes_are_read(folder):
    for mode, color in (("CMYK", (0, 0, 0, 127)), ("L", 128), ("RGBA", (128, 128, 128, 255))):
        file = io.BytesIO()
        Image.new(mode, (6, 4), color).save(file, "TIFF")
        (picture,) = convert.read_pictures(file.getvalue(), folder)
        assert picture["bytes"] == file.getvalue()
    (picture,) = convert.read_pictures(Image.new("L", (6, 4), 128), folder)
    assert grey_of(picture["bytes"]) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    "row, why",
    [
        ({"image": "https://example.org/a.png"}, "wget -x -P"),
        ({"image": "pictures/none.png"}, "no such picture file"),
        ({"image": "pictures/cut.png"}, "damaged picture"),
        ({"image": "pictures"}, "no such picture file"),
        ({"image": "12"}, "index of another row"),
        ({"image": base64.b64encode(b"no picture at all, only text").decode()}, "damaged picture"),
        ({"image": "data:image/png;base64,@@@"}, "damaged picture"),
        ({"image": {"path": None, "height": 3}}, "not a picture"),
        ({"image": 7}, "not a picture"),
        ({"image": [[0.5, -1.0]]}, "damaged picture"),
        ({"image": [[0.5, 1.0], [0.5]]}, "damaged picture"),
        ({"video": "a.mp4"}, "video column"),
        ({"videos": ["a.mp4"], "image": "pictures/red.png"}, "videos column"),
        ({"scan": "pictures/red.png"}, "--picture scan"),
        ({"scan": RED64}, "--picture scan"),
        ({"image_id": 12345}, "--picture image_id"),
        ({"metadata": {"source": "s", "image": "pictures/red.png"}}, "--picture metadata.image"),
        ({"question": "See ![this](pictures/red.png)."}, "1 marks in the text, 0 pictures"),
        ({"question": "q\ud800"}, "surrogates"),
        ({"question": None, "ask": "q"}, "no question"),
        ({"question": ["q", "r"]}, "several questions in one row"),
        ({"question": [{"role": "user", "content": "q"}, "r"]}, "not a message"),
        ({"question": "Compare <image> with <image>.", "image": "pictures/red.png"},
         "2 marks in the text, 1 pictures"),
        ({"question": "Compare <image>."}, "1 marks in the text, 0 pictures"),
        ({"question": "<image 3>?", "images": ["pictures/red.png"] * 2}, "1 marks in the text, 2"),
        ({"question": "<image>?", "images": ["pictures/red.png"] * 2}, "more pictures than marks"),
        ({"question": "<image 1>?", "images": ["pictures/red.png"] * 2}, "more pictures than marks"),
        ({"question": "<image> <image 1>?", "images": ["pictures/red.png"] * 2}, "with and without"),
        ({"question": "<video>?"}, "video"),
        ({"question": " "}, "no question"),
    ],
)  # fmt: skip
def test_what_would_train_blind_is_refused(folder, capsys, row, why):
    assert why in refusal(capsys, folder, {"question": "q", "answer": "1"} | row)


def test_picture_column_named_by_hand_and_downloaded_addresses(folder, capsys):
    row = {"scan": "pictures/red.png", "ask": "q", "reply": "1", "kind": "k", "number": 5}
    names = ["--picture", "scan", "--question", "ask", "--answer", "reply"]
    names += ["--id", "number", "--category", "kind"]
    rows = run(capsys, save(folder, [row]), *names)[2]
    assert (rows[0]["id"], rows[0]["category"]) == ("5", "k")
    assert rows[0]["images"][0]["bytes"] == RED
    assert "no column 'none'" in refusal(capsys, folder, row, "--picture", "none")
    (folder / "example.org").mkdir()
    (folder / "example.org/a.png").write_bytes(BLUE)
    row = {"image": "https://example.org/a.png", "question": "q", "answer": "1"}
    assert one(capsys, folder, row)[2] == [BLUE]


@pytest.mark.parametrize(
    "mark",
    ["<image>", "<image 1>", "<image1>", "<image_1>", "<|image_1|>", "<|image_pad|>", "<img>"]
    + ["<|vision_start|><|image_pad|><|vision_end|>", "<Image>", "<image></image>", "<|image|>"]
    + ["<img src='red.png'>", "<img>red.png</img>", "<image_placeholder>", "<ImageHere>"],
)
def test_marks_of_every_kind_stay_in_their_place(folder, capsys, mark):
    row = {"image": "pictures/red.png", "question": f"Is a < b in {mark} or not?", "answer": "1"}
    assert one(capsys, folder, row) == ("Is a < b in <image> or not?", "1", [RED])


# ------------------------------------------------------------------------------- options and golds

AB = "Which?\n(A) red\n(B) dark blue"


@pytest.mark.parametrize(
    "options",
    [
        ["red", "dark blue"],
        ["red", "dark blue", None, ""],
        ["A. red", "B. dark blue"],
        ["(A) red", "(B) dark blue"],
        {"A": "red", "B": "dark blue"},
        {"a": "red", "b": "dark blue", "c": None},
        {"0": "red", "1": "dark blue"},
        {"label": ["A", "B"], "text": ["red", "dark blue"]},
        [{"label": "A", "text": "red"}, {"label": "B", "text": "dark blue"}],
        '["red", "dark blue"]',
        '{"A": "red", "B": "dark blue"}',
        "['red', 'dark blue']",
        "['red' 'dark blue']",
        "['red'\n 'dark blue']",
        "A: red\nB: dark blue",
        "(A) red (B) dark blue",
        "(A) red\n(B) dark blue",
        "A. red; B. dark blue",
        "A) red, B) dark blue",
        "A. red B. dark blue",
        "Options: A. red B. dark blue",
        "red\ndark blue",
        "red, dark blue",
        "red; dark blue",
        "red | dark blue",
    ],
)
@pytest.mark.parametrize("gold", ["B", "B.", "(b)", "B. dark blue", "Dark Blue", "dark  blue"])
def test_options_in_every_form(folder, capsys, options, gold):
    row = {"question": "Which?", "options": options, "answer": gold}
    assert one(capsys, folder, row)[:2] == (AB, "B")


def test_options_in_columns(folder, capsys):
    row = {"question": "Which?", "A": "red", "B": "dark blue", "C": "", "D": None, "answer": "B"}
    assert one(capsys, folder, row)[:2] == (AB, "B")
    row = {"question": "Which?", "option_a": "red", "option_b": "dark blue", "answer": "B"}
    assert one(capsys, folder, row)[:2] == (AB, "B")
    row = {"question": "Which?", "option_0": "red", "option_1": "dark blue", "answer": "Dark blue"}
    assert one(capsys, folder, row)[:2] == (AB, "B")
    row = {"question": "Which?", "Option 1": "red", "Option 2": "dark blue", "answer": "Dark blue"}
    assert one(capsys, folder, row)[:2] == (AB, "B")


@pytest.mark.parametrize(
    "question",
    [
        "Which?\nA: red, B: dark blue",
        "Which?\n(A) Red (B) dark blue",
        "Which?\nA. red\nB. dark blue",
    ],
)
def test_options_that_the_question_shows_are_not_appended(folder, capsys, question):
    row = {"question": question, "options": ["red", "dark blue"], "answer": "dark blue"}
    assert one(capsys, folder, row)[:2] == (question, "B")
    del row["options"]
    assert one(capsys, folder, row)[:2] == (question, "B")


@pytest.mark.parametrize(
    "options, gold, why",
    [
        (["red", "blue"], "green", "none of the options"),
        (["red", "blue"], "C", "none of the options"),
        (["red", "blue"], "A. blue", "none of the options"),
        (["red", "blue"], "A, B", "none of the options"),
        (["red", "blue"], ["A", "B"], "several answers"),
        (["B", "A", "C"], "A", "--answer_is"),
        (["5", "5", "6"], "5", "several of the options"),
        (["red"], "A", "only one option"),
        (["red", "", "blue"], "C", "an option is empty"),
        ([f"number {n}" for n in range(27)], "number 3", "27 options"),
        ("red and blue", "A", "cannot be told apart"),
        ("1,000,2,000", "B", "cannot be told apart"),
        ("(1, 2), (3, 4)", "B", "cannot be told apart"),
        ("red, blue", "C", "cannot be told apart"),
        ({"first": "red", "second": "blue"}, "A", "options under the names"),
        ([{"bytes": RED64}, {"bytes": RED64}], "A", "not text"),
        (["red", "blue", "green"], 1, "--answer_index"),
        (["red", "blue", "green"], "2", "--answer_index"),
        (["2", "1", "0"], 1, "--answer_index"),
        (["red", "blue"], 9, "none of the options"),
        (["red", "blue"], None, "none of the options"),
    ],
)
def test_choices_that_are_unclear_are_refused(folder, capsys, options, gold, why):
    text = refusal(capsys, folder, {"question": "q", "options": options, "answer": gold})
    assert why in text


def golds(capsys, folder, rows, *options):
    status, text, out = run(capsys, save(folder, rows), *options)
    assert status == 0, text
    return [row["answer"] for row in out]


def test_indexes_count_as_the_whole_file_says(folder, capsys):
    def rows(*indexes, options=("red", "blue", "green")):
        return [{"question": "q", "options": list(options), "answer": i} for i in indexes]

    assert golds(capsys, folder, rows(1, 0, 2)) == ["B", "A", "C"]
    assert golds(capsys, folder, rows("1", "0", "2")) == ["B", "A", "C"]
    assert golds(capsys, folder, rows(1, 3, 2)) == ["A", "C", "B"]
    assert golds(capsys, folder, rows(1), "--answer_index", 0) == ["B"]
    assert golds(capsys, folder, rows("1"), "--answer_index", 1) == ["A"]
    assert "--answer_index" in run(capsys, save(folder, rows(0, 3)))[1]
    # Texts that are numbers stay texts, as in MathVista, unless the file counts its options.
    numbers = ("2", "3", "4")
    assert golds(capsys, folder, rows("2", "4", options=numbers)) == ["A", "C"]
    assert golds(capsys, folder, rows(3, options=(2, 3, 4))) == ["B"]
    mixed = rows("2", options=numbers) + rows("0")
    assert "--answer_is" in run(capsys, save(folder, mixed))[1]
    assert golds(capsys, folder, mixed, "--answer_index", 0) == ["C", "A"]


def test_letter_or_text_can_be_said(folder, capsys):
    row = {"question": "q", "options": ["B", "A", "C"], "answer": "A"}
    assert golds(capsys, folder, [row], "--answer_is", "letter") == ["A"]
    assert golds(capsys, folder, [row], "--answer_is", "text") == ["B"]


@pytest.mark.parametrize(
    "value, gold",
    [
        ("<answer> 3 </answer>", "3"),
        ("<think>so</think>\n<answer>\\boxed{3}</answer>", "3"),
        ("We add and so it is \\boxed{4}.", "4"),
        ("Therefore $x = \\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"),
        ("It is 1 + 3 = 4.\n#### 4", "4"),
        ("['4']", "4"),
        ('["4"]', "4"),
        (["4"], "4"),
        ([4.0], "4"),
        ("[4]", "4"),
        (3.0, "3"),
        (0.1, "0.1"),
        (12345678901234, "12345678901234"),
        ("3.0", "3.0"),
        ("3,5", "3,5"),
        ("[0, 1]", "[0, 1]"),
        ({"ground_truth": "7"}, "7"),
        (True, "Yes"),
        (False, "No"),
        ("A short sentence is a legal gold.", "A short sentence is a legal gold."),
        ("We see two. The answer is 4.", "4"),
        ("Final answer: 4", "4"),
        ("x" * 300 + "\nAnswer: 4", "4"),
    ],
)
def test_golds_are_taken_out(folder, capsys, value, gold):
    row = {"image": "pictures/red.png", "question": "Is it?", "solution": value}
    assert one(capsys, folder, row)[1] == gold


def test_columns_that_belong_to_the_question_or_describe_pictures(folder, capsys):
    row = {
        "instruction": "Add.",
        "input": "2, 2",
        "output": "4",
        "image_width": 3,
        "has_image": False,
    }
    assert one(capsys, folder, row) == ("Add.\n2, 2", "4", [])
    row = {"question": "q", "answer": "1", "metadata": {"image": "pictures/red.png"}}
    assert one(capsys, folder, row, "--picture", "metadata.image")[2] == [RED]
    row = {"question": "q", "answer": "so \\boxed{\\text{B}}", "options": ["x", "y"]}
    assert one(capsys, folder, row)[1] == "B"


def test_truth_follows_the_question(folder, capsys):
    row = {"question": "True or false: it rains.", "answer": True}
    assert one(capsys, folder, row)[1] == "True"
    row = {"question": "Does it?", "options": ["no", "yes"], "answer": True}
    assert one(capsys, folder, row)[1] == "B"
    row = {"question": "Does it?", "options": [False, True], "answer": True}
    assert one(capsys, folder, row)[1] == "B"


@pytest.mark.parametrize("value", [None, "", " ", "N/A", "nan", float("nan"), "None", [], "?", "-"])
def test_empty_golds_are_refused(folder, capsys, value):
    assert "no answer" in refusal(capsys, folder, {"question": "q", "answer": value})


@pytest.mark.parametrize(
    "value, why",
    [
        ("We prove it. " * 30, "a worked solution without"),
        ("\\boxed{3} or \\boxed{4}", "several final answers"),
        ("\\boxed{3", "open \\boxed"),
        ("['3', '4']", "several answers"),
        (["3", "4"], "several answers"),
    ],
)
def test_unclear_golds_are_refused(folder, capsys, value, why):
    assert why in refusal(capsys, folder, {"question": "q", "answer": value})


def test_a_list_as_python_prints_it_is_read_without_evaluating(folder):
    for items in (["it's", 'say "x"', "a\nb", "\\frac{1}{2}", "é\x07", "x, y"], ["", "[1]"]):
        assert convert.read_printed_list(repr(items)) == items
    assert convert.read_printed_list(r"['\theta', '\neq']") == [r"\theta", r"\neq"]
    assert convert.read_printed_list("[1, 2.5]") == ["1", "2.5"]
    bomb = "[__import__('os').system('touch bomb')]"
    assert convert.read_printed_list(bomb) is None
    assert convert.read_printed_list("['a'") is None


# ----------------------------------------------------------------------------------------- files

ROW = {"question": "q", "image": "pictures/red.png", "answer": "1"}


def test_json_of_every_shape(folder, capsys):
    keyed = {"7": ROW, "9": ROW}
    columns = {name: {"0": value, "1": value} for name, value in ROW.items()}
    lists = {name: [value, value] for name, value in ROW.items()}
    splits = {"train": [ROW, ROW], "test": [ROW]}
    for data in ([ROW, ROW], {"data": [ROW, ROW], "version": "1"}, keyed, columns, lists):
        status, text, rows = run(capsys, save(folder, data, "data.json"))
        assert status == 0, text
        assert [row["images"][0]["bytes"] for row in rows] == [RED, RED]
    assert [row["id"] for row in run(capsys, save(folder, keyed, "data.json"))[2]] == ["7", "9"]
    assert "--subset" in run(capsys, save(folder, splits, "data.json"))[1]
    uneven = lists | {"answer": ["1"]}
    assert "differ in length" in run(capsys, save(folder, uneven, "data.json"))[1]
    assert "'dev'" in run(capsys, save(folder, splits, "data.json"), "--subset", "dev")[1]
    messages = {"messages": CHAT, "answer": 5}
    assert len(run(capsys, save(folder, messages, "data.json"))[2]) == 1
    assert len(run(capsys, save(folder, splits, "data.json"), "--subset", "test")[2]) == 1
    assert len(run(capsys, save(folder, ROW, "data.json"))[2]) == 1
    file = folder / "lines.json"
    file.write_text("\n".join(json.dumps(ROW) for _ in range(2)))
    assert len(run(capsys, file)[2]) == 2
    file = folder / "bom.jsonl"
    file.write_text("\ufeff" + json.dumps(ROW) + "\n\n" + json.dumps(ROW) + "\n", "utf-8")
    assert len(run(capsys, file)[2]) == 2


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16"])
@pytest.mark.parametrize(
    "separator, suffix", [(",", ".csv"), (";", ".csv"), ("\t", ".tsv"), ("\t", ".csv")]
)
def test_spreadsheets_as_text(folder, capsys, encoding, separator, suffix):
    file = folder / f"data{suffix}"
    with open(file, "w", encoding=encoding, newline="") as stream:
        writer = csv.writer(stream, delimiter=separator)
        writer.writerow([" Question ", "IMAGE", "Answer", "A", "B"])
        writer.writerow(['Où; "here",\nthere\t?', "pictures/red.png", "b", "3,5", "007"])
    status, text, rows = run(capsys, file)
    assert status == 0, text
    assert rows[0]["question"] == 'Où; "here",\nthere\t?\n(A) 3,5\n(B) 007'
    assert (rows[0]["answer"], rows[0]["images"][0]["bytes"]) == ("B", RED)
    assert ("cp1252" in text) == (encoding == "cp1252")


def test_pictures_as_base64_in_a_tsv(folder, capsys):
    file = folder / "MMStar.tsv"
    header = "index\tquestion\timage\tA\tB\tanswer\tcategory\n"
    file.write_text(header + f"0\tWhich?\t{RED64}\tred\tdark blue\tB\tlogic\n")
    status, text, rows = run(capsys, file)
    assert status == 0, text
    assert (rows[0]["question"], rows[0]["answer"]) == (AB, "B")
    assert rows[0]["images"][0]["bytes"] == RED


def test_separators_that_excel_notes_or_nobody_expects(folder, capsys):
    for text in ("sep=;\nquestion;answer\na,b;1\n", "question|answer\na,b|1\n"):
        (folder / "data.csv").write_text(text)
        assert run(capsys, folder / "data.csv")[2][0]["question"] == "a,b"


def test_text_tables_that_are_broken_are_refused(folder, capsys):
    file = folder / "data.csv"
    for text, why in (
        ('question,answer\n"open,1\nq,2\n', "is a quote left open"),
        ("question,answer\nq,1,2\n", "more fields than the header"),
        ("Question,question,answer\nq,r,1\n", "two columns are called"),
        ("question,answer\n", "has no rows"),
    ):
        file.write_text(text)
        status, printed, _ = run(capsys, file)
        assert status == 1
        assert why in printed


def workbook(folder, sheets):
    import pandas

    with pandas.ExcelWriter(folder / "data.xlsx") as book:
        for name, rows in sheets.items():
            pandas.DataFrame(rows).to_excel(book, sheet_name=name, index=False)
    return folder / "data.xlsx"


def test_workbooks(folder, capsys):
    pytest.importorskip("openpyxl")
    import datetime

    row = {" Question": "q", "Image": "pictures/red.png", "ANSWER": 3.0, "Options": None}
    other = row | {"ANSWER": "N. York", "Image": None}
    file = workbook(folder, {"one": [row, other]})
    status, text, rows = run(capsys, file)
    assert status == 0, text
    assert [r["answer"] for r in rows] == ["3", "N. York"]
    assert [len(r["images"]) for r in rows] == [1, 0]
    assert "rows without a picture: 1" in text
    file = workbook(folder, {"one": [row], "two": [row, row]})
    assert "--subset" in run(capsys, file)[1]
    assert len(run(capsys, file, "--subset", "two")[2]) == 2
    assert run(capsys, file, "--subset", "three")[0] == 1
    file = workbook(folder, {"one": [row | {"ANSWER": datetime.date(2024, 1, 2)}]})
    assert "format the spreadsheet's column as text" in run(capsys, file)[1]


def test_a_workbook_with_pasted_pictures_is_refused(folder, capsys):
    pytest.importorskip("openpyxl")
    import openpyxl
    from openpyxl.drawing.image import Image as Pasted

    file = workbook(folder, {"one": [{"question": "q", "answer": 1}]})
    book = openpyxl.load_workbook(file)
    book["one"].add_image(Pasted(str(folder / "pictures/red.png")), "C2")
    book.save(file)
    assert "pasted into sheet one" in run(capsys, file)[1]


def test_workbooks_need_pandas(folder, capsys, monkeypatch):
    pytest.importorskip("openpyxl")
    file = workbook(folder, {"one": [ROW]})
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    assert "pip install pandas openpyxl" in run(capsys, file)[1]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_imagefolder(folder, capsys, kind):
    source = folder / "set"
    for split in ("train", "test"):
        (source / split).mkdir(parents=True)
        (source / split / "red.png").write_bytes(RED)
        row = {"file_name": "red.png", "question": split, "answer": "1"}
        text = json.dumps(row) if kind == "jsonl" else ",".join(row) + "\n" + ",".join(row.values())
        (source / split / f"metadata.{kind}").write_text(text)
    status, text, rows = run(capsys, source)
    assert status == 1
    assert "test/metadata" in text
    assert "--split" in text
    status, text, rows = run(capsys, source, "--split", "test")
    assert [row["question"] for row in rows] == ["test"]
    assert rows[0]["images"][0]["bytes"] == RED


def test_folder_of_shards_and_configurations(folder, capsys):
    for subset in ("Art", "Math"):
        data = folder / "hub" / subset
        data.mkdir(parents=True)
        for split, shards in (("dev", 1), ("validation", 12)):
            for n in range(shards):
                name = f"{split}-{n:05}-of-{shards:05}.parquet"
                row = {"question": f"{subset} {split} {n}", "image": PICTURE, "answer": "1"}
                save(data, [row], name)
    status, text, _ = run(capsys, folder / "hub", "--split", "validation")
    assert status == 1
    assert "Art/validation" in text
    status, text, rows = run(capsys, folder / "hub", "--split", "validation", "--subset", "Math")
    assert [row["question"] for row in rows] == [f"Math validation {n}" for n in range(12)]
    text = run(capsys, folder / "hub", "--split", "train")[1]
    assert "nothing is called 'train'" in text


def test_saved_by_datasets(folder, capsys):
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "answer": datasets.Value("int64"),
        }
    )
    data = datasets.Dataset.from_dict(
        {"image": [{"bytes": RED, "path": None}], "question": ["q"], "answer": [1]},
        features=features,
    )
    data.save_to_disk(folder / "saved")
    assert run(capsys, folder / "saved")[2][0]["images"][0]["bytes"] == RED
    datasets.DatasetDict(train=data, test=data).save_to_disk(folder / "both")
    assert "--split" in run(capsys, folder / "both")[1]
    assert len(run(capsys, folder / "both", "--split", "test")[2]) == 1


def test_classes_are_read_by_their_names(folder, capsys):
    names = {
        "question": datasets.Value("string"),
        "answer": datasets.ClassLabel(names=["cat", "dog"]),
    }
    data = datasets.Dataset.from_dict(
        {"question": ["q", "q", "q"], "answer": [1, 0, -1]}, features=datasets.Features(names)
    )
    data.to_parquet(folder / "data.parquet")
    data.save_to_disk(folder / "saved")
    for source in (folder / "data.parquet", folder / "saved"):
        rows = run(capsys, source, "--skip_bad", "true")[2]
        assert [row["answer"] for row in rows] == ["dog", "cat"]


def test_a_column_split_is_chosen(folder, capsys):
    rows = [ROW | {"split": "test", "question": "a"}, ROW | {"split": "dev", "question": "b"}]
    out = run(capsys, save(folder, rows), "--split", "dev")[2]
    assert [row["question"] for row in out] == ["b"]
    text = run(capsys, save(folder, [ROW]), "--split", "dev")[1]
    assert "no column split" in text
    text = run(capsys, save(folder, [ROW]), "--subset", "dev")[1]
    assert "--subset dev" in text


def test_scores_are_kept_if_they_are_valid_in_every_row(folder, capsys):
    scores = {"difficulty": 0.25, "complexity": 100.5, "stage": 2}
    out = run(capsys, save(folder, [ROW | scores, ROW | scores]))[2]
    assert [{name: row[name] for name in scores} for row in out] == [scores, scores]
    for bad in ({"difficulty": "easy"}, {"difficulty": 3}, {"stage": None}):
        status, text, out = run(capsys, save(folder, [ROW | scores | bad, ROW | scores]))
        assert status == 0
        assert "difficulty" not in out[0]
        assert "scores left out" in text
        text = run(capsys, save(folder, [ROW | scores, ROW | scores | bad]))[1]
        assert "valid in the first row" in text


# ------------------------------------------------------------------------------ report and faults


def test_bad_rows_stop_or_are_skipped_and_counted(folder, capsys):
    bad = [ROW | {"image": "pictures/none.png", "id": f"bad {n}"} for n in range(25)]
    file = save(folder, [ROW, *bad, ROW | {"answer": "\\boxed{2}"}, ROW | {"answer": None}])
    status, text, rows = run(capsys, file)
    assert (status, rows) == (1, None)
    assert text.count("cannot be used: no such picture file") == 20
    assert "row 1 (id bad 0)" in text
    assert "refused 25: no such picture file" in text
    assert "refused 1: no answer" in text
    assert "--skip_bad" in text
    status, text, rows = run(capsys, file, "--skip_bad", "true")
    assert [row["answer"] for row in rows] == ["1", "2"]
    assert "read 28 rows" in text
    assert "wrote 2 rows with 2 pictures" in text
    assert "golds made the final answer alone: 1, e.g. row 26: '\\\\boxed{2}' → '2'" in text


def test_what_is_left_out_is_said(folder, capsys):
    rows = [ROW | {"answer": "∎", "id": 1, "lecture": "x"}, ROW | {"answer": "C", "id": 1}]
    text = run(capsys, save(folder, rows))[1]
    assert "golds that do not match themselves: 1, e.g. row 0: ∎" in text
    assert "ids that come again: 1" in text
    assert "answers that are a letter while no options were found: 1" in text
    assert "columns not read: lecture (1)" in text
    row = {"messages": CHAT, "answer": 5}
    assert (
        "system messages left out: 1, e.g. row 0: Be good." in run(capsys, save(folder, [row]))[1]
    )


def test_an_interrupt_ends_in_one_line(folder, capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "place_marks", interrupt)
    output = folder / "out.parquet"
    assert convert.main([str(save(folder, [ROW])), str(output)]) == 130
    assert capsys.readouterr().err == "convert: interrupted, nothing is written\n"
    assert list(folder.glob("out*")) == []


def test_outputs_are_not_replaced_and_faults_leave_nothing(folder, capsys):
    source, output = save(folder, [ROW]), folder / "out.parquet"
    output.write_text("mine")
    assert convert.main([str(source), str(output)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert output.read_text() == "mine"
    save(folder, [ROW | {"answer": ""}])
    assert convert.main([str(source), str(output), "--overwrite", "true"]) == 1
    assert output.read_text() == "mine"
    save(folder, [ROW])
    assert convert.main([str(source), str(output), "--overwrite"]) == 0
    assert len(pyarrow.parquet.read_table(output)) == 1
    assert convert.main([str(source), str(folder / "out.csv")]) == 1
    assert convert.main([str(source), str(folder / "no/out.parquet")]) == 1


@pytest.mark.parametrize(
    "name, content, why",
    [
        ("data.jsonl", b"", "is empty"),
        ("data.csv", b"", "is empty"),
        ("data.jsonl", b"\n\n", "has no rows"),
        ("data.json", b"[]", "has no rows"),
        ("data.json", b"{}", "which of"),
        ("data.json", b'"text"', "holds no rows"),
        ("data.json", b"{", "is not JSON"),
        ("data.jsonl", b'{"question": ', "line 1 is not JSON"),
        ("data.jsonl", b"[1, 2]", "not a row with named columns"),
        ("data.jsonl", b"\xff\xfe\xfd", "codec"),
        ("data.parquet", b"nothing", "convert:"),
        ("data.parquet", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("data.xlsx", b"nothing", "convert:"),
        ("data.txt", b"q", "not one of .jsonl"),
    ],
)
def test_files_that_cannot_be_read(folder, capsys, name, content, why):
    file = folder / name
    file.write_bytes(content)
    status, text, _ = run(capsys, file)
    assert status == 1
    assert why in text


@pytest.mark.parametrize("source", ["data/none.jsonl", "./none", "none", "{folder}/none", "a\\b"])
def test_mistyped_paths_are_named_at_once(folder, capsys, source, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", None)  # would raise a TypeError
    output = str(folder / "out.parquet")
    assert convert.main([source.format(folder=folder), output]) == 1
    assert "no such file or folder" in capsys.readouterr().err


def test_the_hub_is_streamed_with_its_configuration(folder, capsys, monkeypatch):
    seen = []

    def load(name, subset, streaming):
        seen.append((name, subset, streaming))
        data = datasets.Dataset.from_list([{"image": PICTURE, "question": "q", "answer": "1"}])
        data = data.cast_column("image", datasets.Image())
        return datasets.IterableDatasetDict(validation=data.to_iterable_dataset())

    monkeypatch.setattr(datasets, "load_dataset", load)
    output = folder / "out.parquet"
    options = ["--subset", "Math", "--split", "validation"]
    assert convert.main(["MMMU/MMMU", str(output), *options]) == 0
    assert set(seen) == {("MMMU/MMMU", "Math", True)}
    (row,) = pyarrow.parquet.read_table(output).to_pylist()
    assert row["images"][0]["bytes"] == RED
    assert convert.main(["MMMU/MMMU", str(output), "--overwrite", "--split", "train"]) == 1
    assert "choose one of the splits validation" in capsys.readouterr().err


def test_as_a_command_without_traceback_or_traces(folder):
    home = folder / "home"
    home.mkdir()
    variables = {name: v for name, v in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    variables |= {"HOME": str(home), "HF_HUB_OFFLINE": "1"}

    def command(*arguments):
        line = [sys.executable, str(ROOT / "tools/convert.py"), *map(str, arguments)]
        return subprocess.run(
            line, capture_output=True, text=True, env=variables, cwd=folder, check=False
        )

    result = command(save(folder, [ROW]), "out.parquet")
    assert (result.returncode, result.stderr) == (0, "")
    assert "wrote 1 rows with 1 pictures to out.parquet" in result.stdout
    result = command("OWNER/NAME", "hub.parquet")
    assert result.returncode == 1
    assert result.stderr.startswith("convert: OWNER/NAME: no such file here, and the hub says")
    assert "Traceback" not in result.stderr
    assert list(home.rglob("*")) == []
    assert not (folder / "hub.parquet").exists()


def test_memory_stays_flat(folder):
    """400 pictures of 1 MB each way: far less than their sum is held at a time."""
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), np.uint8)
    Image.fromarray(noise).save(folder / "noise.bmp")
    file = save(folder, [ROW | {"image": "noise.bmp"}] * 400)
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv.pop(1)); import convert, datasets\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = peak(); assert convert.main(sys.argv[1:]) == 0; print(peak() - before)"
    )
    line = [sys.executable, "-c", code, str(ROOT / "tools"), str(file), str(folder / "o.parquet")]
    result = subprocess.run(line, capture_output=True, text=True, check=True)
    assert float(result.stdout.split()[-1]) < 200
