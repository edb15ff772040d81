"""The examples of docs/python.md run as they stand, one after the other, in one process."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.running import ROOT, environment

PAGE = ROOT / "docs" / "python.md"


def read_program(page: Path) -> str:
    """The Python blocks of a page as one program, each line where it stands on the page."""
    lines, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        fence = line.startswith("```")
        lines.append(line if inside and not fence else "")
        inside = line == "```python" if fence else inside
    return "\n".join(lines) + "\n"


@pytest.mark.integrations
def test_the_examples_run(tmp_path: Path) -> None:
    """From an empty folder that has the repository's models, texts and recipes.

    A traceback names the line of the page.
    """
    for name in ("models", "calib_data", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    program = tmp_path / PAGE.with_suffix(".py").name
    program.write_text(read_program(PAGE), encoding="utf-8")
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, program.name],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    print(f"{time.monotonic() - start:.0f} s\n{done.stdout}")
    assert done.returncode == 0, done.stderr
    for words in ("PASS keeps_greeting", "PASS loses_no_token", "my_rtn"):
        assert words in done.stdout
    assert not list(tmp_path.glob("artifacts/*.partial"))
    assert not list(tmp_path.glob("artifacts/*.in-memory"))
