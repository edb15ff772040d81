"""Tests of quantkit.judging.probing.probes: prompts from files, and both models in real workers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from quantkit.calibration.tokenizer import load_tokenizer
from quantkit.errors import CalibrationError
from quantkit.judging.evaluate import WORKERS
from quantkit.judging.probing.probes import ProbeFindings, check_prompts, long_windows, run_probes
from quantkit.judging.probing.prompts import load_prompts
from quantkit.judging.worker import Pair, running_pair, worker_command
from quantkit.recipe.judging import ProbesSpec
from quantkit.records import TokenWindows
from tests.helpers import make_pico_model, write_pico_tokenizer
from tests.judging.conversation import load, running_worker, say
from tests.judging.onnx_files import write_table

WORDS = ("<end>", "?", "{", '"a"', ":", "1", "}", *(f"w{number}" for number in range(40)))
"""Each word is a token of its own; the models below say which word follows which."""

PROMPTS = [
    *({"text": f"w{number}"} for number in range(8)),
    *({"text": " ".join(["?"] * (number + 1)), "json": True} for number in range(4)),
]


@contextmanager
def loaded_pair(runtime: str, *models: Path) -> Iterator[Pair]:
    """Both workers of a runtime with a baseline and an artifact."""
    command = worker_command(None, WORKERS[runtime])
    with running_pair(command, command, 60) as pair:
        common = {"op": "load", "device": "cpu", "threads": 1}
        pair.ask(common | {"path": str(models[0])}, common | {"path": str(models[1])})
        pair.answers()
        yield pair


def make_windows(count: int, length: int, tokens: int) -> TokenWindows:
    """Random windows of ids from 1 to `tokens` - 1."""
    ids = np.random.default_rng(0).integers(1, tokens, (count, length))
    return TokenWindows(ids, np.ones(ids.shape, np.float32), "test", "0" * 64)


@dataclass(frozen=True)
class Words:
    """A baseline that counts to the end, answers `?` with JSON, and has written `folder`."""

    folder: Path
    table: np.ndarray

    def look_at(self, change: Callable[[np.ndarray], None]) -> ProbeFindings:
        """Probe a copy of the baseline that was changed."""
        broken = self.table.copy()
        change(broken)
        models = [
            write_table(self.folder / name, table)
            for name, table in (("good.onnx", self.table), ("broken.onnx", broken))
        ]
        # A model of one word of context has nothing to lose beyond a window.
        spec = ProbesSpec(prompts=str(self.folder / "prompts.jsonl"), max_long_ratio=None)
        windows = make_windows(8, 16, len(WORDS))
        with loaded_pair("onnxruntime", *models) as pair:
            return run_probes(
                pair,
                load_tokenizer(self.folder),
                windows.ids,
                long_windows(windows, spec, self.folder),
                len(WORDS),
                spec,
                self.folder,
                baseline=self.folder,
            )


def follow(table: np.ndarray, word: str, following: str) -> None:
    """Let `following` come behind `word`, and nothing else."""
    table[WORDS.index(word)] = 0
    table[WORDS.index(word), WORDS.index(following)] = 12


@pytest.fixture
def words(tmp_path: Path) -> Words:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    lines = [json.dumps(prompt) for prompt in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    table = np.zeros((len(WORDS), len(WORDS)), np.float32)
    json_words = ("?", "{", '"a"', ":", "1", "}", "<end>")
    count = (*(word for word in WORDS if word.startswith("w")), "<end>", "w0")
    for sequence in (json_words, count):
        for word, following in pairwise(sequence):
            follow(table, word, following)
    return Words(tmp_path, table)


def values(findings: ProbeFindings) -> dict[str, float | None]:
    return {found.name: found.value for found in findings.probes}


def failed(findings: ProbeFindings) -> list[str]:
    return [found.name for found in findings.probes if found.verdict == "FAIL"]


def test_a_sound_artifact_answers_as_its_baseline_does(words: Words) -> None:
    """Every prompt is shown with both answers; files of logits are gone."""

    def sharpen(table: np.ndarray) -> None:
        table *= 1.01

    findings = words.look_at(sharpen)

    assert failed(findings) == []
    assert values(findings)["lost_json"] == values(findings)["changed_endings"] == 0
    assert len(findings.generations) == len(PROMPTS)
    last = findings.generations[-1]
    assert (last.prompt, last.artifact) == ("? ? ? ?", '{ "a" : 1 } <end>')
    assert (last.same_tokens, last.baseline_ended, last.artifact_ended) == (6, True, True)
    assert not list(words.folder.glob("*.f32"))


def test_an_artifact_that_loops_fails(words: Words) -> None:
    """It turns in a circle of two words on its way to the end, which it does not reach."""
    findings = words.look_at(lambda table: follow(table, "w20", "w19"))

    assert failed(findings) == ["new_loops", "changed_endings"]
    assert values(findings)["new_loops"] == 8 / 12
    assert findings.generations[0].artifact.endswith("w19 w20 w19 w20")


def test_an_artifact_that_answers_no_json_fails(words: Words) -> None:
    """It leaves out the colon."""
    findings = words.look_at(lambda table: follow(table, '"a"', "1"))

    assert failed(findings) == ["lost_json"]
    assert values(findings)["lost_json"] == 1


def test_an_artifact_that_knows_no_end_fails(words: Words) -> None:
    """The end has the logit of any other word; what it says instead is no loop."""

    def forget(table: np.ndarray) -> None:
        for word, instead in (("w39", "w0"), ("}", "w5")):
            follow(table, word, instead)

    findings = words.look_at(forget)

    assert failed(findings) == ["changed_endings", "special_tokens"]
    (special,) = (found for found in findings.probes if found.name == "special_tokens")
    assert special.value is not None
    assert special.value > 8
    assert "'<end>' changes most" in special.detail
    assert "less probable" in special.detail


def test_an_artifact_that_ends_too_early_fails(words: Words) -> None:
    """The baseline never ends of itself."""
    for word, following in (("w39", "w0"), ("}", "w5")):
        follow(words.table, word, following)

    findings = words.look_at(lambda table: follow(table, "w20", "<end>"))

    (endings,) = (found for found in findings.probes if found.name == "changed_endings")
    assert (endings.value, endings.verdict) == (1, "FAIL")
    assert "ended after 12 where the baseline went on" in endings.detail
    assert "special_tokens" in failed(findings)


def test_a_model_in_transformers_is_as_itself(tmp_path: Path) -> None:
    """The shipped prompts fit a tiny model; one without a tokenizer continues the windows."""
    model = make_pico_model(tmp_path / "model")
    windows = make_windows(12, 16, 300)
    spec = ProbesSpec(max_new_tokens=8)
    long = long_windows(windows, spec, model)
    with loaded_pair("transformers", model, model) as pair:
        findings, blind = (
            run_probes(pair, tokenizer, windows.ids, long, 300, spec, tmp_path, baseline=model)
            for tokenizer in (load_tokenizer(model), None)
        )

    assert values(findings) == {
        "new_loops": 0,
        "changed_endings": None,
        "lost_json": None,
        "special_tokens": 0,
        "long_context": 0,
    }
    assert {found.verdict for found in findings.probes} == {"PASS", "UNJUDGED"}
    assert findings.notes == ()
    assert len(findings.generations) == 24
    assert all(shown.same_tokens == 8 for shown in findings.generations)
    assert values(blind)["new_loops"] == 0
    assert blind.generations == ()
    assert "no tokenizer reads the prompts" in blind.notes[0]


def test_prompts_that_are_continued_at_once_get_what_each_gets_alone(tmp_path: Path) -> None:
    """Whatever their lengths are; what ends is cut behind its end."""
    model = make_pico_model(tmp_path / "model")
    prompts = [[5, 6, 7], list(range(20, 60)), [9]]
    with running_worker("transformers") as worker:
        load(worker, model)
        alone = [
            say(worker, op="generate", prompt_ids=prompt, max_new_tokens=12)["ids"]
            for prompt in prompts
        ]
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": alone[0][4]}))
        load(worker, model)
        ended = [
            say(worker, op="generate", prompt_ids=prompt, max_new_tokens=12)["ids"]
            for prompt in prompts
        ]

        got = say(worker, op="continue", prompts=prompts, max_new_tokens=12)["ids"]

    assert got == ended
    assert len(ended[0]) == 1 + alone[0].index(alone[0][4])
    assert max(map(len, got)) == 12


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{'text': 1}", "prompts.jsonl:2: not valid JSON"),
        ("[1]", "prompts.jsonl:2: a prompt is a JSON object like"),
        ('{"txt": "a"}', "prompts.jsonl:2: the key 'txt' is unknown; did you mean 'text'"),
        ('{"json": true}', "prompts.jsonl:2: a prompt has either 'text' or 'messages'"),
        ('{"text": "a", "messages": []}', "prompts.jsonl:2: a prompt has either"),
        ('{"text": "a", "json": 1}', "prompts.jsonl:2: 'json' is true or false, not 1"),
        ('{"text": 3}', "prompts.jsonl:2: 'text' is of type int; expected a text"),
        ('{"text": " "}', "prompts.jsonl:2: the text is empty"),
        ('{"messages": []}', "prompts.jsonl:2: 'messages' is an empty list"),
        ('{"messages": "a"}', "prompts.jsonl:2"),
        (json.dumps({"text": "a" * 200}), "prompts.jsonl:2: the prompt has "),
    ],
)
def test_a_bad_line_is_named(line: str, said: str, tmp_path: Path) -> None:
    """In one line, with the file and its number."""
    write_pico_tokenizer(tmp_path)
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"text": "a good one"}\n' + line + "\n")

    with pytest.raises(CalibrationError, match=re.escape(said)) as error:
        load_prompts(str(file), load_tokenizer(tmp_path), vocabulary=300, longest=100)

    assert "\n" not in str(error.value)
    if "the prompt has" not in said:
        with pytest.raises(CalibrationError, match=re.escape(said)):
            check_prompts(str(file))


def test_prompts_that_a_model_cannot_take_are_left_out_with_a_note(tmp_path: Path) -> None:
    """Conversations without a template, and shipped prompts that are too long."""
    write_pico_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert len(load_prompts(None, tokenizer, vocabulary=300, longest=448).prompts) == 24
    tokenizer.chat_template = None

    found = load_prompts(None, tokenizer, vocabulary=300, longest=80)

    assert 0 < len(found.prompts) < 15
    assert found.prompts[0].ids[0] == tokenizer.bos_token_id
    assert sorted(re.sub(r"\d+", "N", note) for note in found.notes) == [
        "the shipped prompts: N left out, which are conversations, and the tokenizer has no chat "
        "template",
        "the shipped prompts: N left out, which are longer than the N tokens that the model has "
        "room for",
    ]
    tokenizer.chat_template = "{{ 1 / 0 }}"
    found = load_prompts(None, tokenizer, vocabulary=300, longest=448)
    assert [prompt.where for prompt in found.prompts if "jsonl:13" in prompt.where] == []
    assert found.notes == (
        "the shipped prompts: 9 left out, which are conversations that the chat template refuses",
    )
    own = tmp_path / "own.jsonl"
    own.write_text('{"messages": [{"role": "user", "content": "a"}]}')
    with pytest.raises(CalibrationError, match=r"own.jsonl:1: the chat template refuses it"):
        load_prompts(str(own), tokenizer, vocabulary=300, longest=448)
    with pytest.raises(CalibrationError, match=r"cannot read .*none.jsonl"):
        load_prompts(str(tmp_path / "none.jsonl"), tokenizer, vocabulary=300, longest=80)
