from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file

from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.errors import CheckpointError, PlanError, ResourceError
from quantkit.planning import make_plan
from quantkit.recipe import Recipe, validate
from quantkit.records import FoldPlan, LinearPlan, Plan
from tests.helpers import make_pico_model

CALIBRATION = {"data": "x.txt", "samples": 8, "sequence_length": 64}
GATE = {"data": "y.txt", "sequence_length": 64}


def make_recipe(**quantize: Any) -> Recipe:
    settings = {"group_size": 32, **quantize}
    return validate({"version": 1, "quantize": settings, "calibration": CALIBRATION, "gate": GATE})


def open_folder(folder: Path) -> Checkpoint:
    return open_checkpoint(resolve_source(str(folder)))


@pytest.fixture(scope="module")
def picos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """64 wide, 96 in the middle: both divide by 32, and only the first by 64."""
    root = tmp_path_factory.mktemp("picos")
    return {
        family: open_folder(
            make_pico_model(
                root / family, family=family, intermediate=96, vocab=64, tokenizer=False
            )
        )
        for family in ("llama", "qwen2", "olmo2")
    }


def all_linears(plan: Plan) -> dict[str, LinearPlan]:
    return {
        linear.name: linear
        for block in plan.blocks
        for group in block.groups
        for linear in group.linears
    }


def problems_of(recipe: Recipe, checkpoint: Checkpoint, *, gate: bool = True) -> tuple[str, ...]:
    with pytest.raises(PlanError) as caught:
        make_plan(recipe, checkpoint, gate=gate)
    assert not any("\n" in problem for problem in caught.value.problems)
    return caught.value.problems


# --- what is planned --------------------------------------------------------------------------


def test_plan_lists_every_layer_in_the_order_of_the_forward(picos: dict[str, Checkpoint]) -> None:
    """Blocks, groups, shapes, biases and folds."""
    plan = make_plan(make_recipe(), picos["qwen2"])

    assert plan.family == "qwen2"
    assert [block.prefix for block in plan.blocks] == ["model.layers.0", "model.layers.1"]
    groups = plan.blocks[1].groups
    found = [
        [
            (
                linear.name.rpartition(".")[2],
                linear.out_features,
                linear.in_features,
                linear.has_bias,
            )
            for linear in group.linears
        ]
        for group in groups
    ]
    assert found == [
        [("q_proj", 64, 64, True), ("k_proj", 32, 64, True), ("v_proj", 32, 64, True)],
        [("o_proj", 64, 64, False)],
        [("gate_proj", 96, 64, False), ("up_proj", 96, 64, False)],
        [("down_proj", 64, 96, False)],
    ]
    assert groups[0].fold == FoldPlan("model.layers.1.input_layernorm", "norm")
    assert groups[1].fold == FoldPlan("model.layers.1.self_attn.v_proj", "linear", 2, 16)


def test_ignore_then_first_override_then_the_recipe_decide(picos: dict[str, Checkpoint]) -> None:
    """Each layer gets its own scheme, group size and method."""
    recipe = make_recipe(
        method="gptq",
        ignore=["lm_head", "model.layers.0.mlp.*"],
        overrides=[
            {"match": "*.1.*.down_proj", "scheme": "w8a16", "group_size": "channel"},
            {"match": "*.down_proj", "scheme": "w4a16_asym"},
            {"match": "*.o_proj", "group_size": 64, "method": "rtn"},
            {"match": "*.1.mlp.*", "scheme": "none"},
        ],
    )

    linears = all_linears(make_plan(recipe, picos["llama"]))

    def settings(name: str) -> tuple[str, int | None, str]:
        linear = linears[f"model.layers.{name}"]
        return linear.scheme.name, linear.group_size, linear.method.name

    assert settings("0.self_attn.q_proj") == ("w4a16", 32, "gptq")
    assert settings("0.self_attn.o_proj") == ("w4a16", 64, "rtn")
    assert settings("0.mlp.down_proj") == ("none", None, "gptq")
    assert settings("1.mlp.down_proj") == ("w8a16", None, "gptq")
    assert settings("1.mlp.up_proj") == ("none", None, "gptq")


