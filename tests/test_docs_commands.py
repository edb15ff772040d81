"""Every documented command parses, every documented target exists, every link leads somewhere."""

from __future__ import annotations

import ast
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.exceptions import TyperException
from typer.main import get_command

import quantkit
from quantkit.cli.main import app
from tests.cli.running import ROOT, run_here

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = "<!-- run -->"
"""The line above a block whose commands are really run."""

MEANINGS = (
    *("quantkit", "make", "vllm", "source", "llama-server", "ollama"),
    # What mends a mistake, which tests/e2e/test_mistakes.py tries.
    *("cd", "cp", "export", "git", "hf", "pip", "sed", "unset"),
)
"""The programs that a documented command may begin with."""


@dataclass(frozen=True)
class Block:
    """The commands of one fenced block."""

    page: str
    line: int
    commands: tuple[str, ...]
    runs: bool


def read_blocks(page: Path) -> list[Block]:
    """The console and shell blocks of a page; in a console block, commands begin with `$`."""
    blocks: list[Block] = []
    language, start, commands, above = "", 0, [], ""
    inside = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("```") and not inside:
            inside, language, start, commands = True, line.strip("` "), number, []
        elif line.startswith("```"):
            inside = False
            if language in ("console", "bash", "sh"):
                blocks.append(Block(page.name, start, tuple(commands), above == RUN))
            above = ""
        elif inside and language == "console":
            commands += [line[2:]] if line.startswith("$ ") else []
        elif inside and line.strip():
            commands.append(line)
        elif not inside and line.strip():
            above = line.strip()
    return blocks


BLOCKS = [block for page in PAGES for block in read_blocks(page)]
COMMANDS = [
    pytest.param(command, id=f"{block.page}:{block.line}: {command}")
    for block in BLOCKS
    for command in block.commands
]


def parse(arguments: list[str]) -> None:
    """Let the real parser read `arguments`, without running anything.

    Raises:
        TyperException: it refuses them.
    """
    command: Any = get_command(app)
    with command.make_context("quantkit", list(arguments)) as context:
        while hasattr(command, "resolve_command"):
            rest = [*context._protected_args, *context.args]
            name, command, rest = command.resolve_command(context, rest)
            context = command.make_context(name, rest, parent=context)


def test_there_are_commands_to_check() -> None:
    """Otherwise the reader of the pages is broken."""
    assert len(COMMANDS) > 20
    assert sum(block.runs for block in BLOCKS) >= 5


@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_command_is_understood(command: str) -> None:
    """By the parser of quantkit, or by the Makefile."""
    program, *arguments = shlex.split(command.split(" > ")[0], comments=True)
    assert program in MEANINGS
    if program == "quantkit":
        parse(arguments)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert set(arguments) <= set(targets)


def test_a_wrong_command_would_be_noticed() -> None:
    """The parser is the real one."""
    for wrong in (
        ["quantise"],
        ["plan"],
        ["quantize", "--recipe", "x", "--grup"],
        ["recipes", "x"],
    ):
        with pytest.raises(TyperException):
            parse(wrong)


@pytest.mark.parametrize(
    "block",
    [block for block in BLOCKS if block.runs],
    ids=[f"{block.page}:{block.line}" for block in BLOCKS if block.runs],
)
def test_a_block_that_is_marked_runs(block: Block, tmp_path: Path) -> None:
    """From an empty folder that has the repository's models, texts and recipes."""
    for name in ("models", "calib_data", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    for command in block.commands:
        program, *arguments = shlex.split(command)
        assert program == "quantkit"
        done = run_here(*arguments, folder=tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_documented_python_uses_what_quantkit_exports() -> None:
    """The examples parse, and every `quantkit.name` in them is public."""
    blocks = [
        block
        for page in PAGES
        for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    ]
    used = {
        node.attr
        for block in blocks
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "quantkit"
    }
    assert "quantize" in used
    assert used <= set(quantkit.__all__)


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    """To a file that is there."""
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert not [target for target in targets if not (page.parent / target).exists()]


def read_anchors(page: Path) -> set[str]:
    """What a link to a heading of the page says behind `#`."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_to_headings_lead_to_one(page: Path) -> None:
    """On the page itself, or on another one."""
    links = re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text(encoding="utf-8"))
    assert not [
        (target, anchor)
        for target, anchor in links
        if anchor not in read_anchors(page.parent / target if target else page)
    ]


def test_the_headings_that_the_code_cites_are_there() -> None:
    """As in `docs/gate.md, "Metrics"`."""
    cited = {
        found
        for folder in ("quantkit", "benchmarks", "scripts")
        for path in (ROOT / folder).rglob("*.py")
        for found in re.findall(r'(docs/[\w-]+\.md), "([^"]+)"', path.read_text(encoding="utf-8"))
    }
    assert ("docs/gate.md", "Metrics") in cited
    assert not [
        (page, title)
        for page, title in cited
        if not re.search(rf"^#+ {re.escape(title)}$", (ROOT / page).read_text(), flags=re.M)
    ]


def test_recipes_name_commands_that_parse() -> None:
    """The comment on top of a shipped recipe shows how it is used."""
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        shown = re.findall(r"^#\s+quantkit (.*)$", path.read_text(), flags=re.MULTILINE)
        for command in shown:
            parse(shlex.split(command))


def test_the_help_examples_parse() -> None:
    """The line below each `--help`."""
    root: Any = get_command(app)
    for shown in (root, *root.commands.values(), *root.commands["recipes"].commands.values()):
        # What a shell asks for completions is shown to nobody.
        if shown.hidden:
            continue
        example = shown.epilog.removeprefix("Example: ").split(" > ")[0]
        if example.startswith("source <("):
            example = example.removeprefix("source <(").removesuffix(")")
        program, *arguments = shlex.split(example)
        assert program == "quantkit"
        parse(arguments)
