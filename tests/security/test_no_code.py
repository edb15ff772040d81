"""Nothing of a checkpoint is executed, by any command or worker (docs/security.md)."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.main import get_command

from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.skeleton import build_skeleton
from quantkit.cli.main import app
from quantkit.errors import RecipeError
from quantkit.recipe import Recipe
from quantkit.recipe import validate as validate_recipe
from quantkit.records import Source
from tests.cli.running import environment, run, run_here
from tests.helpers import make_pico_model, pico_text

FULL = os.environ.get("QUANTKIT_TRUST") == "full"

MODULES = (
    *("modeling_own", "configuration_own", "tokenization_own", "generation_own"),
    # What a process imports that takes modules from the folder it works in.
    *("torch", "yaml", "transformers", "numpy", "quantkit", "sitecustomize", "usercustomize"),
)
AUTO_MAP = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModel": "modeling_own.OwnModel",
    "AutoModelForCausalLM": "modeling_own.OwnModel",
    "AutoTokenizer": ["tokenization_own.OwnTokenizer", "tokenization_own.OwnTokenizer"],
}
RECIPE = """\
version: 1
model: .
output: ../out
calibration: {data: ../calibration.txt, samples: 8, sequence_length: 32}
quantize: {scheme: w8a16, group_size: 32, method: gptq}
gate: {data: ../evaluation.txt, samples: 8, sequence_length: 32, probes: {max_new_tokens: 8}}
"""


class _Flag:
    """A pickle that would write a file."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return _write, (str(self.flag), "pickle")


def _write(path: str, text: str) -> None:
    Path(path).write_text(text)


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A model folder full of code, each piece of which would leave a file `flag`."""
    model, flag = make_pico_model(tmp_path / "model"), tmp_path / "flag"
    for name in MODULES:
        code = f"open({str(flag)!r}, 'a').write({name!r})\nraise SystemExit(99)\n"
        (model / f"{name}.py").write_text(code)
    for place in ("custom_generate", "onnx"):
        (model / place).mkdir()
        shutil.copy(model / "generation_own.py", model / place / "generate.py")
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pkl"):
        (model / name).write_bytes(pickle.dumps(_Flag(flag)))
    for name, _class_key in (("config.json", "architectures"), ("tokenizer_config.json", "")):
        document = json.loads((model / name).read_text()) | {"auto_map": AUTO_MAP}
        (model / name).write_text(json.dumps(document))
    (tmp_path / "calibration.txt").write_text(pico_text(900, 1))
    (tmp_path / "evaluation.txt").write_text(pico_text(900, 2))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return model


def make_unknown(model: Path) -> None:
    """Let only the model's own code know what it is."""
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnModel"]}
    (model / "config.json").write_text(json.dumps(config))


def check_nothing_ran(model: Path) -> None:
    """Fail where a piece of code has left its file."""
    flag = model.parent / "flag"
    assert not flag.exists(), flag.read_text()
    assert not list(model.rglob("__pycache__"))


LIGHT = (
    ("inspect", "."),
    ("verify", "."),
    ("estimate", "."),
    ("plan", "--recipe", "../recipe.yaml"),
    ("convert", ".", "--to", "gguf:Q8_0", "--output", "../converted"),
    ("serve", ".", "--with", "vllm", "--gpu", "H100"),
    ("publish", ".", "--repo", "a/b", "--dry-run"),
)
"""Commands that take no more than a moment, run in the stranger's folder."""
HEAVY = (
    ("quantize", "--recipe", "../recipe.yaml"),
    ("calibrate", "--recipe", "../recipe.yaml", "--output", "../statistics"),
    ("gate", "../out", "--baseline", ".", "--data", "../evaluation.txt"),
    ("compare", ".", "../out", "--data", "../evaluation.txt", "--output", "../compared"),
    ("sweep", "../recipe.yaml", "--output-root", "../sweep"),
    ("bisect", "../out", "--baseline", "."),
    ("doctor",),
)
"""Those that load the model, in workers of their own too. CI runs the first."""
LEFT = ("out", "statistics", "out.gate", "compared", "sweep")
"""What the first of them leave behind, each its own."""


