"""genai_config.json: does it fit its graph, and does it name nothing that must not be loaded?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantkit.checkpoint.headers import read_json
from quantkit.checkpoint.paths import join_inside
from quantkit.errors import ArtifactError, CheckpointError
from quantkit.formats.onnx.container import OnnxFile
from quantkit.formats.onnx.names import GENAI_CONFIG as CONFIG
from quantkit.formats.onnx.wiring import show

_CODE = re.compile(r"library|plugin", re.IGNORECASE)
"""Keys that name compiled code, which onnxruntime-genai loads into its process."""
_FILE = re.compile(r"(file|filename|path|dir|director(y|ie)|folder|prefix)(e?s)?$", re.IGNORECASE)
_LIBRARY = re.compile(r"\.(so(\.\d+)*|dll|dylib)$", re.IGNORECASE)
"""Ends of the names of such code; backends of providers are named by a path."""
_OPTIONS = ("session_options", "run_options")
"""Keys whose content, that of providers included, is handed to ONNX Runtime as it stands."""
SETTINGS = frozenset(
    {
        *("provider_options", "custom_ops_library", "log_id", "log_severity_level"),
        *("log_verbosity_level", "intra_op_num_threads", "inter_op_num_threads"),
        *("enable_cpu_mem_arena", "enable_mem_pattern", "graph_optimization_level"),
        *("use_env_allocators", "session.use_env_allocators"),
        *("session.use_device_allocator_for_initializers", "session.set_denormal_as_zero"),
        *("session.disable_prepacking", "session.enable_quant_qdq", "session.disable_quant_qdq"),
        *("session.enable_quant_qdq_cleanup", "session.qdqisint8allowed"),
        *("session.disable_cpu_ep_fallback", "session.qdq_matmulnbits_accuracy_level"),
        *("session.disable_aot_function_inlining", "session.intra_op.allow_spinning"),
        *("session.inter_op.allow_spinning", "session.force_spinning_stop"),
        *("session.intra_op_thread_affinities", "session.dynamic_block_base"),
        *("session.x64quantprecision", "optimization.enable_gelu_approximation"),
        *("optimization.disable_specified_optimizers", "mlas.enable_gemm_fastmath_arm64_bfloat16"),
        *("ep.cuda.fpa_intb_gemm", "ep.dml.disable_memory_arena"),
        *("disable_synchronize_execution_providers", "memory.enable_memory_arena_shrinkage"),
        *("gpu_graph_id", "hardware_device_type", "hardware_device_id", "hardware_vendor_id"),
        *("device_id", "device_type", "deviceId", "gpu_mem_limit", "arena_extend_strategy"),
        *("do_copy_in_default_stream", "prefer_nhwc", "use_tf32", "cudnn_conv_algo_search"),
        *("cudnn_conv_use_max_workspace", "cudnn_conv1d_pad_to_nc1d", "fuse_conv_bias"),
        *("enable_cuda_graph", "enable_skip_layer_norm_strict_mode", "use_ep_level_unified_stream"),
        *("sdpa_kernel", "tunable_op_enable", "tunable_op_tuning_enable"),
        *("tunable_op_max_tuning_duration_ms", "multi_rotary_cache_concat_offset"),
        *("nv_profile_min_shapes", "nv_profile_max_shapes", "nv_profile_opt_shapes"),
        *("nv_max_workspace_size", "nv_multi_profile_enable", "nv_profile_index"),
        *("enable_graph_capture", "disable_metacommands", "performance_preference"),
        *("device_filter", "enableGraphCapture", "validationMode", "multiRotaryCacheConcatOffset"),
        *("kvCacheQuantizationBits", "preferredLayout", "powerPreference", "dawnBackendType"),
        *("enableInt64", "forceCpuNodeNames", "enable_causallm", "precision", "num_of_threads"),
        *("num_streams", "model_priority", "disable_dynamic_shapes", "enable_opencl_throttling"),
        *("enable_qdq_optimizer", "backend_type", "htp_performance_mode", "htp_arch"),
        *("htp_graph_finalization_optimization_mode", "soc_model", "vtcm_mb"),
        *("rpc_control_latency", "qnn_context_priority", "enable_htp_fp16_precision"),
        *("enable_htp_shared_memory_allocator", "offload_graph_io_quantization"),
    }
)
"""What may be set there. Others write files (profiles, graphs, caches), read them from anywhere, or
are addresses in memory, and each release adds some."""
_CACHES = ("_key_names", "_value_names")
"""Endings of the roles of the key/value cache."""
_MAX_LAYERS = 10_000
_MAX_DEPTH = 20
_MAX_ROLES, _MAX_PATTERN = 64, 256
"""Inputs or outputs, of which each layer may have its own, and characters of such a name."""
_SAME = (
    ("hidden_size", "hidden_size"),
    ("num_hidden_layers", "num_hidden_layers"),
    ("num_attention_heads", "num_attention_heads"),
    ("num_key_value_heads", "num_key_value_heads"),
    ("head_size", "head_dim"),
)
"""Key of the decoder -> key of config.json."""


def read_genai_config(folder: Path) -> Mapping[str, Any] | None:
    """Return genai_config.json, or None where there is none.

    Raises:
        ArtifactError: it is damaged, names files outside of the folder, or code to be loaded, or
            sets an option of ONNX Runtime that is not one of `SETTINGS`.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        config = read_json(join_inside(folder, CONFIG))
        _check_names(config, folder, path, 0)
    except CheckpointError as error:
        raise ArtifactError(str(error)) from None
    return config


