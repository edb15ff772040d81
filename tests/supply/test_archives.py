"""What is released is complete, the same each time, and works where nothing else of us is."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata

import quantkit

ROOT = Path(__file__).parents[2]
NAME = f"quantkit-{quantkit.__version__}"
WHEEL = f"{NAME}-py3-none-any.whl"
FULL = os.environ.get("QUANTKIT_TRUST") == "full"
SMALL = [
    *("--set", "calibration.samples=2", "--set", "calibration.sequence_length=32"),
    *("--set", "quantize.method=rtn"),
]

pytestmark = pytest.mark.supply


def build(tree: Path, folder: Path, **environment: str) -> Path:
    """Build the release of the project in `tree` into `folder`."""
    command = [str(tree / "scripts" / "build_release.sh"), str(folder)]
    settings = os.environ | {"QUANTKIT_PYTHON": sys.executable} | environment
    subprocess.run(command, check=True, capture_output=True, env=settings)
    return folder


def run_git(folder: Path, *arguments: str) -> str:
    """Run git in `folder` as somebody, and return what it says."""
    who = ("-c", "user.name=a test", "-c", "user.email=test@example.org")
    command = ["git", *who, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A commit of the working tree as it is now, in a folder with a blank in its name."""
    folder = tmp_path_factory.mktemp("the tree")
    listing = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in run_git(ROOT, *listing).rstrip("\0").split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    run_git(folder, "init", "-q")
    run_git(folder, "add", "-A")
    run_git(folder, "commit", "-q", "-m", "as it is now")
    return folder


