"""The `quantkit` command: its subcommands, and what each failure means to the shell."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import os
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Annotated, NoReturn, TextIO

import typer
from typer.exceptions import TyperException
from typer.main import get_command

import quantkit
from quantkit.cli import (
    baselines,
    bisect,
    calibrate,
    compare,
    completion,
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
from quantkit.cli.console import Answered, Reply, print_error, render_reply, write
from quantkit.cli.helping import HelpfulCommand, HelpfulGroup
from quantkit.cli.process import settle_process
from quantkit.cli.stopping import stop_at_once, stopping_by_signals, unstoppable
from quantkit.cli.streams import Murmur, settle_stream
from quantkit.errors import (
    InputError,
    Interrupted,
    OutputError,
    QuantkitError,
    ResourceError,
    is_out_of_memory,
    machine_trouble,
    nearest,
    printable,
)
from quantkit.masking import hide_tokens
from quantkit.ranks import read_ranks

PROGRAM = "quantkit"

app = typer.Typer(
    name=PROGRAM,
    cls=HelpfulGroup,
    help="Quantize a language model and prove that it is still the same model.",
    epilog="Example: quantkit quantize MODEL --recipe awq4 --output artifacts/model-awq4",
    # `quantkit completion` prints scripts instead: see quantkit/cli/completion.py.
    add_completion=False,
)
for command, example in (
    (quantize.quantize, quantize.EXAMPLE),
    (plan.plan, plan.EXAMPLE),
    (calibrate.calibrate, calibrate.EXAMPLE),
    (gate.gate, gate.EXAMPLE),
    (compare.compare, compare.EXAMPLE),
    (sweep.sweep, sweep.EXAMPLE),
    (bisect.bisect, bisect.EXAMPLE),
    (convert.convert, convert.EXAMPLE),
    (inspect.inspect, inspect.EXAMPLE),
    (verify.verify, verify.EXAMPLE),
    (publish.publish, publish.EXAMPLE),
    (serve.serve, serve.EXAMPLE),
    (gateway.gateway, gateway.EXAMPLE),
    (estimate.estimate, estimate.EXAMPLE),
    (track.track, track.EXAMPLE),
    (baselines.baselines, baselines.EXAMPLE),
    (init.init, init.EXAMPLE),
    (doctor.doctor, doctor.EXAMPLE),
    (completion.completion, completion.EXAMPLE),
):
    app.command(command.__name__, cls=HelpfulCommand, epilog=example)(command)
app.add_typer(recipes.app)
app.add_typer(runtimes.app)
app.command(completion.WORDS_COMMAND, hidden=True)(completion.complete)


def _print_version(wanted: bool) -> None:
    if wanted:
        version = quantkit.__version__
        raise Answered(Reply({"version": version}, [f"{PROGRAM} {version}"]))


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
    # What follows is Python's own end: there is nothing to interrupt, and nothing to say about it.
    stop_at_once()
    # Else the garbage collector walks through all of torch once more, which takes up to a second.
    gc.freeze()
    sys.exit(exit_code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; see docs/errors.md for what each one means."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    for stream in (sys.stdout, sys.stderr):
        settle_stream(stream)
    try:
        with stopping_by_signals():
            return _answer(arguments, sys.stdout)
    except KeyboardInterrupt:  # one more, while the first was being told
        return Interrupted.exit_code


def _answer(arguments: list[str], stdout: TextIO) -> int:
    """Run one command and write what it has to say."""
    # What is behind `--` is no option: it may be what somebody has typed so far, to complete.
    as_json = "--json" in itertools.takewhile(lambda each: each != "--", arguments)
    try:
        with _libraries_apart(as_json):
            reply = _run(arguments)
            text = render_reply(reply, as_json=as_json, stdout=stdout) if reply else ""
        with _writing_the_reply():
            write(text, stdout)
    except (KeyboardInterrupt, Exception) as error:
        with unstoppable():
            known = _explain(error, arguments)
            if known is None:
                with contextlib.suppress(OSError):
                    write(printable(hide_tokens(traceback.format_exc())), sys.stderr)
                known = QuantkitError(
                    f"{type(error).__name__}: {error} (this is a defect of quantkit)"
                )
            print_error(str(known), known.exit_code, as_json=as_json, stdout=stdout)
        return known.exit_code
    return reply.exit_code if reply else 0


@contextlib.contextmanager
def _writing_the_reply() -> Iterator[None]:
    """Say what could not be written: all else that a command does is finished by then.

    Raises:
        ResourceError, OutputError: stdout leads to where nothing can be written.
    """
    try:
        yield
    except OSError as error:
        what = "the work is done, but what is to be said about it cannot be written to stdout"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(f"no space left for stdout: {what}: free some space") from error
        raise OutputError(f"{what}: {error.strerror or error}") from error


def _run(arguments: list[str]) -> Reply | None:
    """Parse and run; what the parser answers by itself, as to `--help`, is a reply too.

    None comes from a command that has said all by itself, as a server that was told to end.
    """
    command = get_command(app)
    # Not `command.main`: it would swallow KeyboardInterrupt and broken pipes of ours.
    try:
        with command.make_context(PROGRAM, list(arguments)) as context:
            reply: Reply | None = command.invoke(context)
            return reply
    except Answered as answered:
        return answered.reply


def _explain(error: BaseException, arguments: Sequence[str]) -> QuantkitError | None:
    """Return the error to show for `error`, or None for a defect of ours."""
    if isinstance(error, KeyboardInterrupt | Interrupted):
        return Interrupted(_interrupted(error, arguments))
    trouble = machine_trouble(error)
    if trouble is not None:
        return trouble
    if isinstance(error, QuantkitError):
        return error
    if isinstance(error, TyperException):
        return InputError(_usage(error))
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return InputError(f"{str(error.filename)[:60]!r}... is longer than names of files are")
    if is_out_of_memory(error):
        return ResourceError(
            "out of memory: lower calibration.samples or calibration.sequence_length, "
            "or use a machine with more memory; `quantkit plan` shows what a job needs"
        )
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
        return f"interrupted; nothing is half-written, and the same command begins again: {again}"
    return f"interrupted; what is finished is kept, and the same command goes on: {again}"


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
def _libraries_apart(as_json: bool) -> Iterator[None]:
    """Clean what libraries print; with `--json`, stdout is for the document alone."""
    out, err = sys.stdout, sys.stderr
    with (
        contextlib.redirect_stderr(Murmur(err)),
        contextlib.redirect_stdout(Murmur(err if as_json else out)),
    ):
        yield
