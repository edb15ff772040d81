"""The windows that differ most, in words that can be read (docs/gate.md, "Worst windows")."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np

from quantkit.judging.scoring import WindowScore, WorstPosition
from quantkit.records import TokenWindows
from quantkit.records.measuring import Generation, Parting, TokenChoice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_WINDOWS = 5
BEFORE = 200
"""Characters of the text before that are shown."""

_SPACE = "\N{OPEN BOX}"
_WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"
"""How SentencePiece writes a space in its pieces."""
_BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What decoders put where bytes are no whole character."""


def find_partings(
    scores: Sequence[WindowScore], windows: TokenWindows, tokenizer: PreTrainedTokenizerBase
) -> tuple[Parting, ...]:
    """Describe the windows with the largest mean KL, the worst first.

    Args:
        scores: of the first windows.
        windows: with their numbers in the data, as `select_scored` returns them.
        tokenizer: the baseline's.
    """
    worst = sorted(range(len(scores)), key=lambda window: -scores[window].whole.kl)
    partings = []
    for window in worst[:SHOWN_WINDOWS]:
        numbers = windows.numbers
        partings.append(
            describe_parting(
                scores[window].worst,
                windows.ids[window],
                tokenizer,
                window=window if numbers is None else int(numbers[window]),
                kl=scores[window].whole.kl,
            )
        )
    return tuple(partings)


def describe_parting(
    worst: WorstPosition,
    ids: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int,
    kl: float,
) -> Parting:
    """Describe the position of one window at which the models differ most.

    Args:
        worst: the position.
        ids: int64 [T], the window.
        tokenizer: the baseline's.
        window: its number in the data.
        kl: its mean.
    """

    def name(tokens: Sequence[int], probabilities: Sequence[float]) -> tuple[TokenChoice, ...]:
        return tuple(
            TokenChoice(show_token(token, tokenizer), probability)
            for token, probability in zip(tokens, probabilities, strict=True)
        )

    before = decode(ids[: worst.position + 1].tolist(), tokenizer)
    return Parting(
        window=window,
        kl=kl,
        position=worst.position,
        position_kl=worst.kl,
        before=show_text(before[-BEFORE:]),
        actual=show_token(int(ids[worst.position + 1]), tokenizer),
        baseline=name(worst.baseline, worst.baseline_probabilities),
        artifact=name(worst.candidate, worst.candidate_probabilities),
    )


def describe_generations(
    prompts: Sequence[Sequence[int]],
    baseline: Sequence[Sequence[int]],
    candidate: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    most: int,
) -> tuple[Generation, ...]:
    """Show how both models go on after each prompt.

    Args:
        prompts, baseline, candidate: token ids.
        tokenizer: the baseline's.
        most: tokens that were asked for; a model that gave fewer has ended by itself.
    """
    return tuple(
        Generation(
            prompt=show_text(decode(prompt, tokenizer)),
            baseline=show_text(decode(first, tokenizer)),
            artifact=show_text(decode(second, tokenizer)),
            same_tokens=_count_shared(first, second),
            baseline_ended=len(first) < most,
            artifact_ended=len(second) < most,
        )
        for prompt, first, second in zip(prompts, baseline, candidate, strict=True)
    )


def _count_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Count the tokens that two continuations begin with alike."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def show_token(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a token as it can be read: spaces as open boxes, what cannot be printed escaped.

    A part of a character is shown as the tokenizer's own piece, and an id that the tokenizer does
    not have (models often have more embeddings than tokens) in angle brackets.
    """
    piece = tokenizer.convert_ids_to_tokens(token)
    if not isinstance(piece, str):
        return f"<{token}>"
    text = decode([token], tokenizer)
    if not text or _BROKEN in text:
        return show_text(piece)
    if piece.startswith(_WORD_START) and not text.startswith(" "):
        # SentencePiece's decoder drops the space in front of a text.
        text = f" {text}"
    return show_text(text).replace(" ", _SPACE)


def show_text(text: str) -> str:
    r"""Return `text` with everything that is not printable escaped as in Python (`\n`, `\x1b`)."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of `ids` as it is, special tokens included."""
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )
