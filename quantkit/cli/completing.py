"""What a shell may offer for the word under the cursor; loads neither torch nor a model."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from typer.core import TyperArgument

from quantkit.capacity import GPUS
from quantkit.cli.init import CHOICES
from quantkit.cli.serve import SERVERS
from quantkit.environments.places import RUNTIMES
from quantkit.ggml_types import FILE_TYPES, GGUF
from quantkit.recipe import shipped_recipes
from quantkit.recipe.refusals import FIRST, list_keys


@dataclass(frozen=True)
class Candidates:
    """Words that fit, and whether the name of a file would fit too."""

    words: tuple[tuple[str, str], ...]
    """Each with what it means, or an empty string."""
    takes_files: bool = False


def split_line(line: str) -> list[str]:
    """Split what was typed up to the cursor into words; the last is the one to complete."""
    for closing in ("", '"', "'"):
        try:
            words = shlex.split(line + closing)
        except ValueError:
            continue
        begins = not closing and (not line or line[-1].isspace()) and not line.endswith("\\ ")
        return [*words, ""] if begins or not words else words
    return [""]


def find_candidates(program: Any, words: list[str]) -> Candidates:
    """Return what may stand in the place of the last of `words`, the first being the program."""
    *before, word = words[1:] or [""]
    command, expects, position, only_arguments = program, None, 0, False
    for each in before:
        if expects is not None:
            expects = None
        elif each == "--":
            only_arguments = True
        elif each.startswith("-") and not only_arguments:
            expects = None if "=" in each else _find_option(command, each)
        elif hasattr(command, "commands"):
            command = command.commands.get(each)
            if command is None:
                return Candidates(())
        else:
            position += 1
    if expects is not None:
        return _choose(_offer_values(expects, word), word)
    if word.startswith("-") and not only_arguments:
        name, equals, value = word.partition("=")
        if not equals:
            return _choose(Candidates(tuple(_list_options(command))), word)
        option = _find_option(command, name)
        return (
            Candidates(()) if option is None else _choose(_offer_values(option, value), value, name)
        )
    if hasattr(command, "commands"):
        shown = (each for each in command.commands.values() if not each.hidden)
        return _choose(Candidates(tuple((each.name, _shorten(each.help)) for each in shown)), word)
    arguments = [each for each in command.params if isinstance(each, TyperArgument)]
    if not arguments or (position >= len(arguments) and arguments[-1].nargs != -1):
        return Candidates(())
    return _choose(_offer_values(arguments[min(position, len(arguments) - 1)], word), word)


def _choose(candidates: Candidates, word: str, option: str | None = None) -> Candidates:
    """Keep what begins with `word`; behind `--option=` the whole is what is completed."""
    front = "" if option is None else f"{option}="
    kept = tuple((front + each, help) for each, help in candidates.words if each.startswith(word))
    return Candidates(kept, candidates.takes_files and option is None)


def _find_option(command: Any, name: str) -> Any:
    """Return the option of that name if it takes a value, else None."""
    for option in command.params:
        if name in option.opts and not isinstance(option, TyperArgument):
            return None if option.is_flag else option
    return None


def _list_options(command: Any) -> Iterator[tuple[str, str]]:
    for option in command.params:
        if not isinstance(option, TyperArgument) and not option.hidden:
            for name in (*option.opts, *option.secondary_opts):
                if name.strip():
                    yield name.strip(), _shorten(option.help)
    yield "--help", "Show this message and exit."


def _offer_values(parameter: Any, word: str) -> Candidates:
    """Return the values that are known for an option or an argument."""
    metavar = str(parameter.metavar)
    if "|" in metavar:
        return Candidates(_without_meaning(metavar.split("|")))
    if metavar.startswith("RECIPE"):
        return Candidates(
            _without_meaning(path.stem for path in shipped_recipes()), takes_files=True
        )
    if metavar == "KEY=VALUE":
        return Candidates(tuple(_list_settings(word)))
    if metavar == "FORMAT":
        types = (f"{GGUF}:{name}" for name in FILE_TYPES)
        return Candidates(_without_meaning(["compressed-tensors", "safetensors", *types]))
    if metavar == "RUNTIME":
        return Candidates(_without_meaning(SERVERS))
    if metavar == "NAME" and parameter.name == "name":
        return Candidates(_without_meaning(RUNTIMES))
    if "--gpu" in parameter.opts:
        here = ("auto", "cpu") if parameter.name == "gpu" else ()
        return Candidates(_without_meaning([*here, *GPUS]))
    if metavar == "GPU=DOLLARS":
        return Candidates(_without_meaning(f"{name}=" for name in GPUS))
    return Candidates((), takes_files=True)


def _without_meaning(words: Iterable[str]) -> tuple[tuple[str, str], ...]:
    return tuple((word, "") for word in words)


def _list_settings(word: str) -> Iterator[tuple[str, str]]:
    """Yield `key=` for every key of a recipe; behind it `key=value`, where the values are few."""
    key, equals, _ = word.partition("=")
    if equals:
        yield from ((f"{key}={each}", "") for each in CHOICES.get(key.replace(FIRST, ""), ()))
    else:
        yield from ((f"{each}=", meaning) for each, meaning in list_keys())


def _shorten(text: str | None) -> str:
    """The first sentence of a help."""
    return " ".join((text or "").split()).partition(". ")[0].rstrip(".")
