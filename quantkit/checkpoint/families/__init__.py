"""What is known of an architecture: one YAML file a family, checked while it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from quantkit.errors import QuantkitError


class Fold(BaseModel):
    """The operation in front of a group, into which a scale per channel can be folded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    module: str
    """Name within the block."""
    kind: Literal["norm", "linear"]
    per_head: bool = False
    """The group reads attention's output: key/value heads repeat for their query heads."""


class Group(BaseModel):
    """Linear layers that read the same input, in the order in which the forward calls them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    linears: tuple[str, ...]
    """Names within the block."""
    fold: Fold | None = None


class Family(BaseModel):
    """One architecture; names of modules are those of transformers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    model_types: tuple[str, ...]
    """Values of config.json's `model_type`."""
    blocks: str
    """Full name of the list of decoder blocks."""
    embedding: str
    final_norm: str
    attention: str | None = None
    """Name within the block of the module that caches keys and values; its `head_dim` is theirs."""
    groups: tuple[Group, ...]
    """In the order in which the forward reaches them."""
    fused: tuple[tuple[str, ...], ...] = ()
    """Layers that vLLM makes one of: they must share scheme and group size."""

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Family:
        linears = [name for group in self.groups for name in group.linears]
        if len(set(linears)) < len(linears) or not all(group.linears for group in self.groups):
            raise ValueError("a group is empty or a linear layer is in two groups")
        unknown = {name for members in self.fused for name in members} - set(linears)
        if unknown:
            raise ValueError(f"fused layers are in no group: {sorted(unknown)}")
        return self


def load_family(model_type: str) -> Family | None:
    """Return the family of a model type, or None where no data file knows it.

    Raises:
        QuantkitError: a data file is wrong.
    """
    return next((family for family in load_families() if model_type in family.model_types), None)


def load_families() -> tuple[Family, ...]:
    """Read every data file of this folder, by name.

    Raises:
        QuantkitError: a data file is wrong, or two know the same model type.
    """
    families = tuple(read_family(path) for path in sorted(Path(__file__).parent.glob("*.yaml")))
    types = [model_type for family in families for model_type in family.model_types]
    if len(set(types)) < len(types):
        raise QuantkitError(f"two family files know the same model type: {sorted(types)}")
    return families


def read_family(path: Path) -> Family:
    """Read one data file.

    Raises:
        QuantkitError: it does not describe a family; every fault is named.
    """
    try:
        return Family.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors()
        )
        raise QuantkitError(f"family file {path.name}: {faults}") from None
    except yaml.YAMLError as error:
        raise QuantkitError(f"family file {path.name} is not valid YAML: {error}") from None
