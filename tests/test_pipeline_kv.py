"""Jobs that quantize the key/value cache: what is stored, what is resumed, what it measures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.calibration.data import load_tokenizer
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.errors import InputError
from quantkit.job_windows import load_calibration
from quantkit.recipe import Recipe
from quantkit.records import Event, KvRecord, Plan, SolvedBlock
from quantkit.workspace import load_block, load_kv_record, open_workspace, store_block
from tests.helpers import make_pico_model, write_shards
from tests.pico_jobs import make_pico_job


def make_job(folder: Path, output: str = "out", **quantize: object) -> Recipe:
    """An ungated job on the model in `folder`, which is made if it is not there."""
    settings = {"group_size": 32, "method": "awq+gptq", **quantize}
    return make_pico_job(folder, family="qwen2", output=output, quantize=settings)


def tensors_of(artifact: Path) -> dict[str, Tensor]:
    return load_file(artifact / "compressed-tensors" / "model.safetensors")


def load_float(folder: Path) -> nn.Module:
    """A checkpoint or artifact as transformers computes it, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def calibration_ids(recipe: Recipe, plan: Plan) -> Tensor:
    """The very windows that the job calibrates on."""
    checkpoint = open_checkpoint(resolve_source(recipe.model))
    tokenizer = load_tokenizer(checkpoint.source.folder)
    return torch.from_numpy(load_calibration(recipe.calibration, tokenizer, checkpoint, plan).ids)


@pytest.mark.parametrize(("kv_cache", "scales"), [("fp8", 1), ("fp8_per_head", 2)])
def test_a_cache_alone_leaves_the_weights_as_they_are(
    tmp_path: Path, kv_cache: str, scales: int
) -> None:
    """The artifact has the checkpoint's tensors, and two scales for each layer."""
    recipe = make_job(tmp_path, scheme="none", kv_cache=kv_cache)

    result = quantkit.quantize(recipe, gate=False, device="cpu")

    found = tensors_of(tmp_path / "out")
    original = load_file(tmp_path / "model" / "model.safetensors")
    assert found.keys() - original.keys() == {
        f"model.layers.{layer}.self_attn.{part}_scale" for layer in range(3) for part in "kv"
    }
    for name, tensor in original.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert [record.name for record in result.report.kv_cache] == list(
        result.plan.kv_cache.attentions
    )
    for record in result.report.kv_cache:
        assert len(record.key_scale) == len(record.value_scale) == scales
        assert found[f"{record.name}.k_scale"].flatten().tolist() == list(record.key_scale)
        assert found[f"{record.name}.v_scale"].flatten().tolist() == list(record.value_scale)
    assert result.report.layers == ()
    evidence = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    assert [record["name"] for record in evidence["kv_cache"]] == list(
        result.plan.kv_cache.attentions
    )
    assert result.artifacts[0].tensor_bytes == result.plan.artifact_bytes


def test_scales_are_for_the_keys_and_values_of_the_artifact(tmp_path: Path) -> None:
    """A scale that is folded into v_proj divides its values: those that the artifact caches."""
    recipe = make_job(tmp_path, kv_cache="fp8_per_head")
    result = quantkit.quantize(recipe, gate=False, device="cpu")
    folded = [layer for layer in result.report.layers if layer.name.endswith("o_proj")]
    assert any(layer.awq_exponent for layer in folded)

    model = load_float(tmp_path / "out" / "compressed-tensors")
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith("v_proj"):
            module.register_forward_hook(
                lambda _, __, output, name=name: seen.__setitem__(name, output)
            )
        if hasattr(module, "k_scale"):
            module.quantization_enabled = False
    with torch.no_grad():
        model(input_ids=calibration_ids(recipe, result.plan))

    for record in result.report.kv_cache:
        values = seen[f"{record.name}.v_proj"].unflatten(-1, (2, 16)).abs().amax(dim=(0, 1, 3))
        torch.testing.assert_close(torch.tensor(record.value_absmax), values, rtol=0.03, atol=0.0)


