"""Functions that can be pasted elsewhere, and what the three READMEs say about the code."""

import ast
import dataclasses
import re
import shlex

import pytest
import torch
from conftest import ROOT

import observe_r1
from observe_r1 import Config, parse_arguments

SOURCE = (ROOT / "observe_r1.py").read_text()

# --------------------------------------------------------------------------------- pasted alone

PASTED = {  # a call of each
    "group_advantages": "torch.tensor([[1.0, 0.0, 0.2]]), torch.tensor([1.5])",
    "grpo_loss": "*[torch.randn(2, 3) for _ in range(3)], torch.ones(2), torch.ones(2, 3)",
    "mix_ladder": "[0, 0.5, 1, 0.25, 0.5], [3, 4, 5, 6, 7]",
    "token_log_probs": "torch.randn(9, 4), torch.arange(9) % 5, torch.nn.Linear(4, 5), [3], 0.5, 2",
    "pack_group": "{'input_ids': torch.ones(1, 3, dtype=int), 'position_ids': torch.arange(3)"
    ".expand(3, 1, 3)}, torch.ones(2, 2, dtype=int), torch.ones(2, 2, dtype=int)",
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


def test_the_script_imports_rewards_and_nothing_else_of_ours():
    ours = {path.stem for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    tree = ast.parse(SOURCE)
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported & ours == {"rewards"}


# -------------------------------------------------------------------------------------- READMEs

READMES = {}
for path in (ROOT / "README.md", ROOT / "tools" / "README.md", ROOT / "toy" / "README.md"):
    READMES[path] = path.read_text()
TOOLS = list(ROOT.glob("tools/*.py"))
each_readme = pytest.mark.parametrize("readme", READMES, ids=lambda p: str(p.relative_to(ROOT)))


def commands(readme):
    """The commands of the code blocks of a README, one a string, without comments."""
    found = []
    for kind, block in re.findall(
        r"^ *```(\w*)\n(.*?)^ *```", READMES[readme], re.DOTALL | re.MULTILINE
    ):
        if kind in ("", "bash", "sh", "shell", "console"):
            lines = block.replace("\\\n", " ").splitlines()
            found += [line.strip() for line in lines if ".py" in line]
    return found


def script_of(words):
    """The file of this repository that a command runs, and the words after it."""
    for number, word in enumerate(words):
        if word.endswith(".py"):
            return word, words[number + 1 :]
    return None, []


def test_commands_of_the_readmes_parse():
    """Every `observe_r1.py` line, in blocks and in the text; … stands for more options."""
    lines = [line for readme in READMES for line in commands(readme)]
    for text in READMES.values():
        lines += re.findall(r"`([^`\n]*observe_r1\.py [a-z][^`\n]*)`", text)
    parsed = 0
    for line in lines:
        words = [word for word in shlex.split(line, comments=True) if word not in ("…", "...")]
        script, words = script_of(words)
        if script and script.endswith("observe_r1.py") and "--help" not in words:
            words = [
                str(ROOT / word) if word.endswith("toy/config.json") else word for word in words
            ]
            command, _ = parse_arguments(words)
            assert command in observe_r1.COMMANDS
            parsed += 1
    assert parsed > 5


@each_readme
def test_commands_of_the_readmes_run_files_that_exist_with_options_that_exist(readme):
    for line in commands(readme):
        script, words = script_of(shlex.split(line, comments=True))
        if not script or script.startswith(("$", "/")):
            continue
        places = [ROOT / script, readme.parent / script]
        files = [place for place in places if place.exists()]
        assert files, f"{line}: no {script}"
        if files[0].name == "observe_r1.py":
            continue  # those lines are parsed in the test above
        source = files[0].read_text()
        fields = Config.__dataclass_fields__ if "parse_arguments" in source else ()
        for name in (word[2:].split("=")[0] for word in words if word.startswith("--")):
            assert name in fields or re.search(rf"[\"'](--)?{name}[\"']", source), line


def is_option(name):
    """Whether the script has it, or a program in tools/ or toy/."""
    if name in {field.name for field in dataclasses.fields(Config)} | {"help", "nproc_per_node"}:
        return True
    sources = "".join(file.read_text() for file in (*TOOLS, *ROOT.glob("toy/*.py")))
    declared = rf"[\"']--{name}[\"']|^ +\"{name}\": "  # convert.py makes options from a table
    return re.search(declared, sources, re.MULTILINE)


@each_readme
def test_options_that_the_text_names_exist(readme):
    for code in re.findall(r"`([^`\n]+)`", READMES[readme]):
        for name in re.findall(r"(?<![\w-])--([a-z][\w-]*)(?![\w.-])", code):
            assert is_option(name), f"`{code}`"


def test_the_readme_says_what_is_there_to_be_found():
    names = set(re.findall(r"--(\w+)", READMES[ROOT / "README.md"]))
    assert names >= {"lora_rank", "token_budget", "max_pixels", "resume", "num_samples"}


def anchors(file):
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL)
    found = set()
    for heading in re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


def links(readme):
    """(text, file, anchor) of each link or picture that stays in this repository."""
    text = re.sub(r"```.*?```", "", READMES[readme], flags=re.DOTALL)
    found = re.findall(r"\[((?:!?\[[^]]*\]\([^)]*\)|[^]])*)\]\(\s*([^)\s]+)\s*\)", text)
    found += [("", target) for target in re.findall(r"(?:src|href)=\"([^\"]+)\"", text)]
    for label, target in found:
        if not re.match(r"https?:|mailto:", target):
            place, _, anchor = target.partition("#")
            yield label, (readme.parent / place if place else readme), anchor


@each_readme
def test_links_lead_somewhere(readme):
    count = 0
    for label, file, anchor in links(readme):
        count += 1
        assert file.exists(), f"{label}: {file}"
        line = re.fullmatch(r"L(\d+)(?:-L\d+)?", anchor)
        if line:
            text = file.read_text().splitlines()[int(line[1]) - 1]
            name = re.match(r"`?(\w+)", label)[1]
            assert re.match(rf"\s*(def|class) {name}\b|{name}\b", text), f"{label}: {text}"
        elif anchor:
            assert anchor in anchors(file), f"{label}: #{anchor} among {anchors(file)}"
    assert count


@each_readme
def test_files_that_the_text_names_exist(readme):
    """Names with a folder of this repository, and Python files."""
    for code in re.findall(r"`([\w./-]+)`", READMES[readme]):
        inside = code.startswith(("toy/", "tools/", "tests/")) and "." in code
        if inside or re.fullmatch(r"\w+\.py", code):
            places = [ROOT / code, readme.parent / code, ROOT / "tests" / code, ROOT / "toy" / code]
            assert any(place.exists() for place in places), code


@each_readme
def test_nothing_is_left_to_be_filled_in(readme):
    assert not re.findall(r"@[A-Z]+@|@T:\w+@|TODO|FIXME", READMES[readme])


def test_tests_that_the_readme_names_exist():
    tests = "".join(
        path.read_text() for path in (*ROOT.glob("tests/*.py"), ROOT / "test_rewards.py")
    )
    names = set(re.findall(r"\btest_\w+\b(?!\.py)", READMES[ROOT / "README.md"]))
    names -= {"test_rewards"}
    for name in names:
        assert f"def {name}(" in tests, name


def test_python_blocks_of_the_readmes_are_python():
    count = 0
    for text in READMES.values():
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            ast.parse(block)
            count += 1
    assert count
