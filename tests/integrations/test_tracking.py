"""Jobs that are logged to a real MLflow and send real OTLP to a collector."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sqlite3
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.errors import TrackingError
from quantkit.integrations.mlflow_runs import check_answers
from tests.cli.conftest import Bench, make_bench
from tests.cli.running import ROOT, run_here
from tests.helpers import make_pico_model
from tests.integrations.collector import Collector, collecting, value_of
from tests.ports import free_port

pytestmark = pytest.mark.integrations

EXPERIMENT, MODEL = "quantization", "pico"


@dataclass(frozen=True)
class Tracked:
    """A job that has passed, with what it told MLflow and a collector."""

    bench: Bench
    done: subprocess.CompletedProcess[str]
    uri: str
    collector: Collector


@pytest.fixture(scope="module")
def passed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracked]:
    """One job for many tests: they look and do not touch."""
    folder = tmp_path_factory.mktemp("tracked")
    bench = make_bench(folder / "bench", make_pico_model(folder / "model", layers=2))
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    with collecting() as collector, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.address)
        patch.delenv("QUANTKIT_OTEL", raising=False)
        logging = ("--mlflow", EXPERIMENT, "--mlflow-model", MODEL, "--otel")
        done = run_here("quantize", "--recipe", bench.recipe, *logging, folder=bench.folder)
        assert done.returncode == 0, done.stderr
        yield Tracked(bench, done, uri, collector)


def client_of(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def find_runs(uri: str, experiment: str = EXPERIMENT) -> list[Any]:
    """The runs of an experiment, the newest first."""
    client = client_of(uri)
    found = client.get_experiment_by_name(experiment)
    return [] if found is None else list(client.search_runs([found.experiment_id]))


def first_run(tracked: Tracked) -> Any:
    return client_of(tracked.uri).get_run(find_id(tracked.done.stdout))


def find_id(said: str) -> str:
    found = re.search(r"mlflow +run (\w{32})", said)
    assert found is not None, said
    return found[1]


def test_a_job_becomes_a_run_with_what_it_was_given_and_what_it_measured(passed: Tracked) -> None:
    """Parameters, metrics and tags are those of report.json."""
    run = first_run(passed)
    report = json.loads((passed.bench.output / "report" / "report.json").read_text())
    metrics = report["artifacts"][0]["metrics"]

    assert run.info.status == "FINISHED"
    assert run.data.params["recipe.quantize.scheme"] == "w4a16"
    assert run.data.params["recipe.gate.max_kl"] == "9.0"
    assert run.data.params["versions.torch"] == torch.__version__
    assert run.data.params["model"] == report["model"]
    assert run.data.metrics["kl_mean"] == metrics["kl"]["mean"]
    assert run.data.metrics["kl_p99"] == metrics["kl"]["p99"]
    assert run.data.metrics["perplexity"] == metrics["perplexity"]["value"]
    assert run.data.metrics["perplexity_baseline"] == metrics["perplexity"]["baseline"]
    assert run.data.metrics["top1_agreement"] == metrics["top1_agreement"]["value"]
    assert run.data.metrics["size_bytes"] == report["artifacts"][0]["size_bytes"]
    assert run.data.metrics["seconds/solve"] > 0
    assert run.data.metrics["peak_memory_bytes"] > 0
    assert run.data.tags["quantkit.verdict"] == "PASS"
    assert run.data.tags["quantkit.format"] == "compressed-tensors"


def test_the_report_and_the_evidence_are_artifacts_of_the_run(passed: Tracked) -> None:
    """Byte for byte; weights are not sent."""
    client, run = client_of(passed.uri), first_run(passed)
    top = {file.path for file in client.list_artifacts(run.info.run_id)}
    pages = {file.path for file in client.list_artifacts(run.info.run_id, "report")}
    kept = Path(client.download_artifacts(run.info.run_id, "quantkit.json"))

    assert top == {"report", "quantkit.json"}
    assert {"report/report.html", "report/report.json", "report/junit.xml"} <= pages
    assert kept.read_bytes() == (passed.bench.output / "quantkit.json").read_bytes()


def test_what_passed_is_a_model_version_under_an_alias(passed: Tracked) -> None:
    """Its source is the folder of the artifact, and it belongs to the run."""
    made = client_of(passed.uri).get_model_version_by_alias(MODEL, "quantkit-pass")

    assert made.run_id == find_id(passed.done.stdout)
    assert made.source == str((passed.bench.output / "compressed-tensors").resolve())
    assert made.tags["quantkit.verdict"] == "PASS"
    assert f"{MODEL} version {made.version} @quantkit-pass" in passed.done.stdout


def test_what_fails_is_logged_and_not_registered(passed: Tracked, tmp_path: Path) -> None:
    """The alias stays where it was, and the reply says so."""
    client = client_of(passed.uri)
    before = client.get_model_version_by_alias(MODEL, "quantkit-pass").version
    done = run_here(
        *("gate", passed.bench.output / "compressed-tensors", "--baseline", passed.bench.model),
        *("--set", "gate.max_kl=0.0000001", "--output", tmp_path / "reports"),
        *("--mlflow", EXPERIMENT, "--mlflow-model", MODEL),
        folder=passed.bench.folder,
    )
    run = client.get_run(find_id(done.stdout))

    assert done.returncode == 3
    assert run.data.tags["quantkit.verdict"] == "FAIL"
    assert run.data.params["recipe.gate.max_kl"] == "1e-07"
    assert run.data.metrics["kl_mean"] > 1e-7
    assert run.info.status == "FINISHED"
    assert client.get_model_version_by_alias(MODEL, "quantkit-pass").version == before
    assert f"no version of {MODEL}: the verdict is FAIL" in done.stdout


def test_a_job_that_breaks_is_a_failed_run(passed: Tracked, tmp_path: Path) -> None:
    """With the line of the error, and with the token that it quotes left out."""
    bench = spoil(make_bench(tmp_path, passed.bench.model))
    done = run_here(
        *("quantize", "--recipe", bench.recipe, "--no-gate", "--mlflow", "broken"),
        folder=bench.folder,
    )
    run = find_runs(passed.uri, "broken")[0]

    assert done.returncode == 2
    assert run.info.status == "FAILED"
    assert run.data.tags["quantkit.error"] in done.stderr


def spoil(bench: Bench) -> Bench:
    """Put a NaN into the last block."""
    file = bench.model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    return bench


def test_a_server_that_is_down_is_told_before_the_work(
    passed: Tracked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within seconds, without the password, and nothing is written."""
    bench = make_bench(tmp_path, passed.bench.model)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:hunter2@127.0.0.1:{free_port()}")
    done = run_here(
        "quantize", "--recipe", bench.recipe, "--mlflow", EXPERIMENT, folder=bench.folder
    )

    assert done.returncode == 6
    assert "does not answer" in done.stderr
    assert "hunter2" not in done.stderr + done.stdout
    assert not bench.output.exists()


