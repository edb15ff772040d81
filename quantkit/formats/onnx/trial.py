"""Whether ONNX Runtime takes a file: a script, run in a process of its own.

    python trial.py '{"path": ..., "provider": ..., "bytes": ..., "genai": folder or null}'

A damaged graph can end the process that loads it, so nothing of quantkit is here. Each step is a
line of JSON, `{"step": name}` when it begins and `{"step": name, "errors": [...]}` when it ends:
`checker`, `session`, then `kernels` where no session was created, or `genai` where that was asked.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any

_SPARE_BYTES = 8 << 30
"""Address space besides the weights: libraries, arenas, stacks of threads."""
_COPIES = 8
"""Times that the weights may be in memory: as read, folded, rearranged."""


def main() -> int:
    """Try every step and say how it went."""
    # ONNX Runtime opens a file and threads for telemetry, unless told before its import.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    asked = json.loads(sys.argv[1])
    _limit_memory(asked["bytes"])
    _tell("checker", _check, asked)
    if _tell("session", _open_session, asked):
        _tell("kernels", _ask_kernels, asked)
    elif asked["genai"]:
        _tell("genai", _open_genai, asked)
    return 0


def _tell(name: str, step: Any, asked: Any) -> list[str]:
    print(json.dumps({"step": name}), flush=True)
    errors: list[str] = step(asked)
    print(json.dumps({"step": name, "errors": errors}), flush=True)
    return errors


def _limit_memory(size: int) -> None:
    """Let a graph that asks for all memory fail alone."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        limit = _SPARE_BYTES + _COPIES * size
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        if hard == resource.RLIM_INFINITY or hard > limit:
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _check(asked: Any) -> list[str]:
    """onnx's own checker. Operators of ONNX Runtime in ONNX's domain are unknown to it."""
    import onnx

    model = onnx.load(asked["path"], load_external_data=False)
    _rename_unknown(model, onnx)
    # Where the checker looks for the data files of a model that is not named by a path.
    os.chdir(os.path.dirname(asked["path"]))
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        return [str(error)]
    return []


def _rename_unknown(model: Any, onnx: Any) -> None:
    opset = next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), 1)
    own = {(function.domain, function.name) for function in model.functions}
    renamed = False
    for node in _list_nodes(model):
        known = node.domain not in ("", "ai.onnx") or (node.domain, node.op_type) in own
        if not known and not onnx.defs.has(node.op_type, opset, ""):
            node.domain = "com.microsoft"
            renamed = True
    if renamed and all(each.domain != "com.microsoft" for each in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))


def _list_nodes(model: Any) -> list[Any]:
    found: list[Any] = []
    pending = [model.graph, *model.functions]
    while pending:
        graph = pending.pop()
        for node in graph.node:
            found.append(node)
            for attribute in node.attribute:
                pending += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
    return found


def _ask_kernels(asked: Any) -> list[str]:
    """Operators for which the provider has neither a kernel nor a definition by others."""
    import onnx
    from onnxruntime.capi import _pybind_state as runtime

    versions: dict[tuple[str, str], set[int]] = {}
    for schema in runtime.get_all_operator_schema():
        versions.setdefault((schema.domain, schema.name), set()).add(schema.since_version)
    kernels: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for kernel in runtime.get_all_opkernel_def():
        if kernel.provider == asked["provider"]:
            key = (kernel.domain, kernel.op_name)
            kernels.setdefault(key, []).append(kernel.version_range)
    model = onnx.load(asked["path"], load_external_data=False)
    opsets = {_plain(each.domain): each.version for each in model.opset_import}
    own = {(_plain(function.domain), function.name) for function in model.functions}
    missing: dict[tuple[str, str], int] = {}
    for node in _list_nodes(model):
        key = (_plain(node.domain), node.op_type)
        opset = opsets.get(key[0], 0)
        since = max((version for version in versions.get(key, ()) if version <= opset), default=-1)
        found = any(first <= since <= last for first, last in kernels.get(key, ()))
        if key not in own and not found and not _is_composed(onnx, key, opset):
            missing[key] = missing.get(key, 0) + 1
    return [f"{count} x {domain or 'ai.onnx'}.{name}" for (domain, name), count in missing.items()]


def _plain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _is_composed(onnx: Any, key: tuple[str, str], opset: int) -> bool:
    """Whether ONNX defines an operator by others, so that it needs no kernel."""
    domain, name = key
    try:
        schema = onnx.defs.get_schema(name, opset, domain)
    except onnx.defs.SchemaError:
        return False
    return bool(schema.has_function or schema.has_context_dependent_function or name == "Constant")


def _open_session(asked: Any) -> list[str]:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    found = [each for each in vars(state).values() if isinstance(each, type)]
    failures: Any = tuple(each for each in found if issubclass(each, Exception))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        onnxruntime.InferenceSession(asked["path"], options, providers=[asked["provider"]])
    except (RuntimeError, ValueError, MemoryError, *failures) as error:
        return [str(error)]
    return []


def _open_genai(asked: Any) -> list[str]:
    import onnxruntime_genai

    try:
        config = onnxruntime_genai.Config(asked["genai"])
        # The CPU's, whatever provider the folder asks for: others load libraries of their own.
        config.clear_providers()
        model = onnxruntime_genai.Model(config)
        onnxruntime_genai.Tokenizer(model)
    except (RuntimeError, ValueError, OSError) as error:
        return [str(error)]
    return []


if __name__ == "__main__":
    sys.exit(main())
