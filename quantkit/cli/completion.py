"""`quantkit completion`: a script by which a shell completes commands, options and names.

It is printed, and written nowhere: which file of a user's a shell reads is the user's choice.
"""

from __future__ import annotations

from typing import Annotated

import typer

from quantkit.cli.completing import Candidates, find_candidates, split_line
from quantkit.cli.console import Reply
from quantkit.cli.options import JsonOption, QuietOption
from quantkit.errors import InputError, nearest

EXAMPLE = "Example: source <(quantkit completion bash)"

WORDS_COMMAND = "__complete"
"""What the scripts call, with the shell's name, the line up to the cursor and the shell's word.

Before the line they write `--`: it and the word may begin as options do.
"""

_BASH = """\
# bash completion for quantkit. Now: source <(quantkit completion bash)
# For good: quantkit completion bash > ~/.local/share/bash-completion/completions/quantkit
_quantkit() {
    local line about=
    COMPREPLY=()
    while IFS= read -r line; do
        if [[ -z $about ]]; then about=$line; else COMPREPLY+=("$line"); fi
    done < <("${1/#\\~/$HOME}" __complete bash -- "${COMP_LINE:0:COMP_POINT}" "$2" 2>/dev/null)
    if [[ $about == *files* ]]; then
        while IFS= read -r line; do COMPREPLY+=("$line"); done < <(compgen -f -- "$2")
        compopt -o filenames 2>/dev/null
    fi
    if [[ $about == *open* ]]; then compopt -o nospace 2>/dev/null; fi
}
complete -F _quantkit quantkit
"""

_ZSH = """\
#compdef quantkit
# zsh completion for quantkit. Now: source <(quantkit completion zsh)
# For good: quantkit completion zsh > "${fpath[1]}/_quantkit"
_quantkit() {
    local -a answer values
    answer=("${(@f)$("${(Q)words[1]/#\\~/$HOME}" __complete zsh -- \\
        "${(j: :)words[1,CURRENT-1]} $PREFIX" "$PREFIX" 2>/dev/null)}")
    values=("${(@)answer[2,-1]}")
    if (( $#values )) && [[ $answer[1] == *open* ]]; then
        _describe -t values value values -S ''
    elif (( $#values )); then
        _describe -t values value values
    fi
    if [[ $answer[1] == *files* ]]; then _files; fi
}
if [[ $funcstack[1] == _quantkit ]]; then _quantkit "$@"; else compdef _quantkit quantkit; fi
"""

_FISH = """\
# fish completion for quantkit. Now: quantkit completion fish | source
# For good: quantkit completion fish > ~/.config/fish/completions/quantkit.fish
function __quantkit_complete
    set -l typed (commandline -opc)
    set -l line (commandline -cp | string collect)
    set -l word (commandline -ct | string collect)
    set -l answer ($typed[1] __complete fish -- "$line" "$word" 2>/dev/null)
    printf '%s\\n' $answer[2..-1]
    if string match -q '*files*' -- $answer[1]
        __fish_complete_path "$word"
    end
end
complete -c quantkit -f -a '(__quantkit_complete)'
"""

_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def completion(
    shell: Annotated[
        str, typer.Argument(metavar="bash|zsh|fish", help="The shell that reads the script.")
    ],
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> Reply:
    """Print a script that completes commands, options, recipes and schemes in a shell.

    Its first lines say where it goes.
    """
    if shell not in _SCRIPTS:
        known = ", ".join(_SCRIPTS)
        raise InputError(f"no completion for {shell!r}: {known}{nearest(shell, _SCRIPTS)}")
    script = _SCRIPTS[shell]
    return Reply({"shell": shell, "script": script}, [script.rstrip("\n")])


def complete(
    context: typer.Context,
    shell: Annotated[str, typer.Argument()],
    line: Annotated[str, typer.Argument()],
    word: Annotated[str, typer.Argument()] = "",
) -> Reply:
    """Print what may follow in a line: on the first line what else fits, then a word a line."""
    words = split_line(line)
    found = find_candidates(context.find_root().command, words)
    shown = [_show(shell, each, meaning, words[-1], word) for each, meaning in found.words]
    about = " ".join(filter(None, (_FILES * found.takes_files, _OPEN * _is_open(found)))) or "words"
    return Reply([about, *shown], [about, *shown])


_FILES = "files"
_OPEN = "open"


def _is_open(found: Candidates) -> bool:
    """Whether what is completed goes on without a space."""
    return bool(found.words) and all(each.endswith(("=", ".")) for each, _ in found.words)


def _show(shell: str, candidate: str, meaning: str, typed: str, word: str) -> str:
    """A candidate as a shell takes it."""
    if shell == "fish":
        return f"{candidate}\t{meaning}" if meaning else candidate
    if shell == "zsh":
        escaped = candidate.replace("\\", "\\\\").replace(":", "\\:")
        return f"{escaped}:{meaning}" if meaning else escaped
    # bash replaces its own word, which begins behind the last colon or equals sign.
    front = len(typed) - len(word) if typed.endswith(word) else 0
    return candidate[front:]
