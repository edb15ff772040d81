"""How the command's own process treats threads and memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SHOW = (
    "import os; from quantkit.cli.process import settle_process; settle_process();"
    "print(os.environ['OMP_WAIT_POLICY'])"
)


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_sleep_unless_the_user_says_otherwise(given: str | None, expected: str) -> None:
    """The usual variable wins."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if given is not None:
        environment["OMP_WAIT_POLICY"] = given

    reply = subprocess.run(
        [sys.executable, "-c", SHOW], env=environment, capture_output=True, text=True, check=True
    )

    assert reply.stdout.strip() == expected
