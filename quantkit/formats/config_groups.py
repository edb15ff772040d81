"""The groups of layers that a compressed-tensors config describes, and which layer is in which.

The rules are those of the readers: a layer is in the group that names it exactly, else in the one
whose regular expression (`re:...`) matches the beginning of its name, else in the one that names
its class (compressed-tensors 0.17, `utils/match.py`; vLLM 0.32, `compressed_tensors/utils.py`).
Names under `ignore` are in none.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import regex

from quantkit.errors import ArtifactError
from quantkit.formats.layouts import CONTAINERS, InputRounding, Layout, Strategy

EXPRESSION = "re:"
"""Marks a target that is a regular expression."""

CLASS = "Linear"
"""The target that stands for every linear layer."""

_SECONDS = 0.5
"""What one expression may take on one name: they come from a file, and some never end."""
_SECONDS_IN_ALL = 1.0
_SECONDS_A_TRIAL = 2e-5
"""What all expressions may take on all names, in processor time: ten times what sound ones do."""
_MOST_EXPRESSIONS = 256
_MOST_GROUPS = 1024
"""Each layer is looked for in every group."""
_LONGEST = 1024
"""Characters of an expression, and of a name that is matched: none has a tenth of them."""
_RECURSION = re.compile(r"\(\?(?:R|[+-]?\d|&|P>)")
"""What `regex` takes a gigabyte a second for; Python's own `re`, which readers use, has none."""
_COUNT = re.compile(r"\{(\d+)")
_MOST_REPETITIONS = 10_000
"""Of a part, all counts around it taken together: `regex` writes out each, in a kilobyte."""
_KINDS = ("int", "float")
_STRATEGIES: tuple[Strategy, ...] = ("tensor", "channel", "group", "block")


@dataclass(frozen=True)
class ConfigGroup:
    """A group of layers that config.json describes."""

    layout: Layout
    names: frozenset[str]
    """Targets that are names, of layers or of classes."""
    expressions: tuple[str, ...]
    """Targets that are regular expressions, without their mark."""


def find_config_groups(config: Mapping[str, Any]) -> tuple[ConfigGroup, ...]:
    """Return the groups with quantized weights that a config describes, well-formed ones only.

    Raises:
        ArtifactError: there are more of them than any artifact has.
    """
    description = config.get("quantization_config")
    if not isinstance(description, dict):
        return ()
    groups = description.get("config_groups")
    if isinstance(groups, dict) and len(groups) > _MOST_GROUPS:
        raise ArtifactError(f"config.json: {len(groups)} config_groups, {_MOST_GROUPS} are read")
    found = []
    for group in groups.values() if isinstance(groups, dict) else ():
        layout = _read_layout(group, description.get("format"))
        if layout is not None:
            found.append(ConfigGroup(layout, *_sort_targets(group.get("targets"))))
    return tuple(found)


def count_malformed_groups(config: Mapping[str, Any]) -> int:
    """Return how many groups of a config `find_config_groups` cannot make sense of."""
    description = config.get("quantization_config")
    groups = description.get("config_groups") if isinstance(description, dict) else None
    described = len(groups) if isinstance(groups, dict) else int(groups is not None)
    return described - len(find_config_groups(config))


@dataclass(frozen=True)
class Ignored:
    """The layers that readers leave out."""

    names: frozenset[str]
    expressions: tuple[str, ...]


def find_ignored(config: Mapping[str, Any]) -> Ignored:
    """Return what a config lists under `ignore`."""
    description = config.get("quantization_config")
    return Ignored(
        *_sort_targets(description.get("ignore") if isinstance(description, dict) else None)
    )


def order_groups(name: str, groups: Sequence[ConfigGroup]) -> list[ConfigGroup]:
    """Return the groups that can claim a linear layer, the one that readers choose first.

    Raises:
        ArtifactError: a regular expression is not valid or does not end.
    """
    ranked = [(_rank(name, group), index) for index, group in enumerate(groups)]
    return [groups[index] for rank, index in sorted(ranked) if rank < _NO_MATCH]


def is_ignored(name: str, ignored: Ignored) -> bool:
    """Say whether readers leave a linear layer out.

    Raises:
        ArtifactError: a regular expression is not valid or does not end.
    """
    return bool({name, CLASS} & ignored.names) or _matches_any(name, ignored.expressions)


