"""A tiny encoder with its plan and calibration texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoTokenizer

from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.encoders.model import describe_encoder, load_encoder
from quantkit.encoders.planning import make_encoder_plan
from quantkit.recipe import validate
from quantkit.records import EncoderPlan, TextRows
from tests.encoder_models import encoder_sentences, write_encoder_checkpoint


@dataclass(frozen=True)
class Case:
    """What the stages of an encoder's job begin with."""

    model: nn.Module
    plan: EncoderPlan
    rows: TextRows


def make_case(
    folder: Path,
    architecture: str = "BertModel",
    scheme: str = "w8a8",
    method: str = "best",
    texts: int = 24,
    labels: tuple[str, ...] = ("bad", "fair", "good"),
    **quantize: Any,
) -> Case:
    """Write a random encoder and plan INT8 for it."""
    path = write_encoder_checkpoint(folder / "model", architecture, labels=labels)
    checkpoint = open_checkpoint(resolve_source(str(path)))
    recipe = {
        "version": 1,
        "calibration": {"data": "calibration.txt"},
        "quantize": {"scheme": scheme, "method": method, **quantize},
        "export": [{"format": "onnx", "precision": "int8"}],
    }
    plan = make_encoder_plan(validate(recipe), checkpoint, gate=False)
    model = load_encoder(checkpoint, describe_encoder(checkpoint))
    return Case(model, plan, make_rows(path, encoder_sentences(texts)))


def make_rows(folder: Path, texts: Sequence[str]) -> TextRows:
    """Tokenise texts with a checkpoint's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tuple(tuple(tokenizer(text)["input_ids"][:40]) for text in texts)
    types = tuple((0,) * len(each) for each in ids)
    return TextRows(ids, types, (), (), "calibration.txt", "0" * 64)


def texts_behind(case: Case, count: int = 16) -> TextRows:
    """Texts that are not among those of `make_case`: their words in the opposite order."""
    ids = [each[1:-1] for each in case.rows.ids]
    mixed = [(case.rows.ids[0][0], *ids[i][::-1], case.rows.ids[0][-1]) for i in range(count)]
    types = tuple((0,) * len(each) for each in mixed)
    return TextRows(tuple(mixed), types, (), (), "other.txt", "1" * 64)