def test_a_server_is_asked_with_the_certificates_that_mlflow_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that signs its own certificate is not taken for one that is down."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost"
    command += f" -addext subjectAltName=DNS:localhost -keyout {key} -out {certificate}"
    subprocess.run(command.split(), check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = ThreadingHTTPServer(("localhost", 0), SimpleHTTPRequestHandler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    uri = f"https://localhost:{server.server_address[1]}"
    try:
        with pytest.raises(TrackingError, match="SSLError"):
            check_answers(uri)
        with monkeypatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(certificate))
            check_answers(uri)
        monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
        check_answers(uri)
    finally:
        server.shutdown()
        server.server_close()


def test_a_server_that_goes_down_loses_no_finished_job(
    passed: Tracked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reply stands, its exit code says that something is left, and names what does it later."""
    from quantkit.cli.console import Reply
    from quantkit.cli.tracking import TrackingOptions, tracked

    # A copy, because MLflow takes seconds to make the tables of a new one.
    store = tmp_path / "own.db"
    shutil.copy(passed.uri.removeprefix("sqlite:///"), store)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
    with tracked(TrackingOptions("later"), "a job") as track:
        run_sql(store, "ALTER TABLE params RENAME TO gone")
        reply = track(Reply({"exit_code": 0}, ["verdict  PASS"], 0), passed.bench.output)
    run_sql(store, "ALTER TABLE gone RENAME TO params")
    command = str(reply.lines[-1]).partition(": ")[2]
    done = run_here(*shlex.split(command)[1:])

    assert reply.exit_code == 6
    assert reply.lines[0] == "verdict  PASS"
    assert "not logged" in str(reply.lines[1])
    assert done.returncode == 0, done.stderr
    assert [run.info.status for run in find_runs(f"sqlite:///{store}", "later")] == ["FINISHED"]


def run_sql(store: Path, statement: str) -> None:
    with closing(sqlite3.connect(store)) as database, database:
        database.execute(statement)


def test_the_run_that_the_caller_has_open_is_used_and_left_open(
    passed: Tracked, tmp_path: Path
) -> None:
    """A second result goes into a run below, for parameters cannot be replaced."""
    import mlflow

    from quantkit.integrations.mlflow import log_result

    other = tmp_path / "other"
    shutil.copytree(passed.bench.output / "report", other)
    page = other / "report.json"
    page.write_text(page.read_text().replace('"w4a16"', '"w8a16"'))
    with mlflow.start_run() as active:
        logged = log_result(passed.bench.output, step=7)
        with pytest.raises(quantkit.InputError, match="nested=True"):
            log_result(other)
        below = log_result(other, nested=True)
        assert mlflow.active_run().info.run_id == active.info.run_id
    client = client_of(passed.uri)
    child = client.get_run(below.run_id)

    assert logged.run_id == active.info.run_id
    assert client.get_metric_history(logged.run_id, "kl_mean")[0].step == 7
    assert child.data.tags["mlflow.parentRunId"] == active.info.run_id
    assert child.info.status == "FINISHED"


def test_an_upload_is_what_the_version_points_to(passed: Tracked) -> None:
    """For servers, which take no folder of another machine."""
    from quantkit.integrations.mlflow import log_result

    logged = log_result(
        passed.bench.output, experiment="uploads", registered_model="uploaded", upload=True
    )
    source = Path(logged.versions[0].source)
    original = passed.bench.output / "compressed-tensors" / "model.safetensors"

    assert (source / "model.safetensors").read_bytes() == original.read_bytes()


def test_an_artifact_that_has_changed_since_its_pass_is_not_registered(
    passed: Tracked, tmp_path: Path
) -> None:
    """One byte is enough."""
    output = tmp_path / "out"
    shutil.copytree(passed.bench.output, output)
    weights = output / "compressed-tensors" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    done = run_here("track", output, "--mlflow", EXPERIMENT, "--mlflow-model", "changed")

    assert done.returncode == 2
    assert "no longer what has passed" in done.stderr
    assert not client_of(passed.uri).search_registered_models("name = 'changed'")


def test_a_sweep_is_a_run_with_a_run_for_each_job(passed: Tracked) -> None:
    """A job that failed is a failed run below it."""
    from quantkit.inputs import load
    from quantkit.integrations.mlflow import log_sweep
    from quantkit.sweeping.records import JobOutcome, SweepJob, SweepResult

    def outcome(name: str, **found: Any) -> JobOutcome:
        loaded = load(passed.bench.recipe, passed.bench.model, passed.bench.output, ())
        job = SweepJob(name, "recipe", loaded, (), passed.bench.folder / "log")
        return JobOutcome(job, **found)

    evidence = json.loads((passed.bench.output / "quantkit.json").read_text())
    outcomes = (
        outcome("good", state="finished", exit_code=0, evidence=evidence),
        outcome("bad", state="failed", exit_code=5, error="no space left"),
    )
    swept = SweepResult(passed.bench.folder, outcomes, {}, {}, 5)
    whole = log_sweep(swept, experiment="sweeps")
    below = {run.info.run_name: run for run in find_runs(passed.uri, "sweeps")}

    assert below["good"].data.tags["mlflow.parentRunId"] == whole.run_id
    assert below["good"].data.metrics["kl_mean"] > 0
    assert below["bad"].info.status == "FAILED"
    assert below["bad"].data.tags["quantkit.error"] == "no space left"


def test_spans_of_a_job_arrive_and_nest(passed: Tracked) -> None:
    """One trace: stages below the job, blocks below their stage, the judging below the gate."""
    spans = passed.collector.spans()
    by_id = {span.span_id: span for span in spans}

    def path_of(span: Any) -> str:
        above = by_id.get(span.parent_span_id)
        name = span.name.removeprefix("quantkit.")
        return name if above is None else f"{path_of(above)} > {name}"

    paths = [path_of(span) for span in spans]
    blocks = [span for span in spans if span.name == "quantkit.block"]
    judged = next(span for span in spans if span.name == "quantkit.judge")

    assert len({span.trace_id for span in spans}) == 1
    assert paths.count("job.quantize > quantize > block") == 2
    assert paths.count("job.quantize > quantize > read") == 2
    assert {
        "job.quantize",
        "job.quantize > prepare",
        "job.quantize > quantize > block > calibrate",
        "job.quantize > quantize > block > solve",
        "job.quantize > write > export",
        "job.quantize > gate > judge",
    } <= set(paths)
    assert [value_of(span, "quantkit.block.index") for span in blocks] == [0, 1]
    assert value_of(blocks[0], "quantkit.scheme") == "w4a16"
    assert value_of(blocks[0], "quantkit.layer.error") > 0
    assert value_of(judged, "quantkit.verdict") == "PASS"
    assert value_of(judged, "quantkit.kl") > 0


def test_metrics_of_a_job_arrive(passed: Tracked) -> None:
    """All that docs/tracking.md names."""
    assert passed.collector.metric_names() == {
        "quantkit.block.duration",
        "quantkit.blocks",
        "quantkit.memory.peak",
        "quantkit.verdicts",
    }


def test_a_job_that_breaks_has_an_error_on_its_spans(passed: Tracked, tmp_path: Path) -> None:
    """With the application's own providers; in a rank of torchrun its number is on each span."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    bench, exporter = spoil(make_bench(tmp_path, passed.bench.model)), InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with quantkit_traced(provider), pytest.raises(quantkit.QuantkitError):
        quantkit.quantize(bench.recipe, model=bench.model, output=bench.output, gate=False)
    spans = exporter.get_finished_spans()
    whole = next(span for span in spans if span.name == "quantkit.job.quantize")

    assert whole.status.status_code.name == "ERROR"
    assert "not finite" in whole.status.description or "NaN" in whole.status.description
    assert whole.events[0].name == "exception"


def quantkit_traced(provider: Any) -> Any:
    from quantkit.tracing import traced

    return traced(tracer_provider=provider)


def test_a_rank_says_its_number_and_a_child_is_told_its_parent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TRACEPARENT, as the W3C writes it."""
    from opentelemetry.sdk.trace import TracerProvider

    from quantkit.tracing import child_environment, span

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with quantkit_traced(TracerProvider()), span("here") as opened:
        told = child_environment()
    number = f"{opened.recorded.get_span_context().span_id:016x}"

    assert opened.recorded.attributes["quantkit.rank"] == 1
    assert told["TRACEPARENT"].split("-")[2] == number


def test_a_collector_that_is_down_costs_a_note(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And no result."""
    from quantkit.integrations.telemetry import exported
    from quantkit.tracing import span

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with exported(), span("here"):
        pass

    assert "note: not all spans and metrics were sent" in capsys.readouterr().err


def test_spans_begin_below_the_parent_that_the_environment_names() -> None:
    """So a sweep's jobs, and a pipeline's step, are one trace."""
    from quantkit.integrations.telemetry import exported
    from quantkit.tracing import span

    with collecting() as collector:
        names = {"OTEL_METRICS_EXPORTER": "none", "TRACEPARENT": f"00-{'a' * 32}-{'b' * 16}-01"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.address)
            with exported(names), span("here"):
                pass
        (found,) = collector.spans()

    assert found.trace_id.hex() == "a" * 32
    assert found.parent_span_id.hex() == "b" * 16


def test_nothing_is_loaded_or_sent_unless_asked_for(passed: Tracked, tmp_path: Path) -> None:
    """Not with the packages installed, and not with an endpoint and a server in the environment."""
    bench = make_bench(tmp_path, passed.bench.model)
    program = (
        "import sys, quantkit\n"
        f"quantkit.quantize({str(bench.recipe)!r}, model={str(bench.model)!r}, "
        f"output={str(bench.output)!r}, overrides=['quantize.method=rtn'], gate=False)\n"
        "print(sorted({'mlflow', 'opentelemetry'} & set(sys.modules)))"
    )
    before = len(passed.collector.bodies["/v1/traces"])
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120
    )

    assert done.stdout.strip() == "[]", done.stderr
    assert len(passed.collector.bodies["/v1/traces"]) == before
