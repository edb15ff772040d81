"""A genai_config.json that names compiled code is refused: by `inspect`, and in the gate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import ArtifactError
from quantkit.formats.onnx.genai import read_genai_config
from quantkit.judging.runtimes.onnxruntime_graph import read_config

REFUSED: tuple[dict[str, Any], ...] = (
    {"session_options": {"custom_ops_library": "x.so"}},
    {"session_options": {"provider_options": [{"QNN": {"backend_path": "QnnHtp.dll"}}]}},
    {"session_options": {"provider_options": [{"x": {"Backend_Path": "libx.SO.1"}}]}},
    {"plugin_paths": ["a.bin"]},
    {"run_options": {"ep_plugin": {"a": 1}}},
    {"weight_files": ["a.bin", "libx.dylib"]},
)
TAKEN: tuple[dict[str, Any], ...] = (
    {"session_options": {"custom_ops_library": ""}},
    {"session_options": {"log_id": "x.so"}},
    {"weight_files": ["a.bin", "also.bin"]},
    {"backend_path": None},
    {"sofa_file": "sofa.bin"},
)


def write(folder: Path, decoder: dict[str, Any]) -> Path:
    document = {"model": {"decoder": {"filename": "model.onnx", **decoder}}}
    (folder / "genai_config.json").write_text(json.dumps(document))
    return folder / "model.onnx"


@pytest.mark.parametrize("decoder", REFUSED)
def test_code_is_refused_by_both(tmp_path: Path, decoder: dict[str, Any]) -> None:
    """The worker has a rule of its own, because it imports nothing of quantkit."""
    file = write(tmp_path, decoder)

    with pytest.raises(ArtifactError, match="names compiled code to be loaded"):
        read_genai_config(tmp_path)
    with pytest.raises(ValueError, match="names compiled code to be loaded"):
        read_config(file)


@pytest.mark.parametrize("decoder", TAKEN)
def test_other_files_are_refused_by_neither(tmp_path: Path, decoder: dict[str, Any]) -> None:
    """Data is not code."""
    file = write(tmp_path, decoder)

    assert read_genai_config(tmp_path) == read_config(file) != {}
