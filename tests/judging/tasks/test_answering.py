"""The answers of the workers to lm-eval's requests are those of lm-eval's own model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quantkit.calibration.tokenizer import load_tokenizer
from quantkit.errors import CheckpointError, InputError, WorkerError
from quantkit.judging.evaluate import WORKERS
from quantkit.judging.tasks import answering as module
from quantkit.judging.tasks.answering import answer_requests, key_of
from quantkit.judging.tasks.requests import Reader, Span, make_reader, read_request
from quantkit.judging.worker import Pair, running_pair, worker_command
from tests.helpers import make_pico_model, pico_text
from tests.judging.gguf_files import write_gguf
from tests.judging.onnx_files import write_onnx

POSITIONS = 96
TEXT = pico_text(120, seed=3)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tasks")
    return (
        make_pico_model(folder / "one", max_positions=POSITIONS),
        make_pico_model(folder / "two", max_positions=POSITIONS, seed=1),
    )


@pytest.fixture(scope="module")
def pair(models: tuple[Path, Path]) -> Iterator[Pair]:
    command = worker_command(None, WORKERS["transformers"])
    with running_pair(command, command, 120) as pair:
        first, second = (
            {"op": "load", "path": str(model), "device": "cpu", "threads": 1} for model in models
        )
        pair.ask(first, second)
        pair.answers()
        yield pair


@pytest.fixture(scope="module")
def reader(models: tuple[Path, Path]) -> Reader:
    return make_reader(models[0], load_tokenizer(models[0]), 300)


@pytest.fixture(scope="module")
def theirs(models: tuple[Path, Path]) -> list[Any]:
    """lm-eval's own model, of each folder, in float32."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    found = []
    for folder in models:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = load_tokenizer(folder)
        found.append(HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=1))
    return found


def answer(
    pair: Pair, reader: Reader, folder: Path, kind: str, requests: list[tuple[Any, ...]]
) -> list[list[Any]]:
    """The answers of both models, in the order of the requests."""
    steps: list[tuple[int, int]] = []
    both = answer_requests(
        pair,
        reader,
        [(kind, arguments) for arguments in requests],
        folder,
        lambda done, total: steps.append((done, total)),
    )
    assert [done for done, _ in steps] == list(range(1, steps[-1][1] + 1))
    assert not list(folder.iterdir())
    return [[mine[key_of(kind, arguments)] for arguments in requests] for mine in both]


def ask_theirs(theirs: list[Any], kind: str, requests: list[tuple[Any, ...]]) -> list[list[Any]]:
    from lm_eval.api.instance import Instance

    instances = [
        Instance(request_type=kind, doc={}, arguments=arguments, idx=0) for arguments in requests
    ]
    return [getattr(model, kind)(instances, disable_tqdm=True) for model in theirs]


def test_likelihoods_and_greediness_are_those_of_lm_eval(
    pair: Pair, reader: Reader, theirs: list[Any], tmp_path: Path
) -> None:
    """Empty contexts, blanks, one token of several on a row, what is too long, greedy answers."""
    contexts = [(TEXT[:length], {"max_gen_toks": 1}) for length in range(20, 50)]
    greedy = ask_theirs(theirs, "generate_until", contexts)
    requests = [
        ("", TEXT[:20]),
        ("", "<|begin|>a"),
        ("<|begin|>Bace", " difo"),
        (TEXT[:30] + "  ", "ba ce"),
        *((TEXT[:40], answer) for answer in (" a", " b", " c", " d")),
        (TEXT[:400], TEXT[400:430]),
        (TEXT[:4], TEXT[4:120]),
        # Not each most probable token is a text that is read as this token again.
        *(
            (context, token)
            for texts in greedy
            for (context, _), token in zip(contexts, texts, strict=True)
            if token and theirs[0]._encode_pair(context, token)[1]
        ),
    ]

    mine = answer(pair, reader, tmp_path, "loglikelihood", requests)

    for got, want in zip(mine, ask_theirs(theirs, "loglikelihood", requests), strict=True):
        assert [score for score, _ in got] == pytest.approx([s for s, _ in want], abs=1e-4)
        assert [flag for _, flag in got] == [bool(flag) for _, flag in want]
        assert {flag for _, flag in got} == {True, False}
    assert mine[0] != mine[1]


def test_whole_texts_are_scored_as_by_lm_eval(
    pair: Pair, reader: Reader, theirs: list[Any], tmp_path: Path
) -> None:
    """Also one that is longer than the models' positions."""
    requests = [("ba ce di",), (TEXT,)]

    mine = answer(pair, reader, tmp_path, "loglikelihood_rolling", requests)

    for got, want in zip(mine, ask_theirs(theirs, "loglikelihood_rolling", requests), strict=True):
        assert got == pytest.approx(want, abs=1e-3)


