"""deploy/kubernetes against the schemas of Kubernetes, and against what no schema knows."""

import re
import subprocess

import kubernetes_validate
import pytest
import yaml

from recoup_jobs.settings import PREFIX, Settings
from recoup_jobs.tables import jobs

VERSIONS = ("1.31", "1.37")
"""The oldest and the newest Kubernetes that is meant."""
OVERLAYS = ("base", "overlays/cluster", "overlays/multi-node")
WITHOUT_SCHEMA = {"ScaledJob", "TriggerAuthentication", "JobSet"}
SCALED_JOB = {
    *("jobTargetRef", "pollingInterval", "minReplicaCount", "maxReplicaCount", "successfulJobsHistoryLimit"),
    *("failedJobsHistoryLimit", "rollout", "scalingStrategy", "triggers", "envSourceContainerName"),
}
"""The fields of KEDA's specification, https://keda.sh/docs/latest/reference/scaledjob-spec."""
TRIGGER = {
    "query",
    "targetQueryValue",
    "activationTargetQueryValue",
    "host",
    "port",
    "userName",
    "dbName",
    "sslmode",
}
JOB_SET = {
    "suspend",
    "failurePolicy",
    "successPolicy",
    "network",
    "ttlSecondsAfterFinished",
    "replicatedJobs",
}


@pytest.fixture(scope="session")
def folder(root):
    return root / "deploy/kubernetes"


def documents(text):
    return [document for document in yaml.safe_load_all(text) if document]


@pytest.fixture(scope="session")
def manifests(folder):
    """All that base and overlays add, as written."""
    paths = [path for path in folder.rglob("*.yaml") if path.name != "kustomization.yaml"]
    return [document for path in sorted(paths) for document in documents(path.read_text())]


@pytest.fixture(scope="session")
def one(manifests):
    """`one("Deployment", "api")`."""
    by_name = {(each["kind"], each["metadata"]["name"]): each for each in manifests}
    assert len(by_name) == len(manifests)
    return lambda kind, name: by_name[kind, name]


@pytest.fixture(scope="session")
def pods(manifests):
    """(owner, pod template) of everything that runs."""
    return [
        (f"{each['kind']} {each['metadata']['name']}", pod) for each in manifests for pod in templates(each)
    ]


def templates(manifest):
    spec = manifest.get("spec", {})
    if manifest["kind"] == "JobSet":
        return [job["template"]["spec"]["template"] for job in spec["replicatedJobs"]]
    if manifest["kind"] == "ScaledJob":
        return [spec["jobTargetRef"]["template"]]
    return [spec["template"]] if "template" in spec else []


@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_follows_its_schema_strictly(manifests, version):
    for each in manifests:
        if each["kind"] not in WITHOUT_SCHEMA:
            kubernetes_validate.validate(each, version, strict=True)


