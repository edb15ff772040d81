"""Tests of the transformers worker: real processes, real files, an independent comparison."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.errors import ResourceError
from quantkit.judging.evaluate import WORKERS, evaluate
from quantkit.judging.verdict import judge
from quantkit.recipe import GateSpec
from quantkit.records import Event, TokenWindows
from tests.helpers import make_pico_model
from tests.judging.conversation import load, running_worker, say

WINDOWS = TokenWindows(
    ids=np.random.default_rng(0).integers(3, 300, (9, 24)),
    weights=np.ones((9, 24), np.float32),
    source="test",
    sha256="0" * 64,
)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pico_model(tmp_path_factory.mktemp("pico") / "baseline")


@pytest.fixture(scope="module")
def artifact(baseline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The baseline rounded to w4a16 in groups of 32, written as compressed-tensors by hand."""
    folder = tmp_path_factory.mktemp("packed") / "artifact"
    shutil.copytree(baseline, folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(baseline / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        groups = tensor.float().unflatten(1, (-1, 32))
        scale = (groups.abs().amax(dim=-1) / 7.5).to(torch.bfloat16)
        codes = (groups / scale.float().unsqueeze(-1)).round().clamp(-8, 7).flatten(1)
        nibbles = (codes.long() + 8).unflatten(1, (-1, 8))
        words = (nibbles << torch.arange(0, 32, 4)).sum(dim=-1)
        layer = name.removesuffix("weight")
        tensors[layer + "weight_packed"] = (words - (words >= 1 << 31) * (1 << 32)).int()
        tensors[layer + "weight_scale"] = scale
        tensors[layer + "weight_shape"] = torch.tensor(tensor.shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights | {"group_size": 32}}
        },
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_measurements_agree_with_an_independent_script(baseline: Path, artifact: Path) -> None:
    """Ten lines of transformers and torch in one process give the same numbers."""
    from transformers import AutoModelForCausalLM

    ids = torch.from_numpy(WINDOWS.ids)
    logs = []
    for folder in (baseline, artifact):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            logs.append(torch.log_softmax(model(ids).logits[:, :-1], dim=-1))
    nll = [torch.nn.functional.nll_loss(log.flatten(0, 1), ids[:, 1:].flatten()) for log in logs]
    kl = torch.nn.functional.kl_div(logs[1], logs[0], log_target=True, reduction="none").sum(-1)
    agreement = (logs[0].argmax(-1) == logs[1].argmax(-1)).float().mean()

    got = evaluate(baseline, artifact, WINDOWS, timeout_seconds=120, device="cpu")

    assert np.mean(got.baseline_nll) == pytest.approx(nll[0].item(), rel=1e-4)
    assert np.mean(got.candidate_nll) == pytest.approx(nll[1].item(), rel=1e-4)
    assert np.mean(got.kl) == pytest.approx(kl.mean().item(), rel=1e-4)
    assert got.kl_max == pytest.approx(kl.max().item(), rel=1e-4)
    assert np.mean(got.agreement) == pytest.approx(agreement.item(), rel=1e-6)
    assert got.finite
    assert got.tokens == 9 * 23
    assert np.mean(got.kl) > 1e-4  # the artifact is really another model
    assert (got.runtime, got.versions["dtype"]) == ("transformers", "float32")
    assert got.versions["torch"] == torch.__version__


def test_a_copy_of_the_baseline_has_a_divergence_of_zero_and_fails(
    baseline: Path, tmp_path: Path
) -> None:
    """Two processes compute the same bits, so a copy is caught by exact equality."""
    copy = shutil.copytree(baseline, tmp_path / "copy")

    got = evaluate(baseline, copy, WINDOWS, timeout_seconds=120, device="cpu")
    judgement = judge(got, GateSpec(data="test"))

    assert (got.kl, got.kl_max) == ((0.0,) * 9, 0.0)
    assert got.agreement == (1.0,) * 9
    assert judgement.verdict == "FAIL"
    assert "exactly zero" in judgement.reasons[0]


def test_a_worker_that_is_killed_in_the_middle_is_an_error(baseline: Path, tmp_path: Path) -> None:
    """SIGKILL, as the kernel sends it when memory runs out, ends the evaluation at once."""
    before = set(children_of_this_process())
    killed: list[int] = []

    def kill_one(event: Event) -> None:
        if event.done and not killed:
            killed.append(max(set(children_of_this_process()) - before))
            os.kill(killed[0], signal.SIGKILL)

    many = TokenWindows(np.tile(WINDOWS.ids, (40, 20)), np.ones((360, 480), np.float32), "test", "")
    with pytest.raises(ResourceError, match="worker was killed by SIGKILL, as the kernel does"):
        evaluate(baseline, baseline, many, timeout_seconds=120, device="cpu", progress=kill_one)

    assert set(children_of_this_process()) <= before


def children_of_this_process() -> list[int]:
    """Process ids, from /proc."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            found.append(int(status.parent.name))
    return found


# --- the protocol, spoken by hand ---------------------------------------------------------------


@pytest.fixture(scope="module")
def worker() -> Iterator[subprocess.Popen[str]]:
    """One worker that the tests below talk to."""
    with running_worker("transformers") as process:
        yield process


def test_loading_tells_vocabulary_dtype_and_versions(
    worker: subprocess.Popen[str], artifact: Path
) -> None:
    """On a CPU the arithmetic is float32, also for a bfloat16 artifact."""
    answer = load(worker, artifact)

    assert answer["ok"] is True
    assert (answer["vocab"], answer["dtype"], answer["device"]) == (300, "float32", "cpu")
    assert answer["unexpected"] == []
    assert {"python", "torch", "transformers", "compressed-tensors"} <= answer["versions"].keys()


def test_logits_of_every_position_are_in_the_file(
    worker: subprocess.Popen[str], baseline: Path, tmp_path: Path
) -> None:
    """float32 [B, T, V], equal to what the model gives in this process."""
    from transformers import AutoModelForCausalLM

    load(worker, baseline)
    ids = WINDOWS.ids[:2, :7].tolist()

    answer = say(worker, op="logits", ids=ids, file=str(tmp_path / "x.f32"))

    model = AutoModelForCausalLM.from_pretrained(baseline, dtype=torch.float32).eval()
    with torch.no_grad():
        want = model(torch.tensor(ids)).logits
    got = np.fromfile(tmp_path / "x.f32", np.float32).reshape(answer["shape"])
    assert answer == {"ok": True, "shape": [2, 7, 300], "finite": True}
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_generation_is_greedy_whatever_the_checkpoint_asks_for(
    worker: subprocess.Popen[str], baseline: Path, tmp_path: Path
) -> None:
    """Sampling and a repetition penalty in generation_config.json are not obeyed."""
    from transformers import AutoModelForCausalLM

    folder = shutil.copytree(baseline, tmp_path / "wild")
    wild = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "eos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(wild))
    model = AutoModelForCausalLM.from_pretrained(baseline, dtype=torch.float32).eval()
    want = WINDOWS.ids[0, :5].tolist()
    with torch.no_grad():
        for _ in range(12):
            want.append(int(model(torch.tensor([want])).logits[0, -1].argmax()))

    load(worker, folder)
    answer = say(worker, op="generate", prompt_ids=want[:5], max_new_tokens=12)

    assert answer == {"ok": True, "ids": want[5:]}


def test_missing_tensors_are_refused_and_not_invented(
    worker: subprocess.Popen[str], baseline: Path, tmp_path: Path
) -> None:
    """transformers would fill them with random numbers and only warn."""
    folder = shutil.copytree(baseline, tmp_path / "holey")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    answer = load(worker, folder)

    assert answer["ok"] is False
    assert "model.layers.1.mlp.up_proj.weight" in answer["error"]


def test_an_adapter_beside_the_weights_is_refused(
    worker: subprocess.Popen[str], baseline: Path, tmp_path: Path
) -> None:
    """Where peft is installed, transformers would judge another model than what is served."""
    folder = shutil.copytree(baseline, tmp_path / "adapted")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')

    answer = load(worker, folder)

    assert answer["ok"] is False
    assert "holds an adapter (adapter_config.json): merge it first" in answer["error"]


def test_an_answer_that_is_an_error_is_one_line_and_the_worker_goes_on(
    worker: subprocess.Popen[str], baseline: Path, tmp_path: Path
) -> None:
    """A missing folder, a checkpoint's own code and a full disk are told; then all is well."""
    remote = shutil.copytree(baseline, tmp_path / "remote")
    config = json.loads((remote / "config.json").read_text())
    config |= {"model_type": "nameless", "auto_map": {"AutoConfig": "code.Config"}}
    (remote / "config.json").write_text(json.dumps(config))
    (remote / "code.py").write_text("raise SystemExit('code of the checkpoint ran')")

    missing = load(worker, tmp_path / "nowhere")
    refused = load(worker, remote)
    load(worker, baseline)
    full = say(worker, op="logits", ids=[[1, 2, 3]] * 9, file="/dev/full")

    assert (missing["ok"], missing["kind"]) == (False, "other")
    assert (refused["ok"], refused["kind"]) == (False, "other")
    assert "trust_remote_code" in refused["error"]
    assert (full["ok"], full["kind"]) == (False, "disk")
    assert not any("\n" in answer["error"] for answer in (missing, refused, full))
    assert load(worker, baseline)["ok"] is True


def test_the_end_of_the_input_ends_the_worker(baseline: Path) -> None:
    """A worker whose parent died does not stay behind; `exit` is answered first."""
    lines = '{"op": "exit"}\n{"op": "exit"}\n'
    for text, answers in (("", ""), (lines, '{"ok": true}\n')):
        done = subprocess.run(
            [sys.executable, str(WORKERS["transformers"])],
            input=text,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert done.stdout == answers


def test_what_libraries_print_does_not_reach_the_answers(tmp_path: Path) -> None:
    """A transformers that prints, and cannot be imported, gives one clean line all the same."""
    (tmp_path / "transformers.py").write_text(
        "import os\nprint('welcome')\nos.write(1, b'to you')\nimport no_such_package\n"
    )

    done = subprocess.run(
        [sys.executable, str(WORKERS["transformers"])],
        input=json.dumps({"op": "load", "path": str(tmp_path), "device": "cpu", "threads": 1}),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )

    answer = json.loads(done.stdout)
    assert (answer["kind"], answer["package"]) == ("package", "no_such_package")
    assert "to you" in done.stderr
    assert "welcome" in done.stderr