def check_expressions(config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Try every expression of a config on every name once, so that none is met later on.

    Raises:
        ArtifactError: an expression is not valid or does not end.
    """
    groups, ignored = find_config_groups(config), find_ignored(config)
    found = {each for group in groups for each in group.expressions} | set(ignored.expressions)
    expressions = sorted(found)
    if len(expressions) > _MOST_EXPRESSIONS:
        raise ArtifactError(
            f"config.json: {len(expressions)} regular expressions among its targets, "
            f"{_MOST_EXPRESSIONS} are read"
        )
    if not expressions:
        return
    begun, allowed = time.thread_time(), _SECONDS_IN_ALL
    for name in names:
        for expression in expressions:
            _matches_any(name, (expression,))
            allowed += _SECONDS_A_TRIAL
            if time.thread_time() - begun > allowed:
                raise _refuse(expression, "with the others it takes too long")


_NO_MATCH = 4


def _sort_targets(targets: object) -> tuple[frozenset[str], tuple[str, ...]]:
    """Tell names from expressions."""
    strings = [str(target) for target in targets] if isinstance(targets, list) else []
    names = frozenset(each for each in strings if not each.startswith(EXPRESSION))
    expressions = (each for each in strings if each.startswith(EXPRESSION))
    return names, tuple(each.removeprefix(EXPRESSION) for each in expressions)


def _rank(name: str, group: ConfigGroup) -> int:
    """0 for an exact name, 1 for an expression, 2 for `Linear`, 3 for another class's name."""
    if name in group.names:
        return 0
    if _matches_any(name, group.expressions):
        return 1
    if CLASS in group.names:
        return 2
    # Layers are named in small letters, classes are not.
    return 3 if any(target[:1].isupper() for target in group.names) else _NO_MATCH


def _matches_any(name: str, expressions: Sequence[str]) -> bool:
    """Say whether an expression matches the beginning of a name."""
    for expression in expressions:
        if len(expression) > _LONGEST or len(name) > _LONGEST:
            which = "it" if len(expression) > _LONGEST else "the name of a layer"
            raise _refuse(expression, f"{which} has more than {_LONGEST} characters")
        if _RECURSION.search(expression):
            raise _refuse(expression, "no reader knows recursion")
        if math.prod(int(each) or 1 for each in _COUNT.findall(expression)) > _MOST_REPETITIONS:
            raise _refuse(expression, f"it repeats something more than {_MOST_REPETITIONS} times")
        try:
            if regex.match(expression, name, timeout=_SECONDS) is not None:
                return True
        # OverflowError: a count of repetitions beyond any. ValueError: flags that exclude each
        # other.
        except (
            regex.error,
            TimeoutError,
            RecursionError,
            MemoryError,
            OverflowError,
            ValueError,
        ) as error:
            raise _refuse(expression, str(error) or "it takes too long") from None
    return False


def _refuse(expression: str, why: str) -> ArtifactError:
    return ArtifactError(
        f"config.json: the target {EXPRESSION + expression[:80]!r} cannot be matched: {why}"
    )


def _read_layout(group: object, default_format: object) -> Layout | None:
    """Make a layout of a group's description; None where it is malformed or of another kind."""
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(group, dict) or not isinstance(weights, dict):
        return None
    kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
    if kind not in _KINDS or type(bits) is not int or not 1 <= bits <= 8:
        return None
    if kind == "float" and bits != 8:
        return None
    size = _read_size(weights.get("group_size"))
    strategy = weights.get("strategy") or _infer_strategy(weights.get("group_size"))
    block = _read_block(weights.get("block_structure"))
    if strategy not in _STRATEGIES or (strategy == "group") != (size is not None):
        return None
    if (strategy == "block") != (block is not None):
        return None
    inputs = group.get("input_activations")
    rounding = None if inputs is None else _read_inputs(inputs)
    if inputs is not None and rounding is None:
        return None
    named = group.get("format") or default_format
    return Layout(
        packed=_is_packed(named, kind, rounding),
        kind=kind,
        bits=bits,
        symmetric=weights.get("symmetric") is not False,
        strategy=strategy,
        group_size=size,
        block=block,
        inputs=rounding,
    )


def _is_packed(named: object, kind: str, inputs: InputRounding | None) -> bool:
    """Whether codes are packed; what compressed-tensors infers where no format is named."""
    if isinstance(named, str) and named in CONTAINERS:
        return CONTAINERS[named]
    return kind == "int" and inputs is None


def _infer_strategy(group_size: object) -> str:
    if group_size is None:
        return "tensor"
    return "channel" if group_size == -1 else "group"


def _read_size(size: object) -> int | None:
    return size if type(size) is int and size > 0 else None


def _read_block(block: object) -> tuple[int, int] | None:
    if isinstance(block, list) and len(block) == 2:
        rows, columns = block
        if type(rows) is int and type(columns) is int and rows > 0 and columns > 0:
            return (rows, columns)
    return None


def _read_inputs(inputs: object) -> InputRounding | None:
    if not isinstance(inputs, dict):
        return None
    kind, bits, strategy = (inputs.get(key) for key in ("type", "num_bits", "strategy"))
    dynamic = inputs.get("dynamic", False)
    if kind not in _KINDS or type(bits) is not int or not 1 <= bits <= 8:
        return None
    if not isinstance(strategy, str) or not isinstance(dynamic, bool):
        return None
    size = _read_size(inputs.get("group_size"))
    return InputRounding(kind, bits, inputs.get("symmetric") is not False, dynamic, strategy, size)