@pytest.fixture(scope="module")
def release(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release, built where others have left things."""
    for name in (".venv/lib/left.py", "artifacts/left.txt", "quantkit/__pycache__/left.pyc"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("left\n")
    return build(tree, tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def source(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source archive."""
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(release / f"{NAME}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / NAME


@pytest.fixture(scope="module")
def clean(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the programs of an environment with the wheel, and what it needs.

    That is .venv's packages, by a line in a .pth file: a download of torch takes minutes. With
    QUANTKIT_TRUST=full it is what pip installs from the locks for the dependencies alone.
    """
    environment = tmp_path_factory.mktemp("clean") / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    if FULL:
        install_dependencies(environment)
    else:
        (site,) = environment.glob("lib/python*/site-packages")
        (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ("--no-deps", "--no-index", "--disable-pip-version-check", "-q")
    subprocess.run(
        [python, "-m", "pip", "install", *options, release / WHEEL], cwd=environment, check=True
    )
    return environment / "bin"


def install_dependencies(environment: Path) -> None:
    """Install what pyproject.toml asks for, without any extra, with the hashes of the locks."""
    scripts = ROOT / "scripts"
    subprocess.run([scripts / "install_pip.sh", environment], check=True)
    subprocess.run([scripts / "install_torch.sh", environment, "constraints.txt"], check=True)
    listing = [sys.executable, scripts / "list_requirements.py"]
    needs = subprocess.run(listing, check=True, capture_output=True, text=True).stdout
    (environment / "needs.txt").write_text(needs)
    command = [environment / "bin" / "python", "-m", "pip", "install", "-q", "-r", "needs.txt"]
    lock = ROOT / "locks" / "constraints.txt"
    subprocess.run([*command, "-c", lock], cwd=environment, check=True)


def start(programs: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the installed quantkit in `folder`, with nothing that leads to the repository."""
    kept = ("HOME", "LANG", "QUANTKIT_CACHE", "QUANTKIT_RUNTIMES", "TMPDIR")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {"PATH": f"{programs}:/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    command = [str(programs / "quantkit"), *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_same_commit_gives_the_same_bytes(tree: Path, release: Path, tmp_path: Path) -> None:
    """From a clone, by a user with other habits, in another place, later."""
    umask = os.umask(0o077)
    try:
        run_git(tmp_path, "clone", "-q", str(tree), "clone")
        (tmp_path / "again").mkdir()
        there = {"TMPDIR": str(tmp_path), "LC_ALL": "C", "TZ": "Asia/Tokyo"}
        again = build(tmp_path / "clone", tmp_path / "again", **there)
    finally:
        os.umask(umask)
    sums = (release / "SHA256SUMS").read_text()
    assert (again / "SHA256SUMS").read_text() == sums
    for line in sums.splitlines():
        digest, name = line.split()
        assert hashlib.sha256((release / name).read_bytes()).hexdigest() == digest
        assert hashlib.sha256((again / name).read_bytes()).hexdigest() == digest
    assert {path.name for path in release.iterdir()} == {
        WHEEL,
        f"{NAME}.tar.gz",
        f"{NAME}.cdx.json",
        "SHA256SUMS",
    }


def test_the_source_archive_gives_the_same_wheel(
    tree: Path, release: Path, source: Path, tmp_path: Path
) -> None:
    """So all that is seen of the wheel is true of one that is built from it."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=source,
        env=os.environ | {"SOURCE_DATE_EPOCH": run_git(tree, "log", "-1", "--format=%ct").strip()},
        check=True,
        capture_output=True,
    )
    assert (tmp_path / WHEEL).read_bytes() == (release / WHEEL).read_bytes()


def test_the_archives_hold_what_git_knows_and_nothing_else(
    tree: Path, release: Path, source: Path
) -> None:
    """No environment, artifact or left-over; the wheel has the package and its data alone."""
    known = run_git(tree, "ls-files", "-z").rstrip("\0").split("\0")
    files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    left_out = ("benchmarks/results/", ".ci/")
    assert files - {"PKG-INFO"} == {name for name in known if not name.startswith(left_out)}

    inside = zipfile.ZipFile(release / WHEEL).namelist()
    assert {name.partition("/")[0] for name in inside} == {"quantkit", f"{NAME}.dist-info"}
    for part in ("shipped/recipes/demo.yaml", "shipped/models/demo-llama/model.safetensors"):
        assert f"quantkit/{part}" in inside
    for part in ("py.typed", "shipped/calib_data/docs_evaluation.txt"):
        assert f"quantkit/{part}" in inside
    assert [name for name in inside if name.startswith("quantkit/checkpoint/families/")]
    assert not [name for name in inside if "test" in Path(name).parts or name.endswith(".pyc")]


def test_the_metadata_is_what_an_index_accepts(release: Path) -> None:
    """Valid by the specification, with the page, the licence and the Pythons."""
    with zipfile.ZipFile(release / WHEEL) as archive:
        text = archive.read(f"{NAME}.dist-info/METADATA")
        assert f"{NAME}.dist-info/licenses/LICENSE" in archive.namelist()
    metadata = Metadata.from_email(text, validate=True)
    assert (metadata.name, str(metadata.version)) == ("quantkit", quantkit.__version__)
    assert metadata.license_expression == "Apache-2.0"
    assert metadata.description_content_type == "text/markdown"
    assert str(metadata.requires_python) == "<3.14,>=3.11"
    assert metadata.description is not None
    assert "://" not in "".join(str(line) for line in metadata.requires_dist or [])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--version"], quantkit.__version__),
        (["recipes", "list"], "demo"),
        (["recipes", "show", "awq4"], "version: 1"),
        (["recipes", "schema"], '"quantize"'),
        (["plan", "--recipe", "demo"], "llama"),
    ],
)
def test_the_installed_commands_find_their_data(
    clean: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    """In an empty folder, with nothing of the repository in sight."""
    done = start(clean, tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_installed_demo_runs_outside_of_the_repository(clean: Path, tmp_path: Path) -> None:
    """Recipe, model and texts are those of the wheel."""
    folder = tmp_path / "else where"
    folder.mkdir()
    done = start(
        clean, folder, "quantize", "--recipe", "demo", "--output", "out", "--no-gate", *SMALL
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "out" / "compressed-tensors" / "model.safetensors").is_file()
    assert sorted(path.name for path in folder.iterdir()) == ["out"]
    found = subprocess.run(
        [clean / "python", "-c", "import quantkit; print(quantkit.__file__)"],
        cwd=folder,
        env={"PATH": os.environ["PATH"]},
        check=True,
        capture_output=True,
        text=True,
    )
    assert Path(found.stdout).is_relative_to(clean.parent)


def test_the_bill_of_materials_is_valid_and_complete(release: Path, tmp_path: Path) -> None:
    """By CycloneDX's own schema; every dependency is in it, with its locked version and licence."""
    python = os.environ.get("QUANTKIT_SUPPLY_PYTHON") or shutil.which("cyclonedx-python")
    if python is None:
        pytest.skip("`make supply` sets up what validates it")
    path = release / f"{NAME}.cdx.json"
    program = (
        "import pathlib, sys\n"
        "from cyclonedx.schema import SchemaVersion\n"
        "from cyclonedx.validation.json import JsonStrictValidator\n"
        "text = pathlib.Path(sys.argv[1]).read_text()\n"
        "sys.exit(repr(JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) or 0).strip('0')"
        " or 0)\n"
    )
    subprocess.run([python, "-c", program, path], check=True)
    broken = tmp_path / "broken.json"
    broken.write_text(path.read_text().replace('"library"', '"book"'))
    assert subprocess.run([python, "-c", program, broken], capture_output=True).returncode == 1

    bill = json.loads(path.read_text())
    components = {part["name"]: part for part in bill["components"]}
    required = {name for name, part in components.items() if part["scope"] == "required"}
    assert {"torch", "transformers", "typer", "markupsafe"} <= required
    assert components["onnx"]["scope"] == "optional"
    assert all(part["licenses"] for part in components.values())
    locked = (ROOT / "constraints.txt").read_text().lower().replace("_", "-").splitlines()
    assert {f"{name}=={part['version']}" for name, part in components.items()} <= set(locked)
    refs = {entry["ref"] for entry in bill["dependencies"]}
    assert {need for entry in bill["dependencies"] for need in entry["dependsOn"]} <= refs
