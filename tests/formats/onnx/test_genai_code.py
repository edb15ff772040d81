"""A genai_config.json that names compiled code is refused: by `inspect`, and in the gate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import ArtifactError
from quantkit.formats.onnx import genai
from quantkit.formats.onnx.genai import read_genai_config
from quantkit.judging.runtimes import onnxruntime_graph
from quantkit.judging.runtimes.onnxruntime_graph import read_config

REFUSED: tuple[dict[str, Any], ...] = (
    {"session_options": {"custom_ops_library": "x.so"}},
    {"session_options": {"provider_options": [{"QNN": {"backend_path": "QnnHtp.dll"}}]}},
    {"session_options": {"provider_options": [{"x": {"Backend_Path": "libx.SO.1"}}]}},
    {"plugin_paths": ["a.bin"]},
    {"run_options": {"ep_plugin": {"a": 1}}},
    {"weight_files": ["a.bin", "libx.dylib"]},
)
UNWANTED: tuple[dict[str, Any], ...] = (
    {"session_options": {"enable_profiling": "elsewhere/written"}},
    {"session_options": {"enable_profiling": ""}},
    {"session_options": {"ep.context_enable": "1"}},
    {"session_options": {"session.model_external_initializers_file_folder_path": "here"}},
    {"session_options": {"provider_options": [{"cuda": {"gpu_external_alloc": "4096"}}]}},
    {"session_options": {"provider_options": [{"OpenVINO": {"cache_dir": "here"}}]}},
    {"pipeline": [{"first": {"run_options": {"qnn.lora_config": "x"}}}]},
)
TAKEN: tuple[dict[str, Any], ...] = (
    {"session_options": {"custom_ops_library": ""}},
    {"session_options": {"log_id": "x.so"}},
    {"session_options": {"intra_op_num_threads": 2, "provider_options": [{"dml": {}}]}},
    {"session_options": {"provider_options": [{"cuda": {"enable_cuda_graph": "0"}}]}},
    {"session_options": {"provider_options": [{"webgpu": {"forceCpuNodeNames": "/a/b"}}]}},
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


@pytest.mark.parametrize("decoder", UNWANTED)
def test_an_option_that_no_file_may_choose_is_refused_by_both(
    tmp_path: Path, decoder: dict[str, Any]
) -> None:
    """ONNX Runtime would write files where they say, or call what is at an address."""
    file = write(tmp_path, decoder)

    with pytest.raises(ArtifactError, match="an option of ONNX Runtime that no file may choose"):
        read_genai_config(tmp_path)
    with pytest.raises(ValueError, match="an option of ONNX Runtime that no file may choose"):
        read_config(file)


def test_both_allow_the_same_options() -> None:
    """Two lists, of which the longer one would count."""
    assert onnxruntime_graph.SETTINGS == genai.SETTINGS


@pytest.mark.parametrize(
    "key", ["optimized_model_filepath", "tokenizer_dir", "paths", "cache_directories"]
)
def test_a_file_outside_is_refused_whatever_its_key_is_called(tmp_path: Path, key: str) -> None:
    """Only the end of the key tells that it names a file."""
    write(tmp_path, {key: "/tmp/elsewhere"})

    with pytest.raises(ArtifactError, match="it is absolute"):
        read_genai_config(tmp_path)


def test_a_key_given_twice_is_refused_by_both(tmp_path: Path) -> None:
    """Python takes the last one, and onnxruntime-genai both."""
    file = write(tmp_path, {})
    twice = '"session_options": {"enable_profiling": "x"}, "session_options": {}'
    text = '{"model": {"decoder": {"filename": "model.onnx", %s}}}'
    (tmp_path / "genai_config.json").write_text(text % twice)

    with pytest.raises(ArtifactError, match="gives 'session_options' twice"):
        read_genai_config(tmp_path)
    with pytest.raises(ValueError, match="is not a JSON object, or gives a key twice"):
        read_config(file)


@pytest.mark.parametrize("decoder", TAKEN)
def test_other_files_are_refused_by_neither(tmp_path: Path, decoder: dict[str, Any]) -> None:
    """Data is not code."""
    file = write(tmp_path, decoder)

    assert read_genai_config(tmp_path) == read_config(file) != {}
