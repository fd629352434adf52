"""Turn other people's data into the one Parquet file that observe_r1.py reads.

    python tools/convert.py mathvista.parquet data/mathvista.parquet           # a known data set
    python tools/convert.py MMMU/MMMU data/mmmu.parquet --subset Math --split validation
    python tools/convert.py mine.xlsx data/mine.parquet --picture scan --question ask --answer reply
    python tools/convert.py chats.jsonl data/chats.parquet --picture images --question messages

It reads Parquet, JSON lines, JSON, CSV and TSV, workbooks (pip install openpyxl), folders of shards
and data sets of the hub. Known data sets are told by their columns (PRESETS below); of any other
table the options name the columns, and what nobody names is not guessed. The output has the columns
images, question, answer, id and category, and the ladder's three where the source is a ladder.

Nothing is written unless every row can be used, or --skip_bad true leaves the others out. Rows count
from 0, and each that cannot be used is named with the reason. Whatever is changed, left out or
refused is counted on screen with an example. Nothing in the data is ever run, and no web address in
it is opened.
"""

import argparse
import ast
import base64
import binascii
import csv
import functools
import io
import itertools
import json
import os
import re
import sys
import zipfile
from collections import Counter
from dataclasses import dataclass, replace
from datetime import date, time
from pathlib import Path

import datasets
import numpy as np
import pandas
import pyarrow.parquet
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from rewards import answers_match

ERRORS = (  # what the libraries raise at files that they cannot read
    ValueError, OSError, ImportError, csv.Error, zipfile.BadZipFile, pyarrow.ArrowException,
    datasets.exceptions.DatasetsError, RecursionError,
)  # fmt: skip


class Unusable(ValueError):
    """A row, file or option that cannot be used; the message says why and what to do."""


