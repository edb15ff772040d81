"""The bones of the package: which part may import which, and what no part may contain."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "quantkit"

LAYERS = (
    {"masking"},
    {"errors"},
    {
        "plain_yaml",
        "varints",
        "schemes",
        "ggml_types",
        "durable",
        "ranks",
        "tracing",
        "functions",
        "signals",
    },
    {"locking"},
    {"records", "staging"},
    {"recipe", "numerics", "describe", "differing"},
    {"solvers", "checkpoint"},
    {"planning", "calibration", "workspace", "blocks", "capacity"},
    {"allocation", "encoders"},
    {"fisher"},
    {"formats", "inputs", "running", "environments", "live"},
    {"exports", "job_windows", "materials"},
    {"gguf_conversion"},
    {"conversion"},
    {"job"},
    {"judging"},
    {"report"},
    {"evidence"},
    {"gating"},
    {"encoder_pipeline", "publishing", "serving"},
    {"candidates", "block_loop"},
    {"pipeline", "artifacts", "comparing", "bisection", "calibrating", "estimating", "routing"},
    {"sweeping"},
    {"__init__"},
    {"integrations"},
    {"cli"},
    {"__main__"},
)
"""Lowest first. A part imports lower layers only; parts of one layer do not see each other."""

LEVELS = {part: level for level, layer in enumerate(LAYERS) for part in layer}
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in FILES]


def module_of(path: Path) -> str:
    """`quantkit.solvers.gptq` for quantkit/solvers/gptq.py; a package for its __init__.py."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """`solvers` for `quantkit.solvers.gptq`; `__init__` for `quantkit` itself."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


MODULES = {module_of(path): path for path in FILES}


def imported_modules(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield (line, module, name) of every import of quantkit's own, local ones included.

    `name` is what is taken from the module, or an empty string.
    """
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "quantkit":
                    yield node.lineno, alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            if base.split(".")[0] != "quantkit":
                continue
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                if submodule in MODULES:
                    yield node.lineno, submodule, ""
                else:
                    yield node.lineno, base, alias.name


def test_every_part_has_its_layer() -> None:
    """A new module or package is put into a layer before anything else."""
    parts = {part_of(module) for module in MODULES}
    assert parts <= LEVELS.keys()


@pytest.mark.parametrize("name", NAMES)
def test_a_part_imports_lower_layers_only(name: str) -> None:
    """Also inside functions, so that no cycle hides there; the version alone is for everyone."""
    part = part_of(module_of(PACKAGE / name))
    wrong = [
        f"{name}:{line} imports {module}"
        for line, module, taken in imported_modules(PACKAGE / name)
        if part_of(module) != part
        and LEVELS[part_of(module)] >= LEVELS[part]
        and taken != "__version__"
    ]
    assert not wrong


def test_modules_do_not_import_in_circles() -> None:
    """No module reaches itself, within a package either."""
    graph = {
        module: {target for _, target, _ in imported_modules(path) if target != module}
        for module, path in MODULES.items()
        # The lazy root names every home and is imported for its version.
        if module != "quantkit"
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"a circle: {' -> '.join((*trail, module))}"
        if module in done:
            return
        for target in sorted(graph.get(module, ())):
            visit(target, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_workers_import_nothing_of_quantkit() -> None:
    """A runtime worker may run under an interpreter that does not have quantkit."""
    folders = (PACKAGE / "judging" / "runtimes", PACKAGE / "serving" / "servers")
    workers = sorted(file for folder in folders for file in folder.glob("*.py"))
    assert {file.parent for file in workers} == set(folders)
    assert [list(imported_modules(worker)) for worker in workers] == [[]] * len(workers)


@pytest.mark.parametrize("name", NAMES)
def test_a_module_keeps_no_state_and_hides_no_failure(name: str) -> None:
    """No `global`, no caches, no broad except, no dynamic import, no remote code."""
    source = (PACKAGE / name).read_text(encoding="utf-8")
    tree = ast.parse(source)
    found = [
        f"{name}:{line}: {what}"
        for line, what in (*_forbidden_statements(tree), *_forbidden_calls(tree))
        if (name, what) not in ALLOWED
    ]
    assert not found
    assert "trust_remote_code=True" not in source


ALLOWED = {
    ("cli/main.py", "broad except"),  # the one place that turns any failure into an exit code
    ("checkpoint/ahead.py", "broad except"),  # a thread's error is raised where it is awaited
    ("judging/custom_checks.py", "broad except"),  # whatever a user's check raises is its FAIL
    ("integrations/milestone_jobs.py", "broad except"),  # no job ends a training; it is logged
    ("integrations/trainer.py", "broad except"),  # the other processes are told; a logger's error
    ("__init__.py", "import_module"),  # the lazy public names
}


def _forbidden_statements(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield node.lineno, "global"
        elif isinstance(node, ast.ExceptHandler) and _is_broad(node):
            yield node.lineno, "broad except"


def _is_broad(handler: ast.ExceptHandler) -> bool:
    """Whether it catches everything and does not raise something as its last word."""
    caught = handler.type
    names = caught.elts if isinstance(caught, ast.Tuple) else [caught]
    broad = {"Exception", "BaseException"}
    if not any(name is None or (isinstance(name, ast.Name) and name.id in broad) for name in names):
        return False
    return not isinstance(handler.body[-1], ast.Raise)


def _forbidden_calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    banned = {"cache", "lru_cache", "import_module", "__import__", "eval", "exec"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in banned:
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and node.attr in {"lru_cache", "import_module"}:
            yield node.lineno, node.attr


HOOKS = {
    ("serving/servers/chat_http.py", "BaseHTTPRequestHandler"),  # its parser calls do_GET, do_POST
    ("plain_yaml.py", "yaml.SafeLoader"),  # it calls compose_node for each node
    ("integrations/trainer.py", "TrainerCallback"),  # the Trainer calls each of its events
    ("cli/bars.py", "ProgressColumn"),  # rich calls its render for each bar
    ("cli/helping.py", "TyperCommand"),  # typer calls its get_help for `--help`
    ("cli/helping.py", "TyperGroup"),
    ("cli/streams.py", "io.TextIOBase"),  # what prints calls writelines, closed and the rest too
}
"""Classes of libraries that are there to be inherited from, each where it is."""


@pytest.mark.parametrize("name", NAMES)
def test_classes_inherit_only_where_an_exception_or_pydantic_asks_for_it(name: str) -> None:
    """Records and functions; no towers of classes, and no class named after what it manages."""
    allowed = {"Exception", "Protocol", "NamedTuple", "Enum", "StrEnum", "BaseModel", "Spec"}
    for node in ast.walk(ast.parse((PACKAGE / name).read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ClassDef):
            continue
        assert not node.name.endswith(("Manager", "Mixin", "Helper"))
        assert not node.name.startswith("Base")
        bases = {
            base.id if isinstance(base, ast.Name) else ast.unparse(base) for base in node.bases
        }
        bases -= {base for file, base in HOOKS if file == name}
        assert all(base in allowed or base.endswith("Error") for base in bases), (node.name, bases)


def test_no_module_is_a_drawer_for_leftovers() -> None:
    """Modules are named after what they do, and none grows beyond a few screens."""
    assert not [
        path for path in FILES if path.stem in {"utils", "util", "helpers", "common", "misc"}
    ]
    sizes = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {path: lines for path, lines in sizes.items() if lines > 400}
