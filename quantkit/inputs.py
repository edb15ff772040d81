"""What a command was given, and what the file system alone can refuse of it.

Nothing here imports torch: the command line asks first, and answers at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantkit.calibration.sources import find_kind
from quantkit.checkpoint.headers import WEIGHT_DTYPES
from quantkit.checkpoint.source import find_folder
from quantkit.errors import InputError, NotYetError, RecipeError, nearest
from quantkit.ggml_types import FILE_TYPES, GGUF
from quantkit.recipe import (
    AUTO,
    QuantizeSpec,
    Recipe,
    find_recipe,
    load_recipe,
    read_recipe_text,
    validate,
)
from quantkit.schemes import METHODS, SCHEMES
from quantkit.staging import check_output

RecipeLike = Recipe | str | os.PathLike[str]

PLAIN = "safetensors"
"""Target of a conversion: a checkpoint with plain weights."""

_TARGETS = {"compressed-tensors": True, PLAIN: True, GGUF: True, "onnx": False}
"""Target of a conversion -> built."""


@dataclass(frozen=True)
class LoadedRecipe:
    """A validated recipe and, where it came from a file, that file's text."""

    recipe: Recipe
    text: str | None
    overrides: tuple[str, ...]

    @property
    def model(self) -> str:
        """The model to work on.

        Raises:
            RecipeError: none is named.
        """
        if self.recipe.model is None:
            raise RecipeError("no model: name one on the command line or as `model:` in the recipe")
        return self.recipe.model

    @property
    def output(self) -> Path:
        """The folder to write.

        Raises:
            RecipeError: none is named.
        """
        if self.recipe.output is None:
            raise RecipeError("no output: pass --output or write `output:` in the recipe")
        return Path(self.recipe.output)


def load(
    recipe: RecipeLike,
    model: str | os.PathLike[str] | None,
    output: str | os.PathLike[str] | None,
    overrides: Sequence[str],
) -> LoadedRecipe:
    """Read and validate a recipe; a `Recipe` gets only its model and output replaced.

    Raises:
        RecipeError, NotYetError: as `load_recipe`; or overrides were given for a `Recipe`.
    """
    if not isinstance(recipe, Recipe):
        text = read_recipe_text(find_recipe(recipe))
        loaded = load_recipe(recipe, model=model, output=output, overrides=overrides)
        return LoadedRecipe(loaded, text, tuple(overrides))
    if overrides:
        raise RecipeError("overrides go with a recipe from a file: change the Recipe itself")
    changes = {"model": model, "output": output}
    given = {key: os.fspath(value) for key, value in changes.items() if value is not None}
    # A Recipe that was made in Python may ask for what is not built yet.
    return LoadedRecipe(validate(recipe.model_dump(mode="json") | given), None, ())


def check_inputs(
    loaded: LoadedRecipe, *, overwrite: bool, gate: bool = True, output_needed: bool = True
) -> None:
    """Refuse a model or data that is not there, and an output that cannot be made.

    Args:
        loaded: the recipe with what the command line changed.
        overwrite: accept an output that exists.
        gate: whether the evaluation data will be read.
        output_needed: whether a recipe without an output is refused.

    Raises:
        InputError: one of them.
    """
    recipe = loaded.recipe
    if output_needed or recipe.output is not None:
        check_output(loaded.output, overwrite=overwrite)
    find_folder(loaded.model)
    if recipe.calibration is not None and _needs_calibration(recipe.quantize):
        find_kind(recipe.calibration.data)
    if gate and recipe.gate is not None:
        find_kind(recipe.gate.data)


def check_gate_inputs(
    output: Path, baseline: str, data: str | os.PathLike[str] | None, *, overwrite: bool
) -> None:
    """The same for a gate on an artifact that exists.

    Raises:
        InputError: the baseline or the data is not there, or the output cannot be made.
    """
    check_output(output, overwrite=overwrite)
    find_folder(baseline)
    if data is not None:
        find_kind(os.fspath(data))


@dataclass(frozen=True)
class ConvertOptions:
    """What a conversion may be given besides source, target and output; see `convert`."""

    dtype: str | None = None
    base: str | None = None
    imatrix: str | None = None
    pre_tokenizer: str | None = None
    requantize: bool = False


