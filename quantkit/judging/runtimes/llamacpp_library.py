"""llama.cpp's C interface (llama.h) in the shared object of the wheel xllamacpp.

Part of llamacpp_worker.py, which runs under the interpreter that has the wheel: only the standard
library and numpy are imported here.

The parameters of the interface are structs that change from build to build and are passed by value.
Their layout here is that of BUILD; the library's own defaults are looked at before anything is
loaded, and a library that has others is refused.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import sys
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

BUILD = "2026.10.11549"
"""Version of xllamacpp whose structs are described here; its last part is llama.cpp's build."""

STEP = 512
"""Tokens that are computed at a time: llama.cpp's own default."""

CONTEXT_STEP = 256
"""The length of a context is a multiple of it, as llama.cpp pads it."""

LAST_LINES = 8
"""Warnings and errors of llama.cpp that are kept for a message."""

_KINDS = {"u32": c_uint32, "i32": c_int32, "f32": c_float, "bool": c_bool, "word": ctypes.c_uint64}

_MODEL_PARAMETERS = """
word devices=0 tensor_buft_overrides=0
i32  n_gpu_layers=-1 split_mode=1 load_mode=-1 lazy_mode=1 main_gpu=0
word tensor_split=0 progress_callback=0 progress_callback_user_data=0 kv_overrides=0
bool vocab_only=0 check_tensors=0 use_extra_bufts=1 no_host=0 no_alloc=0 load_mtp=0
"""
_CONTEXT_PARAMETERS = """
u32  n_ctx=512 n_batch=2048 n_ubatch=512 n_seq_max=1 n_rs_seq=0
u32  n_outputs_max=0 n_outputs_max_per_seq=1
i32  n_threads=4 n_threads_batch=4 ctx_type=0
i32  rope_scaling_type=-1 pooling_type=-1 attention_type=-1 flash_attn_type=-1
f32  rope_freq_base=0 rope_freq_scale=0 yarn_ext_factor=-1 yarn_attn_factor=-1
f32  yarn_beta_fast=-1 yarn_beta_slow=-1
u32  yarn_orig_ctx=0
f32  defrag_thold=-1
word cb_eval=0 cb_eval_user_data=0
i32  type_k=1 type_v=1
word unused_1=0 unused_2=0 unused_3=0
bool embeddings=0 offload_kqv=1 no_perf=1 op_offload=1 swa_full=1 kv_unified=0
word samplers=0 n_samplers=0 ctx_other=0
"""
"""Kind, then the fields of it in their order with their defaults, as BUILD answers them."""


def _struct(name: str, fields: list[tuple[str, Any]]) -> Any:
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def _parse(layout: str) -> list[tuple[str, Any, float]]:
    """Return (field, kind, default) of each field."""
    rows = [line.split() for line in layout.strip().splitlines()]
    words = [(kind, word.partition("=")) for kind, *rest in rows for word in rest]
    return [(name, _KINDS[kind], float(default)) for kind, (name, _, default) in words]


def _parameters(name: str, layout: str) -> Any:
    """The struct; what a later build appends to it stays in `rest` as that build fills it."""
    fields = [(field, kind) for field, kind, _ in _parse(layout)]
    return _struct(name, [*fields, ("rest", ctypes.c_uint64 * 32)])


ModelParameters = _parameters("llama_model_params", _MODEL_PARAMETERS)
ContextParameters = _parameters("llama_context_params", _CONTEXT_PARAMETERS)
Batch = _struct(
    "llama_batch",
    [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ],
)

