"""The lines that run an artifact do run it: in a process of their own, as a reader would."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.formats.onnx.decoder import write_float_decoder
from quantkit.report.snippets import decoder_command, decoder_lines, encoder_command, encoder_lines
from tests.encoder_models import write_encoder_checkpoint
from tests.helpers import make_pico_model
from tests.judging.lookup_graph import write_graph


def python(*arguments: str) -> str:
    """Run this interpreter offline and return what it prints."""
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_encoder_checkpoint(tmp_path_factory.mktemp("snippets") / "an encoder")
    write_graph(folder / "model.onnx", "token_embeddings")
    return folder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("snippets")
    checkpoint = open_checkpoint(resolve_source(str(make_pico_model(folder / "model"))))
    return write_float_decoder(checkpoint, folder / "a decoder")


def test_the_lines_of_an_encoder_print_numbers(encoder: Path) -> None:
    """Its last output is the one to look at."""
    assert "[[1 1" in python("-c", encoder_lines(encoder.as_posix()))


def test_the_command_of_an_encoder_is_one_line_of_a_shell(encoder: Path) -> None:
    program, *arguments = shlex.split(encoder_command(encoder.as_posix()))

    assert program == "python"
    assert "[[1 1" in python(*arguments)


def test_the_lines_of_a_decoder_continue_a_text(decoder: Path) -> None:
    assert python("-c", decoder_lines(decoder.as_posix())).startswith("Once upon a time")


def test_the_command_of_a_decoder_is_one_line_of_a_shell(decoder: Path) -> None:
    program, *arguments = shlex.split(decoder_command(decoder.as_posix()))

    assert program == "python"
    assert python(*arguments).startswith("Once upon a time")
