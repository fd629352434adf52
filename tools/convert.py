"""Turn other people's data into the one file that observe_r1.py reads.

    python tools/convert.py mathvista.parquet data/mathvista.parquet
    python tools/convert.py problems.xlsx data/mine.parquet --image_folder pictures
    python tools/convert.py MMMU/MMMU data/mmmu.parquet --subset Math --split validation
    python tools/convert.py odd.csv data/odd.parquet --picture scan --answer reply --skip_bad true

The output has the columns id, images (the encoded files themselves), question, answer, category, and
difficulty, complexity and stage where the source has all three. In the question, <image> stands where
a picture belongs; without any mark the pictures come first. Options stand as lines "(A) text", and
the answer is then the letter.

Nothing is written unless every row can be used, or --skip_bad true leaves the others out. Rows count
from 0. Whatever is changed, left out or refused is counted on screen, with an example. Nothing in the
data is ever evaluated, and no web address that stands in it is opened.
"""

import argparse
import base64
import binascii
import csv
import functools
import io
import json
import math
import os
import re
import shlex
import sys
import tempfile
import warnings
from collections import Counter
from datetime import date, time
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image, ImageFile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from rewards import answers_match

# ------------------------------------------------------------------------------------- column names
# What each of our columns is called elsewhere, in lower case. The first one that is filled is read;
# a dot leads into a nested column.

NAMES = {
    "picture": """images decoded_image image pictures picture image_list image_paths image_path
        img_paths img_path imgs img image_urls image_url image_files image_file image_bytes
        image_base64 file_names file_name bytes""",
    "question": "question problem query messages message conversations prompt instruction query_wo",
    "answer": """answer final_answer ground_truth reward_model.ground_truth gold gold_answer gt
        correct_answer correct_option answer_key answerkey target answers solution label correct
        correct_choice_idx answer_idx response output extra_info.answer""",
    "options": "options choices option choice candidates",
    "id": "id pid question_id sample_index index problem_id qid uid uuid extra_info.index",
    "category": """category subject subfield knowledge_concept topic ability metadata.category
        metadata.subject""",
}
NAMES = {field: names.split() for field, names in NAMES.items()}
WEAK_PICTURE_NAMES = ("file", "path", "url")  # read only if the value looks like a picture
SCORES = ("difficulty", "complexity", "stage")
NUMBERED_PICTURE = re.compile(r"(?:image|img|picture)[_ -]?(\d+)")
LETTER_COLUMN = re.compile(r"(?:(?:option|choice)[ _.-]?)?([a-z])|(?:option|choice)[ _.-]?(\d+)")
# Names of columns that hold pictures, or point to them, unless they end in what describes a picture.
PICTURE_WORD = re.compile(r"image|img|picture|photo|screenshot|figure|diagram")
DESCRIPTION = re.compile(r"(?:type|width|height|size|caption|desc|description|count|source|text)$")
PICTURE_FILE = re.compile(r"\.(?:png|jpe?g|gif|webp|bmp|tiff?|jp2|avif|heic|svg)$", re.IGNORECASE)
BASE64_HEAD = re.compile(r"iVBOR|/9j/|R0lGOD|UklGR")  # PNG, JPEG, GIF, WebP
POINTER = b"version https://git-lfs"


class Unusable(ValueError):
    """A row, file or option that cannot be used; the message says why and what to do."""