_IDS = POINTER(c_int32)
_FLOATS = POINTER(c_float)
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_log_set": (None, (c_void_p, c_void_p)),
    "llama_backend_init": (None, ()),
    "llama_supports_gpu_offload": (c_bool, ()),
    "llama_model_default_params": (ModelParameters, ()),
    "llama_context_default_params": (ContextParameters, ()),
    "llama_model_load_from_file": (c_void_p, (c_char_p, ModelParameters)),
    "llama_model_free": (None, (c_void_p,)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_model_ftype": (c_int32, (c_void_p,)),
    "llama_ftype_name": (c_char_p, (c_int32,)),
    "llama_model_n_ctx_train": (c_int32, (c_void_p,)),
    "llama_model_has_decoder": (c_bool, (c_void_p,)),
    "llama_init_from_model": (c_void_p, (c_void_p, ContextParameters)),
    "llama_free": (None, (c_void_p,)),
    "llama_n_ctx": (c_uint32, (c_void_p,)),
    "llama_n_batch": (c_uint32, (c_void_p,)),
    "llama_n_ubatch": (c_uint32, (c_void_p,)),
    "llama_n_threads": (c_int32, (c_void_p,)),
    "llama_n_threads_batch": (c_int32, (c_void_p,)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_clear": (None, (c_void_p, c_bool)),
    "llama_decode": (c_int32, (c_void_p, Batch)),
    "llama_get_logits": (_FLOATS, (c_void_p,)),
    "llama_get_logits_ith": (_FLOATS, (c_void_p, c_int32)),
    "llama_vocab_type": (c_int32, (c_void_p,)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_vocab_is_eog": (c_bool, (c_void_p, c_int32)),
    "llama_tokenize": (c_int32, (c_void_p, c_char_p, c_int32, _IDS, c_int32, c_bool, c_bool)),
}
"""Function -> type of its result, types of its arguments."""

_LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)
_WARNING, _ERROR, _CONTINUED = 3, 4, 5


class Library:
    """llama.cpp, and the last warnings and errors that it logged.

    Raises:
        ImportError: the wheel is not there.
        RuntimeError: it is of a build with another interface.
    """

    def __init__(self) -> None:
        self.call = ctypes.CDLL(str(_find_shared_object()))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.call, name, None)
            if function is None:
                raise _other_build(f"it has no {name}")
            function.restype, function.argtypes = result, arguments
        self._lines: list[str] = []
        self._level = 0
        # Kept here: the library calls it for as long as it is loaded.
        self._listener = _LOG_CALLBACK(self._listen)
        self.call.llama_log_set(ctypes.cast(self._listener, c_void_p), None)
        self.call.llama_backend_init()
        self.model_defaults = self.call.llama_model_default_params()
        self.context_defaults = self.call.llama_context_default_params()
        _check_defaults(self.model_defaults, _MODEL_PARAMETERS)
        _check_defaults(self.context_defaults, _CONTEXT_PARAMETERS)

    def _listen(self, level: int, text: bytes | None, _: int | None) -> None:
        self._level = self._level if level == _CONTINUED else level
        line = " ".join((text or b"").decode("utf-8", "replace").split())
        if line and self._level in (_WARNING, _ERROR):
            self._lines = [*self._lines, line][-LAST_LINES:]

    def last_words(self) -> str:
        """Return what was logged since the last time, and forget it."""
        words, self._lines = " | ".join(self._lines), []
        return words or "llama.cpp gives no reason"


