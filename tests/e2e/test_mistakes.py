"""The twenty mistakes of docs/errors.md are made, their messages compared, the remedies tried."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import quantkit
from tests.cli.running import ROOT, run_here
from tests.helpers import make_pico_model, pico_text
from tests.hub import READ_TOKEN, HubServer

PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("## Twenty common mistakes\n")[2].partition("\n## ")[0]
RECIPE = SECTION.partition("```yaml\n")[2].partition("```")[0]
POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    "size 275336\n"
)


@dataclass(frozen=True)
class Block:
    """One fenced block: what is typed, or what is changed in the recipe."""

    language: str
    lines: tuple[str, ...]


def read_mistakes() -> dict[str, list[Block]]:
    """The blocks of each mistake by its title."""
    parts = re.split(r"^### \d+\. (.*)\n", SECTION, flags=re.MULTILINE)
    fences = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
    return {
        title: [Block(name, tuple(text.splitlines())) for name, text in fences.findall(body)]
        for title, body in zip(parts[1::2], parts[2::2], strict=True)
    }


MISTAKES = read_mistakes()


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the examples."""
    folder = tmp_path_factory.mktemp("example")
    make_pico_model(folder / "my-model", hidden=128, layers=1, max_positions=1024)
    (folder / "texts.txt").write_text(pico_text(1500, seed=1))
    (folder / "evaluation.txt").write_text(pico_text(1500, seed=2))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    """A Hub on this machine."""
    with HubServer() as server:
        yield server


@dataclass
class User:
    """Somebody who follows the page, in a folder of his own."""

    folder: Path
    hub: HubServer
    patch: pytest.MonkeyPatch
    place: Path
    """Where he is, by `cd`."""

    def follow(self, block: Block) -> None:
        """Do what a block shows, and compare what comes with what it shows."""
        if block.language == "diff":
            self._edit(block.lines)
            return
        starts = [n for n, line in enumerate(block.lines) if line.startswith("$ ")]
        for start, end in zip(starts, [*starts[1:], len(block.lines)], strict=True):
            self._type(block.lines[start][2:], block.lines[start + 1 : end])

    def _edit(self, lines: tuple[str, ...]) -> None:
        recipe = self.folder / "recipe.yaml"
        text = recipe.read_text()
        old, new = lines
        assert old[0] + new[0] == "-+"
        assert f"{old[1:]}\n" in text
        recipe.write_text(text.replace(f"{old[1:]}\n", f"{new[1:]}\n"))

    def _type(self, line: str, shown: tuple[str, ...]) -> None:
        program, *arguments = shlex.split(line)
        if program == "quantkit":
            done = run_here(*arguments, folder=self.place)
            assert done.returncode == (2 if shown else 0), (line, done.stderr)
            # In front of it there may be a bar of the Hub's client.
            said = ("error: " + done.stderr.partition("error: ")[2]).splitlines()
            for found, wanted in zip(said if shown else (), shown, strict=True):
                pattern = re.escape(wanted).replace(r"\.\.\.", ".*")
                assert re.fullmatch(pattern, found), f"{line}\nsays  {found}\nnot   {wanted}"
        else:
            OTHERS.get(program, run_program)(self, program, arguments)


def run_program(user: User, program: str, arguments: list[str]) -> None:
    """Run a program of the system."""
    subprocess.run([program, *arguments], cwd=user.place, check=True)


def change_folder(user: User, _: str, arguments: list[str]) -> None:
    """Be elsewhere."""
    user.place = user.place / arguments[0]


def change_variable(user: User, program: str, arguments: list[str]) -> None:
    """Set or forget a variable; the Hub's client reads one of them when it is imported."""
    from huggingface_hub import constants

    name, _, value = arguments[0].partition("=")
    if name == "HF_HUB_OFFLINE":
        user.patch.setattr(constants, name, program == "export")
    elif value == "hf_...":
        user.patch.setenv(name, READ_TOKEN)


def pull(user: User, _: str, arguments: list[str]) -> None:
    """What Git LFS does, which few machines have: put the file in the place of its pointer."""
    assert user.place == user.folder / "my-model"
    if arguments == ["lfs", "pull"]:
        weights = user.place / "model.safetensors"
        weights.write_bytes(user.hub.files("acme/small-llm")["model.safetensors"])


def install(user: User, _: str, arguments: list[str]) -> None:
    """Let the package be there again that this environment has."""
    assert arguments == ["install", "quantkit[onnx]"]
    for name in ("onnx", "onnxscript"):
        user.patch.delitem(sys.modules, name)


