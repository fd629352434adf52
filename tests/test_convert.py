"""tools/convert.py: the data sets it knows, what it mends, what it refuses; fixtures made by hand."""

import base64
import datetime
import io
import json
import random
import re
import sys
from pathlib import Path
from unittest.mock import Mock

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
PICTURES = ["pictures/red.png"]
ROW = {"images": PICTURES, "question": "How many?", "answer": "3"}


class Lab:
    """An empty folder with pictures, in which rows are saved and converted."""

    def __init__(self, capsys):
        self.capsys = capsys
        Path("pictures").mkdir()
        Path("pictures/red.png").write_bytes(RED)

    def save(self, rows, name):
        if name.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), name)
        else:
            Path(name).write_text(json.dumps(rows))
        return name

    def run(self, source, *options, name="data.json"):
        """What was printed, with the error, and the rows written (None without a file)."""
        if isinstance(source, list | dict):
            source = self.save(source, name)
        output, error = Path("out.parquet"), ""
        output.unlink(missing_ok=True)
        try:
            convert.main([str(source), str(output), *options])
        except SystemExit as stop:
            error = str(stop)
        assert not [*Path().glob("*.part")]
        rows = pyarrow.parquet.read_table(output).to_pylist() if output.exists() else None
        assert bool(error) == (rows is None)
        return self.capsys.readouterr().out + error, rows

    def one(self, row, *options):
        """Question, answer and pictures of a row that can be used."""
        text, rows = self.run([row], *options)
        assert rows, text
        return rows[0]["question"], rows[0]["answer"], pictures_of(rows[0])

    def refusal(self, row, *options):
        text = self.run([row], *options)[0]
        assert "row 0 cannot be used" in text
        assert "nothing is written" in text
        return text


