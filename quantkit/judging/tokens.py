"""Does a runtime's tokenizer read text as the model's own does (docs/gate.md, "Suspicions")?

A model is judged on token ids, so a tokenizer that cuts text otherwise is not seen in its numbers;
its users would see it. llama.cpp has its own tokenizers, which a name in the file chooses;
onnxruntime-genai has its own reader of tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from quantkit.judging.worker import are_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "I'm sure they'll say it's OK, but we've SEEN they DON'T.",
    "In 2024, 3.14159 and 1234567 differ: 10-20% of 1,000,000!",
    "Two  spaces,\ttab\tand   three, and behind   ",
    "line one\nline two\n\n\nline five\n",
    "def f(x):\n    if x >= 0:\n        return {'a': x ** 2}  # why?\n",
    "naïve café, Straße, Ελληνικά, русский, עברית",
    "中文和日本語のテキスト、한국어.",
    "smile 🙂 and family 👨‍👩‍👧‍👦!!!",
)
"""What pre-tokenizers cut differently: contractions, digits, white space, scripts, symbols.

No text begins with a space: transformers 5 and SentencePiece differ there for Llama 2, and
llama.cpp follows the latter. None is decomposed: llama.cpp does not normalize.
"""

MAX_SPECIAL = 1000
"""Special tokens that are looked at."""


@dataclass(frozen=True)
class Reader:
    """A program that has its own tokenizer.

    advice: what to look at where it cuts text otherwise. absent: what to say of an artifact that
    gives it no tokenizer.
    """

    name: str
    advice: str
    absent: str
    required: bool
    """Whether an artifact without a tokenizer is suspicious."""
    frames: bool
    """Whether it puts something before and behind a prompt without being asked to."""


READERS: Mapping[str, Reader] = MappingProxyType(
    {
        "llama.cpp": Reader(
            name="llama.cpp",
            advice="is tokenizer.ggml.pre right?",
            absent="the GGUF file holds no tokenizer: llama.cpp cannot read text with it",
            required=True,
            frames=True,
        ),
        "onnxruntime": Reader(
            name="onnxruntime-genai",
            advice="is tokenizer.json the model's own, and of a kind that onnxruntime-genai reads?",
            absent="there is no genai_config.json for the graph, so onnxruntime-genai does not run "
            "it, and its tokenizer was not compared with the model's own",
            required=False,
            frames=False,
        ),
    }
)
"""Runtime -> the program whose tokenizer its users get."""


@dataclass(frozen=True)
class TokenizerFindings:
    """What a comparison found; one sentence each."""

    suspicions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def collect_texts(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> list[str]:
    """Return what both tokenizers should read: `TEXTS`, and each token with a text of its own.

    Args:
        tokenizer: the model's own, of transformers.
        vocabulary: tokens that the model has.
    """
    return [*TEXTS, *_special_tokens(tokenizer, vocabulary)]


def compare_tokens(
    reader: Reader,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    plain: object,
    special: object,
) -> TokenizerFindings:
    """Check that a program's tokenizer gives the ids that the model's own tokenizer gives.

    Args:
        reader: the program.
        tokenizer, vocabulary: as for `collect_texts`.
        plain, special: what its worker answered for the texts of `collect_texts`: ids of each text
            without and with what it adds to a prompt; None without a tokenizer.

    Raises:
        ValueError: the answers are no lists of ids, one for each text.
    """
    if plain is None:
        found = (reader.absent,)
        return TokenizerFindings(found, ()) if reader.required else TokenizerFindings((), found)
    specials = _special_tokens(tokenizer, vocabulary)
    got, framed = _as_ids(plain), _as_ids(special)
    if not len(got) == len(framed) == len(TEXTS) + len(specials):
        raise ValueError("the ids are not those of the texts")
    wrong = (
        *_compare_texts(reader, tokenizer, got[: len(TEXTS)]),
        *_compare_specials(reader, specials, got[len(TEXTS) :]),
    )
    if wrong:
        return TokenizerFindings(wrong)
    if reader.frames:
        return TokenizerFindings(_compare_frame(reader, tokenizer, got[0], framed[0]))
    return TokenizerFindings(notes=_describe_frame(reader, tokenizer, got[0], framed[0]))


def _special_tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> dict[str, int]:
    """Text of each token that stands outside of the tokenizer's rules -> its id.

    Not those of white space, whose text is written otherwise in the files of SentencePiece.
    """
    added = sorted(tokenizer.added_tokens_decoder.items())[:MAX_SPECIAL]
    return {
        str(token): int(number)
        for number, token in added
        if number < vocabulary and str(token).replace("\u2581", "").strip() == str(token)
    }


def _compare_texts(
    reader: Reader, tokenizer: PreTrainedTokenizerBase, got: Sequence[Sequence[int]]
) -> tuple[str, ...]:
    wrong = []
    for text, ids in zip(TEXTS, got, strict=True):
        want = tokenizer(text, add_special_tokens=False).input_ids
        if list(want) != list(ids):
            wrong.append((text, list(ids), list(want)))
    if not wrong:
        return ()
    text, ids, want = wrong[0]
    place = next(
        (i for i, pair in enumerate(zip(ids, want, strict=False)) if pair[0] != pair[1]),
        min(len(ids), len(want)),
    )
    return (
        f"{reader.name}'s tokenizer gives other ids than the model's own in {len(wrong)} of "
        f"{len(TEXTS)} texts, for instance for {text!r}: {ids[place : place + 4]} and not "
        f"{want[place : place + 4]} from token {place} on; {reader.advice}",
    )


def _compare_specials(
    reader: Reader, want: dict[str, int], got: Sequence[Sequence[int]]
) -> tuple[str, ...]:
    wrong = [
        (text, number, list(ids))
        for (text, number), ids in zip(want.items(), got, strict=True)
        if list(ids) != [number]
    ]
    if not wrong:
        return ()
    text, number, ids = wrong[0]
    return (
        f"{reader.name}'s tokenizer does not know {len(wrong)} of the model's {len(want)} special "
        f"tokens, for instance {text!r}: {ids[:8]} and not [{number}]",
    )


def _compare_frame(
    reader: Reader,
    tokenizer: PreTrainedTokenizerBase,
    plain: Sequence[int],
    framed: Sequence[int],
) -> tuple[str, ...]:
    """Compare what is put before and behind a text: a BOS, or none."""
    want = _frame(tokenizer)
    if list(framed) == want:
        return ()
    return (
        f"{reader.name} begins or ends a prompt otherwise than the model's own tokenizer: "
        f"{_show_ends(framed)} and not {_show_ends(want)}, where the text begins with {plain[0]}; "
        f"are tokenizer.ggml.add_bos_token and add_eos_token right?",
    )


def _describe_frame(
    reader: Reader,
    tokenizer: PreTrainedTokenizerBase,
    plain: Sequence[int],
    framed: Sequence[int],
) -> tuple[str, ...]:
    """Say what a prompt lacks in a program that adds nothing of its own accord."""
    want = _frame(tokenizer)
    if list(plain) == want:
        return ()
    advice = (
        'call tokenizer.update_options(add_special_tokens="true"), or let the prompt hold what is '
        "missing"
    )
    if list(framed) != want:
        advice = (
            f"let the prompt hold what is missing; add_special_tokens gives {_show_ends(framed)}"
        )
    return (
        f"{reader.name} puts nothing before or behind a prompt of its own accord, and the model's "
        f"own tokenizer gives {_show_ends(want)} for a text that is {_show_ends(plain)}: {advice}",
    )


def _frame(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(TEXTS[0], add_special_tokens=True).input_ids)


def _show_ends(ids: Sequence[int]) -> str:
    return f"{' '.join(map(str, ids[:2]))} ... {ids[-1] if ids else ''}".rstrip()


def _as_ids(answer: Any) -> list[list[int]]:
    """Return lists of ids.

    Raises:
        ValueError: they are none.
    """
    if not isinstance(answer, list) or not all(map(are_tokens, answer)):
        raise ValueError("the answer holds no token ids")
    return answer
