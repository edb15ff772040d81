"""The commands that are printed: for every runtime, as their documentation has the options."""

from __future__ import annotations

import json
import re
import shlex
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import quantkit
from quantkit.serving.records import ServeCommand
from tests.serving import documented


def options_of(command: tuple[str, ...]) -> dict[str, str]:
    """Option -> the word behind it."""
    pairs = zip(command, (*command[1:], ""), strict=True)
    return {word: after for word, after in pairs if word.startswith("-")}


def run_in_shell(serve: ServeCommand, program: str, folder: Path) -> dict[str, object]:
    """Let bash run the printed lines with a program that says what it was given."""
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    said = folder / "said.json"
    names = sorted(serve.environment)
    answer = folder / "answer.py"
    answer.write_text(
        f"import json, os, sys\n"
        f"json.dump({{'argv': sys.argv[1:], 'env': {{n: os.environ.get(n) for n in {names!r}}}}},"
        f" open({str(said)!r}, 'w'))\n"
    )
    script = bin_folder / program
    # No `#!` of Python's own: its folder may have a blank in its name.
    script.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, str(answer)])} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    subprocess.run(
        ["bash", "-c", serve.shell()],
        env={"PATH": f"{bin_folder}:/usr/bin:/bin"},
        check=True,
        cwd=folder,
    )
    found = json.loads(said.read_text())
    assert isinstance(found, dict)
    return found


def test_vllm_gets_what_fits_on_the_gpu(output: Path) -> None:
    """Of an output with several formats, its own is taken."""
    serve = quantkit.serve_command(
        output, "vllm", gpu="H100", gpus=1, context=512, concurrency=4, model_name="pico/w4"
    )
    assert serve.command == (
        *("vllm", "serve", str(output / "compressed-tensors")),
        *("--served-model-name", "pico/w4", "--host", "127.0.0.1", "--port", "8000"),
        *("--max-model-len", "512", "--max-num-seqs", "4"),
        *("--tensor-parallel-size", "1", "--gpu-memory-utilization", "0.9"),
    )
    assert serve.environment == {"VLLM_NO_USAGE_STATS": "1"}
    assert serve.url == "http://127.0.0.1:8000/v1"
    # 3 layers of 2 x 2 heads of 16, in 16 bits.
    assert serve.memory.kv_cache == 3 * 2 * 2 * 16 * 512 * 4 * 2
    assert serve.memory.weights < 400_000