class Model:
    """A GGUF file in llama.cpp, and a context that grows with the longest sequence.

    Args:
        library: llama.cpp.
        path: the file, or the first of its parts.
        device: `cpu` for the CPU alone; else llama.cpp uses what it finds.
        threads: threads of its arithmetic.

    Raises:
        ValueError: llama.cpp does not load the file; its own words are in the message.
    """

    def __init__(self, library: Library, path: Path, device: str, threads: int) -> None:
        self.library = library
        self.call = library.call
        self.threads = threads
        self._context: int | None = None
        parameters = _copy(library.model_defaults)
        # Refuses blocks whose scales are not finite, and codes that no encoder writes.
        parameters.check_tensors = True
        # An empty list of devices, which must outlive the call: nothing but the CPU.
        nothing = (c_void_p * 1)()
        if device == "cpu":
            parameters.devices = ctypes.addressof(nothing)
        library.last_words()
        self._model = self.call.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self._model:
            raise ValueError(f"llama.cpp does not load {path.name}: {library.last_words()}")
        self._words = self.call.llama_model_get_vocab(self._model)
        self.vocabulary = int(self.call.llama_vocab_n_tokens(self._words))
        self.positions = int(self.call.llama_model_n_ctx_train(self._model)) or sys.maxsize
        name = self.call.llama_ftype_name(self.call.llama_model_ftype(self._model))
        self.file_type = (name or b"unknown").decode("utf-8", "replace")
        on_gpu = device != "cpu" and self.call.llama_supports_gpu_offload()
        self.device = "gpu" if on_gpu else "cpu"

    def close(self) -> None:
        """Give the memory back."""
        if self._context:
            self.call.llama_free(self._context)
        self.call.llama_model_free(self._model)

    @property
    def predicts(self) -> bool:
        """Whether the model has a decoder, and so gives logits."""
        return bool(self.call.llama_model_has_decoder(self._model))

    @property
    def has_tokenizer(self) -> bool:
        """Whether the file holds one."""
        return bool(self.call.llama_vocab_type(self._words) != 0)

    def ends(self, token: int) -> bool:
        """Whether generation ends with `token`."""
        return bool(self.call.llama_vocab_is_eog(self._words, token))

    def start(self, length: int) -> None:
        """Begin a sequence of up to `length` tokens with an empty key/value cache.

        Raises:
            ValueError: there is no context of this length, for instance for want of memory.
        """
        if self._context is None or self.call.llama_n_ctx(self._context) < length:
            self._make_context(-(-length // CONTEXT_STEP) * CONTEXT_STEP)
        self.call.llama_memory_clear(self.call.llama_get_memory(self._context), True)

    def _make_context(self, length: int) -> None:
        if self._context:
            self.call.llama_free(self._context)
        parameters = _copy(self.library.context_defaults)
        step = min(STEP, length)
        parameters.n_ctx = length
        parameters.n_batch = parameters.n_ubatch = parameters.n_outputs_max = step
        parameters.n_threads = parameters.n_threads_batch = self.threads
        self.library.last_words()
        self._context = self.call.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise ValueError(f"llama.cpp makes no context: {self.library.last_words()}")
        wanted = {"n_batch": step, "n_ubatch": step}
        wanted |= {"n_threads": self.threads, "n_threads_batch": self.threads}
        for name, want in wanted.items():
            got = getattr(self.call, f"llama_{name}")(self._context)
            if got != want:
                raise _other_build(f"{name} was set to {want} and is {got}")

    def run(self, ids: list[int], position: int, *, every: bool) -> np.ndarray:
        """Compute up to STEP tokens behind the `position` tokens that were run since `start`.

        Returns:
            logits float32 [T, V] of every token, or [1, V] of the last; the array is llama.cpp's
            own memory and good until the next call.

        Raises:
            RuntimeError: llama.cpp refuses, or does not keep the logits.
        """
        count = len(ids)
        sequence = ctypes.pointer(c_int32(0))
        batch = Batch(
            n_tokens=count,
            token=(c_int32 * count)(*ids),
            pos=(c_int32 * count)(*range(position, position + count)),
            n_seq_id=(c_int32 * count)(*[1] * count),
            seq_id=(_IDS * count)(*[sequence] * count),
            logits=(c_int8 * count)(*[int(every)] * (count - 1), 1),
        )
        self.library.last_words()
        code = self.call.llama_decode(self._context, batch)
        if code:
            words = self.library.last_words()
            raise RuntimeError(f"llama_decode returned {code} for {count} tokens: {words}")
        rows = count if every else 1
        first = self.call.llama_get_logits(self._context)
        last = self.call.llama_get_logits_ith(self._context, -1)
        distance = _address(last) - _address(first)
        if not first or distance != 4 * (rows - 1) * self.vocabulary:
            raise RuntimeError(f"llama.cpp did not keep the logits of all {rows} positions")
        return np.ctypeslib.as_array(first, shape=(rows, self.vocabulary))

    def tokenize(self, text: str, *, add_special: bool) -> list[int]:
        """Return the ids of `text`; special tokens in it are recognised.

        Args:
            add_special: whether to add what the file says that a prompt begins and ends with.

        Raises:
            ValueError: llama.cpp cannot.
        """
        data = text.encode("utf-8")
        # A token stands for a byte at the least, but for those that are added.
        room = len(data) + 16
        ids = (c_int32 * room)()
        count = self.call.llama_tokenize(self._words, data, len(data), ids, room, add_special, True)
        if count < 0:
            raise ValueError(f"llama.cpp makes {-count} tokens of a text of {len(data)} bytes")
        return list(ids[:count])


def _find_shared_object() -> Path:
    """The shared object in the wheel, which is not imported.

    Raises:
        ImportError: the wheel is not there.
    """
    found = importlib.util.find_spec("xllamacpp")
    for place in (found and found.submodule_search_locations) or ():
        for pattern in ("xllamacpp*.so", "xllamacpp*.pyd"):
            for path in sorted(Path(place).glob(pattern)):
                return path
    raise ImportError("there is no xllamacpp", name="xllamacpp")


def find_version() -> str:
    """Return the version of the wheel."""
    try:
        return importlib.metadata.version("xllamacpp")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _check_defaults(parameters: Any, layout: str) -> None:
    """Refuse a library whose defaults are others, or elsewhere, than in BUILD."""
    for name, _, want in _parse(layout):
        got = getattr(parameters, name)
        if got != want:
            struct = type(parameters).__name__
            raise _other_build(f"{struct}.{name} is {got:g} by default, not {want:g}")


def _other_build(what: str) -> RuntimeError:
    return RuntimeError(
        f"xllamacpp {find_version()} has another interface than {BUILD} ({what}): "
        f"pip install xllamacpp=={BUILD}"
    )


def _copy(parameters: Any) -> Any:
    return type(parameters).from_buffer_copy(parameters)


def _address(pointer: Any) -> int:
    return ctypes.cast(pointer, c_void_p).value or 0
