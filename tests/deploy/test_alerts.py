"""Dashboards and alerts: every metric that they name exists, and Prometheus itself reads them."""

import json
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlencode
from urllib.request import urlopen

import promql_parser
import pytest
import yaml
from prometheus_client import generate_latest

from recoup.schemas import CreateRecovery, ModelRef
from recoup_jobs import metrics
from recoup_jobs.gauges import exposition
from recoup_jobs.ledger import open_ledger
from recoup_jobs.settings import Settings

VLLM = ("num_requests_running", "num_requests_waiting", "generation_tokens_total", "prompt_tokens_total")
"""Of vLLM 0.33; its own names."""
ENDINGS = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
CHILDREN = ("lhs", "rhs", "expr", "args", "vector_selector")


@pytest.fixture(scope="session")
def rules(root):
    groups = yaml.safe_load((root / "deploy/prometheus/alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


@pytest.fixture(scope="session")
def panels(root):
    return json.loads((root / "deploy/grafana/dashboards/recoup.json").read_text())["panels"]


@pytest.fixture(scope="session")
def queries(panels):
    return [target["expr"] for panel in panels for target in panel["targets"]]


@pytest.fixture(scope="session")
def known():
    """Every name that a scrape of API, worker or vLLM brings."""
    families = [*metrics.REGISTRY.collect(), *vars(metrics.Gauges()).values()]
    ours = {family.name + ending for family in families for ending in ENDINGS[family.type]}
    return ours | {f"vllm:{name}" for name in VLLM} | {"up"}


def names_in(query):
    def walk(node):
        if isinstance(node, promql_parser.VectorSelector):
            yield node.name
        for child in (getattr(node, name, None) for name in CHILDREN):
            for each in child if isinstance(child, list) else [child]:
                if each is not None:
                    yield from walk(each)

    return set(walk(promql_parser.parse(query)))


def test_names_are_found_wherever_they_stand():
    query = "histogram_quantile(0.9, sum by (le) (rate(a_bucket[5m]))) > 1 and (b / c{x='y'}) == 0"
    assert names_in(query) == {"a_bucket", "b", "c"}


def test_every_metric_on_the_dashboard_exists(queries, known):
    assert set().union(*map(names_in, queries)) - known == set()


def test_every_metric_of_an_alert_exists(rules, known):
    assert set().union(*(names_in(rule["expr"]) for rule in rules)) - known == set()


def test_every_metric_of_ours_is_on_the_dashboard(queries, known):
    shown = set().union(*map(names_in, queries))
    families = [*metrics.REGISTRY.collect(), *vars(metrics.Gauges()).values()]
    assert [
        family.name for family in families if not any(name.startswith(family.name) for name in shown)
    ] == []


def test_every_alert_has_its_entry_in_the_runbook(rules, root):
    page = (root / "docs/10-operations.md").read_text()
    for rule in rules:
        assert rule["annotations"]["runbook"] == f"docs/10-operations.md#{rule['alert'].lower()}"
        assert f"### {rule['alert']}\n" in page


def test_no_label_of_ours_is_free(known):
    """Tenants, jobs and models are not bounded; a label of them would be a series for each."""
    labels = {label for family in metrics.REGISTRY.collect() for s in family.samples for label in s.labels}
    named = set().union(*(metric._labelnames for metric in metrics.REGISTRY._collector_to_names))
    assert labels | named <= {"method", "route", "status", "reason", "stage", "queue", "kind", "state"} | {
        "outcome",
        "le",
    }


def test_panels_do_not_cover_one_another(panels):
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_prometheus_accepts_rules_and_configuration(tool, root, tmp_path):
    text = (root / "deploy/prometheus/prometheus.yml").read_text()
    key = tmp_path / "api_key"
    key.write_text("a-key")
    text = text.replace("/run/secrets/api_key", str(key))
    (tmp_path / "prometheus.yml").write_text(text.replace("/etc/prometheus/", f"{root}/deploy/prometheus/"))
    check([tool("promtool"), "check", "config", tmp_path / "prometheus.yml"])


def test_alerts_fire_where_they_should_and_nowhere_else(tool, root, tmp_path, rules):
    text = (root / "tests/deploy/alerts.yml").read_text()
    assert all(text.count(f"alertname: {rule['alert']}}}") == 1 for rule in rules)
    (tmp_path / "tests.yml").write_text(text.replace("RULES", f"{root}/deploy/prometheus/alerts.yml"))
    check([tool("promtool"), "test", "rules", tmp_path / "tests.yml"])


def check(command):
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def installation(tmp_path):
    """What API, worker and vLLM would show together, a little more at every scrape; yields its port."""
    ledger = open_ledger(Settings(home=tmp_path / "home"))
    asked = CreateRecovery(student=ModelRef(source="s"), teacher=ModelRef(source="t"))
    for outcome in ("recovered", "no_gain", None):
        ledger.create(asked, "gpu.cpu")
        claim = ledger.claim("worker", ["gpu.cpu"], 30)
        ledger.succeed(claim, outcome) if outcome else ledger.fail(claim, "x", "why", retry=False)
    ledger.create(asked, "gpu.cpu")

    class Shows(BaseHTTPRequestHandler):
        def do_GET(self):
            work_a_little()
            text = exposition(ledger) + vllm(time.time())
            self.send_response(200)
            self.send_header("Content-Type", metrics.CONTENT_TYPE)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Shows)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()
    ledger.close()


def work_a_little():
    for stage in ("generate", "distil"):
        metrics.STAGE_SECONDS.labels(stage).observe(20)
    metrics.TOKENS_GENERATED.inc(100)
    metrics.TOKENS_TRAINED.inc(100)
    metrics.GPU_SECONDS.labels("gpu.1x80g").inc(10)
    metrics.LEASE_LOSSES.labels("lease_expired").inc()
    metrics.REFUSED_WRITES.inc()
    metrics.HINTS.inc()
    metrics.CLAIM_SECONDS.observe(2)
    metrics.RECOVERED_FRACTION.observe(0.8)
    metrics.JOBS_ENDED.labels("recovery", "succeeded", "recovered").inc()
    metrics.HTTP_REQUESTS.labels("GET", "/v1/files", "200").inc()
    metrics.HTTP_REQUESTS.labels("GET", "/v1/files", "503").inc()
    metrics.HTTP_SECONDS.labels("GET", "/v1/files").observe(0.02)


def vllm(much):
    return "".join(f"vllm:{name} {much}\n" for name in VLLM).encode()


def test_every_query_has_an_answer_from_prometheus(tool, installation, tmp_path, free_port, queries, rules):
    """Alerts are asked for without their bound, which an installation that is well keeps."""
    config = {
        "global": {"scrape_interval": "250ms", "scrape_timeout": "250ms"},
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{installation}"]}]}
            for job in ("recoup-api",)
        ],
    }
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    url = f"http://127.0.0.1:{free_port}"
    command = [
        tool("prometheus"),
        f"--config.file={tmp_path}/prometheus.yml",
        f"--storage.tsdb.path={tmp_path}/db",
    ]
    command += [f"--web.listen-address=127.0.0.1:{free_port}", "--log.level=error"]
    wanted = [*queries, *(unbound(rule["expr"]) for rule in rules)]
    with subprocess.Popen(command) as prometheus:
        try:
            until = time.monotonic() + 60
            while (silent := [query for query in wanted if not ask(url, query)]) and time.monotonic() < until:
                time.sleep(0.5)
        finally:
            prometheus.terminate()
    assert silent == []


def unbound(query):
    """The left side of an alert's comparison."""
    node = promql_parser.parse(query)
    return node.lhs.prettify() if str(node.op) in {">", "=="} else query


def ask(url, query):
    try:
        with urlopen(f"{url}/api/v1/query?{urlencode({'query': query})}", timeout=5) as answer:
            return json.load(answer)["data"]["result"]
    except OSError:
        return None


def test_what_a_worker_shows_is_what_prometheus_reads(tool):
    done = subprocess.run(
        [tool("promtool"), "check", "metrics"],
        input=generate_latest(metrics.REGISTRY),
        check=False,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