@pytest.mark.parametrize("tied", [True, False])
def test_lm_head_may_be_ignored_whether_tied_or_not(tmp_path: Path, tied: bool) -> None:
    """It is a layer of the model in both cases, and the default recipe ignores it."""
    folder = make_pico_model(tmp_path, tied=tied, vocab=64, tokenizer=False)

    assert all_linears(make_plan(make_recipe(ignore=["lm_head"]), open_folder(folder)))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"dtype": "float32"}, "float32"),
        ({"dtype": None, "torch_dtype": "float16"}, "float16"),
        ({"dtype": None}, "bfloat16"),
    ],
)
def test_scales_follow_the_dtype_of_the_config(
    picos: dict[str, Checkpoint], changes: dict[str, Any], expected: str
) -> None:
    """Without one in the config it is that of the weights."""
    pico = picos["llama"]
    config = {**pico.config, **changes}
    checkpoint = Checkpoint(pico.source, config, pico.tensors, pico.side_files)

    assert make_plan(make_recipe(), checkpoint).scale_dtype == expected


# --- sizes ------------------------------------------------------------------------------------


def bytes_of_compressed_tensors(
    weight: torch.Tensor, bits: int, symmetric: bool, group: Any
) -> int:
    """What compressed-tensors' own compressor makes of a weight."""
    strategy = "channel" if group == "channel" else "group"
    size = None if group == "channel" else group
    arguments = QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=size
    )
    groups = 1 if size is None else weight.shape[1] // size
    state = {"weight": weight, "weight_scale": torch.ones((len(weight), groups)).to(weight.dtype)}
    if not symmetric:
        state["weight_zero_point"] = torch.zeros((len(weight), groups), dtype=torch.int8)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    compressed = PackedQuantizationCompressor.compress(state, scheme)
    return sum(tensor.numel() * tensor.element_size() for tensor in compressed.values())


@pytest.mark.parametrize(
    ("scheme", "bits", "symmetric"),
    [("w4a16", 4, True), ("w4a16_asym", 4, False), ("w8a16", 8, True)],
)
@pytest.mark.parametrize("group", [32, "channel"])
def test_artifact_bytes_are_those_that_compressed_tensors_makes(
    tmp_path: Path, scheme: str, bits: int, symmetric: bool, group: Any
) -> None:
    """To the byte, with an output dimension that fills no whole words of zero points."""
    folder = make_pico_model(tmp_path, intermediate=96, vocab=64, kv_heads=1, tokenizer=False)
    tensors = load_file(folder / "model.safetensors")

    plan = make_plan(make_recipe(scheme=scheme, group_size=group), open_folder(folder))

    expected = sum(
        bytes_of_compressed_tensors(tensor, bits, symmetric, group)
        if name.endswith("proj.weight")
        else tensor.numel() * 2
        for name, tensor in tensors.items()
    )
    assert plan.artifact_bytes == expected
    assert plan.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert plan.baseline_bytes == 2 * plan.parameters
    assert plan.bits_per_weight == 8 * expected / plan.parameters


def test_a_stored_copy_of_a_tied_tensor_counts_once(tmp_path: Path) -> None:
    """Some checkpoints store lm_head beside the embedding that it is tied to."""
    folder = make_pico_model(tmp_path, vocab=64, tokenizer=False)
    before = make_plan(make_recipe(), open_folder(folder))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")

    assert make_plan(make_recipe(), open_folder(folder)) == before


def test_memory_is_predicted_from_the_widest_layer(picos: dict[str, Checkpoint]) -> None:
    """Activations and statistics only where something is calibrated; a block always."""
    gptq = make_plan(make_recipe(method="gptq"), picos["llama"])
    rtn = make_plan(make_recipe(method="rtn"), picos["llama"])

    assert gptq.activation_bytes == 8 * 64 * (2 * 64 + 2 * 96) * 4
    assert gptq.statistics_bytes == 96 * 96 * 4 * 5
    assert (rtn.activation_bytes, rtn.statistics_bytes) == (0, 0)
    parameters = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64 + 2 * 64
    assert gptq.block_bytes == rtn.block_bytes == 4 * parameters
    assert gptq.disk_bytes > 2 * gptq.artifact_bytes


# --- headers only -----------------------------------------------------------------------------