def _check_names(
    value: Any, folder: Path, path: Path, depth: int, outer: str = "", *, options: bool = False
) -> None:
    """Walk all keys; what stands in a list has the key of the list.

    Args:
        options: whether it is within one of `_OPTIONS`.

    Raises:
        ArtifactError: one names code, or is an option that no file may choose.
        CheckpointError: one names a file outside of the folder.
    """
    if depth > _MAX_DEPTH:
        raise ArtifactError(f"{path} is nested deeper than any configuration")
    pairs = value.items() if isinstance(value, Mapping) else ((outer, inner) for inner in value)
    for key, inner in pairs:
        file = inner if _FILE.search(key) and isinstance(inner, str) else ""
        if (_CODE.search(key) and inner) or _LIBRARY.search(file):
            raise ArtifactError(
                f"{path} names compiled code to be loaded ({show(key)}), which is refused"
            )
        if file:
            join_inside(folder, file)
        if isinstance(inner, Mapping | list):
            within = options or key in _OPTIONS
            _check_names(inner, folder, path, depth + 1, key, options=within)
        elif options and key not in SETTINGS:
            raise ArtifactError(
                f"{path} sets {show(key)}, an option of ONNX Runtime that no file may choose: "
                f"remove it there"
            )


def check_genai(file: OnnxFile, config: Mapping[str, Any], beside: Mapping[str, Any]) -> list[str]:
    """Compare genai_config.json with the graph and with config.json.

    Args:
        beside: config.json, empty where there is none.

    Returns:
        What does not fit, one line each.
    """
    model = config.get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(decoder, dict):
        return [f"{CONFIG} describes no decoder"]
    name = decoder.get("filename")
    if name != file.path.name:
        return [f"{CONFIG} names the graph {show(repr(name))}, this is {file.path.name}"]
    problems = [*_check_numbers(model, decoder), *_check_search(config, model)]
    if not problems:
        problems += _check_values(file, model, decoder)
    text = beside.get("text_config")
    sizes = text if isinstance(text, dict) else beside
    for key, other in _SAME:
        if sizes.get(other) not in (None, decoder.get(key)):
            problems.append(
                f"{CONFIG} says {key} {decoder.get(key)}, config.json {other} {sizes[other]}"
            )
    if sizes.get("vocab_size") not in (None, model.get("vocab_size")):
        problems.append(
            f"{CONFIG} says vocab_size {model.get('vocab_size')}, config.json {sizes['vocab_size']}"
        )
    return problems