def filled(value) -> bool:
    """Whether there is anything in a cell: not None, NaN, blank, or a list or dict of these."""
    if isinstance(value, float):
        return not math.isnan(value)
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}")
    if isinstance(value, dict):
        return any(filled(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(filled(item) for item in value)
    return value is not None


def plain(name) -> str:
    """A column's name without padding, in lower case, with _ for spaces."""
    return "_".join(str(name).strip("\ufeff \t\r\n").lower().split())


def tidy(row) -> dict:
    """The row under lower-case names without padding; two filled columns of one name are refused."""
    if not isinstance(row, dict):
        raise Unusable(f"not a row with named columns: {short(row)}")
    out = {}
    for name, value in row.items():
        if name is None:  # csv puts the fields that the header does not name under None
            raise Unusable(f"more fields than the header has columns: {short(value)}")
        name = plain(name)
        if filled(out.get(name)) and filled(value) and out[name] != value:
            raise Unusable(f"two columns are called {name!r} and differ")
        if name not in out or filled(value):
            out[name] = value
    return out


def cell(row: dict, name: str):
    """The value under a name; "reward_model.ground_truth" leads into a nested column."""
    if name in row:
        return row[name]
    first, dot, rest = name.partition(".")
    nested = row.get(first)
    if dot and isinstance(nested, str) and nested.lstrip().startswith("{"):
        nested = parse_json(nested)
    return cell(nested, rest) if dot and isinstance(nested, dict) else None


def pick(row: dict, field: str, settings) -> tuple[str | None, object]:
    """Name and value of the first filled column for a field; a name given as option stands alone."""
    wanted = getattr(settings, field)
    names = [plain(wanted)] if wanted else NAMES[field]
    if wanted and names[0].split(".")[0] not in row:
        raise Unusable(f"no column {wanted!r} (--{field}): there are {', '.join(sorted(row))}")
    for name in names:
        value = cell(row, name)
        if filled(value):
            return name, value
    return None, None


def short(value, size: int = 60) -> str:
    """A value on one line of at most size characters."""
    text = " ".join((value if isinstance(value, str) else repr(value)).split())
    return text if len(text) <= size else text[: size - 1] + "…"


def parse_json(text: str):
    """What a JSON text says, or None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


# --------------------------------------------------------------------------------------- reading
# Every reader is a generator of rows (dicts), so that memory holds a few rows at a time.


def read_lines(file: Path, subset: str | None):
    with open(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except ValueError as error:
                raise Unusable(f"{file}: line {number} is not JSON: {error}") from error


def read_json(file: Path, subset: str | None):
    """A list of rows, {"data": rows}, rows keyed by their id, columns, or lines that end in .json."""
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data"):
            raise Unusable(f"{file} is not JSON: {error}") from error
        return read_lines(file, subset)
    return iter(json_rows(data, file, subset))


def json_rows(data, file: Path, subset: str | None) -> list:
    if subset is not None:
        if not isinstance(data, dict) or subset not in data:
            raise Unusable(f"{file}: nothing in it is called {subset!r} (--subset)")
        data = data[subset]
    if isinstance(data, list):
        return data
    if not isinstance(data, dict):
        raise Unusable(f"{file} holds no rows but {short(data)}")
    columns = {plain(name): value for name, value in data.items()}
    question = next((columns[name] for name in NAMES["question"] if name in columns), None)
    if question is not None:
        return one_row_or_columns(data, question, file)
    if data and all(isinstance(value, dict) for value in data.values()):
        return [{"id": name} | value for name, value in data.items()]
    lists = [name for name, value in data.items() if isinstance(value, list)]
    tables = [name for name in lists if data[name] and isinstance(data[name][0], dict)]
    if len(tables) != 1:
        raise Unusable(f"{file}: which of {', '.join(data)} holds the rows? --subset NAME")
    return data[tables[0]]


def one_row_or_columns(data: dict, question, file: Path) -> list:
    """{"question": "…"} is one row; {"question": ["…", …]}, or pandas' {"0": "…"}, are columns."""
    texts = question.values() if isinstance(question, dict) else question
    if isinstance(question, str) or not all(isinstance(text, str) for text in texts):
        return [data]
    columns = [list(c.values()) if isinstance(c, dict) else c for c in data.values()]
    if any(not isinstance(column, list) or len(column) != len(question) for column in columns):
        raise Unusable(f"{file}: its columns differ in length")
    return [dict(zip(data, row)) for row in zip(*columns)]


def read_table(file: Path, subset: str | None):
    """Text with a header and commas, semicolons or tabs, in UTF-8, UTF-16 or Windows' latin-1."""
    encoding = text_encoding(file)
    csv.field_size_limit(2**31 - 1)  # pictures in base64 are long
    with open(file, encoding=encoding, newline="") as lines:
        header = lines.readline()
        if not header.startswith("sep="):  # Excel's own note on the separator
            lines.seek(0)
        bare = re.sub(r'"[^"]*"', "", header)
        separator = "\t" if file.suffix.lower() == ".tsv" else max(",;\t|", key=bare.count)
        try:
            yield from csv.DictReader(lines, delimiter=separator, strict=True)
        except csv.Error as error:
            raise Unusable(f"{file}: {error}; is a quote left open?") from error


def text_encoding(file: Path) -> str:
    with open(file, "rb") as stream:
        if stream.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            return "utf-16"
    try:
        with open(file, encoding="utf-8-sig") as text:
            while text.read(1 << 20):
                pass
        return "utf-8-sig"
    except UnicodeDecodeError:
        print(f"convert: {file.name} is not UTF-8: read as Windows' latin-1 (cp1252)")
        return "cp1252"


def read_sheet(file: Path, subset: str | None):
    try:
        import openpyxl
        import pandas
    except ImportError as error:
        raise Unusable(f"{file}: first pip install pandas openpyxl ({error})") from error
    try:
        sheets = pandas.read_excel(file, sheet_name=None, dtype=object, keep_default_na=False)
        book = openpyxl.load_workbook(file) if file.suffix.lower() == ".xlsx" else {}
    except Exception as error:  # the readers raise whatever a broken workbook makes them raise
        raise Unusable(f"{file} cannot be read: {error}") from error
    names = [subset] if subset else [name for name in sheets if len(sheets[name])]
    if len(names) > 1 or not set(names) <= set(sheets):
        raise Unusable(f"{file} has the sheets {', '.join(sheets)}: --subset NAME")
    for name in names:
        if book and book[name]._images:
            raise Unusable(
                f"{file}: pictures are pasted into sheet {name}; name their files instead"
            )
        yield from sheets[name].to_dict("records")


def read_parquet(file: Path, subset: str | None):
    with pyarrow.parquet.ParquetFile(file) as table:
        note = json.loads((table.schema_arrow.metadata or {}).get(b"huggingface", "{}"))
        names = class_names(note.get("info", {}).get("features", {}))
        for batch in table.iter_batches(batch_size=16):
            yield from name_classes(batch.to_pylist(), names)


def class_names(features: dict) -> dict[str, list[str]]:
    """The names behind the numbers of each ClassLabel column of the library `datasets`."""
    return {name: kind["names"] for name, kind in features.items() if "names" in kind}


def name_classes(rows, names: dict[str, list[str]]):
    for row in rows:
        for name, classes in names.items():
            if row[name] is not None:
                row[name] = classes[row[name]] if row[name] >= 0 else None
        yield row


READERS = {
    ".jsonl": read_lines, ".ndjson": read_lines, ".json": read_json, ".parquet": read_parquet,
    ".csv": read_table, ".tsv": read_table, ".xlsx": read_sheet, ".xls": read_sheet,
}  # fmt: skip


def open_source(source: str, settings):
    """A function that starts reading the source anew, yielding (row, folder of its pictures)."""
    path = Path(source)
    if path.is_dir():
        files = folder_files(path, settings)
        if files is None:
            return lambda: saved_rows(path, settings)
        return lambda: chain_files(files, path)
    if path.exists():
        return lambda: split_rows(path, settings)
    looks_like_path = path.suffix.lower() in READERS or source[0] in "./~" or "\\" in source
    if looks_like_path or not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or path.parent.is_dir():
        raise Unusable(f"{source}: no such file or folder (nor is it a hub id, OWNER/NAME)")
    return lambda: hub_rows(source, settings)


def file_rows(file: Path, subset: str | None, folder: Path):
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise Unusable(f"{file}: not one of {' '.join(READERS)}")
    if subset and reader not in (read_json, read_sheet):
        raise Unusable(f"{file} has no parts of which --subset {subset} could be one")
    with open(file, "rb") as stream:
        head = stream.read(len(POINTER))
    if not head:
        raise Unusable(f"{file} is empty")
    if head == POINTER:
        raise Unusable(f"{file} is a Git LFS pointer, not the data: git lfs pull first")
    try:
        for row in reader(file, subset):
            yield row, folder
    except (UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise Unusable(f"{file} cannot be read: {error}") from error


def split_rows(file: Path, settings):
    """The rows of one file; --split chooses those whose column "split" says so."""
    for row, folder in file_rows(file, settings.subset, file.parent):
        if settings.split and isinstance(row, dict):
            name = cell(tidy(row), "split") or cell(tidy(row), "metadata.split")
            if name is None:
                raise Unusable(f"--split {settings.split}: {file} has no column split")
            if name != settings.split:
                continue
        yield row, folder


def unit(file: Path, folder: Path) -> str:
    """The name that shards share: data/train-00000-of-00002.parquet is data/train."""
    name = str(file.relative_to(folder).with_suffix(""))
    return re.sub(r"(?:-\d{5}-of-\d{5}.*|[-_.]?\d+)$", "", name) or name


def folder_files(folder: Path, settings) -> list[Path] | None:
    """The data files of a folder that --split and --subset leave; None if `datasets` saved it."""
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        return None
    files = [f for f in folder.rglob("*") if f.suffix.lower() in READERS and f.is_file()]
    output = Path(settings.output).resolve()
    files = [f for f in files if f.resolve() != output and not f.name.startswith("dataset_info")]
    files = [f for f in files if "/." not in f"/{f.relative_to(folder).as_posix()}"]
    metadata = [f for f in files if f.stem == "metadata" and f.suffix != ".json"]
    files = metadata or files
    for wanted in filter(None, (settings.subset, settings.split)):
        kept = [f for f in files if wanted in unit(f, folder).replace("\\", "/").split("/")]
        if not kept:
            units = ", ".join(sorted({unit(f, folder) for f in files}))
            raise Unusable(f"{folder}: nothing is called {wanted!r}; there is {units}")
        files = kept
    units = {unit(f, folder) + f.suffix for f in files}
    if not files:
        raise Unusable(f"{folder}: no file of {' '.join(READERS)} in it")
    if len(units) > 1:
        choice = ", ".join(sorted(units))
        raise Unusable(f"{folder}: choose one of {choice} with --split and --subset")
    return sorted(files, key=lambda f: natural(str(f)))


def chain_files(files: list[Path], folder: Path):
    if len(files) > 1:
        print(f"convert: {len(files)} files are read as one, {files[0].name} to {files[-1].name}")
    for file in files:
        pictures = file.parent if file.stem == "metadata" else folder
        yield from file_rows(file, None, pictures)


def natural(name: str) -> list:
    """A key that sorts image_10 after image_2."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def saved_rows(folder: Path, settings):
    import datasets

    if settings.subset:
        raise Unusable(f"{folder} has no parts of which --subset {settings.subset} could be one")
    data = choose_split(datasets.load_from_disk(str(folder)), settings)
    names = class_names(data.features.to_dict())
    for batch in data.with_format("arrow").iter(16):
        for row in name_classes(batch.to_pylist(), names):
            yield row, folder


def hub_rows(name: str, settings):
    """Stream a data set from the hub, so that nothing stays on this disk."""
    import datasets

    try:
        data = datasets.load_dataset(name, settings.subset, streaming=True)
    except (ValueError, OSError, RuntimeError) as error:  # offline, or a configuration is missing
        advice = "--subset NAME chooses a configuration; a downloaded folder can be given instead"
        why = f"no such file here, and the hub says: {short(str(error), 300)}"
        raise Unusable(f"{name}: {why} ({advice})") from error
    data = choose_split(data, settings)
    names = class_names(data.features.to_dict() if data.features else {})
    for row in name_classes(data.decode(False), names):
        yield row, Path(".")


def choose_split(data, settings):
    if not isinstance(data, dict):
        if settings.split:
            raise Unusable(f"--split {settings.split}: the source has no splits")
        return data
    wanted = settings.split or (next(iter(data)) if len(data) == 1 else None)
    if wanted not in data:
        raise Unusable(f"choose one of the splits {', '.join(data)} with --split")
    return data[wanted]


# -------------------------------------------------------------------------------------- pictures


def find_pictures(row: dict, folder: Path, settings) -> tuple[str | None, dict[int, dict]]:
    """Column and pictures of a row, by the number that a mark like <image 2> would call them by."""
    numbered = {}
    for name, value in row.items():
        match = NUMBERED_PICTURE.fullmatch(name)
        if match and filled(value):
            numbered[int(match[1])] = name
    name, value = pick(row, "picture", settings)
    if name is None and not settings.picture:
        for weak in WEAK_PICTURE_NAMES:
            if name is None and looks_like_picture(row.get(weak)):
                name, value = weak, row[weak]
    if numbered and not settings.picture and name not in ("images", "decoded_image"):
        if name is not None:  # image beside image_2: the first one of a numbered row
            numbered = numbered if 1 in numbered else {1: name} | numbered
        pictures = {n: read_pictures(row[numbered[n]], folder) for n in sorted(numbered)}
        if any(len(found) != 1 for found in pictures.values()):
            raise Unusable("several pictures in a numbered column")
        return ", ".join(numbered.values()), {n: found[0] for n, found in pictures.items()}
    if name is None:
        return None, {}
    return name, dict(enumerate(read_pictures(value, folder), 1))


def looks_like_picture(value) -> bool:
    if isinstance(value, str):
        head = value.strip()[:4000]
        named = len(head) < 500 and PICTURE_FILE.search(head)
        return bool(named or head.startswith("data:image") or BASE64_HEAD.match(head))
    if isinstance(value, dict):
        return filled(value.get("bytes")) or looks_like_picture(value.get("path"))
    if isinstance(value, (list, tuple)):
        return any(looks_like_picture(item) for item in value[:3])
    return isinstance(value, (bytes, Image.Image))


def unread_pictures(row: dict) -> list[str]:
    """Columns that seem to hold pictures, by their name or by what is in them."""
    names = []
    for name, value in row.items():
        name = str(name).lower()
        named = PICTURE_WORD.search(name) and not DESCRIPTION.search(name)
        if looks_like_picture(value) or (named and filled(value) and not isinstance(value, bool)):
            names.append(name)
        elif isinstance(value, dict):
            names += [f"{name}.{inner}" for inner in unread_pictures(value)]
    return names


def read_pictures(value, folder: Path) -> list[dict]:
    """Every picture in a cell, as {"bytes": an encoded file, "path": its bare name or None}."""
    if not filled(value):
        return []
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        if is_byte_list(value):
            return [check_picture(bytes(value))]
        if is_pixels(value):
            return [check_picture(encode_pixels(pixel_array(value)))]
        return [picture for item in value for picture in read_pictures(item, folder)]
    if isinstance(value, dict):
        return read_picture_dict(value, folder)
    if isinstance(value, Image.Image):
        return [check_picture(encode(value))]
    if isinstance(value, (bytes, bytearray)):
        return [check_picture(undo_base64(bytes(value)) or bytes(value))]
    if isinstance(value, str):
        return read_picture_text(value.strip(), folder)
    raise Unusable(f"not a picture: {short(value)}")


def read_picture_dict(value: dict, folder: Path) -> list[dict]:
    """{"bytes": …, "path": …} and its relatives; the first filled entry is the picture."""
    keys = ("bytes", "image_bytes", "image", "image_url", "source", "data", "base64", "array")
    for key in keys + ("path", "url", "file_name", "filename", "src", "value"):
        if filled(value.get(key)):
            pictures = read_pictures(value[key], folder)
            if isinstance(value.get("path"), str) and len(pictures) == 1:
                pictures[0]["path"] = Path(value["path"]).name or None
            return pictures
    raise Unusable(f"not a picture: a dict of {', '.join(map(str, value))}")


def read_picture_text(text: str, folder: Path) -> list[dict]:
    """A path, file:// or data: address, base64, or a printed list of these."""
    if text.startswith("data:"):
        head, _, data = text.partition(",")
        plain_data = unquote_to_bytes(data)
        return [check_picture(undo_base64(plain_data) if ";base64" in head else plain_data)]
    printed = re.match(r"(?:\{['\"]bytes['\"]: )?b(['\"])((?:\\.|(?!\1).)*)\1", text, re.DOTALL)
    if printed:  # bytes as Python prints them, which is what pandas writes into a CSV
        data = printed[2].encode("latin-1").decode("unicode_escape")
        return [check_picture(data.encode("latin-1"))]
    if text.startswith(("[", "{")):
        items = parse_json(text)
        items = read_printed_list(text) if items is None else items
        if items is not None:
            return read_pictures(items, folder)
    if re.match(r"https?://|ftp://|s3://|gs://|hf://", text):
        local = folder / text.split("://")[1]
        if not local.is_file():
            line = f"wget -x -P {shlex.quote(str(folder))} {shlex.quote(text)}"
            raise Unusable(f"a web address is not opened: first {line}")
        return [read_file(local)]
    if text.startswith("file://"):
        text = unquote(text.removeprefix("file://").removeprefix("localhost"))
        return [read_file(folder / text)]
    if len(text) < 1000:
        for name in (text, text.replace("\\", "/"), unquote(text)):
            if (folder / name).is_file():
                return [read_file(folder / name)]
        parts = [part.strip() for part in re.split(r"[;|,\n]", text) if part.strip()]
        if len(parts) > 1 and all(PICTURE_FILE.search(part) for part in parts):
            return [picture for part in parts for picture in read_picture_text(part, folder)]
    data = undo_base64(text.encode())
    if data is None and text.isdecimal():
        raise Unusable(
            f"the picture is {text}, the index of another row: write its file's name there"
        )
    if data is None:
        raise Unusable(f"no such picture file: {folder / short(text, 200)} (--image_folder DIR)")
    return [check_picture(data)]


def read_file(file: Path) -> dict:
    return check_picture(file.read_bytes()) | {"path": file.name}


def undo_base64(text: bytes) -> bytes | None:
    """The bytes behind base64, with or without line breaks, padding or URL alphabet, or None."""
    text = b"".join(text.split())
    if not text.isascii() or not re.fullmatch(rb"[A-Za-z0-9+/_-]{16,}=*", text):
        return None
    text = text.rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error:
        return None


def is_byte_list(value) -> bool:
    """A file as JSON writes it: [137, 80, 78, 71, …]."""
    flat = len(value) > 16 and all(isinstance(item, int) for item in value)
    return flat and all(0 <= item < 256 for item in value)


def is_pixels(value) -> bool:
    """Nested lists of numbers: rows of a picture, or its channels."""
    deepest = value
    for depth in range(3):
        if not isinstance(deepest, (list, tuple)) or not deepest:
            return False
        deepest = deepest[0]
        if depth and isinstance(deepest, (int, float)):
            return True
    return False


def pixel_array(value) -> np.ndarray:
    try:
        return np.array(value, dtype=float)
    except (ValueError, TypeError, OverflowError) as error:
        raise Unusable("damaged picture: its rows of numbers differ in length") from error


def check_picture(data: bytes | None) -> dict:
    """The bytes as they are, after decoding them once; grey of 16 or 32 bits is made 8 bits."""
    if data is None:
        raise Unusable("damaged picture: its base64 cannot be read")
    if data.startswith(POINTER):
        raise Unusable("a Git LFS pointer, not a picture: git lfs pull first")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            image.load()
    except Exception as error:  # Pillow's readers raise whatever the broken bytes make them raise
        why = "of no kind that Pillow reads" if "identify" in str(error) else error
        raise Unusable(f"damaged picture: {why}") from error
    if image.mode.startswith(("I", "F")):
        white = 65535 if image.mode.startswith("I;16") or image.format == "PNG" else None
        data = encode_pixels(np.asarray(image), white)
    return {"bytes": data, "path": None}


def encode_pixels(pixels: np.ndarray, white: int | None = None) -> bytes:
    """Numbers of any range as an 8-bit PNG; white is guessed from the largest unless it is given."""
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4) and pixels.shape[2] not in (1, 3, 4):
        pixels = pixels.transpose(1, 2, 0)
    pixels = pixels.squeeze(2) if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    if pixels.ndim not in (2, 3):
        raise Unusable(f"damaged picture: numbers in {pixels.ndim} dimensions")
    if not np.isfinite(pixels).all() or pixels.min() < 0:
        raise Unusable("damaged picture: numbers below 0, or not finite, in its pixels")
    largest = pixels.max()
    white = white or next(w for w in (1, 255, 65535, 2**31 - 1, math.inf) if largest <= w)
    if white == math.inf:
        raise Unusable(f"damaged picture: {largest} in its pixels; white is 1, 255 or 65535")
    return encode(Image.fromarray((pixels * (255 / white)).round().astype(np.uint8)))


def encode(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


# ----------------------------------------------------------------------------- questions and marks

MARK = re.compile(
    r"(?:<\|vision_start\|>)?(?:<img>[^<>\n]+</img>|<img\s[^<>]*>"
    r"|<\|?(?:image|img|picture)(?:_?(?:pad|placeholder|here))?[ _:#-]?(\d*)\s?\|?>"
    r"(?:</(?:image|img)>)?|!\[[^\]\n]*\]\([^)\n]*\))(?:<\|vision_end\|>)?",
    re.IGNORECASE,
)
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user"}
ROLES |= dict.fromkeys(("assistant", "gpt", "model", "bot"), "assistant")


def read_question(value, notes) -> tuple[str, list, str | None]:
    """Text, the pictures in it (None: the next one of the picture column), what the model answered.

    value: text, chat messages (or their JSON), LLaVA's conversations, or parts of one message.
    """
    if isinstance(value, str) and re.match(r"\s*[\[{]\s*[{\"]", value):
        parsed = parse_json(value)
        value = value if parsed is None else parsed
    if not isinstance(value, (list, dict)):
        return str(value), [], None
    turns = value if isinstance(value, list) else [value]
    if len(turns) > 1 and not any(isinstance(turn, dict) for turn in turns):
        raise Unusable(f"several questions in one row: {short(turns)}")
    if not any(isinstance(t, dict) and (t.get("role") or t.get("from")) for t in turns):
        turns = [{"role": "user", "content": turns}]
    texts, pictures, reply = [], [], None
    for turn in turns:
        if not isinstance(turn, dict):
            raise Unusable(f"not a message with role and content: {short(turn)}")
        name = str(turn.get("role") or turn.get("from")).lower()
        text, found = read_parts(turn.get("content", turn.get("value")))
        role = ROLES.get(name)
        if role == "system":
            notes.append(("system messages left out", short(text)))
        elif role == "assistant":
            reply = text
        elif role != "user":
            raise Unusable(f"a message of the role {name!r}")
        elif reply is not None:
            raise Unusable("several questions and replies in one conversation: one row each")
        else:
            texts.append(text)
            pictures += found
    return "\n".join(texts), pictures, reply


def read_parts(content) -> tuple[str, list]:
    """Text and pictures of a message: a text, or a list of OpenAI's or Qwen's parts."""
    if not isinstance(content, list):
        return str(content or ""), []
    text, pictures, last = "", [], None
    for part in content:
        part = part if isinstance(part, dict) else {"type": "text", "text": part}
        kind = str(part.get("type") or ("text" if filled(part.get("text")) else "image")).lower()
        if "text" in kind:
            words = next((str(part[k]) for k in ("text", "value", "content") if part.get(k)), "")
            text += "\n" + words if last == "text" else words
            last = "text"
        elif "image" in kind:
            rest = {name: item for name, item in part.items() if name not in ("type", "text")}
            pictures.append(rest if filled(rest) else None)
            text += "<image>"
            last = "image"
        else:
            raise Unusable(f"a message part of the type {kind!r}")
    return text, pictures


def place_marks(text: str, pictures: dict[int, dict], merged: bool) -> tuple[str, list[dict]]:
    """Every mark as <image>, and the pictures in the order of the marks.

    merged: one picture shows everything that the marks number, as in MathVision.
    """
    marks = list(MARK.finditer(text))
    numbers = [int(mark[1]) for mark in marks if mark[1]]
    if not marks:
        return text, list(pictures.values())
    if merged and len(pictures) == 1 and numbers and set(numbers) != {1}:
        named = MARK.sub(lambda mark: f"picture {mark[1]}" if mark[1] else "", text)
        return "<image>" + named, list(pictures.values())
    counts = f"{len(marks)} marks in the text, {len(pictures)} pictures"
    if numbers and len(numbers) < len(marks):
        raise Unusable(f"marks with and without a number in one question: {counts}")
    order = numbers or list(pictures)
    if not set(order) <= set(pictures) or len(order) < len(marks):
        advice = " (--merged true if one picture shows all)" if len(pictures) == 1 else ""
        raise Unusable(f"a mark without its picture: {counts}{advice}")
    if len(set(order)) < len(pictures) or len(order) > len(marks):
        raise Unusable(f"more pictures than marks: {counts}")
    return MARK.sub("<image>", text), [pictures[number] for number in order]


# -------------------------------------------------------------------------------- options and golds

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LABELS = (  # "(A) x", and "A. x", "A: x", "A) x" at the start or after white space, ; or ,
    re.compile(r"[(（]([A-Z])[)）][.:]?\s*"),
    re.compile(r"(?:^|(?<=[\s;,]))([A-Z])\.\s*(?=\S)"),
    re.compile(r"(?:^|(?<=[\s;,]))([A-Z])[:：、．]\s*"),
    re.compile(r"(?:^|(?<=[\s;,]))([A-Z])\)\s*"),
)
STRING = re.compile(
    r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"|([^\s,'\"\[\]()][^,'\"\[\]()]*)", re.DOTALL
)
# In a list that somebody wrote by hand, \theta is LaTeX and not a tab.
ESCAPE = re.compile(
    r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[\\'\"]|n(?!eq|eg|abla|ot\b|u\b|e\b)"
    r"|t(?!heta|imes|an|ext|au|o\b|riangle|frac))"
)
NOTHING = ("", "none", "n/a", "na", "nan", "null", "?", "-", "unknown")
LONGEST_GOLD = 200  # characters; anything longer without a final-answer mark is a worked solution


def read_printed_list(text: str) -> list[str] | None:
    """The strings of a list as Python prints it, commas or not, without evaluating anything."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    items = []
    rest = STRING.sub(lambda match: items.append(match) or "", text[1:-1])
    if rest.strip(" ,\n\t"):
        return None
    texts = []
    for item in items:
        quoted = item[1] if item[1] is not None else item[2]
        texts.append(item[3].strip() if quoted is None else ESCAPE.sub(unescape, quoted))
    return texts


def unescape(match: re.Match) -> str:
    code = match[1]
    if code[0] in "xu":
        return chr(int(code[1:], 16))
    return {"n": "\n", "t": "\t"}.get(code, code)


def split_labels(text: str) -> tuple[str, list[str]] | None:
    """What stands before "(A)", and the options after the labels A, B, C …; None without labels."""
    for label in LABELS:
        found = []
        for match in label.finditer(text):
            if len(found) < 26 and match[1] == LETTERS[len(found)]:
                found.append(match)
        if len(found) > 1:
            ends = [match.start() for match in found[1:]] + [len(text)]
            pieces = [text[match.end() : end] for match, end in zip(found, ends)]
            pieces = [piece.strip().rstrip(";,").strip() for piece in pieces]
            if all(pieces):
                return text[: found[0].start()], pieces
    return None


def options_of(row: dict, settings) -> tuple[str | None, object]:
    """Column and value of the options: one column, or one for each letter as in VLMEvalKit's TSV."""
    name, value = pick(row, "options", settings)
    if name is not None or settings.options:
        return name, value
    columns = {}
    for column, text in row.items():
        match = LETTER_COLUMN.fullmatch(column)
        if match and filled(text):
            columns[match[1].upper() if match[1] else match[2]] = column
    if any(set(pair) <= set(columns) for pair in ("AB", "12", "01")):
        return ", ".join(columns.values()), {key: row[column] for key, column in columns.items()}
    return None, None


def read_options(value, gold: str) -> list[str]:
    """The texts of the options in their order, [] if there are none; what is unclear is refused."""
    if not filled(value) or value in ("None", "nan"):
        return []
    if isinstance(value, str):
        value = read_option_text(value.strip(), gold)
    if isinstance(value, dict):
        value = read_option_dict(value)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        raise Unusable(f"options that are no list: {short(value)}")
    texts = [option_text(item) for item in value]
    while texts and not texts[-1]:
        texts.pop()
    texts = strip_labels(texts)
    if not all(texts):
        raise Unusable(f"an option is empty: {short(texts)}")
    if len(texts) == 1:
        raise Unusable(f"only one option: {short(texts)}")
    if len(texts) > 26:
        raise Unusable(f"{len(texts)} options: more than the 26 letters")
    return texts


def strip_labels(texts: list[str]) -> list[str]:
    """ "A. x", "B. y" without their letters, if every option bears its own."""
    pieces = []
    for letter, text in zip(LETTERS, texts):
        match = re.match(rf"\(?{letter}[).:]\s*(?=\S)", text)
        if not match:
            return texts
        pieces.append(text[match.end() :])
    return pieces


def option_text(item) -> str:
    if isinstance(item, dict):
        names = [name for name in ("text", "value", "content") if filled(item.get(name))]
        item = item[names[0]] if names else item
    if isinstance(item, (dict, list, bytes)):
        raise Unusable(f"an option is not text: {short(item)}")
    return number_text(item) if filled(item) else ""


def read_option_dict(options: dict) -> list:
    """{"A": "x", "B": "y"}, {"0": …}, or {"label": ["A", "B"], "text": ["x", "y"]}."""
    if isinstance(options.get("text"), list):
        return options["text"]
    keys = [str(key).strip().upper().strip("().") for key, text in options.items() if filled(text)]
    texts = {key: text for key, text in zip(keys, filter(filled, options.values()))}
    for names in (LETTERS, range(len(keys)), range(1, len(keys) + 1)):
        names = [str(name) for name in names][: len(keys)]
        if set(names) == set(keys):
            return [texts[name] for name in names]
    raise Unusable(f"options under the names {', '.join(keys)}, not A, B, C …")


def read_option_text(text: str, gold: str) -> list | dict:
    """Options in one cell: JSON, a printed list, labelled, one a line, or with commas between."""
    if text.startswith(("[", "{")):
        items = parse_json(text)
        items = read_printed_list(text) if items is None else items
        if isinstance(items, (list, dict)):
            return items
    labelled = split_labels(text)
    if labelled and (not labelled[0].strip() or re.search(r":\s*$", labelled[0])):
        return labelled[1]
    for separator in (r"\n", r"\|", r";", r",\s+", r","):
        items = [item.strip() for item in re.split(separator, text) if item.strip()]
        if len(items) > 1:
            break
    balanced = all(item.count(a) == item.count(b) for item in items for a, b in ("()", "[]", "{}"))
    thousands = separator == "," and re.search(r"\d,\d{3}(?!\d)", text)
    letter = plain_letter(gold) or named_letter(gold, items)
    fits = quoted_options(gold, items) or (letter and letter in LETTERS[: len(items)])
    if len(items) < 2 or not balanced or thousands or not fits:
        raise Unusable(f"options that cannot be told apart: {short(text)}")
    return items


def plain_letter(gold: str) -> str | None:
    """B of "B", "(b)", "B.", "Option B"; None for anything else."""
    gold = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\{\(?([A-Z])\)?\}|\$", r"\1", gold).strip()
    pattern = r"(?:(?:option|choice)\s+)?[(（\[]?\s*([A-Za-z])\s*[)）\].:]*"
    match = re.fullmatch(pattern, gold, re.IGNORECASE)
    return match[1].upper() if match else None


def same_text(text: str) -> str:
    return " ".join(text.casefold().split()).strip("$ ").rstrip(".").strip()


def quoted_options(gold: str, options: list[str]) -> list[int]:
    """The options that a gold quotes, in any case, or equals by the rules of the reward."""
    exact = [i for i, option in enumerate(options) if option.strip() == gold.strip()]
    loose = [i for i, option in enumerate(options) if same_text(option) == same_text(gold)]
    matches = exact or loose
    if not matches and plain_letter(gold) is None:
        matches = [i for i, option in enumerate(options) if answers_match(gold, option)]
    return matches


def named_letter(gold: str, options: list[str]) -> str | None:
    """B of "B. y", "(B) y" or "B y" if the option B is y."""
    match = re.fullmatch(r"\(?([A-Z])(?:[).:]+\s*|\s+)(\S.*)", gold.strip(), re.DOTALL)
    if not match or match[1] not in LETTERS[: len(options)]:
        return None
    position = LETTERS.index(match[1])
    return match[1] if position in quoted_options(match[2], options) else None


def option_number(gold: str) -> int | None:
    """The number in a gold that may be an option's index."""
    return int(gold) if re.fullmatch(r"[0-9]{1,3}", gold) else None


def find_index_base(cells) -> int | str | None:
    """How a file counts its options, from all its golds: 0, 1, "unclear", or None if it does not.

    cells yields (gold, whether it may be a text among the options, options). A gold 0 speaks for
    counting from 0; one that is the number of options speaks for counting from 1; one beyond that
    says that the numbers are texts.
    """
    used = zero = top = False
    for gold, textual, options in cells:
        number = option_number(gold)
        if number is None or not options:
            continue
        if textual and quoted_options(gold, options):
            continue
        if number > len(options):
            return None
        used = True
        zero = zero or number == 0
        top = top or number == len(options)
    if not used:
        return None
    if zero == top:
        return "unclear"
    return 0 if zero else 1


def pick_letter(gold: str, options: list[str], base, settings) -> str:
    """The letter that a gold means; one with two meanings, or with none, is refused."""
    readings = read_choice(gold, options, base, settings)
    if settings.answer_is in readings:
        return readings[settings.answer_is]
    if not readings:
        raise Unusable(f"the answer {gold!r} is none of the options {short(options, 200)}")
    if len(set(readings.values())) > 1:
        meanings = ", ".join(f"{letter} by {how}" for how, letter in readings.items())
        raise Unusable(f"the answer {gold!r} is {meanings}: --answer_is letter or text")
    return next(iter(readings.values()))


def read_choice(gold: str, options: list[str], base, settings) -> dict[str, str]:
    """What a gold may mean, each with its letter: a letter, "B. y", an option's text, its index.

    base: the function that finds out, from the whole file, how it counts its options.
    """
    letters = LETTERS[: len(options)]
    number = option_number(gold)
    readings = {}
    if number is None or settings.answer_index is None:
        letter = plain_letter(gold) or named_letter(gold, options)
        quoted = quoted_options(gold, options)
        if letter and letter in letters:
            readings["letter"] = letter
        if len(quoted) > 1 and not readings:
            raise Unusable(f"the answer {gold!r} is several of the options {short(options)}")
        if len(quoted) == 1:
            readings["text"] = letters[quoted[0]]
    if number is None:
        return readings
    first = base() if settings.answer_index is None else settings.answer_index
    if first == "unclear" and settings.answer_is is None:
        raise Unusable(f"the answer {gold!r} counts the options: --answer_index 0 or 1?")
    if first in (0, 1) and 0 <= number - first < len(letters):
        readings["index"] = letters[number - first]
    return readings


def number_text(value) -> str:
    """3.0 as "3", a 32-bit 0.1 as "0.1", a text as it is; a date is what a spreadsheet made of 1/2."""
    if isinstance(value, (date, time)):
        raise Unusable(f"a date, {value}: format the spreadsheet's column as text")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, float) and float(np.float32(f"{value:.7g}")) == value:
        return f"{value:.7g}"
    return str(value).strip()


def unwrap(value):
    """The one thing in a list of one, or in {"answer": …}."""
    while isinstance(value, (list, tuple, dict)):
        if isinstance(value, dict):
            keys = ("ground_truth", "answer", "value", "text", "label")
            items = [value[key] for key in keys if filled(value.get(key))]
        else:
            items = [item for item in value if filled(item)]
        texts = [number_text(item) for item in items]
        if len(items) > 1 and not all(answers_match(text, texts[0]) for text in texts):
            raise Unusable(f"several answers: {short(texts)}")
        value = items[0] if items else None
    return value


def read_gold(value, question: str) -> str:
    """The final answer alone: out of tags, a box, "#### 4", a list of one; "" if there is none."""
    value = unwrap(value)
    if isinstance(value, bool):
        truth = re.search(r"\btrue\b", question, re.IGNORECASE)
        return str(value) if truth else ("Yes" if value else "No")
    gold = number_text(value) if filled(value) else ""
    for find in (tagged, boxed, after_hashes, listed, announced):
        found = {text.strip() for text in find(gold)}
        if len(found) > 1:
            raise Unusable(f"several final answers in one solution: {short(sorted(found))}")
        gold = found.pop() if found else gold
    return gold


def tagged(text: str) -> list[str]:
    return re.findall(r"<answer>(.*?)(?:</answer>|$)", text, re.IGNORECASE | re.DOTALL)


def boxed(text: str) -> list[str]:
    """What stands in \\boxed{…} and \\fbox{…}, with balanced braces."""
    found = []
    for match in re.finditer(r"\\f?boxed\s*\{|\\fbox\s*\{", text):
        depth, end = 1, match.end()
        while depth and end < len(text):
            depth += {"{": 1, "}": -1}.get(text[end], 0) * (text[end - 1] != "\\")
            end += 1
        if depth:
            raise Unusable(f"an open \\boxed in the answer: {short(text[match.start() :])}")
        found.append(text[match.end() : end - 1])
    return found


def after_hashes(text: str) -> list[str]:
    return re.findall(r"####\s*(.+?)\s*$", text, re.MULTILINE)[-1:]


def listed(text: str) -> list[str]:
    """The one answer of "['4']"; several are refused unless the reward takes them for the same."""
    quoted = re.fullmatch(r"\[\s*['\"].*['\"]\s*\]", text, re.DOTALL)
    items = read_printed_list(text) if quoted or re.fullmatch(r"\[[^\[\],]*\]", text) else None
    return [str(unwrap(items))] if items else []


def announced(text: str) -> list[str]:
    """4 of "… The answer is 4." or "Answer: 4" on the last line."""
    last = text.strip().splitlines()[-1:] or [""]
    match = re.search(
        r"(?:\banswer is:?|^\W*(?:final )?answer\s*:)\s*(.+?)\.?$", last[0], re.IGNORECASE
    )
    return [match[1]] if match else []


# ----------------------------------------------------------------------------------------- a row


def convert_row(row: dict, number: int, folder: Path, base, settings, notes) -> dict:
    """One row in our columns; ValueError says why it cannot be used.

    notes: a list of (kind, example) to which each change is added.
    """
    row = tidy(row)
    folder = Path(settings.image_folder or folder)
    used = set()

    def take(field):
        name, value = pick(row, field, settings)
        used.add((name or "").split(".")[0])
        return value

    refuse_video(row)
    question, parts, reply = read_question(take("question") or "", notes)
    question = bare_question(row, question, notes)
    column, pictures = find_pictures(row, folder, settings)
    used |= set((column or "").split(", "))
    pictures = join_pictures(parts, pictures, folder, notes)
    name, raw = options_of(row, settings)
    used |= set((name or "").split(", "))
    gold = take("answer")
    gold = reply if gold is None else gold
    if "instruction" in used and filled(row.get("input")):
        question = f"{question}\n{row['input']}"
        used.add("input")
    if filled(row.get("hint")) and str(row["hint"]) not in question:
        question = f"{row['hint']}\n{question}"
        used.add("hint")
    if not question.strip():
        raise Unusable(f"no question: name its column with --question; there are {', '.join(row)}")
    question, gold = settle_answer(question.strip(), gold, raw, base, settings, notes)
    unread = {n: v for n, v in row.items() if n not in used}
    blind = [] if pictures else unread_pictures(unread)
    if blind:
        advice = f"name it with --picture {shlex.quote(blind[0])}"
        raise Unusable(f"pictures that would not be read: column {blind[0]!r}; {advice}")
    merged = settings.merged or column == "decoded_image"
    question, images = place_marks(question, pictures, merged)
    out = {"images": images, "question": question, "answer": gold}
    identity = take("id")
    out["id"] = number_text(number if identity is None else identity)
    category = take("category")
    category = ", ".join(map(str, category)) if isinstance(category, list) else category
    out["category"] = option_text(category)
    "".join([question, gold, out["id"], out["category"]]).encode()  # half a surrogate is no text
    out |= read_scores(row, used)
    out["unread"] = [name for name in row if filled(row[name]) and name not in used]
    return out


def refuse_video(row: dict) -> None:
    for name, value in row.items():
        if re.match(r"(?:video|audio)s?(?:_(?:path|file|url|list)s?)?$", name) and filled(value):
            raise Unusable(f"a {name} column is filled: only pictures can be used")


def bare_question(row: dict, question: str, notes) -> str:
    """verl appends how to answer to the question, and keeps the question alone in extra_info."""
    alone = cell(row, "extra_info.question")
    if filled(alone) and question.startswith(str(alone)) and question != alone:
        rest = question[len(alone) :].strip()
        notes.append(("instructions after the question left out", short(rest)))
        return alone
    return question


def join_pictures(parts: list, pictures: dict, folder: Path, notes) -> dict[int, dict]:
    """The pictures of the messages themselves, or those of the column that their parts stand for."""
    own = [part for part in parts if part is not None]
    if not own:
        return pictures
    if len(own) < len(parts) or (pictures and len(pictures) != len(own)):
        raise Unusable(f"{len(parts)} pictures in the messages, {len(pictures)} in a column")
    if pictures:
        notes.append(("picture columns left out: the messages hold the pictures", ""))
    found = [picture for part in own for picture in read_pictures(part, folder)]
    if len(found) != len(own):
        raise Unusable("a picture part of a message holds several pictures")
    return dict(enumerate(found, 1))


def settle_answer(question: str, value, raw, base, settings, notes) -> tuple[str, str]:
    """The question with its options, and the gold: a letter where there are options."""
    if "<video>" in question:
        raise Unusable("a <video> mark in the question: only pictures can be used")
    gold = read_gold(value, f"{question} {raw}")
    options = read_options(raw, gold)
    inside = split_labels(question)
    if options:
        letter = pick_letter(gold, options, base, settings)
        if not shows_options(question, options):
            lines = [f"({letter}) {text}" for letter, text in zip(LETTERS, options)]
            question = "\n".join([question, *lines])
    elif inside and plain_letter(gold) is None and len(quoted_options(gold, inside[1])) == 1:
        letter = LETTERS[quoted_options(gold, inside[1])[0]]
    elif value is None:
        raise Unusable("no answer: name its column with --answer")
    elif gold.lower() in NOTHING:
        raise Unusable(f"no answer: {short(value)}")
    elif len(gold) > LONGEST_GOLD:
        raise Unusable(f"a worked solution without \\boxed, <answer> or ####: {short(gold)}")
    else:
        letter = None
        if plain_letter(gold) and not inside:
            notes.append(("answers that are a letter while no options were found", short(question)))
    final = letter or gold
    if final != str(value).strip():
        how = "letters of their options" if letter else "the final answer alone"
        notes.append((f"golds made {how}", f"{short(value)!r} → {final!r}"))
    return question, final


def shows_options(question: str, options: list[str]) -> bool:
    """Whether the question already lists all the options behind their letters."""
    text = same_text(question)
    places = [
        rf"(?<!\w)\(?{letter}[).:]*\s*{re.escape(same_text(option))}(?!\w)"
        for letter, option in zip(LETTERS.lower(), options)
    ]
    return all(re.search(place, text) for place in places)


def read_scores(row: dict, used: set) -> dict:
    """The ladder's columns if all three are there and valid: 0 to 1, tokens, a whole number."""
    values = [row.get(name) for name in SCORES]
    if not all(isinstance(value, (int, float)) and filled(value) for value in values):
        return {}
    difficulty, complexity, stage = values
    if not 0 <= difficulty <= 1 or complexity < 0 or stage != int(stage):
        return {}
    used.update(SCORES)
    return {"difficulty": float(difficulty), "complexity": float(complexity), "stage": int(stage)}


def match_scores(out: dict, scored: bool, notes: list) -> None:
    """The ladder's columns in every row or in none, as in the first row that can be used."""
    if scored and "stage" not in out:
        raise Unusable("scores of the ladder are valid in the first row, not in this one")
    if not scored and "stage" in out:
        notes.append(("scores left out: not every row has valid ones", out["difficulty"]))
        for name in SCORES:
            del out[name]


# ------------------------------------------------------------------------------------- the file


class Writer:
    """A parquet file that appears under its name only when it is whole."""

    def __init__(self, output: Path):
        self.output, self.part = output, output.with_name(output.name + ".part")
        self.rows, self.size, self.file = [], 0, None

    def add(self, row: dict) -> None:
        self.rows.append(row)
        self.size += sum(len(image["bytes"]) for image in row["images"])
        if self.size > 32 << 20 or len(self.rows) == 1000:
            self.flush()

    def flush(self) -> None:
        if self.file is None:
            self.schema = our_schema(SCORES if "stage" in self.rows[0] else ())
            self.file = pyarrow.parquet.ParquetWriter(self.part, self.schema)
        self.file.write_table(pyarrow.Table.from_pylist(self.rows, self.schema))
        self.rows, self.size = [], 0

    def close(self, keep: bool) -> None:
        if keep and self.rows:
            self.flush()
        if self.file:
            self.file.close()
        if keep:
            os.replace(self.part, self.output)
        self.part.unlink(missing_ok=True)


def our_schema(scores) -> pyarrow.Schema:
    """The schema as the library `datasets` marks it, so that images are read as pictures."""
    import datasets

    text = datasets.Value("string")
    columns = {"id": text, "images": datasets.List(datasets.Image())}
    columns |= {"question": text, "answer": text, "category": text}
    kinds = {"difficulty": "float64", "complexity": "float64", "stage": "int64"}
    columns |= {name: datasets.Value(kinds[name]) for name in scores}
    return datasets.Features(columns).arrow_schema


def gold_cells(start, settings):
    """(gold, whether it may be an option's text, options) of every row, for find_index_base."""
    for row, _ in start():
        try:
            row = tidy(row)
            raw = options_of(row, settings)[1]
            value = unwrap(pick(row, "answer", settings)[1])
            gold = read_gold(value, "")
            options = read_options(raw, gold)
        except ValueError:
            continue  # such a row is refused by name when it is converted
        items = list(raw.values()) if isinstance(raw, dict) else raw
        listed = isinstance(items, list) and value in items
        yield gold, isinstance(value, str) or listed, options


class Report:
    """Counts for the screen: what was read, changed, left out and refused, each with an example."""

    def __init__(self):
        self.read = self.written = self.pictures = self.bare = 0
        self.ids, self.refused = set(), []
        self.kinds, self.examples, self.unread = Counter(), {}, Counter()

    def accept(self, number: int, row: dict, notes: list) -> None:
        if row["id"] in self.ids:
            notes.append(("ids that come again", row["id"]))
        self.ids.add(row["id"])
        if not answers_match(row["answer"], row["answer"]):
            notes.append(("golds that do not match themselves", short(row["answer"])))
        for kind, example in notes:
            self.kinds[kind] += 1
            self.examples.setdefault(kind, f"row {number}: {example}")
        self.written += 1
        self.pictures += len(row["images"])
        self.bare += not row["images"]

    def show_refused(self, source: str) -> None:
        print(f"read {self.read} rows of {source}")
        for number, name, reason in self.refused[:20]:
            print(f"  row {number} (id {name}) cannot be used: {reason}")
        kinds = Counter(re.split(r":|'|\d", reason)[0].strip() for _, _, reason in self.refused)
        for kind, count in kinds.most_common():
            print(f"  refused {count}: {kind}")

    def show_written(self, output: Path) -> None:
        print(f"wrote {self.written} rows with {self.pictures} pictures to {output}")
        print(f"  rows without a picture: {self.bare}")
        for kind, count in self.kinds.most_common():
            print(f"  {kind}: {count}, e.g. {self.examples[kind]}")
        if self.unread:
            columns = [f"{name} ({count})" for name, count in self.unread.most_common()]
            print(f"  columns not read: {', '.join(columns)}")


def convert(settings) -> None:
    """Read, convert and write, with a report on screen; ValueError if nothing may be written."""
    output = Path(settings.output)
    check_output(output, settings.overwrite)
    start = open_source(settings.source, settings)
    base = functools.cache(lambda: find_index_base(gold_cells(start, settings)))
    report, writer, whole, scored = Report(), Writer(output), False, None
    try:
        for number, (row, folder) in enumerate(start()):
            report.read += 1
            notes = []
            try:
                out = convert_row(row, number, folder, base, settings, notes)
                scored = "stage" in out if scored is None else scored
                match_scores(out, scored, notes)
            except (ValueError, OSError) as error:
                reason = " ".join(str(error).split())
                report.refused.append((number, identity_of(row, number), reason))
                continue
            report.unread.update(out.pop("unread"))
            report.accept(number, out, notes)
            if settings.skip_bad or not report.refused:
                writer.add(out)
        report.show_refused(settings.source)
        check_rows(report, settings)
        whole = True
    finally:
        writer.close(keep=whole)
    report.show_written(output)


def check_rows(report: Report, settings) -> None:
    if not report.read:
        raise Unusable(f"{settings.source} has no rows")
    if report.refused and not settings.skip_bad:
        count = len(report.refused)
        advice = "mend them, or leave them out with --skip_bad true"
        raise Unusable(f"{count} rows cannot be used, so nothing is written: {advice}")
    if not report.written:
        raise Unusable("no row can be used, so nothing is written")


def identity_of(row, number: int) -> str:
    if isinstance(row, dict):
        names = {plain(name): value for name, value in row.items()}
        for name in NAMES["id"]:
            if filled(names.get(name)):
                return short(str(names[name]))
    return str(number)


def check_output(output: Path, overwrite: bool) -> None:
    if output.suffix != ".parquet":
        raise Unusable(f"{output}: the output must be called something.parquet")
    if not output.parent.is_dir():
        raise Unusable(f"{output.parent}: no such folder to write to")
    if output.exists() and not overwrite:
        raise Unusable(f"{output} exists: --overwrite true replaces it")


def truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError("true or false")
    return text.lower() == "true"


def parse_options(arguments=None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("source", help="a file, a folder, or a hub id OWNER/NAME")
    parser.add_argument("output", help="the file to write, something.parquet")
    parser.add_argument("--split", help="train, test, … where a source has several")
    parser.add_argument("--subset", help="a configuration, a subfolder, or a sheet of a workbook")
    parser.add_argument("--image_folder", help="where picture paths start: the source's folder")
    for field in NAMES:
        parser.add_argument(f"--{field}", metavar="COLUMN", help=f"the column with the {field}")
    switches = {
        "skip_bad": "leave out the rows that cannot be used",
        "overwrite": "replace an existing output",
        "merged": "one picture shows everything that several marks number",
    }
    for name, use in switches.items():
        parser.add_argument(f"--{name}", type=truth, nargs="?", const=True, default=False, help=use)
    parser.add_argument(
        "--answer_index", type=int, choices=(0, 1), help="the first option's number"
    )
    parser.add_argument("--answer_is", choices=("letter", "text"), help="what an unclear answer is")
    return parser.parse_args(arguments)


def main(arguments=None) -> int:
    settings = parse_options(arguments)
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    with tempfile.TemporaryDirectory() as cache:
        for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE", "HF_HUB_CACHE", "HF_XET_CACHE"):
            os.environ[name] = cache  # nothing of ours stays under the user's home
        try:
            convert(settings)
        except KeyboardInterrupt:
            print("convert: interrupted, nothing is written", file=sys.stderr)
            return 130
        except (ValueError, OSError, ImportError, RecursionError) as error:
            print(f"convert: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
