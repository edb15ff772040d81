"""What a runtime does not serve, and what then is advised; wrong arguments."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest

import quantkit
from quantkit.errors import ArtifactError, CheckpointError, InputError, QuantkitError
from tests.cli.running import run_here


@pytest.mark.parametrize(
    ("part", "runtime", "words"),
    [
        ("compressed-tensors", "llama.cpp", r"serve it --with vllm; .*--recipe gguf-q4"),
        ("compressed-tensors", "ollama", r"serve it --with vllm; .*--recipe gguf-q4"),
        ("compressed-tensors", "onnxruntime", r"serve it --with vllm; .*--recipe onnx-int4"),
        ("compressed-tensors", "tensorrt-llm", r"serve it --with vllm; .*format: modelopt"),
        ("gguf", "vllm", r"--with ollama or --with llama\.cpp; .*--recipe awq4"),
        ("gguf", "tgi", r"--with ollama or --with llama\.cpp"),
        ("onnx", "vllm", r"serve it --with onnxruntime"),
    ],
)
def test_a_wrong_pair_names_the_right_runtime(
    output: Path, part: str, runtime: str, words: str
) -> None:
    """And the command that makes what was asked for."""
    with pytest.raises(InputError, match=words) as refused:
        quantkit.serve_command(output / part, runtime, gpu="H100")
    assert "\n" not in str(refused.value)


def test_a_checkpoint_can_be_converted_for_llama_cpp(plain: Path) -> None:
    """Without data, so the command is a conversion."""
    with pytest.raises(InputError, match=r"quantkit convert \S+ --to gguf:Q4_K_M"):
        quantkit.serve_command(plain, "llama.cpp")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"runtime": "vlm"}, "did you mean 'vllm'"),
        ({"gpu": "H1000"}, "did you mean 'H100'"),
        ({"gpu": "H100", "gpus": 0}, "at least one"),
        ({"gpu": "cpu", "gpus": 2}, "lists no GPU"),
        ({"memory": 0}, "number of bytes"),
        ({"concurrency": 0}, "at least 1 sequence"),
        ({"port": 70000}, "from 1 to 65535"),
        ({"port": 0}, "from 1 to 65535"),
        ({"host": "a b"}, "is no address"),
        ({"kv_cache": "4bit"}, "known are auto, 16bit, 8bit"),
        ({"model_name": "a b"}, "letters, digits"),
        ({"context": 513}, "made for 512 tokens"),
        ({"runtime": "tgi", "gpu": "cpu"}, "tgi needs an NVIDIA GPU"),
    ],
)
def test_a_wrong_argument_is_one_clear_line(
    output: Path, arguments: dict[str, object], words: str
) -> None:
    """Before anything is started."""
    given: dict[str, object] = {"runtime": "vllm"} | arguments
    with pytest.raises(InputError, match=words) as refused:
        quantkit.serve_command(output, **given)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("gpu", "words"),
    [
        ("T4", "FP8 key/value cache is for compute capability 8.9"),
        ("A10G", "compute capability 8.6"),
    ],
)
def test_an_old_gpu_is_told_from_a_new_one(with_fp8_cache: Path, gpu: str, words: str) -> None:
    """An FP8 cache is not for it; weights alone are."""
    with pytest.raises(InputError, match=words):
        quantkit.serve_command(with_fp8_cache, "vllm", gpu=gpu)
    serve = quantkit.serve_command(with_fp8_cache, "vllm", gpu=gpu, kv_cache="16bit")
    assert any("inputs stay in 16 bits" in note for note in serve.notes)


def test_a_damaged_artifact_is_not_served(output: Path, tmp_path: Path) -> None:
    """What `inspect` finds is what a server would stumble over."""
    folder = tmp_path / "damaged"
    shutil.copytree(output / "compressed-tensors", folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"].append("model.layers.0.mlp.up_proj")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"config\.json ignores it"):
        quantkit.serve_command(folder, "vllm", gpu="H100")


def test_a_graph_without_a_generator_is_no_chat(output: Path, tmp_path: Path) -> None:
    """An encoder, for instance, answers no conversation."""
    shutil.copytree(output / "onnx", tmp_path / "graph")
    (tmp_path / "graph" / "genai_config.json").unlink()
    with pytest.raises(ArtifactError, match=r"has no genai_config\.json"):
        quantkit.serve_command(tmp_path / "graph", "onnxruntime")


@pytest.mark.parametrize("name", ["nosuch", "./no/such"])
def test_nothing_there_is_said(tmp_path: Path, name: str) -> None:
    """A name that could be a Hub id is asked for there, which is offline here."""
    with pytest.raises(CheckpointError, match=r"no such folder|nor in the local Hub cache"):
        quantkit.serve_command(name, "vllm", gpu="H100")


def test_a_number_of_layers_that_no_model_has_is_not_believed(tmp_path: Path) -> None:
    """A list with one entry for each would be made of a few bytes."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    sizes = {"block_count": 100_000, "embedding_length": 8, "attention.head_count": 1}
    entries = [text("general.architecture") + struct.pack("<I", 8) + text("llama")]
    entries += [text(f"llama.{key}") + struct.pack("<IQ", 10, size) for key, size in sizes.items()]
    file = tmp_path / "many.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries)) + b"".join(entries))

    with pytest.raises(ArtifactError, match="announces 100000 layers"):
        quantkit.serve_command(file, "llama.cpp")


def test_the_command_answers_in_text_and_json(output: Path) -> None:
    """The same command in both."""
    arguments = ("serve", output, "--with", "vllm", "--gpu", "H100", "--context", "256")
    shown = run_here(*arguments)
    assert shown.returncode == 0
    document = json.loads(run_here(*arguments, "--json").stdout)
    assert document["command"][:2] == ["vllm", "serve"]
    assert all(word in shown.stdout for word in document["command"])
    assert document["memory"]["context"] == 256
    assert document["memory"]["total_bytes"] == sum(
        document["memory"][f"{part}_bytes"] for part in ("weights", "kv_cache", "overhead")
    )
    assert "UNJUDGED" in " ".join(document["notes"])


def test_what_a_terminal_does_not_show_is_told(output: Path, tmp_path: Path) -> None:
    """A Modelfile with such letters is printed escaped: it is not the text that is meant."""
    (file,) = (output / "gguf").glob("*.gguf")
    shutil.copy(file, tmp_path)
    (tmp_path / "Modelfile").write_text("FROM x\nSYSTEM a\x1b[2Jb\n")
    arguments = ("serve", tmp_path, "--with", "ollama", "--gpu", "cpu")
    shown = run_here(*arguments).stdout
    assert "\x1b" not in shown
    assert "note: characters that a terminal does not show are escaped below" in shown
    files = json.loads(run_here(*arguments, "--json").stdout)["files"]
    assert "a\x1b[2Jb" in files["Modelfile.serve"]


def test_check_belongs_to_start(output: Path) -> None:
    """Else nothing would be checked."""
    done = run_here("serve", output, "--with", "vllm", "--check")
    assert done.returncode == 2
    assert "add --start" in done.stderr


def test_too_little_memory_has_its_own_exit_code(output: Path) -> None:
    """As for a job that would not fit."""
    done = run_here("serve", output, "--with", "vllm", "--gpu", "cpu", "--memory", "1000000000")
    assert done.returncode == 5
    assert "does not fit" in done.stderr


def test_errors_are_of_the_tree() -> None:
    """So that callers of the API catch one class."""
    with pytest.raises(QuantkitError):
        quantkit.serve_command("", "vllm")