def _check_numbers(model: Mapping[str, Any], decoder: Mapping[str, Any]) -> Iterator[str]:
    keys = ("num_hidden_layers", "num_key_value_heads", "head_size", "hidden_size")
    for where, key in (*((decoder, key) for key in keys), (model, "vocab_size")):
        value = where.get(key)
        if type(value) is not int or not 0 < value < 1 << 31:
            yield f"{CONFIG}: {key} is {show(repr(value))}, not a size"
    layers = decoder.get("num_hidden_layers")
    if type(layers) is int and layers > _MAX_LAYERS:
        yield f"{CONFIG}: {layers} layers are more than any decoder has"
    for side in ("inputs", "outputs"):
        names = decoder.get(side)
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            yield f"{CONFIG} does not name the {side} of the decoder"
        elif len(names) > _MAX_ROLES or any(len(name) > _MAX_PATTERN for name in names.values()):
            yield f"{CONFIG} names more {side} than any decoder has"


def _check_search(config: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[str]:
    search, context = config.get("search"), model.get("context_length")
    longest = search.get("max_length") if isinstance(search, dict) else None
    if type(longest) is int and type(context) is int and longest > context:
        yield f"{CONFIG}: max_length {longest} is beyond the context of {context}"
    end, vocabulary = model.get("eos_token_id"), model.get("vocab_size")
    for token in end if isinstance(end, list) else [end]:
        if type(token) is int and type(vocabulary) is int and not 0 <= token < vocabulary:
            yield f"{CONFIG}: eos_token_id {token} is outside of the vocabulary of {vocabulary}"


def _check_values(
    file: OnnxFile, model: Mapping[str, Any], decoder: Mapping[str, Any]
) -> Iterator[str]:
    """Compare the names and shapes of the graph's inputs and outputs."""
    graph = file.model.graph
    for side, values in (("inputs", graph.input), ("outputs", graph.output)):
        shapes = {value.name: _shape(value) for value in values}
        roles = _expand_names(decoder[side], decoder["num_hidden_layers"])
        caches = {name for name, role in roles.items() if role.endswith(_CACHES)}
        # Of what a graph does not ask for nothing is fed: position ids, for instance.
        needed = caches if side == "inputs" else roles.keys()
        absent = sorted(needed - shapes.keys())
        if absent:
            yield f"{CONFIG} names {len(absent)} {side} that the graph lacks: {_first(absent)}"
        strange = sorted(shapes.keys() - roles.keys())
        if strange:
            yield f"the graph has {len(strange)} {side} that {CONFIG} lacks: {_first(strange)}"
        yield from _check_caches({name: shapes[name] for name in caches & shapes.keys()}, decoder)
    logits = decoder["outputs"].get("logits")
    for value in graph.output:
        shape = _shape(value)
        if value.name == logits and shape and shape[-1] not in (None, model["vocab_size"]):
            yield f"{CONFIG} says vocab_size {model['vocab_size']}, the logits have {shape[-1]}"


def _expand_names(patterns: Mapping[str, str], layers: int) -> dict[str, str]:
    """Return name -> role of what a side of the decoder has, one of each block where it says so."""
    return {
        pattern.replace("%d", str(layer)): str(role)
        for role, pattern in patterns.items()
        for layer in (range(layers) if "%d" in pattern else (0,))
    }


def _check_caches(
    shapes: Mapping[str, list[int | None]], decoder: Mapping[str, Any]
) -> Iterator[str]:
    """Compare [batch, heads, positions, head size] with the config; the first that differs."""
    heads, size = decoder["num_key_value_heads"], decoder["head_size"]
    for name, shape in sorted(shapes.items()):
        if len(shape) == 4 and (shape[1] not in (None, heads) or shape[3] not in (None, size)):
            found = f"{shape[1]} of {shape[3]}"
            yield f"{CONFIG} says {heads} heads of {size}, {show(name)} has {found}"
            return


def _first(names: list[str]) -> str:
    return f"{show(names[0])}{', ...' if len(names) > 1 else ''}"


def _shape(value: Any) -> list[int | None]:
    return [
        dim.dim_value if dim.HasField("dim_value") else None
        for dim in value.type.tensor_type.shape.dim
    ]