def short(value, size=60):
    """A value on one line of at most `size` characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= size else text[: size - 1] + "…"


# ----------------------------------------------------------------------------------------- layouts


FIELDS = ("picture", "question", "answer", "options", "id", "category")


@dataclass(frozen=True)
class Layout:
    """Which column holds what. "a,b" are several columns; "a.b" is the entry b of the column a."""

    name: str
    picture: str = ""
    question: str = ""
    answer: str = ""
    options: str = ""
    id: str = ""
    category: str = ""
    known_by: str = ""  # further columns that tell the data set; commas between them
    exact: bool = False  # no other column may be there, because the names are common ones
    answer_is: str = ""  # what answers to choices are: "letter", "text", or numbers from "0" or "1"
    before: str = ""  # what the question begins with, where the column alone asks nothing
    gold: str = ""  # a pattern for the answer in front of an explanation
    one_picture: bool = False  # one picture shows everything that the marks number

    def columns(self, names):
        """Which columns are read, of a table with columns of these names."""
        named = ",".join(getattr(self, field) for field in FIELDS).split(",")
        return {name if name in names else name.split(".")[0] for name in named} - {""}

    def fits(self, names):
        wanted = self.columns(names) | set(self.known_by.split(",")) - {""}
        return wanted == names if self.exact else wanted <= names


PRESETS = [
    # The columns of the card of MathLLMs/MathVision.
    Layout(
        "MathVision", "decoded_image", "question", "answer", "options", "id", "subject",
        known_by="image,solution,level", answer_is="letter", one_picture=True,
    ),
    # data/testmini.json of the repository We-Math/We-Math. ID is shared by the steps of a problem.
    Layout(
        "We-Math", "image_path", "question", "answer", "option", "question number",
        "knowledge concept", known_by="ID,key,knowledge concept description", answer_is="letter",
    ),
    # him1411/polymath, as a public preprocessing script reads it: the question is in the picture.
    Layout(
        "PolyMATH", "image", "answer_option", "final_answer", category="category",
        known_by="final_answer_range", before="Solve the problem in the picture. Its options: ",
    ),
    # Both files of the repository SceMQA/SceMQA. An explanation follows most letters.
    Layout(
        "SceMQA", "ImagePath", "Question", "Answer (final answer highlighted)", category="part",
        gold=r"\(?([A-Ha-h])\)?(?:[\s.:：,;-]|$)",
    ),
    # train_samples_all_tuning.json of Zhiqiang007/MathV360K has the columns of LLaVA's files.
    Layout("MathV360K or another file of LLaVA", "image", "conversations", id="id", exact=True),
    # The card of AI4Math/MathVista. `query` adds the unit and the wanted precision to the question.
    Layout(
        "MathVista", "decoded_image", "query", "answer", "choices", "pid", "metadata.category",
        known_by="question,image,unit,precision,question_type,answer_type", answer_is="text",
    ),
    # The card of AI4Math/MathVerse. `question` is empty where the picture shows it; query_wo asks
    # for an answer without reasoning.
    Layout(
        "MathVerse", "image", "query_cot", "answer", id="sample_index",
        category="metadata.subject", known_by="problem_version,question,query_wo",
    ),
    # The card of MMMU/MMMU.
    Layout(
        "MMMU", ",".join(f"image_{n}" for n in range(1, 8)), "question", "answer", "options", "id",
        "subfield", known_by="explanation,img_type,topic_difficulty", answer_is="letter",
    ),
    # Lin-Chen/MMStar: the question lists its options.
    Layout(
        "MMStar", "image", "question", "answer", id="index", category="category",
        known_by="l2_category,meta_info",
    ),
    # hiyouga/geometry3k; these are the default names of EasyR1, too.
    Layout("Geometry3K or another file of EasyR1", "images", "problem", "answer", exact=True),
]  # fmt: skip
OWN = Layout("columns", "images", "question", "answer", id="id", category="category")
SCORES = {"difficulty": "float64", "complexity": "float64", "stage": "int64"}


def choose_layout(names, settings):
    """The layout of a table with these columns: a preset, or our own names, and the options."""
    given = {field: value for field in (*FIELDS, "answer_is") if (value := vars(settings)[field])}
    if "question" in given:
        given["before"] = ""
    ours = OWN.columns(names) | SCORES.keys()
    layout = next((preset for preset in PRESETS if preset.fits(names)), OWN)
    if layout == OWN and not (names <= ours or given):
        raise Unusable(
            "not the columns of a known data set: choose with --picture, --question, --answer, "
            f"--options, --id and --category from {sorted(names)}"
        )
    layout = replace(layout, **given)
    if missing := layout.columns(names) - names - ours:
        raise Unusable(f"no column {', '.join(sorted(missing))}, only {sorted(names)}")
    scores = [name for name in SCORES if name in names <= ours]
    read = names & layout.columns(names) | {*scores}
    print(f"{layout.name}: reads {sorted(read)}, leaves out {sorted(names - read)}")
    return layout, scores


def cell(row, name):
    """The value of a column; "reward_model.ground_truth" leads into a nested one."""
    if not name:
        return None
    for part in [name] if name in row else name.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


# ----------------------------------------------------------------------------------------- readers
# Each gives rows (dictionaries), few of them at a time. JSON files and workbooks are held whole and
# may have several parts: a dictionary from names to lists of rows.


def read_lines(file):
    with open(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise Unusable(f"line {number} is not JSON: {error}") from error


def read_json(file):
    """A list of rows, several lists by their names, or lines, which some call .json, too."""
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError:
        return read_lines(file)
    if isinstance(data, dict):
        return {name: part for name, part in data.items() if isinstance(part, list)}
    return data if isinstance(data, list) else []


def read_sheets(file):
    sheets = pandas.read_excel(file, sheet_name=None, dtype=object, na_filter=False)
    if any("/media/" in name for name in zipfile.ZipFile(file).namelist()):
        raise Unusable("pictures are pasted into it; write their paths there")
    return {name: sheet.to_dict("records") for name, sheet in sheets.items() if len(sheet)}


def read_text_table(file):
    """Text with a header, and tabs, commas or semicolons. Every cell stays the text that it is."""
    csv.field_size_limit(2**31 - 1)  # pictures in base64 are long
    with open(file, encoding="utf-8-sig", newline="") as lines:
        separator = max(",;\t", key=lines.readline().count)
        lines.seek(0)
        table = csv.DictReader(lines, delimiter=separator, strict=True)
        table.fieldnames = [name.strip() for name in table.fieldnames or ()]
        if len({*table.fieldnames}) < len(table.fieldnames):
            raise Unusable(f"two columns have one name: {table.fieldnames}")
        for row in table:
            if None in (*row, *row.values()):  # what DictReader makes of such lines
                raise Unusable(f"line {table.line_num} has more or fewer fields than the header")
            yield row


def read_parquet(file):
    return read_table(datasets.Dataset.from_parquet(str(file), streaming=True))


def read_dataset(source, settings):
    """The rows of a folder of shards, or of a data set of the hub."""
    if tables := [*Path(source).rglob("*.csv"), *Path(source).rglob("*.tsv")]:
        raise Unusable(f"name the table in it: {tables[0]}")  # the library reads 05 as 5
    data = datasets.load_dataset(source, settings.subset, streaming=True)
    split = settings.split or (next(iter(data)) if len(data) == 1 else "")
    if split not in data:
        raise Unusable(f"choose one of the splits {', '.join(data)} with --split")
    return read_table(data[split])


def read_table(data):
    """Rows with pictures left encoded, and the names of classes in place of their numbers."""
    classes = {}
    for name, kind in (data.features or {}).items():
        if isinstance(kind, datasets.ClassLabel):
            classes[name] = dict(enumerate(kind.names))
    for table in data.with_format("arrow").iter(16):
        for row in table.to_pylist():
            yield row | {name: names.get(row[name]) for name, names in classes.items()}


READERS = {
    ".jsonl": read_lines, ".json": read_json, ".parquet": read_parquet,
    ".csv": read_text_table, ".tsv": read_text_table, ".xlsx": read_sheets,
}  # fmt: skip


def open_source(source, settings):
    """The rows of a file, a folder or a hub data set, and the folder of their pictures."""
    path = Path(source)
    if path.suffix.lower() not in READERS:
        return read_dataset(source, settings), path
    parts = READERS[path.suffix.lower()](path)
    wanted = settings.subset or settings.split
    if not isinstance(parts, dict):
        if wanted:
            raise Unusable(f"{wanted} cannot be chosen: the file is one table without parts")
        return parts, path.parent
    if len(parts) == 1 and not wanted:
        return next(iter(parts.values())), path.parent
    chosen = parts if wanted == "all" else [wanted]
    if not parts.keys() >= {*chosen}:
        raise Unusable(f"choose one of {', '.join(parts)} with --subset, or --subset all")
    return ({"part": name} | row for name in chosen for row in parts[name]), path.parent


# ---------------------------------------------------------------------------------------- pictures


def find_pictures(row, columns, folder):
    """The pictures of a row by the numbers that marks such as <image 2> call them by."""
    cells = [read_pictures(cell(row, name), folder) for name in columns.split(",")]
    if len(cells) == 1:
        return dict(enumerate(cells[0], 1))
    if any(len(found) > 1 for found in cells):
        raise Unusable("several pictures in one of several picture columns")
    return {number: found[0] for number, found in enumerate(cells, 1) if found}


def read_pictures(value, folder):
    """The encoded pictures of a cell: bytes, paths, base64, data URIs, dicts, or lists of these."""
    if isinstance(value, str) and value.startswith("["):
        value = read_printed_list(value)
    if not value:
        return []
    if isinstance(value, list):
        return [picture for item in value for picture in read_pictures(item, folder)]
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path") or value.get("url")
    if isinstance(value, bytes):
        return [clean_picture(value)]
    if isinstance(value, str):
        return [read_picture_text(value.strip(), folder)]
    raise Unusable(f"not a picture: {short(value)}")


def read_picture_text(text, folder):
    """The picture behind a path, a data URI, or base64."""
    if re.match(r"\w+://", text):
        raise Unusable(f"a web address is not opened: download {short(text)} and give its path")
    if len(text) < 250 and not text.startswith("data:"):
        for ending in ("", ".png", ".jpg"):  # SceMQA leaves it out
            file = folder / f"{text}{ending}".replace("\\", "/")
            if file.is_file():
                return read_picture_file(file)
        if "." in text or len(text) < 60:
            raise Unusable(f"no such picture file: {folder / text} (--image_folder DIR)")
    code = "".join(text.rpartition(",")[2].split())  # behind the head of a data URI
    try:
        return clean_picture(base64.b64decode(code, validate=True))
    except binascii.Error as error:
        raise Unusable(f"neither a picture file nor base64: {short(text)} ({error})") from error


@functools.lru_cache(maxsize=64)  # neighbouring rows often ask about one picture
def read_picture_file(file):
    return clean_picture(file.read_bytes())


def clean_picture(data):
    """The same bytes if the picture is upright, opaque, 8-bit RGB or grey; else a PNG that is so.

    Every picture is decoded here, so that a damaged one is refused before any training.
    """
    try:
        picture = Image.open(io.BytesIO(data))
        picture.load()
        upright = picture.getexif().get(274, 1) in (0, 1)  # 274 is the EXIF tag of the orientation
    except Exception as error:  # Pillow raises whatever the broken bytes make it raise
        raise Unusable(f"damaged picture: {error}") from error
    if max(picture.size) > 200 * min(picture.size):  # the limit of Qwen's own resizing
        raise Unusable(
            f"a picture of {picture.width} x {picture.height}: one side over 200 times the other"
        )
    opaque = not picture.has_transparency_data
    if picture.mode in ("L", "RGB") and upright and opaque:
        return data
    if picture.mode in ("I", "F"):
        raise Unusable(f"nothing says which number is white in a picture of mode {picture.mode}")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        picture = picture.convert("I").point(lambda value: value / 257).convert("L")
    if not opaque:
        paper = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(paper, picture.convert("RGBA"))
    file = io.BytesIO()
    picture.convert("L" if picture.mode in ("1", "L") else "RGB").save(file, "PNG")
    return file.getvalue()


# --------------------------------------------------------------------------------- questions, marks

MARK = re.compile(
    r"(?i)(?:<\|vision_start\|>)?(?:<img>[^<>\n]+</img>|<img\s[^<>]*>"
    r"|<\|?(?:image|img|picture)(?:_?(?:pad|placeholder|here))?[ _:#-]?(\d*)\s?\|?>"
    r"(?:</(?:image|img)>)?|!\[[^\]\n]*\]\([^)\n]*\))(?:<\|vision_end\|>)?"
)
FORBIDDEN = re.compile(r"(?i)<\|[^<>|\s]+\|>|<(?:video|audio)[^<>]*>")


def read_chat(turns, notes):
    """Question, the pictures in it (None: the next of the picture column), and the reply."""
    question, pictures, reply = "", [], None
    for turn in turns:
        role = turn.get("role") or turn.get("from")
        text, found = read_message(turn.get("content") or turn.get("value") or "")
        if role == "system":
            notes["system messages left out"] = short(text)
        elif role in ("assistant", "gpt"):
            reply = text
        elif role not in ("user", "human"):
            raise Unusable(f"not a message of a user or an assistant: {short(turn)}")
        elif question:
            raise Unusable("several questions in one conversation: make a row of each")
        else:
            question, pictures = text, found
    return question, pictures, reply


def read_message(content):
    """Text and pictures of a message: a text, or a list of text and picture parts."""
    if isinstance(content, str):
        return content, []
    text, pictures = "", []
    for part in content:
        kind = part.get("type")
        if kind == "text":
            text += part.get("text") or ""
        elif kind in ("image", "image_url"):
            text += "<image>"  # Arrow fills the keys that only other parts have with None
            pictures.append(part.get("image") or part.get("image_url"))
        else:
            raise Unusable(f"not a part with text or a picture: {short(part)}")
    return text, pictures


def place_marks(text, pictures, one_picture):
    """Every mark as <image>, and the pictures in the order of the marks."""
    marks = list(MARK.finditer(text))
    numbers = [int(mark[1]) for mark in marks if mark[1]]
    if not marks:
        return text, list(pictures.values())
    if one_picture and len(pictures) == 1 and numbers and set(numbers) != {1}:
        text = MARK.sub(lambda mark: f"picture {mark[1]}", text)
        return "<image>" + text, list(pictures.values())
    order = numbers or list(pictures)
    if len(order) != len(marks) or set(order) != set(pictures):
        raise Unusable(
            f"marks without their pictures: {len(marks)} marks, {len(pictures)} pictures"
        )
    return MARK.sub("<image>", text), [pictures[number] for number in order]


# --------------------------------------------------------------------------------- golds and options

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LABELS = [  # "(A) x"; and "A. x", "A: x" or "A) x" at the start or after white space, ; or ,
    re.compile(r"\(([A-Z])\)[.:]?\s*"),
    re.compile(r"(?:^|(?<=[\s;,]))([A-Z])[.:)．：]\s*(?=\S)"),
]
FINAL_ANSWERS = [  # in the order in which they are unwrapped; braces may stand in three others
    re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.IGNORECASE | re.DOTALL),
    re.compile(
        r"\\(?:f?boxed|fbox|answer)\s*"
        r"\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}"
    ),
    re.compile(r"####\s*(.+?)\s*\Z"),
    re.compile(r"(?im:\banswer is:?|^\W*(?:final )?answer\s*:)\s*(.+?)\.?\s*\Z"),
]
PRINTED_GOLDS = re.compile(
    r"\s*\[\s*(?:['\"].*['\"]|[^\[\],]*)\s*\]\s*", re.DOTALL
)  # "['8', '8.0']"
WRAPPED = re.compile(r"(?i)</?(?:answer|think|solution)>|\\f?boxed|####")
NOTHING = re.compile(r"|none|n/?a|nan|null|unknown|[?-]", re.IGNORECASE)  # "?" hides MMMU's golds


def read_printed_list(text):
    """The list in a text in JSON or as Python prints it: literals alone, nothing is run."""
    try:
        return json.loads(text)
    except ValueError:  # a list as Python prints it has other quotes
        literal = re.sub(r"(?<!\\)\\(?=[a-zA-Z])", r"\\\\", text)  # \theta begins with no tab
    try:
        items = ast.literal_eval(literal)
    except (ValueError, SyntaxError) as error:
        raise Unusable(f"not a list: {short(text)}") from error
    if len(items) == 1 and re.search(r"['\"]\s+['\"]", text):  # which Python would join
        raise Unusable(f"a list without commas: {short(text)}")
    return items


def read_text(value):
    """The text of a value: 3.0 as "3". Spreadsheets make a date of 1/2, and True may mean Yes."""
    if isinstance(value, (bool, date, time, list, dict, bytes)):
        raise Unusable(f"a {type(value).__name__} is not text, {short(value)}: write it as text")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, float) and float(np.float32(value)) == value:
        value = np.float32(value)  # whose shortest decimal is 1.1, not 1.100000023841858
    return "" if value is None else str(value).strip()


def read_gold(value, pattern=""):
    """The final answer alone, out of a list, tags, a box, "#### 4" or "The answer is 4"."""
    if isinstance(value, str) and PRINTED_GOLDS.fullmatch(value):
        value = read_printed_list(value)
    if isinstance(value, list):
        return only_one([read_text(item) for item in value])
    gold = read_text(value)
    if pattern and (explained := re.match(pattern, gold)):
        return explained[1].upper()
    for final in FINAL_ANSWERS:
        if found := final.findall(gold):
            gold = only_one(found)
    return gold


def only_one(answers):
    first = answers[0].strip() if answers else ""
    if any(answer.strip() != first and not answers_match(answer, first) for answer in answers):
        raise Unusable(f"several answers: {short(answers)}")
    return first


def read_options(row, columns):
    """The texts of the options in their order; [] if there are none."""
    values = [cell(row, name) for name in columns.split(",")]
    values = split_options(values[0]) if len(values) == 1 else values
    texts = [read_text(value) for value in values]
    while texts and not texts[-1]:
        texts.pop()
    before, bare = split_labels("\n".join(texts))  # "A. x" in every option, but not "(A)" alone
    if not before and all(bare) and len(bare) == len(texts):
        texts = bare
    if len(texts) == 1 or len(texts) > len(LETTERS) or not all(texts):
        raise Unusable(f"options that are no choice: {short(texts)}")
    return texts


def split_options(value):
    """The options in one cell: a list, the text of a list, or "A. x; B. y"."""
    if not isinstance(value, str):
        return value or []
    if value.strip() in ("", "None"):
        return []
    if value.lstrip().startswith("["):
        return read_printed_list(value)
    before, texts = split_labels(value)
    if not texts or before.strip():
        raise Unusable(f"options without letters before them: {short(value)}")
    return texts


def split_labels(text):
    """What stands before "(A)", and the texts after the labels A, B, C …; all and [] without."""
    for label in LABELS:
        found = []
        for match in label.finditer(text):
            if match[1] == LETTERS[len(found) % 26]:
                found.append(match)
        if len(found) > 1:
            ends = [match.start() for match in found[1:]] + [len(text)]
            texts = [text[match.end() : end].strip(" \n\t;,") for match, end in zip(found, ends)]
            return text[: found[0].start()], texts
    return text, []


def plain(text):
    return " ".join(text.casefold().split()).strip("$ .")


def letter_of(gold, options):
    """B of "B", "(b)", "B." or "Option B", and of "B. y" if y is the option B."""
    pattern = r"(?:(?:option|choice)\s+)?\(?([A-Z])\)?(?:[).:]\s*(.*))?"
    match = re.fullmatch(pattern, gold.strip("$ "), re.IGNORECASE | re.DOTALL)
    if not match:
        return ""
    letter, text = match[1].upper(), plain(match[2] or "")
    place = LETTERS.index(letter)
    is_quoted = place < len(options) and text == plain(options[place])
    return letter if not text or is_quoted else ""


def find_texts(gold, options):
    """The letters of the options that a gold quotes, or equals by the rules of the reward."""
    same = [plain(option) == plain(gold) for option in options]
    if not any(same) and not letter_of(gold, options):
        same = [answers_match(gold, option) for option in options]
    return "".join(itertools.compress(LETTERS, same))


def name_option(gold, options, answer_is):
    """The letter of the option that a gold means; one with two meanings, or none, is refused."""
    meanings = {"letter": letter_of(gold, options), "text": find_texts(gold, options)}
    if answer_is in ("0", "1") and gold.isdecimal():
        place = int(gold) - int(answer_is)
        meanings = {answer_is: LETTERS[place : place + 1]}
    letters = meanings.get(answer_is) or "".join(meanings.values())
    letters = {*letters} & {*LETTERS[: len(options)]}
    if len(letters) == 1:
        return letters.pop()
    raise Unusable(
        f"the answer {gold!r} means {' and '.join(sorted(letters)) or 'none'} of the options "
        f"{short(options, 200)} (--answer_is letter, text, or 0 or 1 where numbers start)"
    )


def settle_choice(question, gold, options, answer_is, notes):
    """The question with its options as lines "(A) text", and the letter that the gold means."""
    _, inside = split_labels(question)
    named = letter_of(gold, inside) or find_texts(gold, inside)
    if options or (inside and named):
        # Where the question itself lists options, an answer that is a letter means one of them.
        gold = name_option(gold, options or inside, answer_is if options else "letter")
        notes["choices"] = short(question)
    elif named:
        notes["answers that are a letter while no options were found"] = short(question)
    if options and [plain(text) for text in inside] != [plain(text) for text in options]:
        lines = [f"({letter}) {text}" for letter, text in zip(LETTERS, options)]
        question = "\n".join([question, *lines])
    return question, gold


# ------------------------------------------------------------------------------------------- a row


def convert_row(row, number, folder, layout, scores):
    """A row in our columns, and what was changed; Unusable says why it cannot be used."""
    notes = {}
    question, reply, pictures = read_question(row, layout, folder, notes)
    value = cell(row, layout.answer)
    value = reply if value is None else value
    gold = read_gold(value, layout.gold)
    options = read_options(row, layout.options)
    if options and isinstance(value, int) and not layout.answer_is:
        raise Unusable("the answer is a number: --answer_is text, or 0 or 1 if it counts options")
    question, answer = settle_choice(question, gold, options, layout.answer_is, notes)
    if not question.strip() or NOTHING.fullmatch(answer):
        raise Unusable(
            f"no question (--question) or answer (--answer): {question!r}, {short(value)}"
        )
    if len(answer) > 200 or WRAPPED.search(answer):  # as long as that is a solution
        raise Unusable(f"more than an answer, and none in \\boxed, <answer>, ####: {short(answer)}")
    if answer != str(value).strip():
        notes["golds made the final answer alone"] = f"{short(value)} → {answer}"
    if not answers_match(answer, answer):
        notes["answers that the checker can never match"] = short(answer)
    question, images = place_marks(question, pictures, layout.one_picture)
    if forbidden := FORBIDDEN.search(question):
        raise Unusable(f"the question holds the control token {forbidden[0]}")
    notes[f"problems with {len(images)} pictures"] = f"{short(question)} → {answer}"
    (question + answer).encode()  # half of a surrogate pair, as cut texts end with, is no text
    out = {
        "images": [{"bytes": image, "path": None} for image in images],
        "question": question,
        "answer": answer,
        "id": read_text(cell(row, layout.id)) or str(number),
        "category": read_text(cell(row, layout.category)),
    }
    return out | {name: float(row.get(name)) for name in scores}, notes


def read_question(row, layout, folder, notes):
    """Question, reply (None without a conversation) and pictures by number."""
    pictures = find_pictures(row, layout.picture, folder)
    value = cell(row, layout.question)
    if isinstance(value, str) and re.match(r"\s*\[\s*\{", value):
        value = json.loads(value)
    if not isinstance(value, list):
        return layout.before + read_text(value), None, pictures
    question, parts, reply = read_chat(value, notes)
    own = [part for part in parts if part is not None]
    if own and (pictures or len(own) < len(parts)):
        raise Unusable("pictures in the messages and in a column: name only one of them")
    if own:
        pictures = dict(enumerate(read_pictures(own, folder), 1))
    return question.strip(), reply, pictures


# ---------------------------------------------------------------------------------------- the file


def convert(settings):
    """Read, convert and write, with a report on screen; Unusable if nothing may be written."""
    output = Path(settings.output)
    if output.suffix != ".parquet" or not output.parent.is_dir():
        raise Unusable(f"{output}: the output must be NAME.parquet in a folder that exists")
    if output.exists() and settings.overwrite == "false":
        raise Unusable(f"{output} exists: --overwrite true replaces it")
    rows, folder = open_source(settings.source, settings)
    rows = iter(rows)
    first = next(rows, None)
    if not isinstance(first, dict):
        raise Unusable("there are no rows with named columns")
    layout, scores = choose_layout({*first}, settings)
    counts, examples = Counter(), {}
    folder = Path(settings.image_folder or folder)
    good = convert_rows(itertools.chain([first], rows), folder, layout, scores, counts, examples)
    part = output.with_name(output.name + ".part")
    try:
        write_rows(good, scores, part)
        for kind, example in examples.items():
            print(f"  {kind}: {counts[kind]}, for example {example}")
        if counts["refused"] and (settings.skip_bad == "false" or not counts["used"]):
            raise Unusable(
                f"{counts['refused']} rows cannot be used, so nothing is written: "
                "mend them, or leave them out with --skip_bad true"
            )
        os.replace(part, output)
    finally:
        part.unlink(missing_ok=True)
    print(
        "python observe_r1.py train --model Qwen/Qwen2.5-VL-3B-Instruct "
        f"--data {output} --output_dir runs/{output.stem}"
    )


def convert_rows(rows, folder, layout, scores, counts, examples):
    """The rows that can be used, in our columns; each other one is named on screen.

    What was changed or refused is counted by kind, with the first example of each.
    """
    for number, row in enumerate(rows):
        try:
            out, notes = convert_row(row, number, folder, layout, scores)
        except (ValueError, OSError, AttributeError, TypeError) as error:
            # The last two are what rows of unforeseen shapes make Python raise.
            reason = short(f"{error}", 300)
            print(f"  row {number} cannot be used: {reason}")
            out, notes = None, {"refused, " + re.match(r".?[^:'\d]*", reason)[0].strip(): reason}
        counts["used" if out else "refused"] += 1
        for kind, example in notes.items():
            counts[kind] += 1
            examples.setdefault(kind, f"row {number}: {example}")
        if out:
            yield out


def write_rows(rows, scores, file):
    """Write groups of few rows: readers fail on nested columns of groups beyond 2 GB."""
    columns = {"images": datasets.List(datasets.Image())}
    columns |= dict.fromkeys(("question", "answer", "id", "category"), datasets.Value("string"))
    columns |= {name: datasets.Value(SCORES[name]) for name in scores}
    schema = datasets.Features(columns).arrow_schema
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        while group := list(itertools.islice(rows, 32)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema))


def parse_options(arguments=None):
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("source", help="a file, a folder, or a hub id OWNER/NAME")
    parser.add_argument("output", help="the file to write, NAME.parquet")
    parser.add_argument("--split", help="train, test, … where a source has several")
    parser.add_argument("--subset", help="a configuration, a sheet, or a part of a JSON file")
    parser.add_argument("--image_folder", help="where paths of pictures start: the source's folder")
    for field in FIELDS:
        parser.add_argument(f"--{field}", metavar="COLUMN", help=f"the column with the {field}")
    parser.add_argument(
        "--answer_is",
        choices=["letter", "text", "0", "1"],
        help="what answers to choices are: letters, texts, or numbers that count from 0 or 1",
    )
    switch = {"choices": ("true", "false"), "default": "false"}
    parser.add_argument("--skip_bad", help="leave out the rows that cannot be used", **switch)
    parser.add_argument("--overwrite", help="replace an existing output", **switch)
    return parser.parse_args(arguments)


def main(arguments=None):
    settings = parse_options(arguments)
    try:
        convert(settings)
    except ERRORS as error:
        sys.exit(f"convert: {settings.source}: {error}")


if __name__ == "__main__":
    main()