@pytest.mark.parametrize("unknown", [False, True])
def test_no_command_runs_code_of_a_checkpoint(unknown: bool, planted: Path) -> None:
    """Whether transformers knows the model or not; what it does not know is refused."""
    if unknown:
        make_unknown(planted)
    for words in LIGHT:
        done = run_here(*words, folder=planted)
        assert done.returncode in (0, 2), (words, done.stderr)
        assert "Traceback" not in done.stderr
        check_nothing_ran(planted)
    refused = run_here("plan", "--recipe", "../recipe.yaml", folder=planted)
    assert refused.returncode == (2 if unknown else 0), refused.stderr
    if unknown:
        assert "brings its own code (auto_map), which quantkit does not run" in refused.stderr


@pytest.mark.fuzz
def test_no_job_and_no_worker_runs_code_of_a_checkpoint(planted: Path) -> None:
    """In processes of their own, which work in the stranger's folder."""
    wanted = HEAVY if FULL else HEAVY[:1]
    for words in wanted:
        # As the program `quantkit` does, which takes no modules from the working folder.
        done = run_safely(*words, folder=planted)
        assert done.returncode in (0, 3, 4), (words, done.stderr)
        assert "Traceback" not in done.stderr, (words, done.stderr)
        check_nothing_ran(planted)
    for place in LEFT[: len(wanted)]:
        assert (planted.parent / place).is_dir(), place
    names = {path.name for path in (planted.parent / "out").rglob("*")}
    assert not {name for name in names if name.endswith((".py", ".pkl", ".pt", ".bin"))}
    for config in (planted.parent / "out").rglob("*config.json"):
        if config.name == "config.json":
            assert "auto_map" not in json.loads(config.read_text())


@pytest.mark.fuzz
def test_python_m_quantkit_imports_nothing_from_the_working_folder(planted: Path) -> None:
    """But for a quantkit.py, which Python itself takes for the program that is meant."""
    (planted / "quantkit.py").unlink()
    done = run("inspect", ".", folder=planted)
    assert done.returncode == 0, done.stderr
    check_nothing_ran(planted)


def run_safely(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `quantkit` in a process of its own that works in `folder`."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "quantkit", *words],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment(),
        timeout=600,
        check=False,
    )


def test_a_pickle_with_code_is_refused(planted: Path) -> None:
    """It is the only file of weights here."""
    flag = planted.parent / "flag"
    (planted / "model.safetensors").unlink()
    torch.save({"w": _Flag(flag)}, planted / "pytorch_model.bin")
    for words in (("inspect", "."), ("plan", "--recipe", "../recipe.yaml")):
        done = run_here(*words, folder=planted)
        assert done.returncode == 2, (words, done.stderr)
        assert "ask its author for safetensors" in done.stderr
        check_nothing_ran(planted)


def test_nothing_switches_foreign_code_on(planted: Path) -> None:
    """There is no option for it, no key of a recipe, and none of a config."""
    command = get_command(app)
    assert isinstance(command, typer.core.TyperGroup)
    options = {
        option
        for each in command.commands.values()
        for parameter in each.params
        for option in parameter.opts
    }
    assert "--recipe" in options
    assert not [option for option in options if "remote" in option or "code" in option]
    for place in ({"trust_remote_code": True}, {"gate": {"data": "x", "trust_remote_code": True}}):
        with pytest.raises(RecipeError, match="trust_remote_code"):
            validate_recipe({"version": 1, **place})
    assert "trust_remote_code" not in json.dumps(Recipe.model_json_schema())
    config = json.loads((planted / "config.json").read_text())
    config |= {"trust_remote_code": True, "attn_implementation": "someone/kernel"}
    (planted / "config.json").write_text(json.dumps(config))
    build_skeleton(open_checkpoint(Source("model", planted, None)))
    check_nothing_ran(planted)
