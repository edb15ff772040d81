"""Chat templates are programs from elsewhere: what they do to time, memory and the machine."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantkit.calibration import templates
from quantkit.calibration.templates import apply_template, isolated
from quantkit.calibration.tokenizer import load_tokenizer
from quantkit.errors import CalibrationError, CheckpointError
from tests.helpers import write_pico_tokenizer

CHAT = [{"role": "user", "content": "Who?"}]
TEXT = {"tokenize": False}

ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "long": "{{ 'a' * 10 ** 12 }}",
    "width": "{{ '%2000000000d' % 1 }}",
    "doubled": "{% set s = namespace(v='ab') %}{% for i in range(60) %}"
    "{% set s.v = s.v ~ s.v %}{% endfor %}",
}

WithTemplate = Callable[[str], Any]


@pytest.fixture(scope="module")
def with_template(tmp_path_factory: pytest.TempPathFactory) -> WithTemplate:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_pico_tokenizer(folder)

    def make(template: str) -> Any:
        (folder / "chat_template.jinja").write_text(template)
        return load_tokenizer(folder)

    return make


NewChildren = Callable[[], set[int]]


@pytest.fixture
def new_children() -> NewChildren:
    """The children that this process has now and had not before the test."""
    path = Path(f"/proc/self/task/{os.getpid()}/children")

    def find() -> set[int]:
        return {int(number) for number in path.read_text().split()}

    before = find()
    return lambda: find() - before


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_is_stopped(
    name: str,
    with_template: WithTemplate,
    monkeypatch: pytest.MonkeyPatch,
    new_children: NewChildren,
) -> None:
    """By the kernel, in a process of its own: neither Python nor jinja would."""
    monkeypatch.setattr(templates, "MOST_SECONDS", 0.3)

    with pytest.raises(CheckpointError, match="chat template takes more than"):
        apply_template(with_template(ENDLESS[name]), CHAT, TEXT, "here")

    assert not new_children()


def test_conversations_go_through_one_process(
    with_template: WithTemplate, new_children: NewChildren
) -> None:
    """Texts come back as they are; a refusal ends one conversation alone."""
    refusing = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('not so') }}{% endif %}"
    tokenizer = with_template(refusing + "{{ messages[0]['content'] }}é\U0001f600\0")
    with isolated(tokenizer) as apply:
        first = apply(CHAT, TEXT, "first")
        children = new_children()
        with pytest.raises(CalibrationError, match="second: not so"):
            apply([{"role": "user", "content": "no"}], TEXT, "second")
        assert apply(CHAT, TEXT, "third") == first == "Who?é\U0001f600\0"
        assert new_children() == children

    assert len(children) == 1
    assert not new_children()


def test_the_process_holds_no_file_of_this_one_open(
    with_template: WithTemplate, tmp_path: Path, new_children: NewChildren
) -> None:
    """A lock on an open file would outlive the job that took it."""
    with open(tmp_path / "held", "w"), isolated(with_template("x")) as apply:
        apply(CHAT, TEXT, "here")
        (child,) = new_children()
        open_files = {os.readlink(path) for path in Path(f"/proc/{child}/fd").iterdir()}

    assert not [name for name in open_files if name.endswith("held")]


def test_what_no_process_can_be_told_is_refused(with_template: WithTemplate) -> None:
    """Messages of the caller's own are plain values."""
    with pytest.raises(CalibrationError, match="not made of plain values"):
        apply_template(with_template("x"), [{"role": lambda: 0}], TEXT, "here")


def test_forking_beside_threads_is_no_warning(with_template: WithTemplate) -> None:
    """Python 3.12 warns of it, and the tests make errors of warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert apply_template(with_template("x"), CHAT, TEXT, "here") == "x"


_INTERRUPTED = """
import os, signal, sys
from quantkit.calibration import templates

class Tokenizer:
    def apply_chat_template(self, messages, **options):
        return "rendered"

def interrupt():
    signal.raise_signal(signal.SIGINT)

# The same place as that of the callback of `logging`, and as a fork that takes long.
os.register_at_fork(**{sys.argv[1]: interrupt})
heard = 0
for _ in range(5):
    try:
        with templates.isolated(Tokenizer()) as apply:
            apply([], {}, "here")
    except KeyboardInterrupt:
        heard += 1
handler = signal.getsignal(signal.SIGINT)
try:
    os.wait()
except ChildProcessError:
    print(heard, handler is signal.default_int_handler)
"""


@pytest.mark.parametrize("moment", ["before", "after_in_parent"])
def test_a_signal_within_the_fork_is_heard(moment: str) -> None:
    """Python drops what its handler raises there; the child that was begun is ended."""
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED, moment], capture_output=True, text=True, timeout=60
    )

    assert (done.stdout, done.stderr) == ("5 True\n", "")
