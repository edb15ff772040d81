"""What no module may do by itself, since it is done in one place (docs/security.md)."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "quantkit"
NOWHERE: frozenset[str] = frozenset()

IMPORTS = {
    # Pickles: one reader, by `weights_only`; and the questions to a process that was forked.
    "pickle": {"checkpoint/pickles.py", "calibration/templates.py"},
    **dict.fromkeys(("marshal", "shelve", "dill", "cloudpickle", "joblib"), NOWHERE),
    # What a pickle would do is looked at where it is opened.
    "pickletools": {"checkpoint/pickles.py"},
    # Archives: the metadata of a wheel that pip has brought, and the tables of pickled weights;
    # nothing is extracted.
    "zipfile": {"checkpoint/pickles.py", "environments/wheel_metadata.py"},
    "tarfile": NOWHERE,
    # The network: the Hub's client, a tracking server that was asked for, and our own servers.
    "requests": {"integrations/mlflow_runs.py"},
    **dict.fromkeys(("httpx", "aiohttp", "urllib3", "ftplib", "smtplib", "ssl"), NOWHERE),
    "urllib.request": NOWHERE,
    "http.client": {"serving/starting.py"},
    "http.server": {"serving/servers/chat_http.py"},
    "socket": {"serving/starting.py", "sweeping/on_ray.py"},
    "huggingface_hub": {
        *("checkpoint/outline.py", "checkpoint/skeleton.py", "checkpoint/source.py"),
        *("publishing/client.py", "publishing/contents.py", "publishing/promoting.py"),
        *("publishing/rights.py", "publishing/sending.py", "serving/target.py"),
    },
    # Programs: each starts one kind of them, with arguments in a list.
    "subprocess": {
        *("capacity/gpus.py", "environments/places.py", "environments/programs.py"),
        *("formats/onnx/encoder_agreement.py", "formats/onnx/loading.py"),
        *("integrations/alone.py", "judging/abilities.py", "judging/worker.py"),
        *("numerics/kernels/trial.py", "serving/programs.py", "serving/starting.py"),
        "sweeping/processes.py",
    },
    # Templates: rendered for the report, parsed for a task, an error of transformers' sandbox.
    "jinja2": {"calibration/templates.py", "judging/tasks/files.py", "report/html.py"},
    # A library's module is run to see which it is, and a file of quantkit's own by its path; the
    # names are quantkit's own.
    "runpy": {"judging/runtimes/build_probe.py", "judging/runtimes/worker_protocol.py"},
}
"""Module -> the files that may import it; whoever else needs one asks them."""

CALLS = {
    "torch.load": {"checkpoint/pickles.py", "ranks.py"},
    "np.load": {"formats/onnx/encoder_agreement.py", "formats/onnx/graph_runner.py"},
    "numpy.load": NOWHERE,
    "yaml.safe_load": {"checkpoint/families/__init__.py"},
    **dict.fromkeys(("yaml.load", "yaml.full_load", "yaml.unsafe_load"), NOWHERE),
    **dict.fromkeys(("os.system", "os.popen", "os.startfile", "tempfile.mktemp"), NOWHERE),
    "Environment": {
        *("judging/tasks/files.py", "report/html.py"),
        *("environments/installing.py", "environments/places.py"),
    },
    "shutil.unpack_archive": NOWHERE,
}
"""Call -> the files that may make it. `Environment` in environments/ is a record of its own."""

RAW_TEXT = {
    *("formats/gguf/model.py", "workspace.py", "allocation/stored.py"),
    *("environments/installing.py", "cli/init.py"),
}
"""Files that write text without a search for secrets: a model's own, the state of a job whose hash
is compared, and what is made of nothing but names."""


@dataclass(frozen=True)
class Source:
    """What a file does that may be of interest."""

    imports: frozenset[str]
    """`urllib.request`, and `urllib` for the same."""
    calls: tuple[tuple[str, Mapping[str, object]], ...]
    """Name of what is called, with the keyword arguments; those that are no constants are None."""
    compared: frozenset[object]
    """Constants in comparisons."""


@pytest.fixture(scope="module")
def sources() -> dict[str, Source]:
    """Each file of the package, walked once."""
    return {
        path.relative_to(PACKAGE).as_posix(): read_source(path) for path in PACKAGE.rglob("*.py")
    }


def read_source(path: Path) -> Source:
    """Walk a file."""
    imports, compared = set[str](), set[object]()
    calls: list[tuple[str, Mapping[str, object]]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imports |= {above for alias in node.names for above in list_above(alias.name)}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            imports |= {above for name in names for above in list_above(name)}
        elif isinstance(node, ast.Call):
            calls.append((name_call(node.func), options_of(node)))
        elif isinstance(node, ast.Compare):
            sides = (node.left, *node.comparators)
            compared |= {side.value for side in sides if isinstance(side, ast.Constant)}
    return Source(frozenset(imports), tuple(calls), frozenset(compared))


def list_above(module: str) -> list[str]:
    """Return a dotted name and all that it begins with."""
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def name_call(function: ast.expr) -> str:
    """Return `np.load`, and `?.load` for that of what has no name."""
    if isinstance(function, ast.Name):
        return function.id
    if isinstance(function, ast.Attribute):
        return f"{name_call(function.value)}.{function.attr}"
    return "?"


def options_of(call: ast.Call) -> dict[str, object]:
    """Return the keyword arguments."""
    return {
        option.arg: option.value.value if isinstance(option.value, ast.Constant) else None
        for option in call.keywords
        if option.arg
    }


@pytest.mark.parametrize("module", IMPORTS)
def test_a_module_is_imported_only_where_its_use_is_looked_after(
    module: str, sources: dict[str, Source]
) -> None:
    """A second place would need the same care."""
    found = {name for name, source in sources.items() if module in source.imports}
    assert found == IMPORTS[module]


@pytest.mark.parametrize("call", CALLS)
def test_a_call_is_made_only_where_its_arguments_are_looked_after(
    call: str, sources: dict[str, Source]
) -> None:
    """Loaders that may run code, shells, names that others may guess."""
    found = {
        name for name, source in sources.items() if call in {called for called, _ in source.calls}
    }
    assert found == CALLS[call]


def test_loaders_are_told_to_run_nothing(sources: dict[str, Source]) -> None:
    """By constants, so that no setting can change it."""
    for name, source in sources.items():
        for function, options in source.calls:
            assert options.get("trust_remote_code", False) is False, name
            assert options.get("shell", False) is False, name
            assert function != "np.load" or options["allow_pickle"] is False, name
            assert function.rpartition(".")[2] != "extractall", name
            if function == "torch.load" and name != "ranks.py":
                # ranks.py reads what another process of the same job has written.
                assert options["weights_only"] is True
            if function == "Environment" and name == "report/html.py":
                assert options["autoescape"] is True
            if function.endswith(".from_pretrained"):
                assert options["trust_remote_code"] is False, name
                assert options["local_files_only"] is True, name


def test_what_is_said_of_a_job_is_searched_for_secrets(sources: dict[str, Source]) -> None:
    """Whoever writes a text uses `write_words`, or is one of a few."""
    raw = {n for n, source in sources.items() if "quantkit.durable.write_text" in source.imports}
    assert raw == RAW_TEXT


def test_names_are_looked_at_in_one_place(sources: dict[str, Source]) -> None:
    """Nobody else looks for `..`; that of a revision is no path."""
    found = {name for name, source in sources.items() if ".." in source.compared}
    assert found == {"checkpoint/paths.py", "publishing/request.py"}


def test_the_places_and_tests_that_the_page_names_exist() -> None:
    """`quantkit/...py`: `function`, and `tests/...py::test`."""
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    files = set(re.findall(r"`((?:quantkit|tests)/[\w/.]+\.py)(?:::(\w+))?`", page))
    assert len(files) > 20
    for file, name in files:
        path = ROOT / file
        assert path.is_file(), file
        if name:
            text = path.read_text(encoding="utf-8")
            assert re.search(rf"^(?:def|class) {name}\b|^{name}\b", text, re.MULTILINE), (
                file,
                name,
            )
    for place in re.findall(r"`(quantkit(?:\.\w+)+)`", page):
        importlib.import_module(place)
