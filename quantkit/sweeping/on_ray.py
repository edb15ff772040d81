"""Jobs of a sweep as tasks of Ray, each the same command on a node of the cluster.

Ray queues the tasks by the cores and GPUs that each asks for. Recipes, data, models and the output
root have to lie on storage that all nodes share under the same paths, which is checked on each node
before any work.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit import __version__
from quantkit.errors import InputError, MissingPackageError, writing
from quantkit.sweeping.jobs import refuse
from quantkit.sweeping.processes import signal_group, start_process
from quantkit.sweeping.records import Ended, SweepJob

INSTALL = 'pip install "quantkit[ray]"'
LOCAL = "local"
"""Address that starts a cluster of this machine alone, which ends with the sweep."""

_SECONDS_TO_SEE = 10.0
"""How long a network file system may take to show what another machine has written."""
_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_TO_STOP = 10.0
_SECONDS_TO_ANSWER = 10.0


@dataclass(frozen=True)
class Share:
    """What each job asks Ray for."""

    cpus: int
    gpus: float


@dataclass(frozen=True)
class RayCluster:
    """A cluster that this process is connected to."""

    ray: Any
    """The package."""
    share: Share


class RayJob:
    """A `Running` that is a task of Ray."""

    def __init__(self, cluster: RayCluster, job: SweepJob) -> None:
        self._ray = cluster.ray
        task = cluster.ray.remote(run_on_node)
        share = cluster.share
        # A job that died is told, not tried again: it would die in the same way.
        task = task.options(num_cpus=share.cpus, num_gpus=share.gpus, max_retries=0, name=job.name)
        log = os.path.abspath(job.log)
        self._answer = task.remote(job.command, log, os.getcwd(), share.cpus)

    def poll(self) -> Ended | None:
        """As `Running`."""
        ready, _ = self._ray.wait([self._answer], timeout=0)
        if not ready:
            return None
        try:
            return Ended(*self._ray.get(self._answer))
        except self._ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return Ended(1, f"Ray has lost the job: {lines[-1]}", 0.0)

    def stop(self) -> None:
        """As `Running`."""
        self._ray.cancel(self._answer)

    def kill(self) -> None:
        """As `Running`."""
        self._ray.cancel(self._answer, force=True)


def run_on_node(
    command: Sequence[str], log: str, folder: str, threads: int
) -> tuple[int, str, float]:
    """Run a job on the node that Ray has chosen; the fields of an `Ended`.

    Args:
        command: the arguments of `quantkit`.
        log: file on the shared storage.
        folder: to run in.
        threads: of its arithmetic.
    """
    environment = dict(os.environ) | {"OMP_NUM_THREADS": str(threads)}
    started = time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = start_process(command, Path(log), environment, said, Path(folder))
        try:
            # `wait` would sleep through the KeyboardInterrupt that Ray cancels a task with.
            while process.poll() is None:
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        except BaseException:
            signal_group(process, signal.SIGTERM)
            deadline = time.monotonic() + _SECONDS_TO_STOP
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(_SECONDS_BETWEEN_LOOKS)
            signal_group(process, signal.SIGKILL)
            raise
        said.seek(0)
        words = said.read().decode(errors="replace")
    return process.returncode, words, time.monotonic() - started


def load_ray(address: str) -> Any:
    """Return the package, when something answers at `address`.

    Raises:
        MissingPackageError: Ray is not installed.
        InputError: nothing answers.
    """
    try:
        import ray  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise MissingPackageError("ray", "--ray", INSTALL) from error
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        try:
            # Ray itself would try for minutes.
            socket.create_connection((host, int(port)), timeout=_SECONDS_TO_ANSWER).close()
        except (OSError, OverflowError) as error:
            raise InputError(f"--ray {address}: no cluster was reached: {error}") from error
    return ray


@contextmanager
def joined(address: str, cpus: int | None, gpus: float | None, device: str) -> Iterator[RayCluster]:
    """Connect to a cluster, or start one on this machine, and leave it at the end.

    Args:
        address: `local`, or what `ray.init` takes: `auto`, `HOST:PORT`.
        cpus: of each job; None: as `choose_share` says.
        gpus: of each job; None: the same.
        device: of the jobs.

    Raises:
        MissingPackageError: Ray is not installed.
        InputError: there is no such cluster, or it has no node for such a job.
    """
    ray = load_ray(address)
    with _own_signals():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            if address == LOCAL:
                ray.init(address=LOCAL, include_dashboard=False, **quiet)
            else:
                ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            words = str(error).splitlines() or [type(error).__name__]
            raise InputError(f"--ray {address}: no cluster was reached: {words[0]}") from error
    try:
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        yield RayCluster(
            ray, choose_share([node["Resources"] for node in nodes], cpus, gpus, device)
        )
    finally:
        with _own_signals():
            ray.shutdown()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep our answer to SIGTERM: `ray.init` puts its own in the place."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # not in the main thread: nothing was replaced
            signal.signal(signal.SIGTERM, before)


def choose_share(
    nodes: Sequence[Mapping[str, float]], cpus: int | None, gpus: float | None, device: str
) -> Share:
    """Say what each job asks for.

    Where nodes have GPUs a job asks for one of them, and for the cores that fall to what it has of
    GPUs; else for all cores of the smallest node.

    Args:
        nodes: resources of each by Ray's names.
        cpus, gpus: what was asked for.
        device: of the jobs; on `cpu` GPUs do not count.

    Raises:
        InputError: no node has as much.
    """
    with_gpus = [node for node in nodes if node.get("GPU", 0) >= 1] if device != "cpu" else []
    if gpus is None:
        gpus = 1.0 if with_gpus else 0.0
    if cpus is None:
        shares = [
            node["CPU"] * gpus / node["GPU"] if gpus else node["CPU"]
            for node in (with_gpus if gpus else nodes)
        ]
        cpus = max(1, int(min(shares, default=1)))
    if not any(node["CPU"] >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        largest = max((node["CPU"] for node in nodes), default=0)
        most = max((node.get("GPU", 0) for node in nodes), default=0)
        raise InputError(
            f"no node of the cluster has {cpus} cores and {gpus:g} GPUs: the largest has "
            f"{largest:g} cores, and {most:g} GPUs are the most on one node (--cpus, --gpus)"
        )
    return Share(cpus, gpus)


def check_nodes(cluster: RayCluster, jobs: Sequence[SweepJob], root: Path) -> None:
    """Refuse a cluster on which a node lacks quantkit or does not share the storage.

    A task on each node writes a file into the output root, which has to appear here.

    Raises:
        PlanError: a line for each problem, with the node.
        ResourceError, OutputError: the output root cannot be made.
    """
    from ray.util.scheduling_strategies import (  # type: ignore[import-not-found,unused-ignore]
        NodeAffinitySchedulingStrategy,
    )

    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
    needed = {job.loaded.model for job in jobs} | {job.recipe for job in jobs}
    paths = [os.path.abspath(path) for path in sorted(needed) if os.path.exists(path)]
    asked = []
    for node in cluster.ray.nodes():
        if not node["Alive"] or not node["Resources"].get("CPU"):
            continue
        where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        probe = Path(os.path.abspath(root)) / f".node-{uuid.uuid4().hex}"
        task = cluster.ray.remote(look_at_node)
        task = task.options(num_cpus=0, max_retries=0, scheduling_strategy=where)
        name = node.get("NodeManagerHostname") or node["NodeManagerAddress"]
        asked.append((name, probe, task.remote(str(probe), [os.getcwd(), *paths])))
    refuse(problem for each in asked for problem in _hear(cluster, *each))


def look_at_node(probe: str, paths: Sequence[str]) -> tuple[str, str, list[str]]:
    """Write the file `probe` on this node.

    Returns:
        the versions of Python and of quantkit; the reason why the file could not be written, or an
        empty string; and those of `paths` that are not there.
    """
    refusal = ""
    try:
        Path(probe).write_text("quantkit")
    except OSError as error:
        refusal = error.strerror or str(error)
    versions = f"{sys.version_info.major}.{sys.version_info.minor}, {__version__}"
    return versions, refusal, [path for path in paths if not os.path.exists(path)]


def _hear(cluster: RayCluster, name: str, probe: Path, answer: Any) -> list[str]:
    """What is wrong with a node, from what its task says and what it has written."""
    try:
        versions, refusal, missing = cluster.ray.get(answer)
    except cluster.ray.exceptions.RayError as error:
        if "No module named 'quantkit" in str(error):
            return [f"node {name}: quantkit is not installed there for Ray's Python"]
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return [f"node {name}: it cannot be asked: {lines[-1]}"]
    problems = [f"node {name}: {path} is not there: all nodes need it" for path in missing]
    own = f"{sys.version_info.major}.{sys.version_info.minor}, {__version__}"
    if versions != own:
        problems.append(f"node {name}: it has Python and quantkit {versions}, and here is {own}")
    if refusal:
        return [*problems, f"node {name}: cannot write in {probe.parent}: {refusal}"]
    if not _appears(probe):
        problems.append(
            f"node {name}: what it writes in {probe.parent} does not appear here: --output-root "
            f"has to lie on storage that all nodes share"
        )
    probe.unlink(missing_ok=True)
    return problems


def _appears(probe: Path) -> bool:
    """Whether a file is seen here, at once or when the file system has caught up."""
    deadline = time.monotonic() + _SECONDS_TO_SEE
    while not probe.exists():
        if time.monotonic() > deadline:
            return False
        os.listdir(probe.parent)  # so that NFS looks again
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return True
