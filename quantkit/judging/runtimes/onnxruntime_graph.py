"""Decoders in ONNX Runtime: finding the graph, looking at its inputs and outputs, running it.

Part of onnxruntime_worker.py, which runs under the interpreter that has onnxruntime: only the
standard library and numpy are imported here.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

CONFIG = "genai_config.json"
MODEL = "model.onnx"

CODE = re.compile(r"library|plugin", re.IGNORECASE)
"""Keys of `CONFIG` that name compiled code, which onnxruntime-genai loads into its process."""
FILE = re.compile(r"(file|filename|path|dir|director(y|ie)|folder|prefix)(e?s)?$", re.IGNORECASE)
LIBRARY = re.compile(r"\.(so(\.\d+)*|dll|dylib)$", re.IGNORECASE)
"""Keys that name files, and the ends of names of code among these: backends of providers."""
OPTIONS = ("session_options", "run_options")
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
"""What may be set there: neither files that are written nor addresses in memory."""

PAST = re.compile(r"past_key_values\.\d+\.(key|value)")
IDS = ("input_ids", "attention_mask", "position_ids")

DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
}
"""ONNX Runtime's name of a type -> numpy's."""


@dataclass(frozen=True)
class Cache:
    """An input that takes keys or values [B, heads, T, size] of the tokens before."""

    name: str
    present: str
    """The output that gives it back, longer by the tokens of the run."""
    dtype: str
    heads: int
    size: int


@dataclass(frozen=True)
class Decoder:
    """A graph in ONNX Runtime, and what is known of it."""

    session: Any
    """None where onnxruntime-genai alone runs it."""
    path: Path
    inputs: Mapping[str, str]
    """Those of `IDS` that the graph asks for -> their type."""
    caches: tuple[Cache, ...]
    vocabulary: int
    dtype: str
    threads: int
    generator: bool
    """Whether genai_config.json says how onnxruntime-genai runs it."""
    positions: int
    stops: frozenset[int]
    models: list[Any] = field(default_factory=list)
    """The model of onnxruntime-genai, once it was loaded."""


def find_file(path: Path) -> Path:
    """The file that ONNX Runtime opens: `path`, or the one in the folder `path`.

    Raises:
        ValueError: there is none, or more than one.
    """
    if path.is_dir():
        files = sorted(path.glob("*.onnx"))
        named = [file for file in files if file.name == MODEL] or files
        if len(named) != 1:
            names = ", ".join(file.name for file in named[:4]) or "none"
            raise ValueError(f"{path} must hold {MODEL} or one ONNX file, and holds {names}")
        path = named[0]
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    return path


def read_config(file: Path) -> Mapping[str, Any]:
    """Return genai_config.json if it stands beside `file` and is about it; else nothing.

    Raises:
        ValueError: it is damaged, names compiled code to be loaded, or sets an option of ONNX
            Runtime that is not one of `SETTINGS`.
    """
    tree = _read_json(file.with_name(CONFIG))
    found = next(_find_refused(tree), None)
    if found is not None:
        raise ValueError(f"{CONFIG} {found}")
    named = _decoder(tree).get("filename")
    return tree if named == file.name else {}


def describe(session: Any, file: Path, config: Mapping[str, Any], threads: int) -> Decoder:
    """Look at the graph's inputs and outputs.

    Raises:
        ValueError: it is not a decoder as `run` runs them.
    """
    outputs = {output.name: output for output in session.get_outputs()}
    inputs = {value.name: value for value in session.get_inputs()}
    logits = outputs.get("logits")
    if logits is None or len(logits.shape) != 3 or not _is_float(logits):
        found = ", ".join(f"{name} {o.type} {o.shape}" for name, o in list(outputs.items())[:4])
        raise ValueError(
            f"{file.name} is a model whose outputs are not what the gate expects: it gives {found}"
            " and not logits [batch, sequence, vocabulary] in float"
        )
    ids = {name: _find_dtype(inputs[name], file) for name in IDS if name in inputs}
    caches = tuple(_find_caches(inputs, outputs, file, config))
    strange = sorted(inputs.keys() - ids.keys() - {each.name for each in caches})
    if strange or "input_ids" not in ids:
        raise ValueError(
            f"{file.name} is a model whose inputs are not what the gate expects: "
            f"{', '.join(strange[:4]) or 'no input_ids'}"
        )
    positions, stops = _find_limits(file, config)
    decoder = Decoder(
        session=session,
        path=file,
        inputs=ids,
        caches=caches,
        vocabulary=0,
        dtype=DTYPES[logits.type],
        threads=threads,
        generator=bool(config),
        positions=positions,
        stops=stops,
    )
    width = logits.shape[2]
    if not isinstance(width, int):
        width = run(decoder, np.zeros((1, 1), np.int64))[0].shape[2]
    return replace(decoder, vocabulary=width)


def _find_caches(
    inputs: Mapping[str, Any], outputs: Mapping[str, Any], file: Path, config: Mapping[str, Any]
) -> Iterator[Cache]:
    """Yield the caches whose sizes are known, and that the graph gives back."""
    size = _head_size(file, config)
    for name, value in inputs.items():
        present = name.replace("past_key_values", "present")
        if PAST.fullmatch(name) and present in outputs and len(value.shape) == 4:
            heads, last = value.shape[1], value.shape[3]
            last = last if isinstance(last, int) else size
            if isinstance(heads, int) and last and _is_float(value):
                yield Cache(name, present, DTYPES[value.type], heads, last)


def run(
    decoder: Decoder,
    ids: np.ndarray,
    past: list[np.ndarray] | None = None,
    *,
    keep: bool = False,
) -> list[np.ndarray]:
    """Compute `ids` [B, T] behind the tokens of `past`.

    Args:
        past: the caches [B, heads, P, size], in the order of `decoder.caches`; None for no tokens.
        keep: whether to return the caches behind the logits.

    Returns:
        logits [B, T, V], and with `keep` each cache [B, heads, P + T, size].

    Raises:
        ValueError: ONNX Runtime refuses.
    """
    rows, length = ids.shape
    if past is None:
        past = [np.zeros((rows, c.heads, 0, c.size), c.dtype) for c in decoder.caches]
    before = past[0].shape[2] if past else 0
    values = {
        "input_ids": ids,
        "attention_mask": np.ones((rows, before + length)),
        "position_ids": np.broadcast_to(np.arange(before, before + length), (rows, length)),
    }
    feed = {name: values[name].astype(dtype) for name, dtype in decoder.inputs.items()}
    feed |= {each.name: value for each, value in zip(decoder.caches, past, strict=True)}
    wanted = ["logits", *(each.present for each in decoder.caches if keep)]
    with told_in_one_line(decoder.path):
        found: list[np.ndarray] = decoder.session.run(wanted, feed)
    if found[0].shape[:2] != ids.shape:
        raise ValueError(
            f"{decoder.path.name} gives logits of {list(found[0].shape[:2])} positions for tokens "
            f"{list(ids.shape)}: the gate needs those of every position"
        )
    return found


@contextmanager
def told_in_one_line(file: Path) -> Iterator[None]:
    """Give ONNX Runtime's own exceptions, which have no common class, the class of bad files."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        raise ValueError(f"ONNX Runtime does not run {file.name}: {error}") from error


