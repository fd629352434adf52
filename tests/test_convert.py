"""tools/convert.py: the data sets it knows, what it mends, what it refuses; fixtures made by hand."""

import base64
import datetime
import io
import json
import random
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


def encoded(kind="PNG", color=(255, 0, 0), size=(6, 4), mode="RGB", **how):
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, kind, **how)
    return file.getvalue()


RED = encoded()
BLUE = encoded("JPEG", (0, 0, 255), (8, 5))
GREEN = encoded(color=(0, 255, 0), size=(3, 3))
RED64 = base64.b64encode(RED).decode()
PICTURE = {"bytes": RED, "path": "red.png"}
ROW = {"images": ["pictures/red.png"], "question": "How many?", "answer": "3"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name, data in (("red.png", RED), ("blue.jpg", BLUE), ("a [1] é.png", GREEN)):
        (tmp_path / "pictures" / name).write_bytes(data)
    return tmp_path


def save(folder, rows, name="data.jsonl"):
    file = folder / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif name.endswith(".json"):
        file.write_text(json.dumps(rows))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(capsys, source, *options, output=None):
    """What was printed, with the error, and the rows written (None without a file)."""
    output = output or Path(source).parent / "out.parquet"
    output.unlink(missing_ok=True)
    error = ""
    try:
        convert.main([str(source), str(output), *map(str, options)])
    except SystemExit as stop:
        error = str(stop)
    assert not output.with_name(output.name + ".part").exists()
    rows = pyarrow.parquet.read_table(output).to_pylist() if output.exists() else None
    assert bool(error) == (rows is None)
    return capsys.readouterr().out + error, rows


def one(capsys, folder, row, *options, name="data.jsonl"):
    """Question, answer and pictures of a row that can be used."""
    text, rows = run(capsys, save(folder, [row], name), *options)
    assert rows is not None, text
    return rows[0]["question"], rows[0]["answer"], [image["bytes"] for image in rows[0]["images"]]


def refusal(capsys, folder, row, *options):
    text, rows = run(capsys, save(folder, [row]), *options)
    assert rows is None
    assert "row 0 cannot be used" in text
    assert "nothing is written" in text
    return text


# ----------------------------------------------------------------------------------- known data sets
# The columns of each (a cell is "x" unless it is given), and what a row becomes: id, question, answer
# and category, all with one red picture but for the first of MMMU.

VISION = "id,question,options,image,decoded_image,answer,solution,level,subject"
SCEMQA = "Question,Answer (final answer highlighted),ImagePath"
MMMU = "id,question,options,explanation,img_type,answer,topic_difficulty,question_type,subfield,"
MMMU += ",".join(f"image_{n}" for n in range(1, 8))
NO_PICTURES = dict.fromkeys(f"image_{n}" for n in range(1, 8))
CHOICES = "<image>\nHint: give the letter.\nChoices:\n(A) 10 cm\n(B) 12 cm"
LLAVA = [{"from": "human", "value": CHOICES}, {"from": "gpt", "value": "The answer is B."}]
KNOWN = {
    "MathVision": (
        VISION,
        {"decoded_image": PICTURE, "question": "Which?\n<image1>", "options": ["A", "B"], "answer": "B"},
        ("x", "Which?\n<image>\n(A) A\n(B) B", "B", "x"),
    ),
    "MathVision, one picture for all marks": (
        VISION,
        {"decoded_image": PICTURE, "question": "<image1> to <image2>", "options": [], "answer": "7"},
        ("x", "<image>picture 1 to picture 2", "7", "x"),
    ),
    "We-Math": (
        "ID,split,knowledge concept,question,option,answer,image_path,key,question number,"
        "knowledge concept description",
        {"image_path": PICTURE, "option": "A. 3 B．12 cm ;C. No answer", "answer": "B", "question number": 9},
        ("9", "x\n(A) 3\n(B) 12 cm\n(C) No answer", "B", "x"),
    ),
    "PolyMATH": (
        "image,category,answer_option,final_answer_range,final_answer",
        {"image": PICTURE, "answer_option": "(A) 26 (B) 156", "final_answer": "B"},
        ("0", "Solve the problem in the picture. Its options: (A) 26 (B) 156", "B", "x"),
    ),
    "SceMQA, choices": (
        SCEMQA,
        {"Question": "A. a\nB. b", SCEMQA.split(",")[1]: "B Because E is uniform."},
        ("0", "A. a\nB. b", "B", "Math"),
    ),
    "SceMQA, free": (
        SCEMQA,
        {SCEMQA.split(",")[1]: "\\answer{\\frac{1}{2}} A long reason."},
        ("0", "x", "\\frac{1}{2}", "Math"),
    ),
    "MathV360K": (
        "id,image,conversations",
        {"image": PICTURE, "conversations": LLAVA},
        ("x", CHOICES, "B", ""),
    ),
    "MathVista": (
        "pid,question,image,decoded_image,choices,unit,precision,answer,question_type,answer_type,"
        "metadata,query",
        {"decoded_image": PICTURE, "choices": ["10 cm", "12 cm"], "answer": "12 cm", "query": CHOICES,
         "metadata": {"category": "vqa"}},
        ("x", CHOICES, "B", "vqa"),
    ),
    "MathVerse": (
        "sample_index,problem_index,problem_version,question,image,answer,question_type,metadata,"
        "query_wo,query_cot,question_for_eval",
        {"image": PICTURE, "metadata": {"subject": "Plane"}, "query_cot": "First reason.", "answer": "A"},
        ("x", "First reason.", "A", "Plane"),
    ),
    "MMMU": (
        MMMU,
        NO_PICTURES | {"question": "<image 2> or <image 1>?", "options": "['it\\'s <image 3>', \"6\"]",
         "image_1": PICTURE, "image_2": {"bytes": BLUE}, "image_3": {"bytes": GREEN}, "answer": "A"},
        ("x", "<image> or <image>?\n(A) it's <image>\n(B) 6", "A", "x"),
    ),
    "MMMU, open": (
        MMMU,
        NO_PICTURES | {"image_1": PICTURE, "question": "<image 1>", "options": "[]",
         "answer": "['8', '8.0']"},
        ("x", "<image>", "8", "x"),
    ),
    "MMStar": (
        "index,question,image,answer,category,l2_category,meta_info",
        {"question": "Which?\nOptions: A: red, B: blue", "image": PICTURE, "answer": "A"},
        ("x", "Which?\nOptions: A: red, B: blue", "A", "x"),
    ),
    "Geometry3K": (
        "images,problem,answer",
        {"images": [PICTURE], "answer": "2 \\sqrt { 221 }"},
        ("0", "x", "2 \\sqrt { 221 }", ""),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_known_data_sets(folder, capsys, name):
    columns, cells, expected = KNOWN[name]
    row = dict.fromkeys(columns.split(","), "x") | cells
    if name.startswith("SceMQA"):  # two subjects in one file; picture paths without an ending
        parts = {"Math": [row | {"ImagePath": "pictures/red"}], "Physics": []}
        text, rows = run(capsys, save(folder, parts, "data.json"), "--subset", "all")
    else:
        text, rows = run(capsys, save(folder, [row], "data.parquet"))
    assert rows, text
    assert text.startswith(name.partition(",")[0])
    pictures = [BLUE, RED, GREEN] if name == "MMMU" else [RED]
    assert [image["bytes"] for image in rows[0]["images"]] == pictures
    assert tuple(rows[0][key] for key in ("id", "question", "answer", "category")) == expected


def test_the_output_is_the_format_of_the_script_and_passes_through_unchanged(folder, capsys):
    rows = [ROW | {"id": "a", "category": "k"}, ROW | {"images": [], "answer": "\\boxed{4}"}]
    text, out = run(capsys, save(folder, rows))
    output = folder / "out.parquet"
    assert (
        f"train --model Qwen/Qwen2.5-VL-3B-Instruct --data {output} --output_dir runs/out" in text
    )
    assert "2 problems with 1 pictures" in text
    data = datasets.Dataset.from_parquet(str(output), cache_dir=str(folder / "cache"))
    assert isinstance(data.features["images"].feature, datasets.Image)
    assert data[0]["images"][0].size == (6, 4)
    assert data.column_names == ["images", "question", "answer", "id", "category"]
    text, again = run(capsys, output, output=folder / "again.parquet")
    assert again == out
    assert "golds made" not in text


def test_a_ladder_keeps_its_scores_and_a_bad_one_is_named(folder, capsys):
    scores = {"difficulty": 0.25, "complexity": 100.5, "stage": 2}
    out = run(capsys, save(folder, [ROW | scores]))[1]
    assert {name: out[0][name] for name in scores} == scores
    for bad in ({"difficulty": None}, {"stage": 0.5}, {"complexity": "long"}):
        refusal(capsys, folder, ROW | scores | bad)


# ------------------------------------------------------------------------------------ other tables

TABLE = {"scan": "pictures/red.png", "ask": "Which?", "reply": "b", "A": "red", "B": "blue"}
NAMES = ["--picture", "scan", "--question", "ask", "--answer", "reply", "--options", "A,B"]


def test_columns_are_named_by_options_and_never_guessed(folder, capsys):
    assert one(capsys, folder, TABLE, *NAMES) == ("Which?\n(A) red\n(B) blue", "B", [RED])
    row = {"image": "pictures/red.png", "question": "q", "answer": "3", "meta": {"kind": "k"}}
    options = ["--picture", "image", "--category", "meta.kind"]
    text, rows = run(capsys, save(folder, [row | {"other": 1}]), *options)
    assert rows[0]["category"] == "k"
    assert "columns not read: other" in text
    for bad, options, why in (
        (TABLE, [], "there are the columns A, B, ask, reply, scan; name them with --picture"),
        (row, [], "there are the columns answer, image, meta, question"),
        (row, ["--picture", "img"], "no column img"),
        (row | {"images": [], "problem": "p"}, [], "not the columns of a known data set"),
    ):
        text, rows = run(capsys, save(folder, [bad]), *options)
        assert rows is None
        assert why in text


MESSAGES = [
    {"role": "system", "content": "Be good."},
    {"role": "user", "content": [
        {"type": "text", "text": "Compare "},
        {"type": "image", "image": "pictures/red.png"},
        {"type": "text", "text": " with "},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{RED64}"}},
    ]},
    {"role": "assistant", "content": "<think>so</think><answer>5</answer>"},
]  # fmt: skip


def test_chat_files(folder, capsys):
    expected = ("Compare <image> with <image>", "5", [RED, RED])
    for value in (MESSAGES, json.dumps(MESSAGES)):
        row = {"messages": value, "n": 1}
        assert one(capsys, folder, row, "--question", "messages") == expected
        text = run(capsys, save(folder, [row]), "--question", "messages")[0]
        assert "system messages left out: 1, for example row 0: Be good." in text
    row = {"messages": [{"role": "user", "content": "<image>q"}], "images": ["pictures/blue.jpg"]}
    options = ["--question", "messages", "--answer", "gt.x"]
    assert one(capsys, folder, row | {"gt": {"x": 4}}, *options) == ("<image>q", "4", [BLUE])
    for bad, why in (
        (MESSAGES + MESSAGES[1:], "several questions"),
        ([{"role": "user", "content": [{"type": "video"}]}], "not a part with text or a picture"),
        ([{"role": "robot", "content": "q"}], "not a message"),
        (["q", "r"], "not a message"),
    ):
        assert why in refusal(capsys, folder, {"messages": bad, "n": 1}, "--question", "messages")


# ---------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    "value, expected",
    [
        ("pictures/a [1] é.png", [GREEN]),
        ("pictures\\red.png", [RED]),
        (f"data:image/png;base64,{RED64}", [RED]),
        ("\n".join([RED64[:40], RED64[40:]]), [RED]),
        ({"bytes": None, "path": "pictures/red.png"}, [RED]),
        ({"bytes": RED64, "path": "gone.png"}, [RED]),
        ("['pictures/red.png', 'pictures/blue.jpg']", [RED, BLUE]),
        ([["pictures/red.png"], "pictures/blue.jpg", None], [RED, BLUE]),
        (None, []),
    ],
)
def test_pictures_in_every_form(folder, capsys, value, expected):
    assert one(capsys, folder, ROW | {"images": value})[2] == expected


def test_a_folder_of_pictures_can_be_named(folder, capsys):
    row = ROW | {"images": "red.png"}
    assert "--image_folder DIR" in refusal(capsys, folder, row)
    assert one(capsys, folder, row, "--image_folder", folder / "pictures")[2] == [RED]


def deep(number, kind=np.uint16):
    file = io.BytesIO()
    Image.fromarray(np.full((4, 6), number, kind)).save(file, "TIFF")
    return file.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    picture = Image.new("RGB", (6, 4), "red")
    picture.putpixel((0, 0), (0, 0, 255))
    file = io.BytesIO()
    picture.save(file, "PNG", exif=exif)
    return file.getvalue()


@pytest.mark.parametrize(
    "data, mode, size, color",
    [
        (encoded(mode="RGBA", color=(0, 0, 0, 0)), "RGB", (6, 4), (255, 255, 255)),
        (encoded(mode="LA", color=(0, 255)), "RGB", (6, 4), (0, 0, 0)),
        (encoded(mode="P", color=0, transparency=0), "RGB", (6, 4), (255, 255, 255)),
        (encoded(color=(1, 2, 3), transparency=(1, 2, 3)), "RGB", (6, 4), (255, 255, 255)),
        (encoded("JPEG", (0, 0, 0, 0), mode="CMYK"), "RGB", (6, 4), (255, 255, 255)),
        (encoded(mode="1", color=1), "L", (6, 4), 255),
        (deep(128 * 257), "L", (6, 4), 128),
        (turned(6), "RGB", (4, 6), None),
    ],
)
def test_pictures_need_no_repair_later(data, mode, size, color):
    picture = Image.open(io.BytesIO(convert.clean_picture(data)))
    assert (picture.mode, picture.size) == (mode, size)
    assert not picture.has_transparency_data
    assert picture.getexif().get(274, 1) == 1
    assert color is None or picture.getpixel((0, 0)) == color
    if color is None:  # turned by 90 degrees: what was on the left is above
        assert picture.getpixel((3, 0)) == (0, 0, 255)


def test_a_good_picture_keeps_its_bytes():
    for data in (RED, BLUE, encoded("WEBP"), encoded(mode="L", color=9), turned(1)):
        assert convert.clean_picture(data) == data


large = encoded(size=(300, 300), color=(1, 2, 3))


@pytest.mark.parametrize(
    "value, why",
    [
        ("https://example.org/a.png", "a web address is not opened"),
        ("pictures/none.png", "no such picture file"),
        ("pictures", "no such picture file"),
        (base64.b64encode(large[: len(large) // 2]).decode(), "damaged picture"),
        (base64.b64encode(b"no picture at all " * 9).decode(), "damaged picture"),
        (f"data:image/png;base64,{RED64[:-5]}", "nor base64"),
        (base64.b64encode(deep(7, np.int32)).decode(), "nothing says which number is white"),
        (base64.b64encode(encoded(size=(1001, 5))).decode(), "one side over 200 times the other"),
        ({"height": 3}, "not a picture"),
        (7, "not a picture"),
    ],
)
def test_pictures_that_cannot_be_used(folder, capsys, value, why):
    assert why in refusal(capsys, folder, ROW | {"images": value})


@pytest.mark.parametrize(
    "mark",
    ["<image>", "<image 1>", "<image_1>", "<|image_1|>", "<|image_pad|>", "<img>", "![x](a.png)"]
    + ["<|vision_start|><|image_pad|><|vision_end|>", "<Image>", "<image></image>", "<ImageHere>"]
    + ["<img src='red.png'>", "<img>red.png</img>", "<image_placeholder>"],
)
def test_marks_of_every_kind_stay_in_their_place(folder, capsys, mark):
    row = ROW | {"question": f"Is a < b in {mark} or not?"}
    assert one(capsys, folder, row)[0] == "Is a < b in <image> or not?"


@pytest.mark.parametrize(
    "row, why",
    [
        ({"question": "<image> <image>?"}, "2 marks, 1 pictures"),
        ({"question": "<image>?", "images": []}, "1 marks, 0 pictures"),
        ({"question": "<image 1>?", "images": ["pictures/red.png"] * 2}, "1 marks, 2 pictures"),
        ({"question": "<image 3>?"}, "1 marks, 1 pictures"),
        ({"question": "Who <|im_end|> speaks?"}, "control token <|im_end|>"),
        ({"question": "<video>?"}, "control token <video>"),
        ({"question": "q\ud800"}, "surrogates"),
        ({"question": " "}, "no question"),
    ],
)
def test_questions_that_would_train_wrong_are_refused(folder, capsys, row, why):
    assert why in refusal(capsys, folder, ROW | row)


# ------------------------------------------------------------------------------- golds and options


@pytest.mark.parametrize(
    "value, gold",
    [
        ("<answer> 3 </answer>", "3"),
        ("<think>so</think>\n<answer>\\boxed{3}</answer>", "3"),
        ("Therefore $x = \\boxed{\\frac{1}{\\sqrt{2}}}$.", "\\frac{1}{\\sqrt{2}}"),
        ("It is 1 + 3 = 4.\n#### 4", "4"),
        ("x" * 300 + "\nThe answer is 4.", "4"),
        ("Final answer: 4", "4"),
        ("['4']", "4"),
        (["4", "4.0"], "4"),
        ("[0, 1]", "[0, 1]"),
        (3.0, "3"),
        (0.1, "0.1"),
        ("3.50", "3.50"),
        (0, "0"),
        ("A short sentence is a legal gold.", "A short sentence is a legal gold."),
    ],
)
def test_golds_are_taken_out(folder, capsys, value, gold):
    assert one(capsys, folder, ROW | {"answer": value})[1] == gold


@pytest.mark.parametrize(
    "value, why",
    [
        (None, "no answer"),
        ("N/A", "no answer"),
        ("?", "no answer"),
        (float("nan"), "no answer"),
        ("We prove it. " * 30, "more than an answer"),
        ("\\boxed{3", "more than an answer"),
        ("<think>so</think> 4", "more than an answer"),
        ("\\boxed{3} or \\boxed{4}", "several answers"),
        (["3", "4"], "several answers"),
        (True, "a truth value"),
        ({"x": 1}, "not text"),
    ],
)
def test_golds_that_no_response_could_match_are_refused(folder, capsys, value, why):
    assert why in refusal(capsys, folder, ROW | {"answer": value})


def test_numbers_of_32_bits_are_their_shortest_decimals(folder, capsys):
    numbers = np.array([0.1, 1.1, 3.14, 2.0, 16777.217], np.float32)
    golds = pyarrow.array(numbers)
    nested = pyarrow.StructArray.from_arrays([golds], ["gt"])
    table = pyarrow.table({"question": ["q"] * 5, "answer": golds, "model": nested})
    pyarrow.parquet.write_table(table, folder / "data.parquet")
    for name in ("answer", "model.gt"):
        rows = run(capsys, folder / "data.parquet", "--answer", name)[1]
        assert [row["answer"] for row in rows] == ["0.1", "1.1", "3.14", "2", "16777.217"]


def test_classes_are_read_by_their_names(folder, capsys):
    features = {"question": datasets.Value("string")}
    features["answer"] = datasets.ClassLabel(names=["cat", "dog"])
    columns = {"question": ["q", "q", "q"], "answer": [1, 0, -1]}
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    data.to_parquet(folder / "data.parquet")
    data.save_to_disk(folder / "saved")
    for source in (folder / "data.parquet", folder / "saved"):
        rows = run(capsys, source, "--skip_bad", "true")[1]
        assert [row["answer"] for row in rows] == ["dog", "cat"]


def choice(capsys, folder, options, gold, *more):
    row = {"question": "Which?", "choices": options, "answer": gold}
    return one(capsys, folder, row, "--options", "choices", *more)[:2]


@pytest.mark.parametrize(
    "options",
    [
        ["red", "dark blue"],
        ["red", "dark blue", None, ""],
        ["A. red", "B. dark blue"],
        '["red", "dark blue"]',
        "['red', 'dark blue']",
        "['red' 'dark blue']",
        "(A) red\n(B) dark blue",
        "A. red; B. dark blue",
    ],
)
@pytest.mark.parametrize("gold", ["B", "B.", "(b)", "B. dark blue", "(B) dark blue", "Dark  Blue"])
def test_options_become_lines_and_golds_their_letters(folder, capsys, options, gold):
    assert choice(capsys, folder, options, gold) == ("Which?\n(A) red\n(B) dark blue", "B")


def test_options_that_the_question_shows_are_not_appended(folder, capsys):
    question = "Which?\nA: red, B: dark blue"
    row = {"question": question, "choices": ["red", "dark blue"], "answer": "dark blue"}
    assert one(capsys, folder, row, "--options", "choices")[:2] == (question, "B")
    assert one(capsys, folder, row, "--question", "question")[:2] == (question, "B")


def test_what_an_answer_is_can_be_said(folder, capsys):
    swapped, numbers = ["B", "A", "C"], ["3", "2", "1"]
    for options, gold, how, letter in (
        (swapped, "A", "letter", "A"),
        (swapped, "A", "text", "B"),
        (numbers, 2, "0", "C"),
        (numbers, "2", "1", "B"),
        (numbers, 2, "text", "B"),
        (numbers, "C", "0", "C"),
    ):
        assert choice(capsys, folder, options, gold, "--answer_is", how)[1] == letter


@pytest.mark.parametrize(
    "options, gold, why",
    [
        (["red", "blue"], "green", "none of the options"),
        (["red", "blue"], "C", "none of the options"),
        (["red", "blue"], "A. blue", "none of the options"),
        (["red", "blue"], "1", "--answer_is"),
        (["2", "1", "0"], 1, "--answer_is text, or 0 or 1"),
        (["B", "A", "C"], "A", "a letter and a text"),
        (["5", "5", "6"], "5", "several of the options"),
        (["red"], "A", "no choice"),
        (["red", "", "blue"], "C", "no choice"),
        ([f"number {n}" for n in range(27)], "number 3", "no choice"),
        ("red, blue", "A", "without letters"),
        ("[__import__('os').system('touch bomb')]", "A", "not a list"),
    ],
)
def test_choices_that_are_unclear_are_refused(folder, capsys, options, gold, why):
    row = {"question": "q", "choices": options, "answer": gold}
    assert why in refusal(capsys, folder, row, "--options", "choices")


def test_random_lists_are_read_as_python_prints_them():
    dice = random.Random(0)
    for _ in range(500):
        items = ["".join(dice.choices("ab '\"\\,[]{}é$", k=dice.randint(1, 6))) for _ in range(3)]
        items = [item for item in items if item.strip()] or ["x"]
        assert convert.read_printed_list(repr(items)) == items
        assert convert.read_printed_list(json.dumps(items)) == items
    assert convert.read_printed_list(r"['\theta', '\neq']") == [r"\theta", r"\neq"]


# ------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("separator, suffix", [(",", "csv"), (";", "csv"), ("\t", "tsv")])
def test_text_tables_stay_text(folder, capsys, separator, suffix):
    file, quoted = folder / f"data.{suffix}", '"a; b,\nc\t?"'
    lines = [
        ("question ", "answer", "images"),
        (quoted, "05", "pictures/red.png"),
        ("q", "3.50", ""),
    ]
    text = "".join(separator.join(line) + "\n" for line in lines)
    file.write_text(text, encoding="utf-8-sig")
    rows = run(capsys, file)[1]
    assert [(row["question"], row["answer"]) for row in rows] == [
        ("a; b,\nc\t?", "05"),
        ("q", "3.50"),
    ]
    assert [len(row["images"]) for row in rows] == [1, 0]


def workbook(folder, **sheets):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
    book.save(folder / "data.xlsx")
    return folder / "data.xlsx"


def test_workbooks(folder, capsys, monkeypatch):
    head = ["question", "answer", "images"]
    file = workbook(folder, one=[head, ["q", 3.0, "pictures/red.png"], ["r", 1.1, None]])
    assert [row["answer"] for row in run(capsys, file)[1]] == ["3", "1.1"]
    file = workbook(folder, one=[head, ["q", 3, None]], two=[head, ["r", 4, None]])
    assert "data.xlsx holds one, two: choose with --subset" in run(capsys, file)[0]
    options = ["--subset", "two", "--category", "part"]
    assert run(capsys, file, *options)[1][0]["category"] == "two"
    file = workbook(folder, one=[head, ["q", datetime.date(2024, 1, 2), None]])
    assert "format the spreadsheet's column as text" in run(capsys, file)[0]
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    assert "pip install openpyxl" in run(capsys, file)[0]


def test_pictures_pasted_into_a_workbook_are_refused(folder, capsys):
    from openpyxl import load_workbook
    from openpyxl.drawing.image import Image as Pasted

    file = workbook(folder, one=[["question", "answer"], ["q", 1]])
    book = load_workbook(file)
    book["one"].add_image(Pasted(str(folder / "pictures/red.png")), "C2")
    book.save(file)
    assert "pasted into one" in run(capsys, file)[0]


def test_parts_of_json_and_mixed_types_of_a_column(folder, capsys):
    rows = [ROW, ROW | {"answer": 4}, ROW | {"answer": 0.5}]
    assert [row["answer"] for row in run(capsys, save(folder, rows))[1]] == ["3", "4", "0.5"]
    file = save(folder, {"train": rows, "version": 1}, "data.json")
    assert len(run(capsys, file)[1]) == 3
    file = save(folder, {"train": rows, "test": rows[:1]}, "data.json")
    assert "holds train, test: choose" in run(capsys, file)[0]


def test_folders_and_data_sets_on_disk(folder, capsys):
    features = {"images": datasets.List(datasets.Image()), "question": datasets.Value("string")}
    features["answer"] = datasets.Value("float32")
    row = {"images": [PICTURE], "question": "q", "answer": 1.1}
    data = datasets.Dataset.from_list([row, row], features=datasets.Features(features))
    data.save_to_disk(folder / "saved")
    datasets.DatasetDict(train=data, test=data).save_to_disk(folder / "both")
    for n in range(2):
        file = folder / f"hub/data/test-{n:05}-of-00002.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        data.select([n]).to_parquet(file)
    for source, options in (("saved", []), ("both", ["--split", "test"]), ("hub", [])):
        rows = run(capsys, folder / source, *options)[1]
        assert [row["answer"] for row in rows] == ["1.1", "1.1"]
        assert rows[0]["images"][0]["bytes"] == RED
    assert "one of the splits train, test" in run(capsys, folder / "both")[0]
    (folder / "hub/more.csv").write_text("question,answer\nq,05\n")
    assert "name the table in it" in run(capsys, folder / "hub")[0]


def test_the_hub_is_streamed(folder, capsys, monkeypatch):
    seen = []

    def load(*arguments, **how):
        seen.append((*arguments, how))
        data = datasets.Dataset.from_list([{"images": [PICTURE], "question": "q", "answer": "1"}])
        return datasets.IterableDatasetDict(validation=data.to_iterable_dataset())

    monkeypatch.setattr(datasets, "load_dataset", load)
    output = folder / "out.parquet"
    options = ["--subset", "Math", "--split", "validation"]
    assert run(capsys, "MMMU/MMMU", *options, output=output)[1][0]["images"][0]["bytes"] == RED
    assert seen == [("MMMU/MMMU", "Math", {"streaming": True})]


@pytest.mark.parametrize(
    "name, content, why",
    [
        ("data.jsonl", b"", "has no rows"),
        ("data.csv", b"", "has no rows"),
        ("data.json", b"[]", "has no rows"),
        ("data.json", b'"text"', "holds no rows"),
        ("data.json", b'{"a": 1}\n{"a": 2}', "name it .jsonl"),
        ("data.jsonl", b'{"question": ', "line 1 is not JSON"),
        ("data.jsonl", b"[1, 2]", "not a row with named columns"),
        ("data.csv", b"question,answer\n\xff,1\n", "is not UTF-8"),
        ("data.csv", b'question,answer\n"open,1\nq,2\n', "is a quote left open"),
        ("data.csv", b"question,answer\nq,1,2\n", "line 2 has more or fewer fields"),
        ("data.csv", b"question,answer\nq\n", "line 2 has more or fewer fields"),
        ("data.csv", b"question,answer,answer\nq,1,2\n", "two columns have one name"),
        ("data.parquet", b"nothing", "cannot be read"),
        ("data.xlsx", b"nothing", "cannot be read"),
        ("data.txt", b"q", "none of .jsonl"),
    ],
)
def test_files_that_cannot_be_read(folder, capsys, name, content, why):
    (folder / name).write_bytes(content)
    assert why in run(capsys, folder / name)[0]


# ------------------------------------------------------------------------------------------ report


def test_bad_rows_stop_all_or_are_left_out_and_counted(folder, capsys):
    bad = [ROW | {"images": "pictures/none.png"}] * 25
    rows = [
        ROW,
        *bad,
        ROW | {"answer": "\\boxed{2}"},
        ROW | {"answer": None},
        ROW | {"answer": "∎"},
    ]
    text, out = run(capsys, save(folder, rows))
    assert out is None
    assert text.count("cannot be used: no such picture file") == 20
    assert "refused, no such picture file: 25, for example row 1: no such picture file" in text
    assert "26 rows cannot be used, so nothing is written" in text
    text, out = run(capsys, save(folder, rows), "--skip_bad", "true")
    assert [row["answer"] for row in out] == ["3", "2", "∎"]
    assert "3 problems with 3 pictures; 26 rows refused" in text
    assert "golds made the final answer alone: 1, for example row 26: \\boxed{2} → 2" in text
    assert "answers that the checker can never match: 1, for example row 28: ∎" in text


def test_what_looks_odd_is_said(folder, capsys):
    rows = [ROW | {"answer": "C", "id": 1}, ROW | {"images": [], "id": 1}]
    text = run(capsys, save(folder, rows))[0]
    for kind in ("ids that come again", "problems without a picture"):
        assert f"{kind}: 1, for example row 1" in text
    assert "answers that are a letter while no options were found: 1" in text


def test_an_output_is_replaced_only_when_asked_and_only_by_a_whole_one(folder, capsys):
    output = folder / "out.parquet"

    def refused(rows, *options, to=output):
        with pytest.raises(SystemExit) as stop:
            convert.main([str(save(folder, rows)), str(to), *options])
        return str(stop.value)

    output.write_text("mine")
    assert "--overwrite true replaces it" in refused([ROW])
    refused([ROW, ROW | {"answer": ""}], "--overwrite", "true")
    assert output.read_text() == "mine"
    assert not list(folder.glob("*.part"))
    convert.main([str(save(folder, [ROW])), str(output), "--overwrite", "true"])
    assert len(pyarrow.parquet.read_table(output)) == 1
    assert "NAME.parquet" in refused([ROW], to=folder / "out.csv")
    assert "NAME.parquet" in refused([ROW], to=folder / "no/out.parquet")


def test_row_groups_stay_small(folder, capsys):
    run(capsys, save(folder, [ROW] * 200))
    file = pyarrow.parquet.ParquetFile(folder / "out.parquet")
    assert file.metadata.row_group(0).num_rows <= 64
    assert file.metadata.num_rows == 200


def test_as_a_command_without_traceback(folder):
    def command(*arguments):
        line = [sys.executable, ROOT / "tools/convert.py", *arguments]
        return subprocess.run(line, capture_output=True, text=True, cwd=folder, check=False)

    result = command(save(folder, [ROW]), "out.parquet")
    assert (result.returncode, result.stderr) == (0, "")
    result = command("data/none.jsonl", "hub.parquet")
    assert result.returncode == 1
    assert result.stderr.startswith("convert: data/none.jsonl: no file or folder that can be read")
