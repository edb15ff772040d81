"""What ONNX needs is asked for as far as it is needed; ONNX Runtime's errors are all known."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from quantkit.errors import MissingPackageError
from quantkit.formats.onnx import graph_runner, packages, trial
from quantkit.formats.onnx.container import open_graph
from quantkit.formats.onnx.packages import (
    DECODERS,
    ENCODERS,
    READING,
    require_onnx,
    runtime_errors,
)
from tests.formats.onnx.graphs import make_model, save


def test_each_task_asks_for_its_own_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph is read where nothing can write one."""
    path = save(make_model(), tmp_path / "graph.onnx")
    monkeypatch.setattr(packages, "find_spec", lambda name: name if name in READING else None)

    assert open_graph(path).path == path
    for names, absent in ((ENCODERS, "onnx-ir"), (DECODERS[-1:], "onnxruntime-genai")):
        with pytest.raises(MissingPackageError, match=f'{absent}.*pip install "quantkit'):
            require_onnx(names)


def test_what_the_runtime_raises_is_among_its_errors(tmp_path: Path) -> None:
    """They have no class in common."""
    (tmp_path / "torn.onnx").write_bytes(b"\x08")
    for name in ("absent.onnx", "torn.onnx"):
        with pytest.raises(runtime_errors()):
            onnxruntime.InferenceSession(tmp_path / name)
    assert len(runtime_errors()) >= 15


@pytest.mark.parametrize("script", [graph_runner, trial])
def test_scripts_tell_the_makers_of_the_runtime_nothing(script: object, tmp_path: Path) -> None:
    """Whatever the environment asks for."""
    graph = save(make_model(), tmp_path / "graph.onnx")
    home = tmp_path / "home"
    home.mkdir()
    asked = {"path": str(graph), "provider": "CPUExecutionProvider", "bytes": 9, "genai": None}
    arguments = [json.dumps(asked)]
    if script is graph_runner:
        inputs, outputs = tmp_path / "in.npz", tmp_path / "out.npz"
        arrays: dict[str, Any] = {"0.input_ids": np.zeros((1, 4), np.int64)}
        np.savez(inputs, **arrays)
        arguments = [str(graph), str(inputs), str(outputs), "1", "out"]

    subprocess.run(
        [sys.executable, str(script.__file__), *arguments],  # type: ignore[attr-defined]
        env=os.environ
        | {"HOME": str(home), "XDG_CACHE_HOME": str(home), "ORT_DISABLE_TELEMETRY": "0"},
        capture_output=True,
        timeout=60,
        check=True,
    )

    assert list(home.iterdir()) == []
