"""What an encoder's files say, and whether the loaded model is transformers' own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.encoders.model import (
    describe_encoder,
    is_encoder,
    load_encoder,
    pool,
    run_encoder,
)
from quantkit.encoders.structure import find_structure
from quantkit.errors import CheckpointError
from quantkit.records.encoders import Pooling
from tests.encoder_models import (
    ARCHITECTURES,
    POSITIONS,
    encoder_sentences,
    write_encoder_checkpoint,
)
from tests.helpers import make_pico_model


def _open(folder: Path) -> Checkpoint:
    return open_checkpoint(resolve_source(str(folder)))


def _change_json(path: Path, **changes: Any) -> None:
    tree = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


def _rename(folder: Path, rename: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    named = {rename(name): tensor for name, tensor in tensors.items() if rename(name)}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "architecture", [*ARCHITECTURES, "CamembertModel", "ElectraModel", "MPNetModel"]
)
def test_a_loaded_encoder_computes_what_transformers_computes(
    architecture: str, tmp_path: Path
) -> None:
    import transformers

    folder = write_encoder_checkpoint(tmp_path / "m", architecture)
    checkpoint = _open(folder)
    info = describe_encoder(checkpoint)
    batch = transformers.AutoTokenizer.from_pretrained(folder)(
        encoder_sentences(4), padding=True, return_tensors="pt"
    )
    reference = getattr(transformers, architecture).from_pretrained(folder).eval()
    with torch.no_grad():
        found = run_encoder(load_encoder(checkpoint, info), info, batch)
        output = reference(**batch)
    if info.pooling is None:
        expected = output.logits
    else:
        # sentence-transformers' Pooling and Normalize, one text at a time and without padding.
        rows = zip(output.last_hidden_state, batch["attention_mask"], strict=True)
        means = torch.stack([hidden[mask.bool()].mean(0) for hidden, mask in rows])
        expected = means / means.norm(dim=-1, keepdim=True)
    assert torch.allclose(found, expected, atol=1e-6)
    assert set(info.inputs) == set(batch)
    assert info.max_length == POSITIONS


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
def test_pooling_ignores_padding(mode: Any) -> None:
    hidden = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    pooling = Pooling(mode, normalize=False)
    assert torch.allclose(pool(hidden, mask, pooling), pool(hidden[:, :3], mask[:, :3], pooling))


def test_layers_that_read_one_tensor_are_one_group(tmp_path: Path) -> None:
    checkpoint = _open(write_encoder_checkpoint(tmp_path, "BertForSequenceClassification"))
    structure = find_structure(checkpoint, describe_encoder(checkpoint))
    layer = "bert.encoder.layer.1"
    assert [group.linears for group in structure.groups[4:]] == [
        tuple(f"{layer}.attention.self.{leaf}" for leaf in ("query", "key", "value")),
        (f"{layer}.attention.output.dense",),
        (f"{layer}.intermediate.dense",),
        (f"{layer}.output.dense",),
    ]
    assert structure.tables == (
        "bert.embeddings.word_embeddings",
        "bert.embeddings.position_embeddings",
    )
    assert structure.others == ("bert.pooler.dense", "classifier")


def test_names_may_lack_or_have_the_prefix_of_the_base_model(tmp_path: Path) -> None:
    plain = write_encoder_checkpoint(tmp_path / "plain")
    prefixed = shutil.copytree(plain, tmp_path / "prefixed")
    _rename(prefixed, lambda name: f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma"))
    info = describe_encoder(_open(plain))
    expected = load_encoder(_open(plain), info).state_dict()
    found = load_encoder(_open(prefixed), info).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_pickled_weights_load(tmp_path: Path) -> None:
    folder = write_encoder_checkpoint(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    checkpoint = _open(folder)
    model = load_encoder(checkpoint, describe_encoder(checkpoint))
    name = "encoder.layer.1.output.dense.weight"
    assert torch.equal(model.state_dict()[name], tensors[name])


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = write_encoder_checkpoint(tmp_path)
    _rename(folder, lambda name: "" if "layer.1.output.dense.bias" in name else name)
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor .*encoder\.layer\.\*\.output"):
        load_encoder(_open(folder), describe_encoder(_open(folder)))


def test_a_pooler_is_not_needed_and_an_unused_tensor_is_noted(tmp_path: Path) -> None:
    folder = write_encoder_checkpoint(tmp_path)
    structure = find_structure(_open(folder), describe_encoder(_open(folder)))
    assert any("pooler.dense.weight" in note for note in structure.notes)
    _rename(folder, lambda name: "" if "pooler" in name else name)
    structure = find_structure(_open(folder), describe_encoder(_open(folder)))
    assert structure.notes == ()


def test_a_nan_is_refused(tmp_path: Path) -> None:
    folder = write_encoder_checkpoint(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.layer.0.output.dense.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="holds 1 NaN or infinite value"):
        load_encoder(_open(folder), describe_encoder(_open(folder)))


def test_pooling_without_files_is_said(tmp_path: Path) -> None:
    info = describe_encoder(_open(write_encoder_checkpoint(tmp_path, pooling=None)))
    assert info.pooling == Pooling("mean", normalize=True)
    assert any("no modules.json" in note for note in info.notes)


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
def test_old_and_new_names_of_a_pooling_are_read(mode: str, tmp_path: Path) -> None:
    folder = write_encoder_checkpoint(tmp_path, pooling=mode, normalize=False)
    assert describe_encoder(_open(folder)).pooling == Pooling(mode, normalize=False)  # type: ignore[arg-type]
    new = {"embedding_dimension": 32, "pooling_mode": mode}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(new))
    assert describe_encoder(_open(folder)).pooling == Pooling(mode, normalize=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "mean \\+ cls"),
        ({"pooling_mode": "lasttoken"}, "lasttoken is not built"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "sqrt_len_tokens is not built"),
        ({}, "pooling none is not built"),
    ],
)
def test_other_poolings_are_refused(pooling: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_encoder_checkpoint(tmp_path)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    with pytest.raises(CheckpointError, match=message):
        describe_encoder(_open(folder))


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")], "Dense"),
        ([("0_Transformer", "Transformer"), ("1_Pooling", "Pooling")], "name that folder"),
        ([("", "Transformer"), ("../../etc", "Pooling")], "climbs out of the folder"),
        ([("", "Transformer")], "what is built is"),
        ([("", 3)], "not a list of modules"),
        ({"a": 1}, "not a list of modules"),
    ],
)
def test_other_modules_are_refused(modules: Any, message: str, tmp_path: Path) -> None:
    folder = write_encoder_checkpoint(tmp_path)
    if isinstance(modules, list):
        modules = [{"path": path, "type": kind} for path, kind in modules]
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match=message):
        describe_encoder(_open(folder))


def test_the_longest_text_is_no_longer_than_the_positions(tmp_path: Path) -> None:
    folder = write_encoder_checkpoint(tmp_path, "RobertaModel")
    side = folder / "sentence_bert_config.json"
    _change_json(side, max_seq_length=POSITIONS + 2)
    info = describe_encoder(_open(folder))
    assert info.max_length == POSITIONS
    assert any("positions for 128 tokens" in note for note in info.notes)
    _change_json(side, max_seq_length=50)
    assert describe_encoder(_open(folder)).max_length == 50
    side.unlink()
    _change_json(folder / "tokenizer_config.json", model_max_length=60)
    assert describe_encoder(_open(folder)).max_length == 60


def test_labels_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    labels = tuple(f"class {index}" for index in range(12))
    folder = write_encoder_checkpoint(tmp_path, "BertForSequenceClassification", labels=labels)
    assert describe_encoder(_open(folder)).labels == labels


@pytest.mark.parametrize(
    ("architectures", "expected"),
    [
        (["BertModel"], True),
        (["ModernBertForTokenClassification"], True),
        (["BertForMaskedLM"], True),
        (["RobertaForCausalLM"], False),
        (["BertLMHeadModel"], False),
        (["LlamaForCausalLM"], False),
        (["BertModel", "LlamaForCausalLM"], False),
        ("BertModel", False),
        (None, False),
    ],
)
def test_the_class_decides_what_is_an_encoder(architectures: Any, expected: bool) -> None:
    assert is_encoder({"architectures": architectures, "model_type": "bert"}) is expected


def test_a_sentence_encoder_may_name_the_class_that_it_was_pretrained_as(tmp_path: Path) -> None:
    """As all-mpnet-base-v2 does."""
    folder = write_encoder_checkpoint(tmp_path, "MPNetModel")
    plain = describe_encoder(_open(folder))
    _change_json(folder / "config.json", architectures=["MPNetForMaskedLM"])
    checkpoint = _open(folder)
    assert is_encoder(checkpoint.config)
    info = describe_encoder(checkpoint)
    assert info == plain
    assert (info.architecture, info.task) == ("MPNetModel", "embedding")
    expected = load_encoder(_open(folder), plain).state_dict()
    found = load_encoder(checkpoint, info).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    _change_json(folder / "1_Pooling" / "config.json", pooling_mode_mean_tokens=False)
    with pytest.raises(CheckpointError, match="pooling none is not built"):
        describe_encoder(checkpoint)


def test_a_task_that_is_not_built_is_named(tmp_path: Path) -> None:
    folder = write_encoder_checkpoint(tmp_path, pooling=None)
    _change_json(folder / "config.json", architectures=["BertForMaskedLM"])
    with pytest.raises(CheckpointError, match="BertForMaskedLM is no encoder that is built"):
        describe_encoder(_open(folder))


def test_a_decoder_of_an_encoders_class_is_refused(tmp_path: Path) -> None:
    folder = write_encoder_checkpoint(tmp_path)
    _change_json(folder / "config.json", is_decoder=True)
    with pytest.raises(CheckpointError, match="is_decoder is set"):
        describe_encoder(_open(folder))


def test_a_class_of_another_family_is_refused(tmp_path: Path) -> None:
    folder = write_encoder_checkpoint(tmp_path)
    _change_json(folder / "config.json", architectures=["DistilBertModel"])
    with pytest.raises(CheckpointError, match="is of model_type distilbert, and the file says"):
        describe_encoder(_open(folder))


def test_decoders_are_none(tmp_path: Path) -> None:
    folder = make_pico_model(tmp_path, tokenizer=False)
    assert not is_encoder(_open(folder).config)
