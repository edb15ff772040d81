"""What names files, in a stranger's hands: who reads it, and how a name is put there.

A carrier prepares a folder, and outside of it a file (or a folder) that its reader would take; then
it writes a name down, and reads. Whoever refuses raises one of quantkit's own errors. What is read
otherwise is returned as text, in which nothing of the file outside may be.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from quantkit.calibration.dataset_folders import check_dataset_folder
from quantkit.calibration.stored import StoredStatistics, load_fishers
from quantkit.calibration.tokenizer import load_tokenizer
from quantkit.checkpoint.reader import open_checkpoint, read_tensor
from quantkit.encoders.model import describe_encoder
from quantkit.errors import QuantkitError
from quantkit.formats.gguf.container import open_gguf
from quantkit.formats.gguf.header import GgufSpec
from quantkit.formats.gguf.writing import write_gguf
from quantkit.formats.inspect import inspect_artifact
from quantkit.formats.onnx.genai import read_genai_config
from quantkit.formats.sidecars import copy_side_files
from quantkit.ggml_types import GGML_TYPES
from quantkit.integrations.figures import Told
from quantkit.integrations.mlflow_registry import _check_artifacts, _place
from quantkit.judging.side_files import _describe_modules
from quantkit.judging.suspicions import compare_hashes
from quantkit.judging.tasks.files import find_data_files, read_task_file
from quantkit.publishing.checking import check_output
from quantkit.publishing.client import say_nothing
from quantkit.records import Source
from quantkit.report.document import report_document
from quantkit.sweeping.finished import _damaged
from tests.encoder_models import write_encoder_checkpoint
from tests.formats.onnx.graphs import make_model, save
from tests.helpers import make_pico_model
from tests.report.sample import make_report
from tests.security.names import SECRET, Attack, Place

TOKEN = "<taken-from-outside>"
"""A token of the vocabulary outside."""
CONTENT = "what only the file outside says"
VALUE = 7.5
"""Of the tensors outside."""
MARKS = (TOKEN, CONTENT, str(VALUE))


@dataclass(frozen=True)
class Carrier:
    """Something that names files."""

    title: str
    base: str
    """A harmless name; where `fixed`, the only one."""
    prepare: Callable[[Place, Models], None]
    read: Callable[[Place, str], str]
    """Write the name down, and read it. Returns what was read."""
    fixed: bool = False
    """Whether the name is quantkit's own choice, and only what lies there is the stranger's."""
    harmless: str = ""
    """Why names may be passed over here; empty: each is refused."""
    users: bool = False
    """Whether the user names the file: any path is theirs."""
    remote: bool = False
    """Whether nothing of it lies on this disk before."""

    def meets(self, attack: Attack) -> bool:
        """Whether an attack can be made here."""
        return not self.remote if attack.on_disk else not self.fixed


@dataclass(frozen=True)
class Models:
    """Models that are made once, to be copied."""

    decoder: Path
    encoder: Path
    wider: Path
    """A tokenizer folder with TOKEN."""


def make_models(folder: Path) -> Models:
    """Write them into `folder`."""
    models = Models(folder / "decoder", folder / "encoder", folder / "wider")
    make_pico_model(models.decoder)
    write_encoder_checkpoint(models.encoder)
    tokenizer = load_tokenizer(models.decoder)
    tokenizer.add_tokens([TOKEN])
    tokenizer.save_pretrained(models.wider)
    return models


def _write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document))


def _edit_json(path: Path, **changes: object) -> None:
    _write_json(path, {**json.loads(path.read_text()), **changes})


def _copy(model: Path, folder: Path, *left_out: str) -> None:
    shutil.copytree(
        model, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*left_out, ".*")
    )


def _prepare_shards(place: Place, models: Models) -> None:
    _write_json(place.folder / "config.json", {"model_type": "llama"})
    save_file({"w": torch.full((2,), VALUE)}, place.outside / SECRET)


def _prepare_pickles(place: Place, models: Models) -> None:
    _write_json(place.folder / "config.json", {"model_type": "llama"})
    torch.save({"w": torch.full((2,), VALUE)}, place.outside / SECRET)


def _read_shards(index: str) -> Callable[[Place, str], str]:
    def read(place: Place, name: str) -> str:
        _write_json(place.folder / index, {"weight_map": {"w": name}})
        checkpoint = open_checkpoint(Source("model", place.folder, None))
        return str(read_tensor(checkpoint, "w").tolist())

    return read


def _prepare_onnx(place: Place, models: Models) -> None:
    save(make_model(), place.outside / "model.onnx", external=SECRET)
    shutil.copy(place.outside / "model.onnx", place.folder)


def _read_onnx(place: Place, name: str) -> str:
    import onnx

    path = place.folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    path.write_bytes(model.SerializeToString())
    inspect_artifact(place.folder)
    return CONTENT


def _prepare_genai(place: Place, models: Models) -> None:
    (place.outside / SECRET).write_text(CONTENT)


def _read_genai(place: Place, name: str) -> str:
    _write_json(place.folder / "genai_config.json", {"model": {"decoder": {"filename": name}}})
    read_genai_config(place.folder)
    return ""


def _prepare_parts(place: Place, models: Models) -> None:
    kind = GGML_TYPES["F32"]
    specs = [GgufSpec(letter, kind, (64,)) for letter in "ab"]
    contents = ((letter, torch.full((1, 256), 7, dtype=torch.uint8)) for letter in "ab")
    write_gguf(place.folder, "x", {}, specs, contents, 300)
    (place.folder / "x-00002-of-00002.gguf").rename(place.outside / SECRET)


def _read_parts(place: Place, name: str) -> str:
    open_gguf(place.folder / "x-00001-of-00002.gguf")
    return CONTENT


def _prepare_tokenizer(place: Place, models: Models) -> None:
    _copy(models.decoder, place.folder, "*.safetensors")
    shutil.copy(models.wider / "tokenizer.json", place.outside / SECRET)


def _prepare_other_tokenizer(place: Place, models: Models) -> None:
    _prepare_tokenizer(place, models)
    (place.folder / "tokenizer.json").unlink()
    (place.folder / "vocab.json").write_text("{}")


def _read_tokenizer(**setting: Callable[[str], object]) -> Callable[[Place, str], str]:
    def read(place: Place, name: str) -> str:
        changes = {key: make(name) for key, make in setting.items()}
        _edit_json(place.folder / "tokenizer_config.json", **changes)
        return repr(sorted(load_tokenizer(place.folder).get_vocab()))

    return read


def _prepare_templates(place: Place, models: Models) -> None:
    _copy(models.decoder, place.folder)
    (place.folder / "additional_chat_templates").mkdir()
    (place.outside / SECRET).write_text(CONTENT)


def _read_templates(place: Place, name: str) -> str:
    checkpoint = open_checkpoint(Source("model", place.folder, None))
    copied = place.folder.parent / "copied"
    copied.mkdir(exist_ok=True)
    found = sorted(copy_side_files(checkpoint, copied))
    return repr(found) + "".join(
        path.read_text() for path in copied.rglob("*") if path.suffix == ".jinja"
    )


def _prepare_modules(place: Place, models: Models) -> None:
    _copy(models.encoder, place.folder)
    (place.outside / SECRET).mkdir()
    _write_json(place.outside / SECRET / "config.json", {"pooling_mode_cls_token": True})


def _write_modules(place: Place, name: str) -> None:
    kinds = ("Transformer", ""), ("Pooling", name), ("Normalize", "2_Normalize")
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": p} for kind, p in kinds]
    _write_json(place.folder / "modules.json", modules)


def _read_modules(place: Place, name: str) -> str:
    _write_modules(place, name)
    info = describe_encoder(open_checkpoint(Source("model", place.folder, None)))
    return CONTENT if info.pooling is not None and info.pooling.mode == "cls" else ""


def _compare_modules(place: Place, name: str) -> str:
    _write_modules(place, name)
    return repr(_describe_modules(place.folder)).replace("pooling_mode_cls_token", CONTENT)


def _prepare_evidence(place: Place, models: Models) -> None:
    (place.folder / "compressed-tensors").mkdir()
    (place.outside / SECRET).write_text(CONTENT)


_DIGEST = hashlib.sha256(CONTENT.encode()).hexdigest()


def _row(**changes: object) -> dict[str, Any]:
    row = {"name": "x", "path": "compressed-tensors", "format": "compressed-tensors"}
    return {**row, "files": {"config.json": _DIGEST}, **changes}


def _publish(place: Place, row: dict[str, Any]) -> str:
    evidence = {"schema": 1, "verdict": "PASS", "artifacts": [row]}
    report = make_report("PASS")
    rows = [
        replace(each, **{key: row[key] for key in ("name", "path", "format")})
        for each in report.artifacts
    ]
    report = replace(report, artifacts=tuple(rows), evidence=evidence)
    _write_json(place.folder / "quantkit.json", evidence)
    (place.folder / "report").mkdir()
    _write_json(place.folder / "report" / "report.json", report_document(report))
    check_output(place.folder, say_nothing)
    return CONTENT


def _publish_file(place: Place, name: str) -> str:
    # What the attack has put down lies in the output, the file is one of an artifact.
    moved = place.folder / place.base
    if moved.is_symlink() or moved.exists():
        moved.rename(place.folder / "compressed-tensors" / place.base)
    return _publish(place, _row(files={name: _DIGEST}))


def _publish_folder(place: Place, name: str) -> str:
    return _publish(place, _row(path=name, files={SECRET: _DIGEST}))


def _judge_file(place: Place, name: str) -> str:
    found = compare_hashes(place.folder, {name: _DIGEST})
    # Reasons for a FAIL; that of a file that is not there is one as well.
    if found:
        raise QuantkitError(found[0])
    return CONTENT


def _keep_output(place: Place, name: str) -> str:
    found = _damaged(place.folder, [_row(path="compressed-tensors", files={name: _DIGEST})])
    if found:
        raise QuantkitError(found[0])
    return CONTENT


def _register(place: Place, name: str) -> str:
    told = Told({"artifacts": [_row(path=name)]}, None, place.folder)
    _check_artifacts(told)
    found = _place(told, told.document["artifacts"][0])
    return "" if found.resolve().is_relative_to(place.folder.resolve()) else CONTENT


_CPU = torch.device("cpu")


def _prepare_fisher(place: Place, models: Models) -> None:
    save_file({"layer": torch.full((2,), VALUE)}, place.outside / SECRET)


def _read_fisher(place: Place, name: str) -> str:
    digest = hashlib.sha256((place.outside / SECRET).read_bytes()).hexdigest()
    manifest = {"blocks": {"0": {"fisher_sha256": digest}}}
    stored = StoredStatistics(place.folder, manifest, "", None)  # type: ignore[arg-type]
    block: Any = type("Block", (), {"index": 0, "prefix": "x"})
    return str([tensor.tolist() for tensor in load_fishers(stored, block, _CPU).values()])


def _prepare_task(place: Place, models: Models) -> None:
    (place.outside / SECRET).write_text(f"task: {CONTENT}\n")


def _include(place: Place, name: str) -> str:
    path = place.folder / "task.yaml"
    _write_json(path, {"include": name})
    return repr(read_task_file(path))


def _find_data(place: Place, name: str) -> str:
    config = {"dataset_path": "json", "dataset_kwargs": {"data_files": name}}
    find_data_files(place.folder / "task.yaml", config)
    return CONTENT


def _prepare_data(place: Place, models: Models) -> None:
    (place.outside / SECRET).write_text(json.dumps({"text": CONTENT}))


def _describe_data(place: Place, name: str) -> str:
    configs = [{"config_name": "default", "data_files": [{"split": "train", "path": name}]}]
    (place.folder / "README.md").write_text(
        f"---\n{json.dumps({'configs': configs})}\n---\n", encoding="utf-8"
    )
    check_dataset_folder(place.folder)
    found = (place.folder / name).resolve()
    return "" if found.is_relative_to(place.folder.resolve()) else CONTENT


def _describe_saved(place: Place, name: str) -> str:
    _write_json(place.folder / "state.json", {"_data_files": [{"filename": name}]})
    check_dataset_folder(place.folder)
    found = (place.folder / name).resolve()
    return "" if found.is_relative_to(place.folder.resolve()) else CONTENT


CARRIERS: tuple[Carrier, ...] = (
    Carrier(
        "safetensors index",
        "part.safetensors",
        _prepare_shards,
        _read_shards("model.safetensors.index.json"),
    ),
    Carrier(
        "index of pickles",
        "part.bin",
        _prepare_pickles,
        _read_shards("pytorch_model.bin.index.json"),
    ),
    Carrier("ONNX external data", "weights.data", _prepare_onnx, _read_onnx),
    Carrier(
        "genai_config.json",
        "other.onnx",
        _prepare_genai,
        _read_genai,
        harmless="only model.onnx is opened",
    ),
    Carrier("GGUF parts", "x-00002-of-00002.gguf", _prepare_parts, _read_parts, fixed=True),
    Carrier("tokenizer.json", "tokenizer.json", _prepare_other_tokenizer, _read_tokenizer(), True),
    Carrier(
        "tokenizer, `fast_tokenizer_files`",
        "tokenizer.4.0.0.json",
        _prepare_tokenizer,
        _read_tokenizer(fast_tokenizer_files=lambda name: [name]),
        harmless="the name is that of no version",
    ),
    Carrier("tokenizer, `vocab`", "other.json", _prepare_tokenizer, _read_tokenizer(vocab=str)),
    Carrier(
        "tokenizer, `gguf_file`", "other.gguf", _prepare_tokenizer, _read_tokenizer(gguf_file=str)
    ),
    Carrier(
        "tokenizer, `vocab_file`",
        "other.json",
        _prepare_tokenizer,
        _read_tokenizer(vocab_file=str, tokenizer_file=str),
        harmless="transformers looks it up in the folder, whatever it says",
    ),
    Carrier(
        "chat templates",
        "additional_chat_templates/x.jinja",
        _prepare_templates,
        _read_templates,
        fixed=True,
    ),
    Carrier(
        "modules.json",
        "other",
        _prepare_modules,
        _read_modules,
        harmless="a dot is the folder itself",
    ),
    Carrier(
        "modules.json, compared",
        "other",
        _prepare_modules,
        _compare_modules,
        harmless="compared as a module that says nothing",
    ),
    Carrier("evidence, files (publish)", "x.json", _prepare_evidence, _publish_file),
    Carrier("evidence, folder (publish)", "x.json", _prepare_evidence, _publish_folder),
    Carrier("evidence, files (gate)", "x.json", _prepare_evidence, _judge_file),
    Carrier("evidence, files (sweep)", "x.json", _prepare_evidence, _keep_output),
    Carrier(
        "report, folder (register)",
        "x.json",
        _prepare_evidence,
        _register,
        harmless="it lies in the output",
    ),
    Carrier("statistics", "fisher-00000.safetensors", _prepare_fisher, _read_fisher, fixed=True),
    Carrier(
        "data folder, README.md",
        "x.jsonl",
        _prepare_data,
        _describe_data,
        harmless="it lies in the folder",
    ),
    Carrier(
        "data folder, state.json",
        "x.arrow",
        _prepare_data,
        _describe_saved,
        harmless="it lies in the folder",
    ),
    Carrier("task file, `include`", "x.yaml", _prepare_task, _include, users=True),
    Carrier("task file, `data_files`", "x.jsonl", _prepare_task, _find_data, users=True),
)
"""Who reads names from files; those from the Hub's answers have a server of their own."""
