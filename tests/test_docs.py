"""README, CONTRIBUTING and docs: code is run, commands are run or parsed, names are looked up."""

import ast
import contextlib
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest
import torch
from typecheck import unchecked

import openmythos
import openmythos.config as kinds
from openmythos import MythosConfig
from openmythos.cli import COMMANDS, command_of, main, parse
from openmythos.evidence.claims import CLAIMS
from openmythos.model.attention import ATTENTION
from openmythos.model.feed_forward import FEED_FORWARD
from openmythos.model.halting import HALTING
from openmythos.model.injection import INJECTION
from openmythos.training.depth import DEPTH
from openmythos.training.run import Settings as RunSettings
from openmythos.training.settings import CorpusName, Source, TrainConfig
from openmythos.training.start import start_run
from openmythos.training.trainer import Trainer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")]
PAGES += sorted((ROOT / "docs").glob("*.md"))

# Commands are run as they are written, in a folder that has what they name, but for these changes.
SMALL_TRAINING = (
    "--steps 2 --batch-size 2 --length 16 --gate-steps 1 --evaluate-tokens 64 --precision fp32 "
    "--threads 1 --model.hidden-size 32 --model.num-heads 4 --model.kv-heads 2"
)
REPLACED = {  # by command: what is written, and what is run instead
    "train": {"--corpus embedded": "--text my_books", "--corpus sotu": "--text my_books"},
    "eval": {"--corpus embedded": "--text letters.txt", "--corpus sotu": "--text letters.txt"},
}
APPENDED = {  # by command: flags and values, which take the places of the same flags
    "train": SMALL_TRAINING,
    "generate": "--max-new-tokens 3",
    "chat": "--max-new-tokens 3",
}
# Minutes, or another package: that every flag exists is all that is asked of these.
PARSED_ALONE = ("demo", "bench", "lm-eval", "evidence", "serve")
NOT_RUN = ("cat", "curl", "printf", "pip", "source")  # of pip the extras are checked

TABLES = {  # by the first cell of a table's head: what its first column must list
    "attention": tuple(ATTENTION),
    "feed_forward": tuple(FEED_FORWARD),
    "injection": tuple(INJECTION),
    "halting": tuple(HALTING),
    "depth": tuple(DEPTH),
    "corpus": get_args(CorpusName),
    "policy": get_args(kinds.CachePolicy),
    "norm": get_args(kinds.NormPlacement),
    "h0": get_args(kinds.FirstState),
    "core_output": get_args(kinds.CoreOutputKind),
    "rope_pairing": get_args(kinds.RopePairing),
}


@dataclass(frozen=True)
class Block:
    """A fenced block; `source` names the file that an excerpt is of."""

    page: Path
    line: int
    language: str
    source: str
    text: str


