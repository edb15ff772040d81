"""Where the process begins: what has to be in order before anything else is imported."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn


def run() -> NoReturn:
    """Run the command line of this process and exit.

    Until `quantkit.cli.main` listens, Ctrl-C ends the process by itself: there is nothing to tidy,
    and a traceback through half of an import says nothing.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    open_standard_streams()
    from quantkit.cli.main import run as run_command_line

    run_command_line()


def open_standard_streams() -> None:
    """Let what was closed lead nowhere: else the next file that is opened gets its number.

    Whatever is written to stdout or stderr after that, by a library in C or by another process,
    would go into that file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free, which is this one.
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            stream = open(  # noqa: SIM115
                number, "w" if number else "r", encoding="utf-8", closefd=False
            )
            setattr(sys, name, stream)
