from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.checkpoint.families import load_families, load_family, read_family
from quantkit.errors import QuantkitError

GOOD = """
name: pico
model_types: [pico]
blocks: model.layers
embedding: model.embed_tokens
final_norm: model.norm
groups:
  - linears: [attention.qkv]
    fold: {module: norm, kind: norm}
  - linears: [attention.out]
"""


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_shipped_families_are_found_by_model_type(model_type: str) -> None:
    """Each of them has all seven projections, every group a fold, and what vLLM fuses."""
    family = load_family(model_type)

    assert family is not None
    assert sum(len(group.linears) for group in family.groups) == 7
    assert all(group.fold for group in family.groups)
    assert [len(members) for members in family.fused] == [3, 2]


def test_unknown_model_type_has_no_family() -> None:
    """The structural fallback takes over."""
    assert load_family("olmo2") is None
    assert len(load_families()) == 4


def test_family_file_is_read(tmp_path: Path) -> None:
    """A fold and the list of fused layers are optional."""
    path = tmp_path / "pico.yaml"
    path.write_text(GOOD)

    family = read_family(path)

    assert family.groups[1].fold is None
    assert family.fused == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("name: pico", "nome: pico"), "nome"),
        (("kind: norm", "kind: conv"), "groups.0.fold.kind"),
        (("groups:", "groups: []\nold:"), "old"),
        (("[attention.out]", "[attention.qkv]"), "in two groups"),
        (("[attention.out]", "[]"), "empty"),
        (("groups:", "fused: [[attention.k]]\ngroups:"), "in no group"),
        (("name: pico", "name: [pico"), "not valid YAML"),
    ],
)
def test_wrong_family_file_is_named_with_its_fault(
    tmp_path: Path, change: tuple[str, str], words: str
) -> None:
    """Unknown keys, wrong values and contradictions are found while it is read."""
    path = tmp_path / "pico.yaml"
    path.write_text(GOOD.replace(*change))

    with pytest.raises(QuantkitError, match=r"pico\.yaml") as caught:
        read_family(path)
    assert words in str(caught.value)