def write_sparse(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """A checkpoint with a header, a little garbage, and a hole where its weights should be."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * 2
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text + b"\xff" * 4096)
        handle.truncate(8 + len(text) + end)


def llama_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, middle = config["hidden_size"], config["intermediate_size"]
    values = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for index in range(config["num_hidden_layers"]):
        inside = f"model.layers.{index}"
        shapes |= {
            f"{inside}.input_layernorm.weight": (hidden,),
            f"{inside}.post_attention_layernorm.weight": (hidden,),
            f"{inside}.self_attn.q_proj.weight": (hidden, hidden),
            f"{inside}.self_attn.k_proj.weight": (values, hidden),
            f"{inside}.self_attn.v_proj.weight": (values, hidden),
            f"{inside}.self_attn.o_proj.weight": (hidden, hidden),
            f"{inside}.mlp.gate_proj.weight": (middle, hidden),
            f"{inside}.mlp.up_proj.weight": (middle, hidden),
            f"{inside}.mlp.down_proj.weight": (hidden, middle),
        }
    return shapes


@pytest.mark.skipif(sys.platform != "linux", reason="counts the bytes read in /proc")
def test_planning_eight_billion_weights_reads_headers_only(
    picos: dict[str, Checkpoint], tmp_path: Path
) -> None:
    """Fourteen gigabytes of garbage behind a header are never read, and the answer is quick."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    config = {**picos["llama"].config, **sizes, **heads, "vocab_size": 128256}
    write_sparse(tmp_path / "big", config, llama_shapes(config))
    make_plan(make_recipe(), picos["llama"])  # everything is imported from here on

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before, start = bytes_read(), time.process_time()
    plan = make_plan(make_recipe(), open_folder(tmp_path / "big"))

    assert time.process_time() - start < 5
    assert bytes_read() - before < 1_000_000
    assert plan.parameters == 7_504_924_672
    assert len(all_linears(plan)) == 224


# --- problems ---------------------------------------------------------------------------------


def test_group_size_that_does_not_divide_is_one_line_with_what_would(
    picos: dict[str, Checkpoint],
) -> None:
    """Layers of all blocks are joined; sizes that divide are named."""
    problems = problems_of(make_recipe(group_size=64), picos["llama"])

    assert problems == (
        "model.layers.*.mlp.down_proj (2 layers): group_size 64 does not divide in_features 96; "
        "use 32 or channel, or leave these layers out with an override or an ignore pattern",
    )
    fixed = make_recipe(group_size=64, overrides=[{"match": "*.down_proj", "group_size": 32}])
    assert make_plan(fixed, picos["llama"])


def test_rows_that_cannot_be_packed_are_found(tmp_path: Path) -> None:
    """Eight 4-bit codes make a word: 36 inputs leave half a word over, 8-bit codes none."""
    checkpoint = open_folder(
        make_pico_model(tmp_path, hidden=32, intermediate=36, vocab=64, tokenizer=False)
    )

    (problem,) = problems_of(make_recipe(group_size="channel"), checkpoint)
    assert "mlp.down_proj (2 layers): in_features 36 is not a multiple of 8" in problem
    (problem,) = problems_of(make_recipe(), checkpoint)
    assert "in_features 36; leave these layers out" in problem
    assert make_plan(make_recipe(group_size="channel", scheme="w8a16"), checkpoint)


@pytest.mark.parametrize(
    ("quantize", "words"),
    [
        ({"ignore": ["lm_hed"]}, "ignore[0] 'lm_hed' matches no layer; did you mean 'lm_head'?"),
        (
            {"overrides": [{"match": "*.down_prj", "scheme": "w8a16"}]},
            "overrides[0].match '*.down_prj' matches no layer; did you mean '*.down_proj'?",
        ),
        (
            {"ignore": ["lm_head", "model.layers.7.mlp.up_proj"]},
            "ignore[1] 'model.layers.7.mlp.up_proj' matches no layer; did you mean 'model.layers.",
        ),
        ({"ignore": ["lm_head", "re:.*down"]}, "not a regular expression"),
        ({"ignore": ["lm_head", "zzz"]}, "(layers of this model: *.q_proj, *.k_proj"),
        ({"ignore": []}, "quantizing lm_head is not built yet: add lm_head to quantize.ignore"),
        (
            {"overrides": [{"match": "*embed_tokens", "scheme": "w8a16"}]},
            "names model.embed_tokens: quantizing layers outside of the decoder blocks is not",
        ),
    ],
)
def test_patterns_that_cannot_be_followed_are_explained(
    picos: dict[str, Checkpoint], quantize: dict[str, Any], words: str
) -> None:
    """A pattern without a layer gets the nearest name; what is not built yet is said."""
    problems = problems_of(make_recipe(**quantize), picos["llama"])

    assert any(words in problem for problem in problems)


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_layers_that_vllm_fuses_must_agree(picos: dict[str, Checkpoint], family: str) -> None:
    """One scheme and group size for q/k/v and for gate/up; where traced, for a shared input."""
    recipe = make_recipe(
        method="gptq",
        ignore=["lm_head", "*.k_proj"],
        overrides=[{"match": "*.up_proj", "group_size": 64}],
    )

    attention, mlp = problems_of(recipe, picos[family])

    inside = "model.layers.*"
    assert attention == (
        f"{inside}.self_attn.q_proj w4a16/32, {inside}.self_attn.k_proj none, "
        f"{inside}.self_attn.v_proj w4a16/32 (2 blocks): vLLM makes one layer of these; give all "
        f"of them the same scheme and group_size"
    )
    assert mlp.startswith(f"{inside}.mlp.gate_proj w4a16/32, {inside}.mlp.up_proj w4a16/64 (2 bl")


def test_methods_may_differ_within_a_fused_layer(picos: dict[str, Checkpoint]) -> None:
    """How codes were chosen does not show in how they are stored."""
    recipe = make_recipe(overrides=[{"match": "*.k_proj", "method": "rtn"}])

    assert make_plan(recipe, picos["llama"])


def test_scaling_needs_a_family_that_says_where_to(picos: dict[str, Checkpoint]) -> None:
    """awq on a traced model names the methods that work."""
    (problem,) = problems_of(make_recipe(method="awq"), picos["olmo2"])

    assert "(14 layers): method awq scales inputs" in problem
    assert problem.endswith("use method gptq or rtn")
    assert make_plan(make_recipe(method="gptq"), picos["olmo2"]).family == "structural"


def test_missing_sections_are_problems_only_where_they_are_needed(
    picos: dict[str, Checkpoint],
) -> None:
    """Calibration for methods that look at it, the gate unless it is turned off."""
    bare = validate({"version": 1, "quantize": {"group_size": 32, "method": "awq"}})
    rounding = validate({"version": 1, "quantize": {"group_size": 32, "method": "rtn"}})

    calibration, gate = problems_of(bare, picos["llama"])
    assert calibration.startswith("method awq needs calibration data: add a `calibration:`")
    assert gate.startswith("the recipe has no gate: add a `gate:` section with `data:`")
    assert problems_of(bare, picos["llama"], gate=False) == (calibration,)
    assert problems_of(rounding, picos["llama"]) == (gate,)
    assert make_plan(rounding, picos["llama"], gate=False)


def test_windows_longer_than_the_model_are_problems(picos: dict[str, Checkpoint]) -> None:
    """512 positions: calibration and gate are both checked, and only where they are used."""
    recipe = validate(
        {
            "version": 1,
            "quantize": {"group_size": 32, "method": "gptq"},
            "calibration": {**CALIBRATION, "sequence_length": 513},
            "gate": {**GATE, "sequence_length": 1024},
        }
    )

    assert problems_of(recipe, picos["llama"]) == (
        "calibration.sequence_length 513 is more than the model's 512 positions: use 512 or less",
        "gate.sequence_length 1024 is more than the model's 512 positions: use 512 or less",
    )
    assert len(problems_of(recipe, picos["llama"], gate=False)) == 1


def test_scheme_that_the_format_lacks_is_a_problem(picos: dict[str, Checkpoint]) -> None:
    """The nearest one that it has is offered."""
    recipe = Recipe.model_validate(
        {
            "version": 1,
            "quantize": {"scheme": "w8a8", "method": "rtn"},
            "export": [{"format": "onnx"}],
            "calibration": CALIBRATION,
            "gate": GATE,
        }
    )

    assert problems_of(recipe, picos["llama"]) == (
        "format onnx has no scheme w8a8; the nearest that it has is w8a16 (all: w4a16, w4a16_asym, "
        "w8a16)",
    )


def test_weights_that_are_no_floats_are_a_problem(tmp_path: Path) -> None:
    """A checkpoint in FP8 without a quantization_config is quantized all the same."""
    folder = make_pico_model(tmp_path, vocab=64, tokenizer=False)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")

    (problem,) = problems_of(make_recipe(), open_folder(folder))
    assert "mlp.up_proj (1 layer): the weight is F8_E4M3, which cannot be quantized" in problem


def test_all_problems_come_in_one_error(picos: dict[str, Checkpoint]) -> None:
    """Nobody should have to mend a recipe one line at a time."""
    recipe = validate(
        {
            "version": 1,
            "quantize": {
                "group_size": 64,
                "ignore": ["*.oproj"],
                "overrides": [{"match": "*.k_proj", "scheme": "w8a16"}],
            },
        }
    )

    problems = problems_of(recipe, picos["llama"])

    found = [
        "'*.oproj' matches no layer",
        "quantizing lm_head",
        "does not divide",
        "vLLM makes one layer",
        "needs calibration data",
        "has no gate",
    ]
    assert len(problems) == len(found)
    assert all(words in problem for words, problem in zip(found, problems, strict=True))


def test_quantized_checkpoint_is_refused(picos: dict[str, Checkpoint]) -> None:
    """Before anything else is looked at."""
    pico = picos["llama"]
    config = {**pico.config, "quantization_config": {"quant_method": "compressed-tensors"}}

    with pytest.raises(CheckpointError, match="is quantized already"):
        make_plan(make_recipe(), Checkpoint(pico.source, config, pico.tensors, ()))


def test_a_disk_that_is_too_small_is_found_before_any_work(
    picos: dict[str, Checkpoint], tmp_path: Path
) -> None:
    """A checkpoint with a hole as large as the free space: exit code 5, sizes and place named."""
    config = dict(picos["llama"].config)
    shapes = {name: info.shape for name, info in picos["llama"].tensors.items()}
    shapes["extra"] = (shutil.disk_usage(tmp_path).free // 2,)
    write_sparse(tmp_path / "big", config, shapes)
    checkpoint = open_folder(tmp_path / "big")
    output = tmp_path / "not/yet/there"
    recipe = make_recipe().model_copy(update={"output": str(output)})

    with pytest.raises(ResourceError, match=rf"MB at {output}, and {tmp_path} has") as caught:
        make_plan(recipe, checkpoint)

    assert caught.value.exit_code == 5
    assert make_plan(make_recipe(), checkpoint)
    assert not output.parent.exists()


# --- notes ------------------------------------------------------------------------------------


def notes_of(checkpoint: Checkpoint, **quantize: Any) -> str:
    return "\n".join(make_plan(make_recipe(**quantize), checkpoint).notes)


def test_a_plain_plan_has_nothing_to_note(picos: dict[str, Checkpoint]) -> None:
    """Notes are for what the user should know."""
    assert notes_of(picos["llama"]) == ""


@pytest.mark.parametrize(
    ("quantize", "words"),
    [
        ({"scheme": "w8a16"}, "vLLM's CPU build has no W8A16 kernel"),
        ({"method": "rtn"}, "the calibration data is not used"),
        ({"scheme": "none"}, "nothing will be quantized"),
        (
            {
                "overrides": [
                    {"match": "*.mlp.*", "scheme": "w8a16"},
                    {"match": "*.down_proj", "group_size": 64},
                ]
            },
            "overrides[1].match '*.down_proj' has no effect",
        ),
    ],
)
def test_what_may_surprise_is_noted(
    picos: dict[str, Checkpoint], quantize: dict[str, Any], words: str
) -> None:
    """It works, but perhaps not as one might think."""
    assert words in notes_of(picos["llama"], **quantize)


def test_shapes_without_a_cpu_kernel_are_noted(tmp_path: Path) -> None:
    """vLLM's CPU kernels work on multiples of 32."""
    folder = make_pico_model(tmp_path, kv_heads=1, vocab=64, tokenizer=False)

    assert notes_of(open_folder(folder)) == (
        "model.layers.*.self_attn.k_proj, model.layers.*.self_attn.v_proj (4 layers): 16x64 is "
        "not made of multiples of 32, which vLLM's CPU kernels need"
    )


def test_tensors_without_a_place_are_noted(tmp_path: Path) -> None:
    """They are copied as they are, and their bytes count."""
    folder = make_pico_model(tmp_path, vocab=64, tokenizer=False)
    before = make_plan(make_recipe(), open_folder(folder))
    tensors = load_file(folder / "model.safetensors")
    extra = {f"model.layers.{index}.rotary_emb.inv_freq": torch.ones(8) for index in (0, 1)}
    save_file({**tensors, **extra}, folder / "model.safetensors")

    plan = make_plan(make_recipe(), open_folder(folder))

    assert plan.notes == (
        "2 tensors of the checkpoint have no place in the model and are copied as they are: "
        "model.layers.*.rotary_emb.inv_freq",
    )
    assert plan.artifact_bytes == before.artifact_bytes + 2 * 8 * 4


def test_too_few_tokens_for_the_widest_layer_are_noted(picos: dict[str, Checkpoint]) -> None:
    """Fewer tokens than inputs make a second moment singular."""
    recipe = make_recipe()
    spec = recipe.calibration
    assert spec is not None
    short = spec.model_copy(update={"samples": 1})

    plan = make_plan(recipe.model_copy(update={"calibration": short}), picos["llama"])

    assert plan.notes[0].startswith("64 calibration tokens are fewer than the 96 inputs")
