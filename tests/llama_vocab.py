"""llama.cpp's own tokenizer: ids of texts under the vocabulary of a GGUF file.

It runs in a process of its own, since llama.cpp aborts where it does not like a file. The structure
of the parameters is that of llama.h of build 11549; its size and order are checked by the defaults
that the library itself gives.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def tokenize_with_llama(
    gguf: Path,
    texts: Sequence[str | bytes],
    *,
    add_special: bool = False,
    parse_special: bool = True,
) -> list[list[int]]:
    """Return the token ids of each text; bytes need not be valid UTF-8."""
    request = {
        "gguf": str(gguf),
        "texts": [(text.encode() if isinstance(text, str) else text).hex() for text in texts],
        "add_special": add_special,
        "parse_special": parse_special,
    }
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(request),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=120,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"llama.cpp refused {gguf}: {done.stderr[-2000:]}")
    answer: list[list[int]] = json.loads(done.stdout.splitlines()[-1])
    return answer


class _ModelParams(ctypes.Structure):
    _fields_ = (
        ("devices", ctypes.c_void_p),
        ("tensor_buft_overrides", ctypes.c_void_p),
        ("n_gpu_layers", ctypes.c_int32),
        ("split_mode", ctypes.c_int32),
        ("load_mode", ctypes.c_int32),
        ("lazy_mode", ctypes.c_int32),
        ("main_gpu", ctypes.c_int32),
        ("tensor_split", ctypes.c_void_p),
        ("progress_callback", ctypes.c_void_p),
        ("progress_callback_user_data", ctypes.c_void_p),
        ("kv_overrides", ctypes.c_void_p),
        ("vocab_only", ctypes.c_bool),
        ("check_tensors", ctypes.c_bool),
        ("use_extra_bufts", ctypes.c_bool),
        ("no_host", ctypes.c_bool),
        ("no_alloc", ctypes.c_bool),
        ("load_mtp", ctypes.c_bool),
    )


def _library() -> ctypes.CDLL:
    import xllamacpp

    llama = ctypes.CDLL(str(Path(xllamacpp.__file__).parent / "xllamacpp.abi3.so"))
    llama.llama_model_default_params.restype = _ModelParams
    llama.llama_model_load_from_file.restype = ctypes.c_void_p
    llama.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _ModelParams]
    llama.llama_model_get_vocab.restype = ctypes.c_void_p
    llama.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
    llama.llama_tokenize.argtypes = [
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.c_int32,
        ctypes.c_void_p,
        ctypes.c_int32,
        ctypes.c_bool,
        ctypes.c_bool,
    ]
    return llama


def _answer(request: dict[str, object]) -> list[list[int]]:
    llama = _library()
    params = llama.llama_model_default_params()
    flags = (params.vocab_only, params.check_tensors, params.use_extra_bufts)
    assert flags == (False, False, True), "llama_model_params has another layout in this build"
    params.vocab_only = True
    model = llama.llama_model_load_from_file(str(request["gguf"]).encode(), params)
    if not model:
        raise SystemExit(1)
    vocab = llama.llama_model_get_vocab(model)
    answer = []
    texts = request["texts"]
    assert isinstance(texts, list)
    for text in map(bytes.fromhex, texts):
        room = 3 * len(text) + 16  # a blank can become the three bytes of SentencePiece's
        ids = (ctypes.c_int32 * room)()
        count = llama.llama_tokenize(
            vocab, text, len(text), ids, room, request["add_special"], request["parse_special"]
        )
        assert count >= 0, (count, room)
        answer.append(list(ids[:count]))
    return answer


if __name__ == "__main__":
    print(json.dumps(_answer(json.load(sys.stdin))))
