"""The `quantkit` command: its subcommands, and what each failure means to the shell."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Annotated, NoReturn, TextIO

import typer
from typer.exceptions import Exit, TyperException
from typer.main import get_command

import quantkit
from quantkit.cli import (
    baselines,
    bisect,
    calibrate,
    compare,
    convert,
    doctor,
    estimate,
    gate,
    gateway,
    init,
    inspect,
    plan,
    publish,
    quantize,
    recipes,
    runtimes,
    serve,
    sweep,
    track,
    verify,
)
from quantkit.cli.console import Reply, print_error, render_reply, write
from quantkit.cli.process import settle_process
from quantkit.errors import (
    InputError,
    Interrupted,
    QuantkitError,
    ResourceError,
    is_out_of_memory,
    nearest,
)
from quantkit.ranks import read_ranks

PROGRAM = "quantkit"

app = typer.Typer(
    name=PROGRAM,
    help="Quantize a language model and prove that it is still the same model.",
    epilog="Example: quantkit quantize MODEL --recipe awq4 --output artifacts/model-awq4",
    add_completion=False,
)
app.command("quantize", epilog=quantize.EXAMPLE)(quantize.quantize)
app.command("plan", epilog=plan.EXAMPLE)(plan.plan)
app.command("calibrate", epilog=calibrate.EXAMPLE)(calibrate.calibrate)
app.command("gate", epilog=gate.EXAMPLE)(gate.gate)
app.command("compare", epilog=compare.EXAMPLE)(compare.compare)
app.command("sweep", epilog=sweep.EXAMPLE)(sweep.sweep)
app.command("bisect", epilog=bisect.EXAMPLE)(bisect.bisect)
app.command("convert", epilog=convert.EXAMPLE)(convert.convert)
app.command("inspect", epilog=inspect.EXAMPLE)(inspect.inspect)
app.command("verify", epilog=verify.EXAMPLE)(verify.verify)
app.command("publish", epilog=publish.EXAMPLE)(publish.publish)
app.command("serve", epilog=serve.EXAMPLE)(serve.serve)
app.command("gateway", epilog=gateway.EXAMPLE)(gateway.gateway)
app.command("estimate", epilog=estimate.EXAMPLE)(estimate.estimate)
app.command("track", epilog=track.EXAMPLE)(track.track)
app.add_typer(recipes.app)
app.add_typer(runtimes.app)
app.command("baselines", epilog=baselines.EXAMPLE)(baselines.baselines)
app.command("init", epilog=init.EXAMPLE)(init.init)
app.command("doctor", epilog=doctor.EXAMPLE)(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        write(f"{PROGRAM} {quantkit.__version__}\n", sys.stdout)
        raise Exit(0)


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Options of the program itself; the app's own help stands in for this text."""


def run() -> NoReturn:
    """Run the command line of this process and exit."""
    settle_process()
    exit_code = main()
    # Else the garbage collector walks through all of torch once more, which takes up to a second.
    gc.freeze()
    sys.exit(exit_code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; see docs/errors.md for what each one means."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    as_json = "--json" in arguments
    stdout = sys.stdout
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _termination_as_interrupt(), _stdout_for_the_reply_alone(as_json):
            reply = _run(arguments)
            if reply is None:
                return 0
            text = render_reply(reply, as_json=as_json, stdout=stdout)
        write(text, stdout)
    except (KeyboardInterrupt, Exception) as error:
        known = _explain(error, arguments)
        if known is None:
            traceback.print_exc()
            known = QuantkitError(f"{type(error).__name__}: {error} (this is a defect of quantkit)")
        print_error(str(known), known.exit_code, as_json=as_json, stdout=stdout)
        return known.exit_code
    return reply.exit_code


def _run(arguments: list[str]) -> Reply | None:
    """Parse and run; None where the parser has answered already, as to `--help`."""
    command = get_command(app)
    # Not `command.main`: it would swallow KeyboardInterrupt and broken pipes of ours.
    try:
        with command.make_context(PROGRAM, list(arguments)) as context:
            reply: Reply = command.invoke(context)
            return reply
    except Exit:
        return None


def _explain(error: BaseException, arguments: Sequence[str]) -> QuantkitError | None:
    """Return the error to show for `error`, or None for a defect of ours."""
    if isinstance(error, KeyboardInterrupt | Interrupted):
        return Interrupted(_interrupted(error, arguments))
    if isinstance(error, QuantkitError):
        return error
    if isinstance(error, TyperException):
        return InputError(_usage(error))
    if is_out_of_memory(error):
        return ResourceError(
            "out of memory: lower calibration.samples or calibration.sequence_length, "
            "or use a machine with more memory; `quantkit plan` shows what a job needs"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ResourceError(f"no space left on the device: {error.filename or error.strerror}")
    return None


def _interrupted(error: BaseException, arguments: Sequence[str]) -> str:
    again = shlex.join([*_program(), *arguments])
    if arguments[0] == "sweep":
        return f"interrupted; no job is left running, and the same command goes on: {again}"
    if arguments[0] == "calibrate":
        return (
            f"interrupted; the statistics of finished blocks are kept, and the same command goes "
            f"on: {again}"
        )
    if arguments[0] != "quantize":
        return "interrupted"
    return (
        f"interrupted; the finished blocks are kept (an encoder has none: its job takes minutes), "
        f"and the same command goes on: {again}"
    )


def _program() -> list[str]:
    """The words that have started this process."""
    if read_ranks().size == 1:
        return [PROGRAM]
    # Of one machine; on several, each has words of its own.
    count = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return ["torchrun", "--nproc-per-node", count, "-m", PROGRAM]


def _usage(error: TyperException) -> str:
    """One line for what the parser refused, and where to read more."""
    message = error.format_message().strip()
    option, choices = getattr(error, "option_name", None), getattr(error, "possibilities", None)
    if option and choices:
        message = f"no such option {option}{nearest(option, choices)}"
    context = getattr(error, "ctx", None)
    command = context.command_path if context else PROGRAM
    return f"{message[:1].lower()}{message[1:].rstrip('.')} (see `{command} --help`)"


@contextlib.contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """Let SIGTERM stop a job as Ctrl-C does: resumable and without half-written output."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _stdout_for_the_reply_alone(as_json: bool) -> Iterator[TextIO]:
    """With `--json`, send what libraries print to stderr: stdout is for the document."""
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout) as stream:
        yield stream