def _is_float(value: Any) -> bool:
    return DTYPES.get(value.type, "none").startswith("float")


def _find_dtype(value: Any, file: Path) -> str:
    """numpy's name of an input's type.

    Raises:
        ValueError: there is none.
    """
    if value.type not in DTYPES:
        raise ValueError(f"{file.name} takes {value.name} as {value.type}: numpy has no such type")
    return DTYPES[value.type]


def _head_size(file: Path, config: Mapping[str, Any]) -> int:
    """Channels of a head, where the graph leaves them open; 0 where nothing says it."""
    model = _read_json(file.with_name("config.json"))
    heads = model.get("num_attention_heads")
    sizes = [_decoder(config).get("head_size"), model.get("head_dim")]
    if isinstance(heads, int) and heads > 0 and isinstance(model.get("hidden_size"), int):
        sizes.append(model["hidden_size"] // heads)
    return next((size for size in sizes if isinstance(size, int) and size > 0), 0)


def _find_limits(file: Path, config: Mapping[str, Any]) -> tuple[int, frozenset[int]]:
    """The longest sequence, and the tokens that end a text."""
    model = _read_json(file.with_name("config.json"))
    limits = [_model(config).get("context_length"), model.get("max_position_embeddings")]
    positions = next((n for n in limits if isinstance(n, int) and n > 0), sys.maxsize)
    stops = _read_json(file.with_name("generation_config.json")).get("eos_token_id")
    stops = model.get("eos_token_id") if stops is None else stops
    found = stops if isinstance(stops, list) else [stops]
    return positions, frozenset(stop for stop in found if isinstance(stop, int))


def _model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = config.get("model")
    return found if isinstance(found, dict) else {}


def _decoder(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = _model(config).get("decoder")
    return found if isinstance(found, dict) else {}


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is no file.

    Raises:
        ValueError: it holds something else.
    """
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_bytes(), object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        raise ValueError(f"{path.name} is not a JSON object, or gives a key twice")
    return tree


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object; onnxruntime-genai regards both of two keys that are the same.

    Raises:
        ValueError: there are such.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError
    return found


def _find_refused(tree: Any, outer: str = "", options: bool = False) -> Iterator[str]:
    """Yield what a tree of JSON names that is not used; what stands in a list has the list's key.

    It is the rule of quantkit's formats/onnx/genai.py.
    """
    pairs = tree.items() if isinstance(tree, dict) else ((outer, inner) for inner in tree)
    for key, inner in pairs:
        library = FILE.search(key) and isinstance(inner, str) and LIBRARY.search(inner)
        if library or (CODE.search(key) and inner):
            what = f"names compiled code to be loaded ({key!r:.80})"
            yield f"{what}: programs of artifacts are not run"
        elif isinstance(inner, dict | list):
            yield from _find_refused(inner, key, options or key in OPTIONS)
        elif options and key not in SETTINGS:
            yield f"sets {key!r:.80}, an option of ONNX Runtime that no file may choose"