def test_continuations_end_as_those_of_lm_eval(
    pair: Pair, reader: Reader, theirs: list[Any], tmp_path: Path
) -> None:
    """At a stop string, at the number of tokens, and with a context that has to be cut."""
    whole = ask_theirs(theirs, "generate_until", [(TEXT[:60], {"max_gen_toks": 60})])[0][0]
    stop = whole[len(whole) * 2 // 3 :][:3]
    requests = [
        (TEXT[:60], {"max_gen_toks": 60}),
        (TEXT[:60], {"max_gen_toks": 60, "until": [stop]}),
        (TEXT[:60], {"max_gen_toks": 60, "until": ["never", stop], "do_sample": False}),
        (TEXT[:60], {"max_gen_toks": 7, "until": "nowhere", "temperature": 0.0}),
        (TEXT, {"max_gen_toks": 5}),
    ]

    mine = answer(pair, reader, tmp_path, "generate_until", requests)

    assert mine == ask_theirs(theirs, "generate_until", requests)
    assert whole.startswith(mine[0][1])
    assert stop not in mine[0][1]


def test_requests_of_one_row_are_computed_once(
    pair: Pair, reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a length share a request within the limits, and answers of one token share a row."""
    asked: list[Any] = []
    ask = pair.ask

    def listen(first: dict[str, Any], second: dict[str, Any]) -> None:
        asked.append(first["ids"])
        ask(first, second)

    monkeypatch.setattr(pair, "ask", listen)
    requests = [(context, token) for context in ("1+", "2+", "3+") for token in "454"]

    answer(pair, reader, tmp_path, "loglikelihood", requests)
    assert [len(rows) for rows in asked] == [3]
    monkeypatch.setattr(module, "REQUEST_TOKENS", 7)
    answer(pair, reader, tmp_path, "loglikelihood", requests)
    assert [len(rows) for rows in asked[1:]] == [2, 1]


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("generate_until", ("a", {"do_sample": True, "temperature": 1.0}), "sampled text"),
        ("generate_until", ("a", {"temperature": 0.7}), "sampled text"),
        ("generate_until", ("a", {"repetition_penalty": 2.0}), "repetition_penalty"),
        ("generate_until", ("a", {"max_gen_toks": POSITIONS}), "96 new tokens"),
        ("loglikelihood", ("a", TEXT), "96 positions"),
        ("loglikelihood", ("a", ""), "without tokens"),
        ("multiple_answers", ("a",), "multiple_answers"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_computed(
    reader: Reader, kind: str, arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_request(reader, kind, arguments)


def test_a_context_is_cut_from_the_left(reader: Reader) -> None:
    """What the models read is as long as their positions, and ends before the last target."""
    (span,) = read_request(reader, "loglikelihood", (TEXT, "bace"))  # type: ignore[misc]

    assert isinstance(span, Span)
    assert len(span.ids) == POSITIONS
    assert span.ids[-len(span.targets) + 1 :] == span.targets[:-1]


def test_a_runtime_may_have_fewer_positions_than_the_model(models: tuple[Path, Path]) -> None:
    tokenizer = load_tokenizer(models[0])

    assert make_reader(models[0], tokenizer, 300, 8).positions == 8
    assert make_reader(models[0], tokenizer, 300, 1 << 40).positions == POSITIONS


def test_a_model_without_a_tokenizer_has_no_tasks(models: tuple[Path, Path]) -> None:
    with pytest.raises(CheckpointError, match="a BOS or an EOS token"):
        make_reader(models[0], None, 300)


SHORT_WORKER = """
import runpy, sys
import numpy as np
names = runpy.run_path({fake!r})
def write_logits(model, request):
    table = names["make_table"](model["vocab"], model["seed"])
    logits = table[np.array(request["ids"])][:, -request["last"]:]
    logits.tofile(request["file"])
    return {{"ok": True, "shape": list(logits.shape), "finite": not model.get("fault")}}
names["main"].__globals__["write_logits"] = write_logits
names["main"]()
"""


def test_a_worker_may_leave_out_the_logits_that_nobody_looks_at(
    reader: Reader, tmp_path: Path
) -> None:
    """Both give the same; and what is no number is the worker's fault."""
    fake = Path(__file__).parent.parent / "fake_worker.py"
    short = tmp_path / "short_worker.py"
    short.write_text(SHORT_WORKER.format(fake=str(fake)))
    folders = [tmp_path / name for name in ("whole", "short", "bad")]
    for folder in folders:
        folder.mkdir()
        fault = {"fault": "late"} if folder.name == "bad" else {}
        (folder / "fake.json").write_text(json.dumps({"vocab": 300, "seed": 1} | fault))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    requests = [(TEXT[:30], " ba"), (TEXT[:31], TEXT[31:44])]
    with running_pair(worker_command(None, fake), worker_command(None, short), 60) as pair:
        pair.ask(*({"op": "load", "path": str(folder)} for folder in folders[:2]))
        pair.answers()
        whole, part = answer(pair, reader, scratch, "loglikelihood", requests)
        assert whole == part
        pair.ask(*({"op": "load", "path": str(folder)} for folder in folders[1:]))
        pair.answers()
        with pytest.raises(WorkerError, match="candidate's worker answered logits with a NaN"):
            answer(pair, reader, scratch, "loglikelihood", requests)


@pytest.mark.parametrize("runtime", ["llama.cpp", "onnxruntime"])
def test_a_file_of_another_runtime_answers_as_its_baseline_in_transformers(
    models: tuple[Path, Path], reader: Reader, tmp_path: Path, runtime: str
) -> None:
    """In float32, up to what the runtime's arithmetic adds."""
    if runtime == "llama.cpp":
        artifact = write_gguf(models[0], tmp_path / "one-F32.gguf")
    else:
        artifact = write_onnx(models[0], tmp_path / "graph")
    folder = tmp_path / "scratch"
    folder.mkdir()
    commands = [worker_command(None, WORKERS[name]) for name in ("transformers", runtime)]
    with running_pair(*commands, 120) as pair:
        common = {"op": "load", "device": "cpu", "threads": 1}
        pair.ask(common | {"path": str(models[0])}, common | {"path": str(artifact)})
        pair.answers()
        pairs = [(TEXT[:length], TEXT[length : length + 20]) for length in (0, 9, 30, 31, 300)]
        scores = answer(pair, reader, folder, "loglikelihood", pairs)
        texts = answer(pair, reader, folder, "generate_until", [(TEXT[:40], {"max_gen_toks": 40})])

    first, second = ([score for score, _ in mine] for mine in scores)
    assert first == pytest.approx(second, abs=0.05)
    assert first != second
    assert texts[0][0][:4] == texts[1][0][:4]