def blocks_of(page):
    fence = re.compile(r"^( *)```(\w*) ?(\S*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
    content = page.read_text(encoding="utf-8")
    for found in fence.finditer(content):
        line = content.count("\n", 0, found.start()) + 2
        text = textwrap.dedent(found[4])
        yield Block(page, line, found[2], found[3], text)


def prose_of(page):
    """A page without its fenced blocks and comments."""
    content = re.sub(r"^( *)```.*?^\1```$", "", page.read_text("utf-8"), flags=re.M | re.S)
    return re.sub(r"<!--.*?-->", "", content, flags=re.S)


def commands_of(block):
    """Every command of a block, pipes taken apart and comments left out."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":  # output stands between the commands
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split = True
        words = []
        for word in [*lexer, "|"]:
            if not set(word) <= set("|&;"):
                words.append(word)
            elif words:
                yield words
                words = []


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
EXCERPTS = [block for block in BLOCKS if block.source]
RUN = [block for block in BLOCKS if block.language == "python" and not block.source]
TYPED = [
    pytest.param(words, id=f"{block.page.name}: {shlex.join(words)}")
    for block in BLOCKS
    if block.language in ("bash", "console")
    for words in commands_of(block)
]


def where(block):
    return f"{block.page.name}:{block.line}"


@pytest.fixture(autouse=True)
def _no_shape_checks():
    with unchecked():  # they take more time than what is run here
        yield


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with all that the pages' code and commands name."""
    folder = tmp_path_factory.mktemp("prepared")
    lines = [f"The {n} mice ran up the clock, and the clock struck {n % 12}." for n in range(100)]
    (folder / "my_books").mkdir()
    (folder / "my_books" / "rhyme.txt").write_text("\n\n".join(lines))
    for name in ("letters.txt", "diary.txt", "story.txt"):
        (folder / name).write_text("\n\n".join(lines[:9]))
    model = MythosConfig.preset("nano").replace(hidden_size=32, head_dim=8, vocab_size=300)
    train = TrainConfig(
        steps=2,
        batch_size=2,
        length=16,
        gate_steps=1,
        evaluate_tokens=64,
        precision="fp32",
        threads=1,
    )
    source = Source(text=folder / "my_books", held_out=0.1)
    start_run(folder / "runs" / "nano", model, train, source=source).fit()
    shutil.copytree(folder / "runs" / "nano", folder / "runs" / "books")
    return folder


@pytest.mark.parametrize("block", EXCERPTS, ids=where)
def test_an_excerpt_stands_in_its_file(block):
    source = "\n" + (ROOT / block.source).read_text(encoding="utf-8")
    indented = ("\n" + textwrap.indent(block.text, " " * 4 * depth) for depth in range(5))
    assert any(text in source for text in indented), f"{block.source} has no such lines"


@pytest.mark.parametrize("page", dict.fromkeys(block.page for block in RUN), ids=lambda p: p.name)
@pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")  # a Trainer's, without a GPU
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT's
def test_the_code_of_a_page_runs_from_top_to_bottom(page, prepared, monkeypatch):
    monkeypatch.chdir(prepared)
    names = {}
    for block in RUN:
        if block.page == page:
            # As many lines before it as on the page, so that a traceback points there.
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            exec(code, names)


class PagesText:
    """The text of a page's training loop, as a run reads it."""

    bytes = tokens = 1

    def __init__(self, text):
        self.text = text

    def batch(self, samples, length, *, seed):
        return self.text(int(samples[0]) // 4)[samples % 4].numpy()


@pytest.mark.parametrize("shape", ['preset("nano")', 'preset("nano").replace(experts=0)'])
def test_the_training_loop_of_a_page_takes_the_steps_of_the_trainer(shape, tmp_path):
    (block,) = [block for block in RUN if "train_gate" in block.text]
    names = {}
    assert 'MythosConfig.preset("nano")' in block.text
    exec(block.text.replace('preset("nano")', shape), names)
    model, steps = names["model"], names["steps"]
    whole = {"precision": "fp32", "compile": "never", "threads": 1}
    train = TrainConfig(steps=steps, batch_size=4, length=32, accumulation=2, **whole)
    settings = RunSettings(model=model.config, train=train, source=Source(corpus="embedded"))
    text = PagesText(names["text"])
    trainer = Trainer(tmp_path, settings, None, text, None, device=torch.device("cpu"))
    for _ in range(steps):
        trainer.one_step()
    mine = model.state_dict()
    for name, tensor in trainer.model.state_dict().items():
        assert name.startswith("core.gate.") or tensor.equal(mine[name]), name


def test_training_in_several_processes_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert exit_code(main, ["train", "--corpus", "embedded", "--steps", "1"]) == 2
    assert "WORLD_SIZE=2 must be 1: openmythos train is one process" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", TYPED)
def test_a_command_runs(words, prepared, monkeypatch, capsys):
    monkeypatch.chdir(prepared)
    while re.match(r"[A-Z_]+=", words[0]):  # settings of the environment
        words = words[1:]
    program, *arguments = words
    if program == "openmythos":
        run_ours(arguments, monkeypatch)
    elif program == "make":
        subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)
    elif program == "python":
        run_help(arguments, monkeypatch, capsys)
    else:
        assert program in NOT_RUN
    if program == "pip":
        check_extras(arguments)


def run_ours(arguments, monkeypatch):
    name, line = arguments[0], f" {shlex.join(arguments[1:])} "
    if name in PARSED_ALONE or "--task" in arguments:
        parse_ours(arguments)
        return
    for written, instead in REPLACED.get(name, {}).items():
        line = line.replace(f" {written} ", f" {instead} ")
    if name == "train" and "--resume" not in arguments:
        line = with_flags(line, f"--run {len(list(Path().iterdir()))}")  # that is not there yet
    if "--resume" not in arguments:
        line = with_flags(line, APPENDED.get(name, ""))
    typed = io.TextIOWrapper(io.BytesIO(b"The 3 mice"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", typed)
    assert exit_code(main, [name, *shlex.split(line)]) == 0, f"openmythos {name} {line}"


def with_flags(line, flags):
    """Append flags with a value each, and take the same ones out before."""
    for flag in flags.split()[::2]:
        line = re.sub(rf" {flag}[ =]\S+", "", line)
    return f"{line} {flags}"


def exit_code(call, *arguments):
    try:
        call(*arguments)
    except SystemExit as ended:
        return ended.code or 0
    return 0


def parse_ours(arguments):
    """Fail where the command or one of its flags does not exist."""
    name, *flags = arguments
    assert name in COMMANDS
    command = command_of(name)
    assert exit_code(parse, command, name, flags) == 0, f"openmythos {shlex.join(arguments)}"


def run_help(arguments, monkeypatch, capsys):
    """Ask a benchmark for its help, which must have every flag that is named."""
    script, *flags = arguments
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.syspath_prepend((ROOT / script).parent)  # as Python does for a script
    assert exit_code(runpy.run_path, str(ROOT / script), None, "__main__") == 0
    text = capsys.readouterr().out
    for flag in flags:
        assert not flag.startswith("--") or flag.partition("=")[0] in text


def check_extras(arguments):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for argument in arguments:
        named = re.fullmatch(r"(?:\.|openmythos)\[(.+)\]", argument)
        assert not named or set(named[1].split(",")) <= set(project["optional-dependencies"])


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_a_help_page_parse(name):
    text = Path(command_of(name).__file__).read_text(encoding="utf-8")
    lines = re.findall(r"^    (.*\bopenmythos .*)$", ast.get_docstring(ast.parse(text)), re.M)
    assert lines
    for line in lines:
        for words in commands_of(Block(ROOT, 0, "bash", "", line)):
            if words[0] == "openmythos":
                flags = words[1 : words.index("<")] if "<" in words else words[1:]
                parse_ours(flags)


def tables_of(page):
    """Every table: the cells of its head, and of each row."""
    table = re.compile(r"^\|.+\|\n\|[-|: ]+\|\n(?:\|.+\|\n)*", re.MULTILINE)
    for found in table.finditer(prose_of(page)):
        rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in found[0].splitlines()]
        yield rows[0], rows[2:]


def rows_under(first_cell, pages=PAGES):
    """The rows of every table whose head begins with this cell."""
    named = (first_cell, f"`{first_cell}`")
    return [rows for page in pages for head, rows in tables_of(page) if head[0] in named]


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_lists_the_kinds_there_are(kind):
    found = rows_under(kind)
    assert found
    for rows in found:
        assert tuple(row[0].strip("`") for row in rows) == TABLES[kind]


def test_the_table_of_public_names_has_all_of_them():
    (rows,) = rows_under("public name")
    assert sorted(row[0].strip("`") for row in rows) == sorted(openmythos.__all__)


def test_the_table_of_commands_is_that_of_the_command_line():
    (rows,) = rows_under("command", [ROOT / "README.md"])
    assert {name.strip("`"): line for name, line in rows} == COMMANDS


def test_the_table_of_targets_is_that_of_the_makefile():
    (rows,) = rows_under("target", [ROOT / "CONTRIBUTING.md"])
    targets = re.findall(r"^([a-z]+):.*?## (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert [(name.strip("`"), line) for name, line in rows] == [
        (f"make {name}", line) for name, line in targets
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", prose_of(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors_of(linked), target


def anchors_of(page):
    """The headings as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_names_are_where_a_page_says(page):
    prose = re.sub(r"\s+", " ", prose_of(page))
    for file in re.findall(r"`([\w./-]+\.(?:py|md|toml))`", prose):
        assert (ROOT / file).is_file(), file
    for folder in re.findall(r"`((?:openmythos|tests|benchmarks|docs)/[\w/]*)`", prose):
        assert (ROOT / folder).is_dir(), folder
    for name, file in re.findall(r"`([A-Za-z_][\w.]*)` \(`([\w./]+\.py)`\)", prose):
        assert name in names_in(ROOT / file), f"{file} defines no {name}"


def names_in(file):
    """Everything that a file defines at its top, and in its classes as `Class.name`."""
    names = set()
    for prefix, body in scopes(ast.parse(file.read_text(encoding="utf-8"))):
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                names.add(prefix + node.name)
            elif isinstance(node, ast.AnnAssign):
                names.add(prefix + ast.unparse(node.target))
            elif isinstance(node, ast.Assign):
                names.update(prefix + ast.unparse(target) for target in node.targets)
    return names


def scopes(tree):
    yield "", tree.body
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield f"{node.name}.", node.body


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_in_the_text_exist(page, every_help):
    for code in re.findall(r"`([^`]+)`", prose_of(page)):
        assert set(re.findall(r"(?<!\S)--[a-z][\w.-]*", code)) <= every_help, code


@pytest.fixture(scope="module")
def every_help():
    """The flags of all commands, and those of `make same`."""
    flags = {"--help", "--record", "--version"}
    for name in COMMANDS:
        command = command_of(name)
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exit_code(parse, command, name, ["--help"])
        flags |= set(re.findall(r"--[a-z][\w.-]*", output.getvalue()))
    return flags


def mapped_files():
    """The names that the map of folders gives each folder, by its path inside the package."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    lines = text.split("    openmythos/\n")[1].split("    tests/")[0].splitlines()
    found, folder = {"": set()}, ""
    for line in lines:
        outer, inside = folder.split("/")[0], len(line) - len(line.lstrip()) > 6
        first, *cells = re.split(r" {3,}", line.strip())
        if first.endswith(".py"):
            found[""].add(first.removesuffix(".py"))
            continue
        if first.endswith("/"):
            folder = f"{outer}/{first[:-1]}" if inside else first[:-1]
            first = cells[0] if len(cells) > 1 else ""
        elif line.startswith(" " * 8 + first):  # no folder inside goes on here
            folder = outer
        found.setdefault(folder, set()).update(first.split())
    return found


MADE_BY_NAME = {
    "evidence": {name.replace("-", "_") for name in CLAIMS},
    "cli": {f"{name.replace('-', '_')}_command" for name in COMMANDS},
}
"""Files that the map does not list, because a command does."""


def test_the_map_of_folders_has_every_file():
    listed, package = mapped_files(), ROOT / "openmythos"
    folders = {file.parent for file in package.rglob("*.py")}
    assert {str(folder.relative_to(package)) for folder in folders} - {".", "data"} <= set(listed)
    for name, names in listed.items():
        files = {file.stem for file in (package / name).glob("[!_]*.py")}
        assert files - MADE_BY_NAME.get(name, set()) == names, name


def test_the_page_lists_all_of_its_parts():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, re.M)
    assert re.findall(r"^- \[(.+)\]\(#", text, re.M) == headings


FOLDERS = ("model", "training", "tasks", "inference", "evidence", "cli")  # each knows those before


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_one_way(folder):
    later = FOLDERS[FOLDERS.index(folder) + 1 :]
    for file in (ROOT / "openmythos" / folder).rglob("*.py"):
        imported = re.findall(r"^\s*(?:from|import) openmythos\.(\w+)", file.read_text(), re.M)
        assert not set(imported) & set(later), file.name