def check_convert_inputs(
    source: str, to: str, output: Path, options: ConvertOptions, *, overwrite: bool
) -> None:
    """The same for a conversion: what it goes to, and from what.

    Raises:
        NotYetError: the target is known and not built yet.
        InputError: the target or the dtype is unknown or does not go with the other, the model is
            not there, or the output cannot be made.
    """
    name = to.partition(":")[0]
    if name not in _TARGETS:
        known = ", ".join(_TARGETS)
        raise InputError(f"--to {to!r} is unknown{nearest(name, _TARGETS)} (known: {known})")
    if not _TARGETS[name]:
        built = ", ".join(target for target, is_built in _TARGETS.items() if is_built)
        raise NotYetError(f"--to {to!r} is not yet built (built: {built})")
    if name == GGUF:
        _check_file_type(to)
    elif name != to:
        raise InputError(f"--to {to!r}: {name} has no types to choose from, write --to {name}")
    _check_options(to, options)
    check_output(output, overwrite=overwrite)
    if Path(source).suffix != f".{GGUF}" or os.path.isdir(source):
        find_folder(source)
        return
    if not os.path.isfile(source):
        raise InputError(f"{source}: there is no such file")
    check_source(source, to, options, is_gguf=True)


def check_source(source: str, to: str, options: ConvertOptions, *, is_gguf: bool) -> None:
    """Refuse a target and options that do not go with what is converted.

    Args:
        is_gguf: whether `source` is a GGUF file, or holds one.

    Raises:
        NotYetError: GGUF files do not become this target yet.
        InputError: an option is missing, or goes with another kind of source.
    """
    if not is_gguf:
        for option, value in (("--base", options.base), ("--requantize", options.requantize)):
            if value:
                raise InputError(f"{option} goes with GGUF files: {source} is a checkpoint")
        return
    if options.pre_tokenizer is not None:
        raise InputError(f"--pre-tokenizer goes with checkpoints: {source} has named its own")
    if to.partition(":")[0] == GGUF:
        return
    if to != PLAIN:
        raise NotYetError(
            f"--to {to!r} of GGUF files is not yet built (built: {PLAIN}, {GGUF}:TYPE)"
        )
    if options.base is None:
        raise InputError(
            f"config and tokenizer come from the original that {source} was made from: pass "
            f"--base MODEL"
        )


def _check_options(to: str, options: ConvertOptions) -> None:
    """Refuse options that do not go with the target, and files that are not there."""
    name, dtype = to.partition(":")[0], options.dtype
    if dtype is not None and dtype not in WEIGHT_DTYPES:
        known = ", ".join(WEIGHT_DTYPES)
        near = nearest(dtype, WEIGHT_DTYPES)
        raise InputError(f"--dtype {dtype!r} is unknown{near} (known: {known})")
    if dtype is not None and to != PLAIN:
        reason = "is a type of its own" if name == GGUF else "keeps codes and scales as they are"
        raise InputError(f"--dtype goes with --to {PLAIN}: {to} {reason}")
    if options.base is not None:
        if to != PLAIN:
            raise InputError(f"--base goes with --to {PLAIN}: {to} needs none")
        find_folder(options.base)
    for option, value, reason in (
        ("--imatrix", options.imatrix, "is not rounded anew"),
        ("--requantize", options.requantize, "is not rounded anew"),
        ("--pre-tokenizer", options.pre_tokenizer, "has the tokenizer's own files"),
    ):
        if value and name != GGUF:
            raise InputError(f"{option} goes with --to {GGUF}:TYPE: {to} {reason}")
    if options.imatrix is not None and not Path(options.imatrix).is_file():
        raise InputError(f"--imatrix {options.imatrix}: there is no such file")


def _check_file_type(to: str) -> None:
    """Refuse a GGUF target without a type that there is."""
    _, _, kind = to.partition(":")
    if not kind:
        raise InputError(f"--to {to!r} needs a type: write --to gguf:Q4_K_M")
    if kind.upper() not in FILE_TYPES:
        near = nearest(kind.upper(), FILE_TYPES)
        raise InputError(f"--to {to!r} is unknown{near} (known: {', '.join(FILE_TYPES)})")


def _needs_calibration(spec: QuantizeSpec) -> bool:
    """Whether anything that the recipe names may look at data; the plan knows it exactly."""
    methods = (spec.method, *(override.method for override in spec.overrides))
    schemes = (spec.scheme, *(override.scheme for override in spec.overrides))
    return (
        spec.kv_cache != "none"
        or spec.scheme == AUTO
        or any(SCHEMES[name].static for name in schemes if name in SCHEMES)
        or any(name not in METHODS or METHODS[name].needs_calibration for name in methods if name)
    )