def test_a_job_with_a_cache_is_resumed_to_the_same_bytes(tmp_path: Path) -> None:
    """Blocks that were stored keep their scales; the others see what they would have seen."""
    whole = make_job(tmp_path, "whole", kv_cache="fp8_per_head")
    halves = make_job(tmp_path, "halves", kv_cache="fp8_per_head")
    quantkit.quantize(whole, gate=False, device="cpu")

    def stop(event: Event) -> None:
        if event.stage == "quantize" and event.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantkit.quantize(halves, gate=False, device="cpu", progress=stop)
    changed = make_job(tmp_path, "halves", kv_cache="fp8")
    with pytest.raises(InputError, match="differs in plan"):
        quantkit.quantize(changed, gate=False, device="cpu")
    events: list[Event] = []
    resumed = quantkit.quantize(halves, gate=False, device="cpu", progress=events.append)

    told = {event.message for event in events}
    assert "resumed after 2 blocks, goes on with model.layers.2" in told
    name = Path("compressed-tensors") / "model.safetensors"
    assert (tmp_path / "halves" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(resumed.report.kv_cache) == 3


def test_blocks_of_which_only_the_cache_is_quantized_are_resumed_too(tmp_path: Path) -> None:
    """Each is stored when the walk has left it."""
    recipe = make_job(tmp_path, kv_cache="fp8", scheme="none")
    events: list[Event] = []

    def stop(event: Event) -> None:
        if event.stage == "quantize" and event.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantkit.quantize(recipe, gate=False, device="cpu", progress=stop)
    quantkit.quantize(recipe, gate=False, device="cpu", progress=events.append)

    steps = [(event.done, event.total) for event in events if event.stage == "quantize"]
    assert steps == [(1, 3), (1, 3), (2, 3), (3, 3)]


def test_a_stored_block_keeps_its_scales(tmp_path: Path) -> None:
    """Tensors and record come back as they were."""
    workspace = open_workspace(tmp_path, {}, restart=False)
    record = KvRecord("attn", (0.5, 0.25), (0.125, 0.5), (3.0, 4.0), (5.0, 6.0))
    added = {"attn.k_scale": torch.tensor([0.5, 0.25]).reshape(2, 1, 1).bfloat16()}
    store_block(workspace, SolvedBlock(0, (), {}, (), added=added, kv=record))
    store_block(workspace, SolvedBlock(1, (), {}, ()))

    found = load_block(workspace, 0)

    assert found.kv == load_kv_record(workspace, 0) == record
    assert torch.equal(found.added["attn.k_scale"], added["attn.k_scale"])
    assert load_block(workspace, 1).kv is load_kv_record(workspace, 1) is None


def test_scales_per_head_save_a_model_with_an_outlier_head(tmp_path: Path) -> None:
    """Keys of one head are 2**16 times as large, its queries as small: the same function.

    FP8 has 15 octaves of full precision, so only then a common scale costs the other head its bits.
    """
    folder = make_pico_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}.self_attn"
        tensors[f"{prefix}.k_proj.weight"][:16] *= 2.0**16
        tensors[f"{prefix}.q_proj.weight"][:32] *= 2.0**-16
        tensors[f"{prefix}.q_proj.weight"][32:] *= 4  # So that attention is not nearly uniform.
    write_shards(folder, tensors)
    baseline = load_float(folder)
    divergences = {}

    for kv_cache in ("fp8", "fp8_per_head"):
        recipe = make_job(tmp_path, kv_cache, scheme="none", kv_cache=kv_cache)
        plan = quantkit.quantize(recipe, gate=False, device="cpu").plan
        artifact = load_float(tmp_path / kv_cache / "compressed-tensors")
        ids = calibration_ids(recipe, plan)
        with torch.no_grad():
            logs = [model(input_ids=ids).logits.log_softmax(-1) for model in (baseline, artifact)]
        divergences[kv_cache] = float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())

    assert divergences["fp8_per_head"] < 0.5 * divergences["fp8"]