def test_vllm_on_a_processor_gets_its_cache_in_whole_gibibytes(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And without a compiler no graphs that would be compiled."""
    serve = quantkit.serve_command(output, "vllm", gpu="cpu", memory=8 << 30)
    assert serve.environment["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert "--gpu-memory-utilization" not in serve.command
    assert serve.container is None
    monkeypatch.setenv("PATH", "")
    serve = quantkit.serve_command(output, "vllm", gpu="cpu", memory=8 << 30)
    assert "--enforce-eager" in serve.command
    assert serve.environment["TORCHDYNAMO_DISABLE"] == "1"
    assert any("no C++ compiler" in note for note in serve.notes)


def test_the_cache_is_as_wide_as_the_artifact_says(with_fp8_cache: Path, output: Path) -> None:
    """FP8 where it has scales for it; otherwise where somebody asks for it, with a warning."""
    own = quantkit.serve_command(with_fp8_cache, "vllm", gpu="L4")
    wide = quantkit.serve_command(with_fp8_cache, "vllm", gpu="L4", kv_cache="16bit")
    narrow = quantkit.serve_command(output, "vllm", gpu="L4", kv_cache="8bit")
    assert options_of(own.command)["--kv-cache-dtype"] == "fp8"
    assert options_of(wide.command)["--kv-cache-dtype"] == "bfloat16"
    assert own.memory.kv_cache * 2 == wide.memory.kv_cache
    assert options_of(narrow.command)["--kv-cache-dtype"] == "fp8"
    assert any("no scales for an FP8" in note for note in narrow.notes)
    assert not any("no scales" in note for note in own.notes)


def test_tgi_gets_options_that_its_launcher_documents(with_fp8_cache: Path) -> None:
    """In its container too; and that it is no longer developed is said."""
    serve = quantkit.serve_command(with_fp8_cache, "tgi", gpu="L4", context=512, concurrency=3)
    options = options_of(serve.command)
    assert serve.command[0] == "text-generation-launcher"
    assert options.keys() <= documented.TGI
    assert options["--max-total-tokens"] == "512"
    assert options["--max-input-tokens"] == "511"
    assert options["--max-batch-total-tokens"] == "1536"
    for name, values in documented.TGI_VALUES.items():
        assert options[name] in values
    assert serve.container is not None
    image = next(i for i, word in enumerate(serve.container) if "text-generation-inf" in word)
    assert options_of(serve.container[image:]).keys() <= documented.TGI
    assert any("maintenance mode" in note for note in serve.notes)


def test_tensorrt_llm_gets_options_that_its_command_has(plain: Path) -> None:
    """What has no option stands in a file of YAML."""
    serve = quantkit.serve_command(plain, "tensorrt-llm", gpu="H100", gpus=1, kv_cache="8bit")
    options = options_of(serve.command)
    assert serve.command[:2] == ("trtllm-serve", str(plain))
    assert options.keys() <= documented.TENSORRT_LLM
    assert serve.model_name == "model"
    (name,) = serve.files
    assert options["--extra_llm_api_options"] == name
    assert yaml.safe_load(serve.files[name]) == {"kv_cache_config": {"dtype": "fp8"}}


def test_llama_cpp_gets_the_context_of_all_slots_together(output: Path) -> None:
    """And each slot its part."""
    serve = quantkit.serve_command(
        output, "llama.cpp", gpu="cpu", context=128, concurrency=3, kv_cache="8bit"
    )
    options = options_of(serve.command)
    assert options.keys() <= documented.LLAMA_CPP
    assert (options["-c"], options["-np"], options["-ngl"]) == ("384", "3", "0")
    assert options["-ctk"] == options["-ctv"] == "q8_0"
    assert options["-ctk"] in documented.LLAMA_CPP_CACHES
    assert Path(options["-m"]).parent == output / "gguf"
    # Pages of 16 tokens, 34 bytes for 32 numbers.
    assert serve.memory.kv_cache == 3 * 3 * 128 * (2 * 2 * 16) * 34 // 32
    on_gpu = quantkit.serve_command(output, "llama.cpp", gpu="T4", context=128)
    assert options_of(on_gpu.command)["-ngl"] == "4"


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """The instructions of a Modelfile; a value in three quotes goes over lines."""
    rule = re.compile(r'^(\w+)\s+("""(?s:.*?)"""\s*$|.*$)', re.MULTILINE)
    rest = rule.sub("", re.sub(r"^#.*$", "", text, flags=re.MULTILINE))
    assert not rest.strip(), f"no instructions: {rest!r}"
    return [(name.lower(), value) for name, value in rule.findall(text)]


@pytest.mark.parametrize("with_modelfile", [True, False])
def test_ollama_gets_a_modelfile_of_its_grammar(
    output: Path, tmp_path: Path, with_modelfile: bool
) -> None:
    """With the context that was asked for, and the file by its absolute path."""
    (file,) = (output / "gguf").glob("*.gguf")
    place = file
    if not with_modelfile:
        place = tmp_path / "Some Model (v1).gguf"
        place.write_bytes(file.read_bytes())
    serve = quantkit.serve_command(
        place, "ollama", gpu="cpu", context=128, concurrency=2, kv_cache="8bit", port=11500
    )
    (text,) = serve.files.values()
    instructions = read_modelfile(text)
    assert {name for name, _ in instructions} <= documented.MODELFILE
    parameters = [value.split()[0] for name, value in instructions if name == "parameter"]
    assert set(parameters) <= documented.MODELFILE_PARAMETERS
    assert [value for name, value in instructions if name == "from"] == [f'"{place.absolute()}"']
    assert text.count("num_ctx") == 1
    assert "PARAMETER num_ctx 128" in text
    assert serve.environment.keys() <= documented.OLLAMA_VARIABLES
    assert serve.environment["OLLAMA_KV_CACHE_TYPE"] in documented.OLLAMA_CACHES
    assert serve.environment["OLLAMA_HOST"] == "127.0.0.1:11500"
    (create,) = serve.setup
    assert create[2:] == ("ollama", "create", serve.model_name, "-f", "Modelfile.serve")
    assert re.fullmatch(r"[a-z0-9_.-]+", serve.model_name)
    lines = serve.shell().splitlines()
    assert lines[-3].endswith("ollama serve &")
    assert lines[-2].startswith("until curl -sf http://127.0.0.1:11500/ ")
    assert tuple(shlex.split(lines[-1])) == create


def test_ollama_takes_the_modelfile_that_fits(output: Path) -> None:
    """quantize has written one beside the file."""
    serve = quantkit.serve_command(output, "ollama", gpu="cpu", context=512)
    assert not serve.files
    assert serve.setup[0][-1] == str(output / "gguf" / "Modelfile")


def test_onnx_runtime_gets_the_server_of_quantkit(output: Path) -> None:
    """Whose cache is as wide as the graph's numbers."""
    serve = quantkit.serve_command(output, "onnxruntime", context=64)
    assert Path(serve.command[1]).is_file()
    assert serve.command[2] == str(output / "onnx")
    assert serve.environment == {"ORT_DISABLE_TELEMETRY": "1"}
    assert serve.memory.concurrency == 1
    assert serve.memory.kv_cache == 3 * 64 * (2 * 2 * 16) * 4


def test_a_shell_gives_the_program_the_very_words(odd_place: Path, tmp_path: Path) -> None:
    """Whatever is in a path."""
    serve = quantkit.serve_command(odd_place, "vllm", gpu="H100", context=64)
    said = run_in_shell(serve, "vllm", tmp_path)
    assert said == {"argv": list(serve.command[1:]), "env": dict(serve.environment)}
    assert serve.container is not None
    assert tuple(shlex.split(shlex.join(serve.container))) == serve.container


def test_a_file_is_written_by_the_printed_lines(plain: Path, tmp_path: Path) -> None:
    """Before the server that reads it starts."""
    serve = quantkit.serve_command(plain, "tensorrt-llm", gpu="H100", kv_cache="8bit")
    run_in_shell(serve, "trtllm-serve", tmp_path)
    assert (tmp_path / "trtllm.yaml").read_text() == serve.files["trtllm.yaml"]


def test_a_strangers_file_does_not_end_in_the_shell(plain: Path, tmp_path: Path) -> None:
    """A Modelfile may come along with a download, and is printed to be pasted."""
    serve = quantkit.serve_command(plain, "tensorrt-llm", gpu="H100", kv_cache="8bit")
    evil = "a: 1\nQUANTKIT\ntouch pwned\n"
    run_in_shell(replace(serve, files={"trtllm.yaml": evil}), "trtllm-serve", tmp_path)
    assert (tmp_path / "trtllm.yaml").read_text() == evil
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("host", "published"),
    [("0.0.0.0", "0.0.0.0:8100:"), ("localhost", "127.0.0.1:8100:"), ("::1", "[::1]:8100:")],
)
def test_docker_is_given_an_address(plain: Path, output: Path, host: str, published: str) -> None:
    """It takes no names, and brackets around those with colons."""
    for artifact, runtime in ((plain, "vllm"), (plain, "tgi"), (output, "ollama")):
        serve = quantkit.serve_command(artifact, runtime, gpu="H100", host=host, port=8100)
        assert serve.container is not None
        assert serve.container[serve.container.index("-p") + 1].startswith(published)
    assert serve.environment["OLLAMA_HOST"] == f"{'[::1]' if host == '::1' else host}:8100"


def test_the_gpus_of_this_machine_are_taken_by_themselves(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As nvidia-smi lists them; of two kinds the first one's alone."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        "echo 'NVIDIA L4, 23034, 8.9'\necho 'NVIDIA L4, 23000, 8.9'\necho 'Tesla T4, 15360, 7.5'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    serve = quantkit.serve_command(output, "vllm")
    assert (serve.machine.name, serve.machine.gpus) == ("NVIDIA L4", 2)
    assert serve.machine.memory_bytes == 23000 << 20
    assert any("of the 3 GPUs of this machine" in note for note in serve.notes)
    with pytest.raises(quantkit.InputError, match="this machine has 2 x NVIDIA L4"):
        quantkit.serve_command(output, "vllm", gpus=3)
    assert quantkit.serve_command(output, "vllm", gpu="cpu").machine.gpus == 0
