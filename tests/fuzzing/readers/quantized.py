"""What other tools say of their quantized checkpoints, and the tensors that it is said of.

Read as `inspect` and `verify` do, and each layer's weight as `convert` and `bisect` do.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import quantkit
from quantkit.errors import QuantkitError
from quantkit.formats.decode import open_artifact
from quantkit.formats.readers.fitting import fit_model
from quantkit.formats.readers.stored import open_stored, read_weight
from tests.fuzzing.corpus import copying, pico_model, root
from tests.fuzzing.damage import BYTES, flip, overwrite
from tests.fuzzing.reader import Damage, Reader
from tests.fuzzing.trees import damage_json, replace_values

_EVIL = (
    *(
        "re:(a+)+$",
        "re:(.*)*x",
        "re:(?:.?){40}.{40}$",
        "re:(?:a|a|m)*(?:o|o|d)*(.*)*!$",
        "re:(?R)?m",
    ),
    *(
        "re:" + "(" * 500,
        "re:a{999999999}",
        "re:[",
        "re:(?P<a>m)(?P<a>o)",
        "re:(?:m{0,9999}){0,9999}x",
    ),
    *("re:(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)!", "re:", "re:.*", "re:(?iL)x", "Linear", "lm_head"),
    *("*" * 200 + "x", "[" * 5000, "*[!a-z]*?*" * 60, "?" * 900, "model.layers.0*", "\0", "" * 3),
)
_VALUES: tuple[Any, ...] = (
    *(2**40, 2**63, 2**64, 10**30, -1, 0, 1, 3, 4, 8, 64, 1.5, True, None, "4", [], {}, [128, 128]),
    *([2**40, 2**40], [1, 2**62], [0, 1], [-1, 1], "group", "channel", "tensor", "block", "float"),
    *(["re:(a+)+$"], ["re:(.*)*x"] * 300, ["Linear"], [], ["x"] * 20_000, [[]], [None], [{}]),
    *("gptq_v2", "marlin", "gemm", "fp8", "awq", "gptq", "compressed-tensors", "modelopt", "int"),
    *("FP8", "W4A16_AWQ", "W8A8_SQ_PER_CHANNEL", "pack-quantized", "float-quantized", "attn_head"),
)


@cache
def _foreign(kind: str) -> Path:
    from tests.formats.readers import packers

    make: Callable[..., Any] = getattr(packers, f"make_{kind}")
    make(pico_model(), root() / kind, **({"weight_block_size": [16, 16]} if kind == "fp8" else {}))
    return root() / kind


@cache
def _own(scheme: str, kv_cache: str = "none") -> Path:
    """A compressed-tensors artifact of the package's own writer."""
    from tests.formats.cases import make_case

    size = 32 if scheme.startswith("w4") else None
    case = make_case(
        pico_model(), [("*q_proj", "w8a16", None), ("*", scheme, size)], kv_cache=kv_cache
    )
    place = root() / f"own-{scheme}"
    place.mkdir()
    case.write(place)
    return place


@cache
def _modelopt() -> Path:
    from quantkit.formats.modelopt.writing import write_modelopt
    from tests.formats.cases import make_case

    case = make_case(pico_model(), [("*", "w4a16", 32)], kv_cache="none")
    place = root() / "modelopt"
    place.mkdir()
    write_modelopt(case.checkpoint, case.plan, case.blocks.__getitem__, place, 1 << 30)
    return place


def _read(folder: Path) -> object:
    found = quantkit.inspect(folder)
    with contextlib.suppress(QuantkitError):
        quantkit.verify(folder)
    model = open_stored(open_artifact(folder))
    if model is not None:
        with contextlib.suppress(QuantkitError):
            fit_model(model, "BF16")
        for name in model.layers:
            with contextlib.suppress(QuantkitError):
                read_weight(model, name)
    return found


def _in_description(damage: Damage) -> Damage:
    """Make the damage that changes config.json's `quantization_config` alone."""

    def change(draw: random.Random, content: bytes) -> bytes:
        try:
            config = json.loads(content)
            inner = damage(draw, json.dumps(config.pop("quantization_config")).encode())
        except (ValueError, KeyError, AttributeError, RecursionError):
            return content
        rest = json.dumps(config).encode()
        return rest[:-1] + b', "quantization_config": ' + inner + b"}"

    return change


_OF_CONFIG = (
    *(damage_json, replace_values(*_VALUES), replace_values(*_EVIL, list(_EVIL))) * 2,
    flip,
)
_WEIGHTS = (flip, overwrite, *BYTES)


def _reader(name: str, **samples: Callable[[], Path]) -> Reader:
    return Reader(
        name=name,
        build=copying(**samples),
        damages={
            "config.json": tuple(map(_in_description, _OF_CONFIG)),
            "*quant*_config.json": _OF_CONFIG,
            "model.safetensors": _WEIGHTS,
        },
        read=_read,
    )


READERS = (
    _reader(
        "compressed-tensors",
        int4=lambda: _own("w4a16_asym"),
        fp8=lambda: _own("fp8_static", "fp8"),
        block=lambda: _own("fp8_block"),
    ),
    _reader("gptq", gptq=lambda: _foreign("gptq")),
    _reader("awq", awq=lambda: _foreign("awq")),
    _reader("fp8", fp8=lambda: _foreign("fp8")),
    _reader("modelopt", modelopt=_modelopt),
)
