"""What a job works with, as the caller gives it: names and files, or what is in memory already."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from quantkit.calibration.stored import StoredStatistics, open_statistics
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.errors import CalibrationError, InputError
from quantkit.inputs import (
    LoadedRecipe,
    RecipeLike,
    check_inputs,
    load,
    refuse_object,
    replace_calibration,
)
from quantkit.live import LiveModel, opened, take_live
from quantkit.ranks import read_ranks
from quantkit.recipe import GivenSolver, Overrides

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Materials:
    """A recipe, and what takes the place of what it names.

    live: a model in memory. examples: to calibrate on. statistics: to solve from.
    """

    loaded: LoadedRecipe
    live: LiveModel | None = None
    examples: Iterable[object] | None = None
    statistics: StoredStatistics | None = None


def gather_materials(
    recipe: RecipeLike,
    *,
    model: str | os.PathLike[str] | PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    output: str | os.PathLike[str] | None,
    overrides: Overrides,
    examples: Iterable[object] | None,
    statistics: str | os.PathLike[str] | None = None,
    solvers: Mapping[str, GivenSolver] = MappingProxyType({}),
) -> Materials:
    """Read the recipe, and look at what was given beside it.

    Raises:
        InputError: two things were given that exclude each other, or one of the wrong kind.
    """
    refuse_object("statistics", statistics)
    if examples is not None and statistics is not None:
        raise InputError("calibration and statistics are both given: statistics have their data")
    live = None
    if model is not None and not isinstance(model, str | os.PathLike):
        live = take_live(model, tokenizer)
    elif tokenizer is not None:
        raise InputError("tokenizer goes with a model in memory: a folder has its own")
    name = live.name if live is not None else model
    assert name is None or isinstance(name, str | os.PathLike)
    loaded = load(recipe, name, output, overrides, solvers)
    if statistics is None:
        if examples is not None:
            loaded = replace_calibration(loaded)
        return Materials(loaded, live, examples)
    stored = open_statistics(statistics)
    try:
        loaded = replace_calibration(loaded, stored.manifest["spec"])
    except ValueError:
        raise CalibrationError(
            f"the statistics in {stored.folder} are damaged (spec): calibrate again"
        ) from None
    return Materials(loaded, live, None, stored)


def refuse_sharing(model: object, statistics: object) -> None:
    """Refuse several processes where one does the job; before they meet, as others may not come.

    Raises:
        InputError: torchrun has started several, and a model is in memory or statistics are given.
    """
    size = read_ranks().size
    in_memory = model is not None and not isinstance(model, str | os.PathLike)
    if size > 1 and (in_memory or statistics is not None):
        what = "a model in memory is quantized" if in_memory else "statistics are solved from"
        raise InputError(
            f"{what} by one process, and torchrun has started {size}: do it in a process of its "
            f"own, without RANK and WORLD_SIZE in its environment"
        )


def check_materials(materials: Materials, *, overwrite: bool, gate: bool) -> None:
    """Refuse what the file system alone can refuse.

    Raises:
        InputError: as `check_inputs`.
    """
    live = materials.live
    check_inputs(
        materials.loaded,
        overwrite=overwrite,
        gate=gate,
        in_memory=live is not None,
        has_tokenizer=live is None or live.tokenizer is not None,
    )


@contextmanager
def opened_model(materials: Materials) -> Iterator[Checkpoint]:
    """Open the model by its name, or write the one in memory beside the output meanwhile.

    Raises:
        QuantkitError: as `resolve_source`, `open_checkpoint` and `saved`.
    """
    if materials.live is None:
        yield open_checkpoint(resolve_source(materials.loaded.model))
        return
    with opened(materials.live, materials.loaded.output) as checkpoint:
        yield checkpoint


def refuse_encoder(materials: Materials) -> None:
    """Refuse for an encoder what is about decoders.

    Raises:
        InputError: examples or statistics were given.
    """
    for what, given in (
        ("calibration= takes windows of tokens", materials.examples),
        ("statistics are of decoders", materials.statistics),
    ):
        if given is not None:
            raise InputError(
                f"{materials.loaded.model} is an encoder, and {what}: its recipe names its texts"
            )
