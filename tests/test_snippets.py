"""Functions that can be pasted elsewhere, and what the three READMEs say about the code."""

import ast
import re
import shlex

import pytest
import torch
from conftest import ROOT

import observe_r1
from observe_r1 import Config, parse_arguments

# ------------------------------------------------------------------------------------ pasted alone

SOURCE = (ROOT / "observe_r1.py").read_text()
PASTED = {  # a call of each
    "group_advantages": "torch.tensor([[1.0, 0.0, 0.2]]), torch.tensor([1.5])",
    "grpo_loss": "*[torch.randn(2, 3) for _ in range(3)], torch.ones(2), torch.ones(2, 3)",
    "mix_ladder": "[0, 0.5, 1, 0.25, 0.5], [3, 4, 5, 6, 7]",
    "token_log_probs": "torch.randn(9, 4), torch.arange(9) % 5, torch.randn(5, 4), [3], 0.5, 2",
    "pack_group": "{'input_ids': torch.ones(1, 3, dtype=int), 'position_ids': torch.arange(3)"
    ".expand(3, 1, 3)}, torch.ones(2, 2, dtype=int), torch.ones(2, 2, dtype=bool)",
}


@pytest.mark.parametrize("name", PASTED)
def test_each_equation_runs_when_pasted_alone(name):
    """The text of the function with two imports, and nothing else of the script."""
    (function,) = [node for node in ast.parse(SOURCE).body if getattr(node, "name", "") == name]
    pasted = {}
    text = "import torch\nimport numpy as np\n" + ast.get_source_segment(SOURCE, function)
    exec(text, pasted)  # noqa: S102
    results = []
    for place in (pasted, vars(observe_r1)):
        torch.manual_seed(0)
        results.append(eval(f"{name}({PASTED[name]})", dict(place)))
    torch.testing.assert_close(*results)


# ----------------------------------------------------------------------------------------- READMEs

FILES = (ROOT / "README.md", ROOT / "tools" / "README.md", ROOT / "toy" / "README.md")
READMES = {file: file.read_text() for file in FILES}
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
TEXTS = {file: FENCE.sub("", text) for file, text in READMES.items()}  # without blocks
each_readme = pytest.mark.parametrize("readme", READMES, ids=lambda p: str(p.relative_to(ROOT)))


def places(readme, name):
    """Where a file may stand that a README names."""
    folders = (ROOT, readme.parent, *(ROOT / folder for folder in ("tests", "tools", "toy")))
    return [folder / name for folder in folders if (folder / name).exists()]


def code_spans(readme):
    """What stands between backticks in the text."""
    return re.findall(r"`([^`\n]+)`", TEXTS[readme])


def commands(readme):
    """(script, the words after it) of each command in blocks and in the text."""
    lines = [code for code in code_spans(readme) if ".py " in code]
    for kind, block in FENCE.findall(READMES[readme]):
        if kind in ("", "bash", "sh", "shell", "console"):
            lines += block.replace("\\\n", " ").splitlines()
    for line in (line for line in lines if ".py" in line):
        words = [word for word in shlex.split(line, comments=True) if word not in ("…", "...")]
        scripts = [word for word in words if word.endswith(".py")]
        if scripts and not scripts[0].startswith(("$", "/")):
            yield scripts[0], words[words.index(scripts[0]) + 1 :]


@each_readme
def test_commands_run_files_that_exist_with_options_that_exist(readme, monkeypatch):
    monkeypatch.chdir(ROOT)
    for script, words in commands(readme):
        files = places(readme, script)
        assert files, f"no {script}"
        if files[0].name == "observe_r1.py" and "--help" not in words:
            assert parse_arguments(words)[0] in observe_r1.COMMANDS
        for name in re.findall(r"--([a-z]\w+)", " ".join(words)):
            takes_all = "parse_arguments" in files[0].read_text()
            assert is_option(name, files[:1], takes_all), f"{script} {' '.join(words)}"


def is_option(name, files, takes_all=True):
    """Whether one of the files declares it, or it is the script's and those are taken."""
    sources = "".join(file.read_text() for file in files)
    known = {*Config.__dataclass_fields__, "help"} if takes_all else {"help"}
    return name in known or re.search(rf"[\"'](--)?{name}[\"']", sources)


@each_readme
def test_options_that_the_text_names_exist(readme):
    """Of the script, or of a program in tools/ or toy/; torchrun has some of its own."""
    programs = [*ROOT.glob("tools/*.py"), *ROOT.glob("toy/*.py")]
    for code in code_spans(readme):
        for name in re.findall(r"(?<![\w-])--([a-z]\w*)(?![\w.-])", code):
            assert "torchrun" in code or is_option(name, programs), f"`{code}`"


@each_readme
def test_files_and_tests_that_the_text_names_exist(readme):
    for code in code_spans(readme):
        if re.fullmatch(r"(toy|tools|tests)/[\w./-]+\.\w+|\w+\.py", code):
            assert places(readme, code), code
    tests = "".join(file.read_text() for file in ROOT.rglob("test_*.py"))
    for name in set(re.findall(r"\btest_\w+\b(?!\.py)", READMES[readme])) - {"test_rewards"}:
        assert f"def {name}(" in tests, name


def anchors(file):
    """The anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", file.read_text())
    for heading in re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", heading).lower()
        yield re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


@each_readme
def test_links_lead_somewhere(readme):
    """Files, headings, and lines at which a function begins."""
    text = TEXTS[readme]
    links = re.findall(r"\[([^]\[]*)\]\(\s*([^)\s]+)\s*\)", text)
    links += [("", target) for target in re.findall(r"(?:src|href)=\"([^\"]+)\"", text)]
    for label, target in links:
        name, _, anchor = target.partition("#")
        if re.match(r"https?:|mailto:", target):
            continue
        file = readme.parent / name if name else readme
        assert file.exists(), f"{label}: {file}"
        if line := re.match(r"L(\d+)", anchor):
            found = file.read_text().splitlines()[int(line[1]) - 1]
            named = r"def test_\w+" if label == "test" else label.strip("`")
            assert re.search(rf"\b{named}\b", found), label
        elif anchor:
            assert anchor in anchors(file), f"{label}: #{anchor}"


@each_readme
def test_nothing_is_left_to_be_filled_in(readme):
    assert not re.findall(r"@[A-Z]+@|TODO|FIXME", READMES[readme])
    for kind, block in FENCE.findall(READMES[readme]):
        if kind == "python":
            ast.parse(block)
