"""What a command was given, and what the file system alone can refuse of it.

Nothing here imports torch: the command line asks first, and answers at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from quantkit.calibration.sources import CALLERS, find_kind
from quantkit.checkpoint.headers import WEIGHT_DTYPES
from quantkit.checkpoint.source import find_folder
from quantkit.errors import CalibrationError, InputError, NotYetError, RecipeError, nearest
from quantkit.ggml_types import FILE_TYPES, GGUF
from quantkit.locking import refuse_held
from quantkit.recipe import (
    AUTO,
    CalibrationSpec,
    GivenSolver,
    Overrides,
    QuantizeSpec,
    Recipe,
    find_recipe,
    load_recipe,
    read_overrides,
    read_recipe_text,
    read_solvers,
    validate,
)
from quantkit.schemes import METHODS, SCHEMES, Method
from quantkit.staging import STATISTICS, check_output, partial_of

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
    methods: Mapping[str, Method] = field(default_factory=lambda: METHODS)
    """That the recipe may name: the built ones, and those of solvers that were given."""
    reads_calibration: bool = True
    """Whether the calibration data is to be read; else the caller iterates over it, or it was."""

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
    overrides: Overrides,
    solvers: Mapping[str, GivenSolver] = MappingProxyType({}),
) -> LoadedRecipe:
    """Read and validate a recipe; a `Recipe` gets only its model and output replaced.

    Raises:
        InputError: as `read_solvers`; or a solver is given that the recipe does not name, or with
            which it cannot be used.
        RecipeError, NotYetError: as `load_recipe`; or overrides were given for a `Recipe`.
    """
    pairs = read_overrides(overrides)
    if not isinstance(recipe, Recipe):
        text = read_recipe_text(find_recipe(recipe))
        loaded = load_recipe(recipe, model=model, output=output, overrides=pairs, solvers=solvers)
        return _with_methods(LoadedRecipe(loaded, text, pairs), solvers)
    if pairs:
        raise RecipeError("overrides go with a recipe from a file: change the Recipe itself")
    changes = {"model": model, "output": output}
    given = {key: os.fspath(value) for key, value in changes.items() if value is not None}
    # A Recipe that was made in Python may ask for what is not built yet.
    tree = recipe.model_dump(mode="json") | given
    checked = validate(tree, methods=read_solvers(solvers))
    return _with_methods(LoadedRecipe(checked, None, ()), solvers)


def _with_methods(loaded: LoadedRecipe, solvers: Mapping[str, GivenSolver]) -> LoadedRecipe:
    """Return the recipe with what it may name.

    Raises:
        InputError: a solver is not named by it, or it writes what no solver can be used for.
    """
    methods = read_solvers(solvers)
    spec = loaded.recipe.quantize
    named = {spec.method, *(override.method for override in spec.overrides)}
    own = {name for name in named if name is not None and name not in METHODS and name in methods}
    used = {name.rpartition("+")[2] for name in own}
    for name in solvers:
        if name not in used:
            raise InputError(
                f"solvers: {name!r} is given, and the recipe does not name it: write it as "
                f"quantize.method, or as the method of an override"
            )
    for export in loaded.recipe.export:
        if own and export.format == GGUF:
            raise RecipeError(
                f"method {min(own)} chooses integer codes, and gguf files have types of their own "
                f"with solvers of their own: export gguf with another recipe"
            )
    return replace(loaded, methods=methods)


def check_inputs(
    loaded: LoadedRecipe,
    *,
    overwrite: bool,
    gate: bool = True,
    output_needed: bool = True,
    in_memory: bool = False,
    has_tokenizer: bool = True,
    statistics: str | os.PathLike[str] | None = None,
) -> None:
    """Refuse a model or data that is not there, and an output that cannot be made.

    Args:
        loaded: the recipe with what the command line changed.
        overwrite: accept an output that exists.
        gate: whether the evaluation data will be read.
        output_needed: whether a recipe without an output is refused.
        in_memory: whether the model is.
        has_tokenizer: whether a model in memory has one.
        statistics: a folder that `calibrate` wrote, in place of calibration data.

    Raises:
        InputError: one of them.
    """
    recipe = loaded.recipe
    if recipe.publish is not None and (not gate or recipe.gate is None):
        raise InputError(
            "publish: only what has passed a gate is published, and this job has none: write "
            "`gate:` and leave out --no-gate, or leave out `publish:`"
        )
    if output_needed or recipe.output is not None:
        check_output(loaded.output, overwrite=overwrite)
    if output_needed:
        refuse_held(partial_of(loaded.output))
    if not in_memory:
        find_folder(loaded.model)
    if statistics is not None and not Path(statistics, STATISTICS).is_file():
        raise CalibrationError(
            f"{os.fspath(statistics)} holds no statistics (there is no {STATISTICS}): make them "
            f"with `quantkit calibrate`"
        )
    reads = loaded.reads_calibration and statistics is None and recipe.calibration is not None
    reads = reads and _needs_calibration(recipe.quantize, loaded.methods)
    if not has_tokenizer:
        _refuse_text(recipe, calibration=reads, gate=gate)
    if reads and recipe.calibration is not None:
        find_kind(recipe.calibration.data)
    if gate and recipe.gate is not None:
        find_kind(recipe.gate.data)


def _refuse_text(recipe: Recipe, *, calibration: bool, gate: bool) -> None:
    """Refuse what a model without a tokenizer cannot be used for.

    Raises:
        InputError: the recipe asks for something of it.
    """
    reasons = {
        "the calibration data is text": calibration,
        "the gate reads text": gate and recipe.gate is not None,
        "a gguf file holds it": any(export.format == GGUF for export in recipe.export),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise InputError(f"the model in memory has no tokenizer, and {found[0]}: pass tokenizer=")


def replace_calibration(
    loaded: LoadedRecipe, spec: Mapping[str, object] | None = None
) -> LoadedRecipe:
    """Return the recipe with data that it need not read.

    Args:
        spec: the calibration as a recipe has it, of statistics that were taken; None: the caller
            iterates over examples, of which the recipe's `samples` and `sequence_length` are cut.
    """
    recipe = loaded.recipe
    if spec is not None:
        chosen = CalibrationSpec.model_validate(spec)
    else:
        known = recipe.calibration or CalibrationSpec(data=CALLERS)
        chosen = known.model_copy(update={"data": CALLERS})
    written = (recipe.calibration or CalibrationSpec(data="")).model_dump()
    # What people read beside the recipe's text, which says something else.
    told = [
        f"calibration.{key}={value}"
        for key, value in chosen.model_dump().items()
        if loaded.text is not None and value != written[key]
    ]
    return replace(
        loaded,
        recipe=recipe.model_copy(update={"calibration": chosen}),
        overrides=tuple(dict.fromkeys((*loaded.overrides, *told))),
        reads_calibration=False,
    )


def refuse_object(what: str, given: object) -> None:
    """Refuse what is no name where only names are taken: `quantize` alone takes a model in memory.

    Args:
        what: name of the parameter.

    Raises:
        InputError: it is none.
    """
    if given is not None and not isinstance(given, str | os.PathLike):
        raise InputError(
            f"{what} is of type {type(given).__name__}: pass the name of a folder"
            f"{' (or a Hub id)' if what != 'statistics' else ''}, since what is in memory is only "
            f"taken by quantize(model=...) and calibrate(model=...)"
        )


def check_gate_inputs(
    output: Path,
    baseline: str | os.PathLike[str],
    data: str | os.PathLike[str] | None,
    *,
    overwrite: bool,
) -> None:
    """The same for a gate on an artifact that exists.

    Raises:
        InputError: the baseline or the data is not there, or the output cannot be made.
    """
    refuse_object("baseline", baseline)
    check_output(output, overwrite=overwrite)
    refuse_held(partial_of(output))
    find_folder(os.fspath(baseline))
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
    refuse_held(partial_of(output))
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


def _needs_calibration(spec: QuantizeSpec, known: Mapping[str, Method]) -> bool:
    """Whether anything that the recipe names may look at data; the plan knows it exactly."""
    methods = (spec.method, *(override.method for override in spec.overrides))
    schemes = (spec.scheme, *(override.scheme for override in spec.overrides))
    return (
        spec.kv_cache != "none"
        or spec.scheme == AUTO
        or any(SCHEMES[name].static for name in schemes if name in SCHEMES)
        or any(name not in known or known[name].needs_calibration for name in methods if name)
    )
