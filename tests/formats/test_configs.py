"""Numbers of config.json that short windows do not show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.formats.configs import compare_configs
from tests.helpers import make_pico_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pico_model(tmp_path_factory.mktemp("base"), tokenizer=False)


def compare(base: Path, folder: Path, **changes: Any) -> str | None:
    """Compare a copy whose config.json has other values."""
    folder.mkdir()
    config = json.loads((base / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))
    (folder / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    one, other = (open_checkpoint(resolve_source(str(each))) for each in (folder, base))
    return compare_configs(one, other)


def test_what_does_not_change_a_logit_may_differ(base: Path, tmp_path: Path) -> None:
    """And what other versions of transformers write, leave out or describe."""
    assert compare(base, tmp_path / "same") is None
    idle = {"dtype": "float16", "use_cache": False, "eos_token_id": 7, "attention_dropout": 0.5}
    assert compare(base, tmp_path / "idle", **idle, transformers_version="4.1", x=3) is None
    described = {"quantization_config": {"quant_method": "compressed-tensors"}}
    assert compare(base, tmp_path / "described", **described, attention_bias=...) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": 0.01},
        {"num_attention_heads": 8, "head_dim": 8, "num_key_value_heads": 4},
        {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}},
        {"hidden_act": "gelu"},
    ],
)
def test_what_changes_them_is_named(base: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    problem = compare(base, tmp_path / "other", **changes)

    assert problem is not None
    assert next(iter(changes)) in problem or "head_dim is 8 and not 16" in problem
