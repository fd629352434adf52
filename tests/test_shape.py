"""The script stays small: a minimal reference grows back unless something holds it."""

import io
import re
import tokenize
import tomllib

from conftest import ROOT

from observe_r1 import Config

LIMIT = 10_502  # code tokens; comments and docstrings are free
LINES = 1_564
SOURCE = (ROOT / "observe_r1.py").read_text()
FREE = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER"}


def test_the_script_stays_small():
    count = 0
    for token in tokenize.generate_tokens(io.StringIO(SOURCE).readline):
        is_code = tokenize.tok_name[token.type] not in FREE
        count += is_code and not token.string.startswith('"""')
    assert count <= LIMIT
    assert SOURCE.count("\n") <= LINES and len(Config.__dataclass_fields__) <= 40


def test_of_ours_it_imports_rewards_alone():
    imported = set(re.findall(r"^ *(?:import|from) (\w+)", SOURCE, re.MULTILINE))
    ours = {path.stem for path in (*ROOT.glob("*"), *ROOT.glob("t*/*.py"))}
    assert imported & ours == {"rewards"}


def test_both_lists_of_requirements_agree():
    block = re.search(r"# /// script\n(.*?)# ///\n", SOURCE, re.DOTALL)[1].replace("# ", "")
    required = (ROOT / "requirements.txt").read_text().split()
    assert [*tomllib.loads(block)["dependencies"], "pytest>=8.0"] == required
