"""What is wanted comes about on servers that behave as vLLM does; silent failures are caught or healed."""

import json
import shutil
import time

import numpy
import pytest
from safetensors.numpy import load_file, save_file

from recoup.schemas import CreateDeployment
from recoup_jobs.artifacts import publish
from recoup_jobs.deployments import Deployments
from recoup_jobs.ledger import open_ledger
from recoup_jobs.publication import prepared, weights_sha256
from recoup_jobs.reconciler import ROLE, Reconciler
from recoup_jobs.stores import open_store
from recoup_jobs.tables import DEFAULT_TENANT


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def recovered(ledger, settings, asked, write_adapter, write_model, tmp_path):
    """A recovery of `student` that handed this over; call `spoil` to hand it over otherwise."""
    if not (settings.model_roots[0] / "student").exists():
        write_model("student")

    def make(kind="adapter", **adapter):
        sha256 = weights_sha256(settings.model_roots[0] / "student")
        source = tmp_path / f"out-{time.monotonic_ns()}"
        write_adapter(source, **{"sha256": sha256} | adapter)
        (source / "adapter").rename(source / kind)
        id = ledger.create(asked, "gpu.cpu").id
        claim = ledger.claim("worker", ["gpu.cpu"], 30)
        package = f"{id}/e1/package"

        def hand_over(spoil=lambda folder: None):
            spoil(source / kind)
            files = {str(path.relative_to(source)): path for path in source.rglob("*") if path.is_file()}
            publish(open_store(settings), package, files)

        hand_over()
        ledger.commit_stage(claim, "package", package)
        ledger.succeed(claim, "recovered")
        return id, hand_over

    return make


@pytest.fixture
def installation(ledger, settings, clock, recovered):
    """An installation whose servers are these."""
    made = []

    class Installation:
        def __init__(self, *upstreams, **more):
            urls = [getattr(upstream, "url", upstream) for upstream in upstreams]
            self.settings = settings.model_copy(update={"serve_urls": urls} | more)
            self.deployments = Deployments(ledger, urls)
            self.reconciler = Reconciler(ledger, self.settings, clock, drain_seconds=-1)
            made.append(self.reconciler)

        def deploy(self, name="support", spoil=lambda folder: None, **adapter):
            """Asks for a deployment of a new recovery, whose adapter is spoilt behind the service's back."""
            recovery, hand_over = recovered(**adapter)
            asked = CreateDeployment(recovery=recovery, name=name)
            new = prepared(asked, ledger, self.settings, DEFAULT_TENANT)
            hand_over(spoil)
            return self.deployments.add(new, 10).id

        def round(self):
            self.reconciler.reconcile()
            ledger.resign(ROLE, self.reconciler._name)

        def look(self, id):
            return self.deployments.get(id, DEFAULT_TENANT)

    yield Installation
    for reconciler in made:
        for replica in reconciler._replicas.values():
            replica.close()