@pytest.fixture
def lab(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    return Lab(capsys)


def pictures_of(row):
    return [image["bytes"] for image in row["images"]]


def answers_of(rows):
    return [row["answer"] for row in rows]


# ----------------------------------------------------------------------------------- known data sets
# The columns of each (a cell is "x" unless it is given), and what a row becomes: id, question, answer
# and category, all with one red picture but for the first of MMMU.

VISION = "id,question,options,image,decoded_image,answer,solution,level,subject"
SCEMQA = "Question,Answer (final answer highlighted),ImagePath"
MMMU = "id,question,options,explanation,img_type,answer,topic_difficulty,question_type,subfield,"
MMMU += ",".join(f"image_{n}" for n in range(1, 8))
NO_PICTURES = dict.fromkeys(f"image_{n}" for n in range(1, 8))
CHOICES = "<image>\nHint: give the letter.\nChoices:\n(A) B\n(B) A"
LLAVA = [{"from": "human", "value": CHOICES}, {"from": "gpt", "value": "The answer is B."}]
KNOWN = {
    "MathVision": (
        VISION,
        {"decoded_image": PICTURE, "question": "Which?\n<image1>", "options": ["A", "B"], "answer": "B"},
        ("x", "Which?\n<image>\n(A) A\n(B) B", "B", "x"),
    ),
    "MathVision, one picture for all marks": (
        VISION,
        {"decoded_image": PICTURE, "question": "<image1> to <image2>", "options": []},
        ("x", "<image>picture 1 to picture 2", "x", "x"),
    ),
    "We-Math": (
        ("ID,split,knowledge concept,question,option,answer,image_path,key,question number,"
        "knowledge concept description"),
        {"image_path": PICTURE, "option": "A. 3 B．12 cm ;C. No answer", "answer": "B", "question number": 9},
        ("9", "x\n(A) 3\n(B) 12 cm\n(C) No answer", "B", "x"),
    ),
    "PolyMATH": (
        "image,category,answer_option,final_answer_range,final_answer",
        {"image": PICTURE, "answer_option": "(A) 26 (B) 156", "final_answer": "B"},
        ("0", "Solve the problem in the picture. Its options: (A) 26 (B) 156", "B", "x"),
    ),
    "SceMQA": (
        SCEMQA,
        {"Question": "A. a\nB. b", SCEMQA.split(",")[1]: "B Because E is uniform."},
        ("0", "A. a\nB. b", "B", "Math"),
    ),
    "MathV360K": (
        "id,image,conversations",
        {"image": PICTURE, "conversations": LLAVA},
        ("x", CHOICES, "B", ""),
    ),
    "MathVista": (
        ("pid,question,image,decoded_image,choices,unit,precision,answer,question_type,answer_type,"
        "metadata,query"),
        {"decoded_image": PICTURE, "choices": ["B", "A"], "answer": "A", "query": CHOICES,
         "metadata": {"category": "vqa"}},
        ("x", CHOICES, "B", "vqa"),
    ),
    "MathVerse": (
        ("sample_index,problem_index,problem_version,question,image,answer,question_type,metadata,"
        "query_wo,query_cot,question_for_eval"),
        {"image": PICTURE, "metadata": {"subject": "Plane"}, "query_cot": "First reason.", "answer": "A"},
        ("x", "First reason.", "A", "Plane"),
    ),
    "MMMU": (
        MMMU,
        NO_PICTURES | {"question": "<image 2> or <image 1>?", "options": "['it\\'s <image 3>', \"6\"]",
         "image_1": PICTURE, "image_2": {"bytes": BLUE}, "image_3": {"bytes": GREEN}, "answer": "A"},
        ("x", "<image> or <image>?\n(A) it's <image>\n(B) 6", "A", "x"),
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
def test_known_data_sets(lab, name):
    columns, cells, expected = KNOWN[name]
    row = dict.fromkeys(columns.split(","), "x") | cells
    if name == "SceMQA":  # two subjects in one file; picture paths without an ending
        parts = {"Math": [row | {"ImagePath": "pictures/red"}], "Physics": []}
        text, rows = lab.run(parts, "--subset", "all")
    else:
        text, rows = lab.run([row], name="data.parquet")
    assert rows, text
    assert text.startswith(name.partition(",")[0])
    pictures = [BLUE, RED, GREEN] if name == "MMMU" else [RED]
    assert pictures_of(rows[0]) == pictures
    assert tuple(rows[0][key] for key in ("id", "question", "answer", "category")) == expected


def test_the_output_is_the_format_of_the_script_and_passes_through_unchanged(lab):
    text, rows = lab.run([ROW | {"id": "a"}, ROW | {"images": []}])
    command = "train --model Qwen/Qwen2.5-VL-3B-Instruct --data out.parquet --output_dir runs/out"
    assert command in text
    data = datasets.Dataset.from_parquet("out.parquet", cache_dir="cache")
    assert data.column_names == ["images", "question", "answer", "id", "category"]
    assert isinstance(data.features["images"].feature, datasets.Image)
    assert data[0]["images"][0].size == (6, 4)
    assert lab.run(Path("out.parquet").rename("first.parquet"))[1] == rows


def test_a_ladder_keeps_its_scores(lab):
    scores = {"difficulty": 0.25, "complexity": 100.5, "stage": 2}
    rows = lab.run([ROW | scores])[1]
    assert {name: rows[0][name] for name in scores} == scores
    assert "not 'NoneType'" in lab.refusal(ROW | scores | {"difficulty": None})


# ------------------------------------------------------------------------------------ other tables

TABLE = {"scan": "pictures/red.png", "ask": "Which?", "reply": "b", "A": "red", "B": "blue"}
NAMES = ["--picture", "scan", "--question", "ask", "--answer", "reply", "--options", "A,B"]


def test_columns_are_named_by_options(lab):
    expected = ("Which?\n(A) red\n(B) blue", "B", [RED])
    assert lab.one(TABLE | {"difficulty": "hard"}, *NAMES) == expected
    row = ROW | {"meta": {"kind": "k"}, "a.b": "c", "other": 1}
    text, rows = lab.run([row], "--category", "meta.kind", "--id", "a.b")
    assert (rows[0]["category"], rows[0]["id"]) == ("k", "c")
    assert "leaves out ['other']" in text


@pytest.mark.parametrize(
    "row, options, why",
    [
        (TABLE, [], "choose with --picture, .* from .'A', 'B', 'ask', 'reply', 'scan'"),
        (ROW | {"problem": "p"}, [], "not the columns of a known data set"),
        (TABLE, ["--picture", "img", *NAMES[2:]], "no column img, only .'A', 'B'"),
    ],
)
def test_columns_are_never_guessed(lab, row, options, why):
    assert re.search(why, lab.run([row], *options)[0])


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


def test_chat_files(lab):
    rows = [{"messages": MESSAGES}, {"messages": json.dumps(MESSAGES)}]
    text, rows = lab.run(rows, "--question", "messages")
    assert "system messages left out: 2, for example row 0: Be good." in text
    assert [row["question"] for row in rows] == ["Compare <image> with <image>"] * 2
    assert answers_of(rows) == ["5", "5"]
    assert pictures_of(rows[1]) == [RED, RED]
    clash = {"messages": MESSAGES, "images": PICTURES}
    assert "in the messages and in a column" in lab.refusal(clash, "--question", "messages")
    row = {"chat": [{"role": "user", "content": "<image>q"}], "images": PICTURES, "gt": {"x": 4}}
    options = ["--question", "chat", "--answer", "gt.x"]
    assert lab.one(row, *options) == ("<image>q", "4", [RED])


@pytest.mark.parametrize(
    "turns, why",
    [
        (MESSAGES + MESSAGES[1:], "several questions"),
        ([{"role": "user", "content": [{"type": "video"}]}], "not a part with text or a picture"),
        (["q"], "no attribute 'get'"),
    ],
)
def test_chats_that_are_no_problem_are_refused(lab, turns, why):
    assert why in lab.refusal({"chat": turns}, "--question", "chat")


# ---------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    "value, expected",
    [
        ("pictures\\red.png", [RED]),
        ("\n".join([RED64[:40], RED64[40:]]), [RED]),
        ("['pictures/red.png', 'pictures/red.png']", [RED, RED]),
        ([PICTURES, {"bytes": None, "path": "pictures/red.png"}, None], [RED, RED]),
    ],
)
def test_pictures_in_every_form(lab, value, expected):
    assert lab.one(ROW | {"images": value})[2] == expected


def test_a_folder_of_pictures_can_be_named(lab):
    assert lab.one(ROW | {"images": "red.png"}, "--image_folder", "pictures")[2] == [RED]


def deep(number, kind=np.uint16):
    file = io.BytesIO()
    Image.fromarray(np.full((4, 6), number, kind)).save(file, "TIFF")
    return file.getvalue()


WHITE, CLEAR = (255, 255, 255), (0, 0, 0, 0)


@pytest.mark.parametrize(
    "data, color",
    [
        (encoded(mode="RGBA", color=CLEAR), WHITE),
        (encoded(mode="P", color=0, transparency=0), WHITE),
        (encoded("JPEG", CLEAR, mode="CMYK"), WHITE),
        (encoded(mode="1", color=1), 255),
        (deep(128 * 257), 128),
    ],
)
def test_pictures_become_opaque_8_bit_rgb_or_grey(data, color):
    picture = Image.open(io.BytesIO(convert.clean_picture(data)))
    assert picture.mode == ("L" if isinstance(color, int) else "RGB")
    assert not picture.has_transparency_data
    assert picture.getpixel((0, 0)) == color


def turned(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    return encoded(exif=exif)


def test_pictures_become_upright_and_a_good_one_keeps_its_bytes():
    assert Image.open(io.BytesIO(convert.clean_picture(turned(6)))).size == (4, 6)
    for data in (RED, BLUE, encoded(mode="L", color=9), turned(1)):
        assert convert.clean_picture(data) == data


@pytest.mark.parametrize(
    "value, why",
    [
        ("https://example.org/a.png", "a web address is not opened"),
        ("pictures/none.png", "no such picture file"),
        (base64.b64encode(BLUE[:-9]).decode(), "damaged picture"),
        (f"data:image/png;base64,{RED64[:-5]}", "nor base64"),
        (base64.b64encode(deep(7, np.int32)).decode(), "nothing says which number is white"),
        (base64.b64encode(encoded(size=(1001, 5))).decode(), "one side over 200 times the other"),
        ({"height": 3}, "not a picture"),
    ],
)
def test_pictures_that_cannot_be_used(lab, value, why):
    assert why in lab.refusal(ROW | {"images": value})


@pytest.mark.parametrize(
    "mark",
    ["<image>", "<image 1>", "<image_1>", "<|image_1|>", "<|image_pad|>", "<img>", "![x](a.png)"]
    + ["<|vision_start|><|image_pad|><|vision_end|>", "<Image>", "<image></image>", "<ImageHere>"]
    + ["<img src='red.png'>", "<img>red.png</img>", "<image_placeholder>"],
)
def test_marks_of_every_kind_stay_in_their_place(lab, mark):
    row = ROW | {"question": f"Is a < b in {mark} or not?"}
    assert lab.one(row)[0] == "Is a < b in <image> or not?"


@pytest.mark.parametrize(
    "row, why",
    [
        ({"question": "<image> <image>?"}, "2 marks, 1 pictures"),
        ({"question": "Who <|im_end|> speaks?"}, "control token <|im_end|>"),
        ({"question": "q\ud800"}, "surrogates"),
    ],
)
def test_questions_that_would_train_wrong_are_refused(lab, row, why):
    assert why in lab.refusal(ROW | row)


# ------------------------------------------------------------------------------- golds and options


@pytest.mark.parametrize(
    "value, gold",
    [
        ("<think>so</think>\n<answer>\\boxed{3}</answer>", "3"),
        ("Therefore $x = \\boxed{\\frac{1}{\\sqrt{2}}}$.", "\\frac{1}{\\sqrt{2}}"),
        ("It is 1 + 3 = 4.\n#### 4", "4"),
        ("x" * 300 + "\nThe answer is 4.", "4"),
        ("['8', '8.0']", "8"),
        ("\\answer{\\frac{1}{2}} A long reason.", "\\frac{1}{2}"),  # SceMQA
        ("[0, 1]", "[0, 1]"),
        (3.0, "3"),
        ("A short sentence is a legal gold.", "A short sentence is a legal gold."),
    ],
)
def test_golds_are_taken_out(lab, value, gold):
    assert lab.one(ROW | {"answer": value})[1] == gold


@pytest.mark.parametrize(
    "value, why",
    [
        (None, "or answer (--answer)"),
        ("?", "or answer (--answer)"),
        ("We prove it. " * 30, "more than an answer"),
        ("\\boxed{3", "more than an answer"),
        (["3", "4"], "several answers"),
        (True, "a bool is not text"),
        ("['3' '4']", "a list without commas"),
    ],
)
def test_golds_that_no_response_could_match_are_refused(lab, value, why):
    assert why in lab.refusal(ROW | {"answer": value})


def test_numbers_of_32_bits_are_their_shortest_decimals(lab):
    golds = pyarrow.array([0.1, 1.1, 3.14, 2.0, 16777.217], pyarrow.float32())
    nested = pyarrow.StructArray.from_arrays([golds], ["gt"])
    table = pyarrow.table({"question": ["q"] * 5, "model": nested})
    pyarrow.parquet.write_table(table, "data.parquet")
    rows = lab.run("data.parquet", "--answer", "model.gt")[1]
    assert answers_of(rows) == ["0.1", "1.1", "3.14", "2", "16777.217"]
    assert lab.one(ROW | {"answer": 0.1})[1] == "0.1"  # of 64 bits


def choice(lab, options, gold, *more):
    row = {"question": "Which?", "choices": options, "answer": gold}
    return lab.one(row, "--options", "choices", *more)[:2]


@pytest.mark.parametrize(
    "options",
    [
        ["red", "dark blue"],
        ["A. red", "B. dark blue", None, ""],
        "['red', 'dark blue']",
        "(A) red\n(B) dark blue",
        "A. red; B. dark blue",
    ],
)
@pytest.mark.parametrize("gold", ["B", "B.", "(b)", "B. dark blue", "(B) dark blue", "Dark  Blue"])
def test_options_become_lines_and_golds_their_letters(lab, options, gold):
    assert choice(lab, options, gold) == ("Which?\n(A) red\n(B) dark blue", "B")


@pytest.mark.parametrize("gold", ["dark blue", "(b) dark blue"])
@pytest.mark.parametrize("options", [["--options", "choices"], ["--question", "question"]])
def test_options_that_the_question_shows_are_not_appended(lab, options, gold):
    question = "Which?\nA: red, B: dark blue"
    row = {"question": question, "choices": ["red", "dark blue"], "answer": gold}
    assert lab.one(row, *options)[:2] == (question, "B")


@pytest.mark.parametrize(
    "options, gold, how, letter",
    [
        (["B", "A", "C"], "A", ["--answer_is", "text"], "B"),
        (["3", "2", "1"], 2, ["--answer_is", "0"], "C"),
        (["3", "2", "1"], "2", ["--answer_is", "1"], "B"),
        (["0 A", "1 A"], "A", [], "A"),  # no rule of the reward makes it 1 ampere
        (["1/2", "3"], "0.5", [], "A"),
        (["(A)", "(B)"], "B", [], "B"),  # MathVision
    ],
)
def test_an_answer_is_an_option(lab, options, gold, how, letter):
    assert choice(lab, options, gold, *how)[1] == letter


@pytest.mark.parametrize(
    "options, gold, why",
    [
        (["red", "blue"], "C", "none of the options"),
        (["2", "1", "0"], 1, "--answer_is text, or 0 or 1"),
        (["B", "A", "C"], "A", "'A' means A and B of the options"),
        (["5", "5", "6"], "5", "'5' means A and B of the options"),
        (["red", "", "blue"], "C", "no choice"),
        ("red, blue", "A", "without letters"),
        ("[__import__('os').system('touch bomb')]", "A", "not a list"),
    ],
)
def test_choices_that_are_unclear_are_refused(lab, options, gold, why):
    row = {"question": "q", "choices": options, "answer": gold}
    assert why in lab.refusal(row, "--options", "choices")


def test_random_lists_are_read_as_python_prints_them():
    dice = random.Random(0)
    for _ in range(500):
        items = ["x" + "".join(dice.choices("ab '\"\\,[](){}é$", k=6)) for _ in range(3)]
        assert convert.read_printed_list(repr(items)) == items
    assert convert.read_printed_list(r"['\theta', '\neq']") == [r"\theta", r"\neq"]


# ------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("separator, suffix", [(",", "csv"), (";", "csv"), ("\t", "tsv")])
def test_text_tables_stay_text(lab, separator, suffix):
    lines = [("question ", "answer", ""), ('"a; b,\nc\t?"', "05", "0"), ("q", "3.50", "1")]
    text = "".join(separator.join(line) + "\n" for line in lines)  # pandas numbers the rows so
    Path(f"data.{suffix}").write_text(text, encoding="utf-8-sig")
    rows = lab.run(f"data.{suffix}", "--question", "question")[1]
    assert [row["question"] for row in rows] == ["a; b,\nc\t?", "q"]
    assert answers_of(rows) == ["05", "3.50"]


def workbook(picture=None, **sheets):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in [["question", "answer", "images"], *rows]:
            sheet.append(row)
    if picture:
        sheet.add_image(openpyxl.drawing.image.Image(picture), "C2")
    book.save("data.xlsx")
    return "data.xlsx"


def test_workbooks(lab):
    file = workbook(one=[["q", 3.0, "pictures/red.png"], ["r", 1.1]], two=[["s", 4]])
    assert "choose one of one, two with --subset" in lab.run(file)[0]
    rows = lab.run(file, "--subset", "all", "--category", "part")[1]
    assert answers_of(rows) == ["3", "1.1", "4"]
    assert rows[2]["category"] == "two"
    file = workbook(one=[["q", datetime.date(2024, 1, 2)]])
    assert "datetime is not text" in lab.run(file)[0]
    assert "pictures are pasted" in lab.run(workbook("pictures/red.png", one=[["q", 1]]))[0]


def test_json_with_parts_or_lines_and_mixed_types_of_a_column(lab):
    rows = [ROW, ROW | {"answer": 4}, ROW | {"answer": 0.5}]
    Path("lines.json").write_text("\n".join(map(json.dumps, rows)))
    for source in (rows, {"train": rows, "version": 1}, "lines.json"):
        assert answers_of(lab.run(source)[1]) == ["3", "4", "0.5"]
    assert "one table without parts" in lab.run([ROW], "--split", "test")[0]


def test_folders_of_shards_and_classes_by_their_names(lab):
    features = {"images": datasets.List(datasets.Image()), "question": datasets.Value("string")}
    features["answer"] = datasets.ClassLabel(names=["cat", "dog"])
    rows = [{"images": [PICTURE], "question": "q", "answer": n} for n in (1, 0, -1)]
    data = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    file = Path("hub/data/test-00000-of-00001.parquet")
    file.parent.mkdir(parents=True)
    data.to_parquet(file)
    for source in ("hub", file):
        rows = lab.run(source, "--skip_bad", "true")[1]
        assert answers_of(rows) == ["dog", "cat"]
        assert pictures_of(rows[0]) == [RED]
    data.to_parquet("hub/data/train-00000-of-00001.parquet")
    assert "one of the splits train, test" in lab.run("hub")[0]
    Path("hub/more.csv").write_text("question,answer\nq,05\n")
    assert "name the table in it" in lab.run("hub")[0]


def test_the_hub_is_streamed(lab, monkeypatch):
    data = datasets.Dataset.from_list([{"images": [PICTURE], "question": "q", "answer": "1"}])
    splits = datasets.IterableDatasetDict(validation=data.to_iterable_dataset())
    load = Mock(return_value=splits)
    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = lab.run("MMMU/MMMU", "--subset", "Math", "--split", "validation")[1]
    assert pictures_of(rows[0]) == [RED]
    load.assert_called_once_with("MMMU/MMMU", "Math", streaming=True)


@pytest.mark.parametrize(
    "name, content, why",
    [
        ("none.csv", None, "No such file"),
        ("data.jsonl", b"[1, 2]", "no rows with named columns"),
        ("data.jsonl", b'{"question": ', "line 1 is not JSON"),
        ("data.csv", b"question,answer\n\xff,1\n", "'utf-8' codec can't decode"),
        ("data.csv", b'question,answer\n"open,1\nq,2\n', "unexpected end of data"),
        ("data.csv", b"question,answer\nq,1,2\n", "line 2 has more or fewer fields"),
        ("data.csv", b"question,answer,answer\nq,1,2\n", "two columns have one name"),
        ("data.parquet", b"nothing", "Parquet"),
        ("data.xlsx", b"nothing", "Excel file format"),
    ],
)
def test_files_that_cannot_be_read(lab, name, content, why):
    if content is not None:
        Path(name).write_bytes(content)
    text = lab.run(name)[0]
    assert text.startswith(f"convert: {name}: ")
    assert why in text


# ------------------------------------------------------------------------------------------ report


def test_bad_rows_stop_all_or_are_left_out_and_counted(lab):
    bad = [ROW | {"images": "none.png"}] * 25
    table = [ROW, *bad, ROW | {"answer": "\\boxed{2}"}, ROW | {"answer": "∎"}]
    text, rows = lab.run(table)
    assert rows is None
    assert text.count("cannot be used: no such picture file") == 25
    assert "refused, no such picture file: 25, for example row 1: no such picture file" in text
    text, rows = lab.run(table, "--skip_bad", "true")
    assert answers_of(rows) == ["3", "2", "∎"]
    assert "problems with 1 pictures: 3, for example row 0: How many? → 3" in text
    assert "golds made the final answer alone: 1, for example row 26: \\boxed{2} → 2" in text
    assert "answers that the checker can never match: 1, for example row 27: ∎" in text
    assert "nothing is written" in lab.run(bad, "--skip_bad", "true")[0]


def test_what_looks_odd_is_said(lab):
    text, rows = lab.run([{"question": "q", "answer": "C"}, ROW | {"hint": "Look."}])
    assert "answers that are a letter while no options were found: 1, for example row 0" in text
    assert "problems with 0 pictures: 1, for example row 0" in text
    assert pictures_of(rows[1]) == [RED]  # a column that row 0 has not


def test_an_output_stays_what_it_was(lab):
    Path("out.parquet").write_text("mine")
    file, bad = lab.save([ROW], "data.json"), lab.save([ROW | {"answer": ""}], "bad.json")
    replace = ["--overwrite", "true"]
    for source, output, options, why in (
        (file, "out.parquet", [], "--overwrite true replaces it"),
        (bad, "out.parquet", replace, "nothing is written"),
        (file, "out.csv", [], "NAME.parquet"),
    ):
        with pytest.raises(SystemExit, match=why):
            convert.main([source, output, *options])
        assert Path("out.parquet").read_text() == "mine"
    convert.main([file, "out.parquet", *replace])
    assert len(pyarrow.parquet.read_table("out.parquet")) == 1


def test_row_groups_stay_small(lab):
    lab.run([ROW] * 200)
    file = pyarrow.parquet.ParquetFile("out.parquet").metadata
    assert (file.row_group(0).num_rows, file.num_rows) == (32, 200)
