"""A model in memory becomes an artifact, and stays what it was."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import quantkit
from quantkit import live
from quantkit.errors import (
    CheckpointError,
    InputError,
    OutputError,
    QuantkitError,
    ResourceError,
)
from quantkit.recipe import Recipe
from quantkit.report.advice import suggestions
from tests.pico_jobs import make_pico_job

GPTQ = {"scheme": "w4a16", "group_size": 32, "method": "gptq"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pico model and a calibration text."""
    folder = tmp_path_factory.mktemp("live")
    make_pico_job(folder, quantize=GPTQ)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    """The pico model, in memory."""
    return AutoModelForCausalLM.from_pretrained(folder / "model")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    """Its tokenizer."""
    return AutoTokenizer.from_pretrained(folder / "model")


def make_recipe(folder: Path, output: Path) -> Recipe:
    """The ungated job, to another output."""
    recipe = make_pico_job(folder, quantize=GPTQ)
    return recipe.model_copy(update={"output": str(output), "model": None})


def weights_of(output: Path) -> str:
    """The hash of the weights that an artifact's evidence names."""
    evidence = json.loads((output / "quantkit.json").read_text())
    return str(evidence["artifacts"][0]["files"]["model.safetensors"])


def test_a_model_in_memory_gives_the_bytes_that_its_folder_gives(
    folder: Path, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """And nothing of where it was written meanwhile is told."""
    recipe = make_recipe(folder, tmp_path / "live")
    result = quantkit.quantize(recipe, model=model, tokenizer=tokenizer, gate=False)
    quantkit.quantize(recipe, model=folder / "model", output=tmp_path / "file", gate=False)
    assert weights_of(tmp_path / "live") == weights_of(tmp_path / "file")
    evidence = json.loads((tmp_path / "live" / "quantkit.json").read_text())
    assert evidence["model"]["name"] == result.report.model == "in memory: LlamaForCausalLM"
    assert evidence["recipe"]["resolved"]["model"] == "in memory: LlamaForCausalLM"
    assert not (tmp_path / "live.in-memory").exists()
    texts = [path for path in (tmp_path / "live").rglob("*") if path.suffix in (".json", ".md")]
    assert len(texts) > 5
    for path in texts:
        assert "in-memory" not in path.read_text(), path
    (advice,) = suggestions(result.report)
    assert "--baseline MODEL" in advice.setting
    card = (tmp_path / "live" / "compressed-tensors" / "README.md").read_text()
    assert "base_model" not in card


def test_the_model_is_not_changed(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Its mode, weights, gradients, hooks, config and the random numbers to come."""
    trained = copy.deepcopy(model).train()
    trained.config.dtype, trained.config.architectures = None, None
    seen: list[int] = []
    trained.register_forward_hook(lambda *_: seen.append(1))
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    config, random = copy.deepcopy(vars(trained.config)), torch.get_rng_state()
    with live.saved(trained, tokenizer, tmp_path / "out") as folder:
        assert (folder / "config.json").is_file()
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert trained.training
    assert not seen
    assert len(trained._forward_hooks) == 1
    assert vars(trained.config) == config
    assert torch.equal(torch.get_rng_state(), random)
    after = trained.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.requires_grad for parameter in trained.parameters())


def test_what_a_tokenizer_was_last_called_with_is_not_written(
    folder: Path, model: Any, tmp_path: Path
) -> None:
    """A training cuts its rows; what reads tokenizer.json by itself would cut prompts so."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer("one two three", truncation=True, max_length=2, padding="max_length")
    backend = tokenizer.backend_tokenizer
    before = (backend.truncation, backend.padding)
    with live.saved(model, tokenizer, tmp_path / "out") as written:
        found = json.loads((written / "tokenizer.json").read_text())
    assert found["truncation"] is found["padding"] is None
    assert (backend.truncation, backend.padding) == before
    assert None not in before


def test_where_a_model_in_memory_is_not_taken(folder: Path, model: Any, tmp_path: Path) -> None:
    """By one line, which says what takes it."""
    recipe = make_recipe(folder, tmp_path / "out")
    words = "of type LlamaForCausalLM: pass the name of a folder .*taken by quantize"
    with pytest.raises(InputError, match=f"model is {words}"):
        quantkit.plan(recipe, model=model)
    with pytest.raises(InputError, match=f"baseline is {words}"):
        quantkit.gate(folder / "model", baseline=model, output=tmp_path / "judged")
    with pytest.raises(InputError, match=f"baseline is {words}"):
        quantkit.compare(model, [folder / "model"], output=tmp_path / "judged")
    with pytest.raises(InputError, match="statistics is of type dict: pass the name of a folder,"):
        quantkit.quantize(recipe, statistics={})  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


class OptimizedModule(nn.Module):
    """What torch.compile returns, without the two seconds that loading its compiler takes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._orig_mod = inner


class FullyShardedDataParallel(nn.Module):
    """The name is what it is known by: each process has a part of the weights."""


def test_what_others_have_put_around_it_is_taken_off(model: Any) -> None:
    """As DataParallel and torch.compile do; DDP has the same `module`."""
    assert live.take_live(nn.DataParallel(OptimizedModule(model))).model is model
    with pytest.raises(InputError, match="each process has a part of it"):
        live.take_live(FullyShardedDataParallel())


def test_where_it_came_from_is_told_where_that_is_a_hub_id(model: Any) -> None:
    """A local path concerns nobody."""
    assert live.take_live(model).loaded_from is None
    named = copy.copy(model)
    named.name_or_path = "someone/model"
    assert live.take_live(named).loaded_from == "someone/model"


def changed(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return what makes a copy of a model and changes it."""

    def make(model: Any) -> Any:
        other = copy.deepcopy(model)
        change(other)
        return other

    return make


def put_nan(model: Any) -> None:
    """As after a loss that diverged."""
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")


def on_meta(model: Any) -> Any:
    """The same model without weights."""
    config = AutoConfig.for_model(**model.config.to_dict())
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda _: 3, InputError, "model is of type int"),
        (lambda _: nn.Linear(2, 2), InputError, r"torch\S*Linear: pass the name of a model"),
        (lambda model: setattr_copy(model, "peft_config", {}), CheckpointError, "merge_and_unload"),
        (changed(put_nan), CheckpointError, r"layers\.1\.mlp\.up_proj\.weight .* holds NaN"),
        (on_meta, CheckpointError, "embed_tokens.weight .* on the meta device or offloaded"),
        (
            changed(lambda model: setattr(model.config, "quantization_config", {"bits": 4})),
            CheckpointError,
            "quantized already",
        ),
        (
            changed(lambda model: setattr(model.config, "auto_map", {"AutoModel": "x"})),
            CheckpointError,
            "brings its own code",
        ),
        (
            changed(lambda model: setattr(model.generation_config, "temperature", 0.3)),
            CheckpointError,
            "cannot be saved: .*temperature",
        ),
    ],
)
def test_what_cannot_be_written_is_refused(
    make: Callable[[Any], Any],
    error: type[QuantkitError],
    message: str,
    folder: Path,
    model: Any,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    """With the remedy, before any work, and without a trace."""
    recipe = make_recipe(folder, tmp_path / "out")
    with pytest.raises(error, match=message):
        quantkit.quantize(recipe, model=make(model), tokenizer=tokenizer, gate=False)
    assert not list(tmp_path.iterdir())


def setattr_copy(model: Any, name: str, value: object) -> Any:
    """A shallow copy with an attribute more."""
    other = copy.copy(model)
    setattr(other, name, value)
    return other


def test_a_tokenizer_is_asked_for_where_text_is_read(
    folder: Path, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """Token ids need none."""
    recipe = make_recipe(folder, tmp_path / "out")
    with pytest.raises(InputError, match="no tokenizer, and the calibration data is text"):
        quantkit.quantize(recipe, model=model, gate=False)
    with pytest.raises(InputError, match="tokenizer is of type str"):
        quantkit.quantize(recipe, model=model, tokenizer="gpt2", gate=False)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="tokenizer goes with a model in memory"):
        quantkit.quantize(recipe, model=folder / "model", tokenizer=tokenizer, gate=False)
    assert not list(tmp_path.iterdir())
    ids = ([number % 250 + 3 for number in range(start, start + 40)] for start in range(99))
    result = quantkit.quantize(recipe, model=model, calibration=ids, gate=False)
    told = result.report.evidence
    assert told["calibration"]["source"] == "an iterator of the caller"
    assert told["recipe"]["resolved"]["calibration"]["data"] == "an iterator of the caller"


def test_a_disk_that_is_too_small_is_told_by_numbers(
    model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before a byte is written, and with nothing left."""
    monkeypatch.setattr(live, "_TOKENIZER_BYTES", 1 << 60)
    with (
        pytest.raises(ResourceError, match=r"takes [\d,]+ bytes .* and [\d,]+ are free"),
        live.saved(model, None, tmp_path / "out"),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_what_a_killed_job_left_is_written_anew_and_what_is_not_ours_stays(
    model: Any, tmp_path: Path
) -> None:
    """Two jobs at once do not share the files."""
    place = live.place_of(tmp_path / "out")
    (place / "model").mkdir(parents=True)
    (place / "model" / "model-00001-of-00002.safetensors").write_bytes(b"half")
    with live.saved(model, None, tmp_path / "out") as folder:
        assert sorted(path.name for path in folder.glob("*.safetensors")) == ["model.safetensors"]
        with (
            pytest.raises(OutputError, match="another job works on"),
            live.saved(model, None, tmp_path / "out"),
        ):
            pass
        assert (folder / "model.safetensors").is_file()
    assert not place.exists()
    place.mkdir()
    (place / "thesis.txt").write_text("mine")
    with (
        pytest.raises(OutputError, match="quantkit did not write it"),
        live.saved(model, None, tmp_path / "out"),
    ):
        pass
    assert (place / "thesis.txt").is_file()


def test_an_interrupted_job_goes_on_with_the_same_weights(
    folder: Path, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """The folder is gone in between; the same bytes are written again."""
    recipe = make_recipe(folder, tmp_path / "out")

    def stop(event: quantkit.Event) -> None:
        if event.stage == "quantize" and event.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantkit.quantize(recipe, model=model, tokenizer=tokenizer, gate=False, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    told: list[str] = []
    quantkit.quantize(
        recipe,
        model=model,
        tokenizer=tokenizer,
        gate=False,
        progress=lambda event: told.append(event.message),
    )
    assert any(message.startswith("resumed after 2 blocks") for message in told)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_several_processes_are_refused_before_they_meet(
    folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In a training that torchrun has started, the others never come."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="by one process, and torchrun has started 2"):
        quantkit.quantize(make_recipe(folder, tmp_path / "out"), model=model)