def change_weights(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def with_zeros(folder):
    change_weights(folder, lambda weights: {name: numpy.zeros_like(w) for name, w in weights.items()})


def with_wrong_prefix(folder):
    change_weights(
        folder, lambda weights: {name.replace("base_model.", ""): w for name, w in weights.items()}
    )


def with_half_the_weights(folder):
    change_weights(folder, lambda weights: {name: w / 2 for name, w in weights.items()})


def test_an_adapter_is_loaded_proven_and_live(installation, start_upstream):
    upstream = start_upstream()
    here = installation(upstream)
    id = here.deploy()
    here.round()
    found = here.look(id)
    assert (found.state, found.reason) == ("live", None)
    assert [(one.replica, one.state) for one in found.replicas] == [(0, "ready")]
    assert upstream.adapters == {id: pytest.approx(0.7)}
    config = json.loads((here.settings.deployments_dir / id / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == upstream.folder


def test_a_second_round_asks_a_server_for_its_list_alone(installation, start_upstream):
    upstream = start_upstream()
    here = installation(upstream)
    id = here.deploy()
    here.round()
    asked, version = len(upstream.bodies), here.look(id).version
    here.round()
    assert (len(upstream.bodies), here.look(id).version) == (asked, version)


@pytest.mark.parametrize(
    ("spoil", "code"),
    [(with_zeros, "no_effect"), (with_wrong_prefix, "no_effect"), (with_half_the_weights, "effect_mismatch")],
)
def test_an_adapter_that_does_not_do_what_it_did_in_training_fails(installation, start_upstream, spoil, code):
    upstream = start_upstream()
    here = installation(upstream)
    id = here.deploy(spoil=spoil)
    here.round()
    found = here.look(id)
    assert (found.state, found.reason.code) == ("failed", code)
    assert upstream.adapters == {}
    here.round()
    assert not (here.settings.deployments_dir / id).exists()


def test_a_server_of_another_base_under_the_same_name_is_found_out(installation, start_upstream):
    upstream = start_upstream("other")
    here = installation(upstream)
    id = here.deploy()
    upstream.base, real = "student", upstream.log_p
    upstream.log_p = lambda model, token, at: real(model, token + 1, at)
    here.round()
    assert (here.look(id).state, here.look(id).reason.code) == ("failed", "base_mismatch")


def test_a_student_that_changed_since_its_training_is_found_out(installation, start_upstream):
    here = installation(start_upstream())
    id = here.deploy(sha256="1" * 64)
    here.round()
    assert (here.look(id).state, here.look(id).reason.code) == ("failed", "base_changed")


def test_what_the_server_refuses_is_told(installation, start_upstream):
    upstream = start_upstream()
    upstream.max_rank = 2
    here = installation(upstream)
    id = here.deploy()
    here.round()
    assert here.look(id).reason.code == "load_refused"
    assert "max_lora_rank" in here.look(id).reason.message


def test_an_adapter_unloaded_behind_our_back_comes_back(installation, start_upstream):
    upstream = start_upstream()
    here = installation(upstream)
    id = here.deploy()
    here.round()
    upstream.adapters.clear()
    here.round()
    assert (id in upstream.adapters, here.look(id).state) == (True, "live")


def test_a_restarted_server_is_away_and_then_gets_everything_back(installation, start_upstream):
    upstream = start_upstream()
    here = installation(upstream)
    ids = [here.deploy(name) for name in ("a", "b")]
    here.round()
    upstream.restart()
    upstream.is_away = True
    here.round()
    for id in ids:
        found = here.look(id)
        assert (found.state, found.reason.code, found.replicas[0].state) == ("live", "replicas_away", "away")
    upstream.is_away = False
    here.round()
    assert [(here.look(id).state, here.look(id).reason) for id in ids] == [("live", None)] * 2
    assert upstream.adapters.keys() == set(ids)


def test_a_server_that_lists_an_adapter_and_serves_the_base_is_left_out(installation, start_upstream, clock):
    quiet, sound = start_upstream(), start_upstream()
    here = installation(quiet, sound)
    id = here.deploy()
    here.round()
    quiet.silent.add(id)
    here.round()
    assert [one.state for one in here.look(id).replicas] == ["ready", "ready"]
    clock.now += here.settings.probe_seconds
    here.round()
    first, second = here.look(id).replicas
    assert (first.state, first.reason.code, second.state) == ("refused", "no_effect", "ready")
    assert (here.look(id).state, id in quiet.adapters) == ("live", False)
    quiet.silent.clear()
    here.round()
    assert here.look(id).replicas[0].state == "refused"
    clock.now += here.settings.probe_seconds
    here.round()
    assert [one.state for one in here.look(id).replicas] == ["ready", "ready"]


def test_a_server_finds_the_folder_by_itself_where_it_has_no_route_to_load(installation, start_upstream):
    upstream = start_upstream()
    here = installation(upstream)
    upstream.runtime_loading, upstream.resolves = False, here.settings.deployments_dir
    id = here.deploy()
    here.round()
    assert here.look(id).state == "live"


def test_a_server_that_was_given_no_name_is_known_by_its_folder(installation, start_upstream):
    here = installation(start_upstream("/srv/models/student", "/srv/models/student"))
    id = here.deploy()
    here.round()
    assert here.look(id).state == "live"


def test_a_deployment_waits_for_a_server_of_its_student(installation, start_upstream):
    here = installation(start_upstream("another-student"), "http://127.0.0.1:9")
    id = here.deploy()
    here.round()
    found = here.look(id)
    assert (found.state, found.reason.code) == ("pending", "replicas_away")
    alone = installation(start_upstream("another-student"))
    alone.round()
    assert alone.look(id).reason.code == "no_replica"
    there = installation(start_upstream())
    there.round()
    assert there.look(id).state == "live"


@pytest.fixture
def serve_whole(start_upstream):
    """Starts a server of a whole model by this name, which adds this much to what the student says."""
    student = start_upstream()

    def start(id, folder, effect=0.7):
        upstream = start_upstream(id, str(folder))
        upstream.log_p = lambda _model, token, at: student.log_p("student", token, at) + effect
        return upstream

    return start


def test_a_whole_model_lies_ready_for_the_server_that_is_started_on_it(
    installation, start_upstream, serve_whole
):
    here = installation(start_upstream(), "http://127.0.0.1:9")
    id = here.deploy(kind="model")
    here.round()
    waiting = here.look(id)
    assert (waiting.kind, waiting.state, waiting.reason.code) == ("model", "pending", "replicas_away")
    assert "launch" in waiting.reason.message
    folder, _, name = waiting.launch.arguments
    assert name == id
    assert (here.settings.home / folder / "adapter_model.safetensors").exists()

    there = installation(serve_whole(id, here.settings.home / folder))
    there.round()
    assert [(one.state, one.reason) for one in there.look(id).replicas] == [("ready", None)]
    assert there.look(id).state == "live"


def test_a_whole_model_does_without_its_student(installation, serve_whole):
    here = installation()
    id = here.deploy(kind="model", sha256="1" * 64)
    there = installation(serve_whole(id, "anywhere"))
    there.round()
    assert there.look(id).state == "live"


@pytest.mark.parametrize(("effect", "code"), [(0.0, "no_effect"), (0.3, "effect_mismatch")])
def test_a_server_that_has_something_else_by_a_whole_models_name_is_found_out(
    installation, serve_whole, effect, code
):
    here = installation()
    id = here.deploy(kind="model")
    there = installation(serve_whole(id, "anywhere", effect))
    there.round()
    assert (there.look(id).state, there.look(id).reason.code) == ("failed", code)
    there.round()
    assert not (here.settings.deployments_dir / id).exists()


def test_a_whole_model_that_was_never_served_leaves_no_folder(installation, start_upstream):
    here = installation(start_upstream())
    id, stays = here.deploy(kind="model"), here.deploy("other", kind="model")
    here.round()
    here.deployments.withdraw(id, DEFAULT_TENANT)
    here.round()
    assert [folder.name for folder in here.settings.deployments_dir.iterdir()] == [stays]


def test_a_whole_model_whose_files_are_gone_fails(installation, start_upstream, settings):
    here = installation(start_upstream())
    id = here.deploy(kind="model")
    shutil.rmtree(settings.home / "artifacts")
    here.round()
    assert here.look(id).state == "failed"


def test_one_refusal_fails_a_new_deployment_everywhere(installation, start_upstream):
    sound, spoilt = start_upstream(), start_upstream()
    spoilt.max_rank = 1
    here = installation(sound, spoilt)
    id = here.deploy()
    here.round()
    assert here.look(id).state == "failed"
    here.round()
    assert (sound.adapters, here.look(id).replicas) == ({}, [])


def test_what_is_withdrawn_is_unloaded_and_its_folder_removed(installation, start_upstream):
    upstream = start_upstream()
    here = installation(upstream)
    id = here.deploy()
    here.round()
    here.deployments.withdraw(id, DEFAULT_TENANT)
    here.round()
    assert (upstream.adapters, here.look(id).replicas) == ({}, [])
    assert not (here.settings.deployments_dir / id).exists()


def test_adapters_of_others_are_left_alone(installation, start_upstream):
    upstream = start_upstream()
    upstream.adapters["theirs"] = 1.0
    here = installation(upstream)
    here.deploy()
    here.round()
    here.round()
    assert "theirs" in upstream.adapters


def test_a_name_passes_on_and_back(installation, start_upstream):
    upstream = start_upstream()
    here = installation(upstream)
    blue = here.deploy()
    here.round()
    green = here.deploy()
    assert here.look(blue).state == "live"
    here.round()
    assert (here.look(blue).state, here.look(green).state) == ("superseded", "live")
    here.round()
    assert upstream.adapters.keys() == {green}
    here.deployments.roll_back(green, DEFAULT_TENANT)
    here.round()
    assert (here.look(blue).state, here.look(green).state) == ("live", "superseded")
    here.round()
    assert upstream.adapters.keys() == {blue}


def test_a_spoilt_successor_does_not_take_the_name(installation, start_upstream):
    here = installation(start_upstream())
    sound = here.deploy()
    here.round()
    here.deploy(spoil=with_zeros)
    here.round()
    assert [one.id for one in here.deployments.serving(DEFAULT_TENANT)] == [sound]


def test_one_of_several_reconcilers_leads_and_the_next_takes_over(installation, start_upstream, settings):
    upstream = start_upstream()
    here = installation(upstream, reconcile_seconds=0.02)
    other = open_ledger(settings)
    threads = [Reconciler(ledger, here.settings) for ledger in (here.reconciler._ledger, other)]
    for thread in threads:
        thread.start()
    id = here.deploy()
    wait_until(lambda: here.look(id).state == "live")
    threads[0].stop()
    upstream.restart()
    wait_until(lambda: id in upstream.adapters)
    assert threads[1].alive
    threads[1].stop()
    other.close()


def wait_until(holds, seconds=20.0):
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)
