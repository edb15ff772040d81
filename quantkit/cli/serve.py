"""`quantkit serve`: the command that serves an artifact, or a server that runs it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

import quantkit
from quantkit.cli.console import Reply, render_reply, write
from quantkit.cli.layout import Line, Sentence, make_table
from quantkit.cli.options import JsonOption, QuietOption, given
from quantkit.errors import InputError, printable
from quantkit.report.rounding import format_bytes, format_count, format_significant

if TYPE_CHECKING:
    from quantkit.serving.records import MemoryPlan, ServeCommand
    from quantkit.serving.starting import ChatAnswer

SERVERS = ("vllm", "tgi", "tensorrt-llm", "ollama", "onnxruntime", "llama.cpp")
"""What `--with` takes, named here because `quantkit.serving` loads torch."""

EXAMPLE = "Example: quantkit serve artifacts/model-awq4 --with vllm --gpu H100 --context 32768"


def serve(
    artifact: Annotated[
        str,
        typer.Argument(
            metavar="ARTIFACT",
            help="Output of quantize, folder of a quantized model, GGUF file, or a Hub id.",
        ),
    ],
    runtime: Annotated[
        str,
        typer.Option(
            "--with",
            metavar="RUNTIME",
            help=f"{', '.join(SERVERS[:-1])} or {SERVERS[-1]}.",
        ),
    ],
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            metavar="N",
            help="Tokens of a sequence, prompt and answer together; by default up to 8192.",
        ),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency", metavar="N", help="Sequences at a time; by default 8, onnxruntime 1."
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu", metavar="NAME", help="auto (what is here), cpu, or for instance H100."
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", metavar="N", help="GPUs that there are; the fewest are used."),
    ] = None,
    memory: Annotated[
        int | None,
        typer.Option(
            "--memory", metavar="BYTES", help="Of each GPU, or of the processor's memory."
        ),
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            "--kv-cache",
            metavar="auto|16bit|8bit",
            help="Precision of keys and values; auto: what the artifact has scales for.",
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option("--host", metavar="ADDRESS", help="By default 127.0.0.1.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option("--port", metavar="PORT", help="By default the runtime's own."),
    ] = None,
    model_name: Annotated[
        str | None,
        typer.Option("--model-name", metavar="NAME", help="Of the model, in requests."),
    ] = None,
    start: Annotated[
        bool,
        typer.Option("--start", help="Run it, check one chat completion, stay until Ctrl-C."),
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="With --start: end it after the check.")
    ] = False,
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout", metavar="SECONDS", help="With --start: until it answers; by default 900."
        ),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> Reply | None:
    """Print the exact command that serves an artifact on this machine, or on one that is named.

    With the memory that weights and key/value cache take, and the context that fits. `--start` runs
    it where it is installed, has it answer one chat completion, and stays in the foreground.
    """
    if not start and (check or timeout is not None):
        raise InputError("--check and --timeout are of a server that runs: add --start")
    command = quantkit.serve_command(
        artifact,
        runtime,
        **given(
            context=context,
            concurrency=concurrency,
            gpu=gpu,
            gpus=gpus,
            memory=memory,
            kv_cache=kv_cache,
            host=host,
            port=port,
            model_name=model_name,
        ),
    )
    if not start:
        return Reply(command.document(), _lines(command))
    return _run(command, check=check, timeout=timeout, as_json=json, quiet=quiet)


def _run(
    command: ServeCommand, *, check: bool, timeout: float | None, as_json: bool, quiet: bool
) -> Reply | None:
    """Start the server and check it; None once it was told to end."""
    from quantkit.serving.starting import running_server

    tell = None if quiet else _tell
    with running_server(command, tell=tell, **given(timeout=timeout)) as server:
        answer = server.ask()
        reply = Reply(
            {**command.document(), "answer": _answer_document(answer)},
            [*_lines(command), *_answer_lines(command, answer, stays=not check)],
        )
        if check:
            return reply
        # With --json, sys.stdout is kept from libraries.
        stdout = sys.__stdout__ if as_json and sys.__stdout__ is not None else sys.stdout
        try:
            write(render_reply(reply, as_json=as_json, stdout=stdout), stdout)
            server.wait()
        except KeyboardInterrupt:
            write("stopping the server\n", sys.stderr)
    return None


def _tell(line: str) -> None:
    write(f"{line}\n", sys.stderr)


def _lines(command: ServeCommand) -> list[Line]:
    rows = (
        ("artifact", f"{command.artifact} ({command.format}, {command.scheme})"),
        ("runtime", f"{command.runtime} on {_machine(command)}"),
        *_memory_rows(command.memory),
        ("address", command.url),
        ("model name", command.model_name),
    )
    notes, shell = list(command.notes), command.shell()
    if printable(shell, keep="\n\t") != shell:
        notes.append(
            "characters that a terminal does not show are escaped below, so that it is not the "
            "very text: --json has it"
        )
    lines: list[Line] = [make_table(rows), *(Sentence("note: ", note) for note in notes)]
    return [*lines, "", shell, *_container_lines(command)]


def _machine(command: ServeCommand) -> str:
    machine, used = command.machine, command.memory.gpus
    if not machine.gpus:
        return "this machine's processor"
    return f"{used} x {machine.name}"


def _container_lines(command: ServeCommand) -> list[str]:
    if command.container is None:
        return []
    from quantkit.serving.records import break_lines

    return ["", "# or in its container:", break_lines(command.container)]


def _memory_rows(memory: MemoryPlan) -> list[tuple[str, str]]:
    each = f" on each of {memory.gpus} GPUs" if memory.gpus > 1 else ""
    width = format_significant(8 * memory.bytes_per_value, 2 if memory.bytes_per_value > 1 else 1)
    sequences = format_count(memory.concurrency, "sequence")
    held = (
        f"{format_bytes(memory.kv_cache)}: {sequences} of {memory.context:,} tokens, {width} bits"
    )
    return [
        ("weights", f"{format_bytes(memory.weights)}{each}"),
        ("kv cache", held + each),
        ("besides", f"{format_bytes(memory.overhead)}{each} (a guess)"),
        ("in all", f"{format_bytes(memory.total)} of {format_bytes(memory.available)}{each}"),
    ]


def _answer_document(answer: ChatAnswer) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(answer)


def _answer_lines(command: ServeCommand, answer: ChatAnswer, *, stays: bool) -> list[str]:
    lines = ["", f"answer   {answer.content!r} ({answer.finish_reason})"]
    if stays:
        lines.append(f"serving  {command.url} until Ctrl-C")
    return lines