def test_the_schema_finds_a_mistake(one):
    wrong = yaml.safe_load(yaml.safe_dump(one("Deployment", "api")))
    wrong["spec"]["template"]["spec"]["containers"][0]["redinessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


def test_pods_inside_what_has_no_schema_follow_theirs(pods):
    for owner, pod in pods:
        if owner.split()[0] in WITHOUT_SCHEMA:
            alone = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod["spec"]}
            kubernetes_validate.validate(alone, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_renders_it_and_schemas_accept_the_result(tool, folder, overlay):
    done = subprocess.run(
        [tool("kubectl"), "kustomize", folder / overlay], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rendered = documents(done.stdout)
    assert {each["metadata"].get("namespace", "recoup") for each in rendered} == {"recoup"}
    for each in rendered:
        if each["kind"] not in WITHOUT_SCHEMA:
            kubernetes_validate.validate(each, VERSIONS[-1], strict=True)


def test_every_file_is_listed_and_every_listed_file_is_there(folder):
    for path in folder.rglob("kustomization.yaml"):
        listed = yaml.safe_load(path.read_text())["resources"]
        files = {file.name for file in path.parent.glob("*.yaml")} - {path.name}
        assert {name for name in listed if name.endswith(".yaml")} == files
        assert all((path.parent / name).exists() for name in listed)


def test_every_container_is_unprivileged_on_a_read_only_root(pods):
    for owner, pod in pods:
        outside = pod["spec"]["securityContext"]
        assert outside["runAsNonRoot"] and outside["runAsUser"] > 0, owner
        assert outside["seccompProfile"]["type"] == "RuntimeDefault", owner
        for container in pod["spec"]["containers"]:
            inside = container["securityContext"]
            assert inside["readOnlyRootFilesystem"] and not inside["allowPrivilegeEscalation"], owner
            assert inside["capabilities"] == {"drop": ["ALL"]}, owner


def test_no_pod_but_the_router_may_speak_to_the_cluster(pods):
    speaking = [owner for owner, pod in pods if pod["spec"]["automountServiceAccountToken"]]
    assert speaking == ["Deployment router"]


def test_every_container_says_what_it_needs_and_how_much_memory_it_may_take(pods):
    for owner, pod in pods:
        for container in pod["spec"]["containers"]:
            resources = container["resources"]
            assert {"cpu", "memory"} <= resources["requests"].keys(), owner
            assert resources["limits"]["memory"], owner
            gpus = [kind.get("nvidia.com/gpu") for kind in (resources["requests"], resources["limits"])]
            assert gpus[0] == gpus[1], owner


def test_every_pod_has_a_priority_that_exists(pods, one):
    for _, pod in pods:
        assert one("PriorityClass", pod["spec"]["priorityClassName"])
    values = [one("PriorityClass", f"recoup-{name}")["value"] for name in ("service", "teacher", "worker")]
    assert values == sorted(values, reverse=True)


def test_what_serves_is_probed(one):
    for name in ("api", "vllm", "router"):
        (container,) = one("Deployment", name)["spec"]["template"]["spec"]["containers"]
        assert {"readinessProbe", "livenessProbe"} <= container.keys()
        assert one("PodDisruptionBudget", name)


def test_the_api_is_not_restarted_because_its_database_is_away(one):
    (api,) = one("Deployment", "api")["spec"]["template"]["spec"]["containers"]
    assert api["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert api["readinessProbe"]["httpGet"]["path"] == "/readyz"


def test_the_autoscaler_alone_decides_how_many_api_pods_there_are(one):
    assert "replicas" not in one("Deployment", "api")["spec"]
    assert one("HorizontalPodAutoscaler", "api")["spec"]["minReplicas"] >= 2


def test_every_image_has_an_exact_version(pods):
    for owner, pod in pods:
        for container in pod["spec"]["containers"]:
            assert re.fullmatch(r"[a-z0-9./-]+:v?\d+\.\d+\.\d+", container["image"]), owner


def test_vllm_is_the_release_of_the_other_installations(one, root):
    pinned = re.search(r"^vllm==(\S+)$", (root / "deploy/vllm/requirements.txt").read_text(), re.MULTILINE)
    (vllm,) = one("Deployment", "vllm")["spec"]["template"]["spec"]["containers"]
    assert vllm["image"] == f"vllm/vllm-openai:v{pinned[1]}"


def test_every_variable_of_ours_is_a_setting_and_no_secret(pods, one):
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    given = {*one("ConfigMap", "recoup")["data"]}
    given |= {each["name"] for _, pod in pods for c in pod["spec"]["containers"] for each in c.get("env", [])}
    ours = {name for name in given if name.startswith(PREFIX)}
    assert ours <= known
    assert not ours & {f"{PREFIX}{name}" for name in ("API_KEY", "SECRET", "DATABASE_URL", "BROKER_URL")}


def test_secrets_come_by_reference_and_a_worker_gets_the_ledgers_alone(manifests, pods):
    assert not any(each["kind"] == "Secret" for each in manifests)
    for owner, pod in pods:
        for volume in pod["spec"]["volumes"]:
            if "secret" in volume and owner.split()[1].startswith("worker"):
                assert [item["key"] for item in volume["secret"]["items"]] == ["recoup_database_url"]


def test_a_runner_has_its_grace_before_its_pod_is_killed(one, pods):
    grace = float(one("ConfigMap", "recoup")["data"]["RECOUP_GRACE_SECONDS"])
    for owner, pod in pods:
        if owner.split()[1].startswith("worker"):
            assert pod["spec"]["terminationGracePeriodSeconds"] > 2 * grace
            assert pod["spec"]["restartPolicy"] == "Never"


# KEDA: kubernetes-validate has no schema of it.


@pytest.fixture(scope="session")
def scaled(one):
    return one("ScaledJob", "worker")["spec"]


def test_the_scaled_job_has_only_fields_that_keda_knows(scaled):
    assert scaled.keys() <= SCALED_JOB
    assert scaled["rollout"] == {"strategy": "gradual", "propagationPolicy": "foreground"}
    assert scaled["scalingStrategy"] == {"strategy": "accurate"}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": scaled["jobTargetRef"]}
    kubernetes_validate.validate(job, VERSIONS[-1], strict=True)


def test_a_running_recovery_is_never_scaled_in(scaled, manifests):
    """KEDA's ScaledObject and an HPA pick pods to kill; a Job they leave alone."""
    assert not any(each["kind"] == "ScaledObject" for each in manifests)
    scaling = [
        each["spec"]["scaleTargetRef"]["name"]
        for each in manifests
        if "scaleTargetRef" in each.get("spec", {})
    ]
    assert scaling == ["api"]
    annotations = scaled["jobTargetRef"]["template"]["metadata"]["annotations"]
    assert annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
    assert annotations["karpenter.sh/do-not-disrupt"] == "true"
    assert scaled["jobTargetRef"]["activeDeadlineSeconds"] >= 7 * 86_400


def test_a_pod_works_on_one_recovery_and_the_ledger_tries_it_again(scaled):
    job = scaled["jobTargetRef"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (1, 1, 0)
    (worker,) = job["template"]["spec"]["containers"]
    assert worker["args"] == ["recoup-server", "worker", "--once"]


def test_the_trigger_counts_jobs_that_wait_for_this_class_of_machine(scaled, one, tmp_path):
    (trigger,) = scaled["triggers"]
    assert trigger["type"] == "postgresql"
    assert trigger["metadata"].keys() <= TRIGGER
    assert all(isinstance(value, str) for value in trigger["metadata"].values())
    query = trigger["metadata"]["query"]
    assert {"state", "queue"} <= {*jobs.c.keys()} and f"FROM {jobs.name} " in query
    queue = re.search(r"queue = '([^']+)'", query)[1]
    assert queue == one("ConfigMap", "recoup")["data"]["RECOUP_QUEUE"]
    assert trigger["authenticationRef"]["name"] == one("TriggerAuthentication", "ledger")["metadata"]["name"]


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_the_trigger_counts_what_a_worker_would_take(scaled, database, tmp_path):
    from sqlalchemy import text

    from recoup.schemas import CreateRecovery, ModelRef
    from recoup_jobs.ledger import open_ledger

    ledger = open_ledger(Settings(home=tmp_path, database_url=database))
    asked = CreateRecovery(student=ModelRef(source="s"), teacher=ModelRef(source="t"))
    for queue in ("gpu.1x80g", "gpu.1x80g", "gpu.cpu"):
        ledger.create(asked, queue)
    query = text(scaled["triggers"][0]["metadata"]["query"])

    def waiting():
        with ledger.reading() as conn:
            return conn.execute(query).scalar_one()

    assert waiting() == 2
    ledger.claim("worker", ["gpu.1x80g"], 30)
    assert waiting() == 1
    ledger.close()


# Several hosts.


def test_the_job_set_has_only_fields_that_jobset_knows_and_waits(one):
    spec = one("JobSet", "worker-16x80g")["spec"]
    assert spec.keys() <= JOB_SET
    assert spec["suspend"] is True
    for each in spec["replicatedJobs"]:
        job = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": "x"},
            "spec": each["template"]["spec"],
        }
        kubernetes_validate.validate(job, VERSIONS[-1], strict=True)


def test_ranks_find_their_leader(one):
    spec = one("JobSet", "worker-16x80g")["spec"]
    leader, follower = (job["template"]["spec"]["template"]["spec"] for job in spec["replicatedJobs"])
    named = {each["name"]: each.get("value") for each in follower["containers"][0]["env"]}
    first = f"worker-16x80g-{spec['replicatedJobs'][0]['name']}-0-0.{spec['network']['subdomain']}"
    assert named["PET_RDZV_ENDPOINT"].split(":")[0] == first
    assert leader["containers"][0]["args"] == ["recoup-server", "worker", "--once"]
    assert not any("secret" in volume for volume in follower["volumes"])


# The network.


@pytest.fixture(scope="session")
def policies(manifests):
    return [each["spec"] for each in manifests if each["kind"] == "NetworkPolicy"]


def chosen(selector, labels):
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    ins = selector.get("matchExpressions", [])
    return wanted and all(labels.get(each["key"]) in each["values"] for each in ins)


def test_what_is_not_allowed_is_forbidden(policies):
    nothing = [p for p in policies if p["podSelector"] == {} and {"ingress", "egress"}.isdisjoint(p)]
    assert [set(p["policyTypes"]) for p in nothing] == [{"Ingress", "Egress"}]


@pytest.mark.parametrize(
    ("source", "target", "port", "open"),
    [
        ("worker", "router", 8000, True),
        ("router", "vllm", 8000, True),
        ("worker", "vllm", 8000, False),
        ("worker", "api", 8321, False),
        ("api", "vllm", 8000, False),
        ("vllm", "api", 8321, False),
        ("api", "router", 8000, False),
    ],
)
def test_who_reaches_whom(policies, pods, source, target, port, open):
    labels = {pod["metadata"]["labels"]["app"]: pod["metadata"]["labels"] for _, pod in pods}

    def allowed(direction, side, other):
        rules = [
            rule
            for policy in policies
            if chosen(policy["podSelector"], labels[side])
            for rule in policy.get(direction, [])
        ]
        peers = "to" if direction == "egress" else "from"
        return any(
            any("podSelector" in peer and chosen(peer["podSelector"], labels[other]) for peer in rule[peers])
            and any(each["port"] == port for each in rule["ports"])
            for rule in rules
            if "ports" in rule
        )

    assert (allowed("egress", source, target) and allowed("ingress", target, source)) == open


def test_every_service_and_budget_selects_pods_that_exist(manifests, pods):
    labels = [pod["metadata"]["labels"] for _, pod in pods]
    for each in manifests:
        if each["kind"] in {"Service", "PodDisruptionBudget"}:
            selector = each["spec"]["selector"]
            wanted = selector if each["kind"] == "Service" else selector["matchLabels"]
            assert any(wanted.items() <= found.items() for found in labels)