def download(user: User, _: str, arguments: list[str]) -> None:
    """The real client, from the Hub of the tests."""
    done = subprocess.run(
        [sys.executable, "-m", "huggingface_hub.cli.hf", *arguments],
        cwd=user.place,
        env=user.hub.environment(user.folder / "home"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


OTHERS: dict[str, Callable[[User, str, list[str]], None]] = {
    "cd": change_folder,
    "export": change_variable,
    "unset": change_variable,
    "git": pull,
    "pip": install,
    "hf": download,
}


# --- how each is made


def edit(user: User, old: str, new: str) -> None:
    """Change the recipe."""
    recipe = user.folder / "recipe.yaml"
    text = recipe.read_text()
    assert old in text
    recipe.write_text(text.replace(old, new))


def lose_tokenizer(user: User) -> None:
    """As it is after a training."""
    shutil.copytree(user.folder / "my-model", user.folder / "original")
    for path in (user.folder / "my-model").glob("tokenizer*"):
        path.unlink()


def quantize(user: User) -> None:
    """Have an output that was not judged."""
    done = run_here(
        "quantize", "--recipe", "recipe.yaml", "--no-gate", "--quiet", folder=user.folder
    )
    assert done.returncode == 0, done.stderr


def cut(user: User) -> None:
    """Lose the end of the weights."""
    weights = user.folder / "my-model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def interrupt(user: User) -> None:
    """Press Ctrl-C after the first block."""

    def press(event: quantkit.Event) -> None:
        if event.stage == "quantize" and event.done == 1:
            raise KeyboardInterrupt

    user.patch.chdir(user.folder)
    with pytest.raises(KeyboardInterrupt):
        quantkit.quantize("recipe.yaml", gate=False, progress=press)


def hide_onnx(user: User) -> None:
    """As an installation without the extra."""
    for name in ("onnx", "onnxscript"):
        user.patch.setitem(sys.modules, name, None)


MAKING: dict[str, Callable[[User], object]] = {
    "The tokenizer was not copied": lose_tokenizer,
    "A GGUF file where a model is wanted": lambda user: (
        user.folder / "my-model-Q4_K_M.gguf"
    ).write_bytes(b"GGUF"),
    "Quantizing what is quantized": quantize,
    "Cloned without Git LFS": lambda user: (
        user.folder / "my-model" / "model.safetensors"
    ).write_text(POINTER),
    "A download that broke off": cut,
    "A recipe with tabs": lambda user: edit(user, "\n  scheme", "\n\tscheme"),
    "A key of the recipe is misspelt": lambda user: edit(user, "scheme:", "shceme:"),
    "The group size does not divide": lambda user: make_pico_model(
        user.folder / "odd-model", hidden=128, intermediate=320, layers=1, max_positions=1024
    ),
    "A pattern that matches no layer": lambda user: edit(
        user,
        "  method: gptq\n",
        '  method: gptq\n  overrides: [{match: "*.donw_proj", scheme: w8a16}]\n',
    ),
    "Too little text": lambda user: (user.folder / "texts.txt").write_text("too short"),
    "The column of the texts has another name": lambda user: (
        user.folder / "rows.jsonl"
    ).write_text(json.dumps({"prompt": pico_text(1500, seed=3)}) + "\n"),
    "The output exists": quantize,
    "An interrupted job, and another recipe since": interrupt,
    "Publishing what nobody has judged": quantize,
    "An optional package is absent": hide_onnx,
}


@pytest.fixture
def user(example: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> User:
    """A fresh copy of the folder, and models on the Hub."""
    folder = shutil.copytree(example, tmp_path / "work")
    for name in ("calib_data", "recipes"):
        (folder / name).symlink_to(ROOT / name)
    files = {path.name: path.read_bytes() for path in (folder / "my-model").iterdir()}
    hub.add_repo("acme/small-llm", files)
    hub.add_repo("acme/gated-llm", files, gated=True)
    hub.connect(monkeypatch, tmp_path / "home", token=None)
    return User(folder, hub, monkeypatch, folder)


def test_there_are_twenty() -> None:
    """And what makes them belongs to one of them."""
    assert len(MISTAKES) == 20
    assert set(MAKING) <= set(MISTAKES)


@pytest.mark.recipes
@pytest.mark.parametrize("title", MISTAKES)
def test_a_mistake_says_how_it_is_mended_and_is_mended_so(title: str, user: User) -> None:
    """The message is the one that the page shows, and after the remedy the command works."""
    first, *remedy = MISTAKES[title]
    assert any(line.startswith("error: ") for line in first.lines)
    MAKING.get(title, lambda user: None)(user)
    user.follow(first)
    for block in remedy:
        user.follow(block)
