"""`recoup` on the command line: what it prints, and with which code it ends."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import recoup
from recoup import Client, _render, _watch
from recoup._commands import app
from recoup.schemas import Event, Progress

SUBMIT = ["submit", "--student", "damaged", "--teacher", "healthy"]


@pytest.fixture
def run(service, monkeypatch):
    monkeypatch.setenv("RECOUP_BASE_URL", service.url)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    return lambda *arguments: CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture
def client(service):
    with Client(service.url, timeout=5.0) as client:
        yield client


@pytest.fixture
def id(client):
    return client.recoveries.create(student="damaged", teacher="healthy").id


def event(type: str, **data: object) -> Event:
    row = {"object": "recovery.event", "seq": 1, "epoch": 1, "type": type, "data": data, "at": 1.0}
    return Event.model_validate(row)


def test_submit_says_how_to_watch(run, service):
    result = run(*SUBMIT)
    (id,) = service.jobs
    assert (result.exit_code, result.stdout) == (0, f"{id} queued\nwatch it with: recoup watch {id}\n")


def test_submit_sends_the_options_and_uploads_the_files(run, service, tmp_path):
    (tmp_path / "general.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "skill.jsonl").write_text('{"prompt": "b"}\n')
    files = ["--prompts", tmp_path / "general.jsonl", "--keep", tmp_path / "skill.jsonl"]
    options = ["--damage", "pruning", "--method", "off_policy", "--mode", "lora", "--steps", 9, "--seed", 3]
    more = ["--learning-rate", "2e-4", "--batch-size", 4, "--max-new-tokens", 32, "--name", "fixed"]
    result = run(*SUBMIT, *files, *options, *more, "--json")
    assert result.exit_code == 0, result.output
    general, skill = service.files
    assert [file["filename"] for file in service.files.values()] == ["general.jsonl", "skill.jsonl"]
    assert json.loads(service.sent("POST", "/v1/recoveries")[0].body) == {
        "student": {"source": "damaged"},
        "teacher": {"source": "healthy"},
        "damage": "pruning",
        "prompts": {"file": general},
        "keep": {"file": skill},
        "method": {"type": "off_policy"},
        "training": {"mode": "lora", "steps": 9, "learning_rate": 2e-4, "batch_size": 4},
        "generation": {"max_new_tokens": 32},
        "output": {"name": "fixed"},
        "seed": 3,
    }
    assert json.loads(result.stdout)["state"] == "queued"


def test_a_dry_run_prints_plan_and_cost_and_leaves_nothing_behind(run, service, tmp_path):
    (tmp_path / "general.jsonl").write_text('{"prompt": "a"}\n')
    asked = ["dry-run", *SUBMIT[1:], "--prompts", tmp_path / "general.jsonl"]
    assert run(*asked).stdout.splitlines() == [
        "method: off_policy (the student was pruned)",
        "estimate: 3 min 20 s by 3 finished recoveries, 12,000 tokens at most, "
        "2.0 GiB of memory, 0.5 GiB of disk",
    ]
    assert json.loads(run(*asked, "--json").stdout)["object"] == "recovery.dry_run"
    assert (service.jobs, service.files) == ({}, {})


def test_a_dry_run_of_what_would_be_refused_says_so_and_ends_in_2(run, service):
    item = {"pointer": "/prompts/file", "code": "too_few_prompts", "message": "7 prompts are too few"}
    service.dry_run = service.dry_run | {"findings": [item], "plan": [], "estimate": None}
    result = run("dry-run", *SUBMIT[1:])
    assert (result.exit_code, result.stdout) == (2, "refused: /prompts/file: 7 prompts are too few\n")


def test_a_dry_run_warns_of_what_could_not_be_served(run, service):
    item = {"pointer": "/training/mode", "code": "dora_not_servable", "message": "vLLM serves no DoRA"}
    service.dry_run = service.dry_run | {"warnings": [item]}
    result = run("dry-run", *SUBMIT[1:], "--servable")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "warning: /training/mode: vLLM serves no DoRA"
    (sent,) = service.sent("POST", "/v1/recoveries")
    assert json.loads(sent.body)["output"] == {"servable": True}


def test_before_the_first_recovery_a_dry_run_tells_no_time(run, service):
    unknown = service.dry_run["estimate"] | {"seconds": None, "calibrated_on": 0}
    service.dry_run = service.dry_run | {"estimate": unknown}
    assert "this class of machine has finished no recovery yet" in run("dry-run", *SUBMIT[1:]).stdout


def test_submit_teaches_a_healthy_model(run, service, tmp_path):
    shown, held_out = tmp_path / "shown.jsonl", tmp_path / "held-out.jsonl"
    for path in (shown, held_out):
        path.write_text('{"prompt": "a", "completion": "b"}\n')
    asked = ["submit", "--student", "healthy", "--teach", shown, "--held-out", held_out]
    result = run(*asked, "--match", "contains", "--no-rehearse")
    assert result.exit_code == 0, result.output
    first, second = service.files
    assert json.loads(service.sent("POST", "/v1/recoveries")[0].body) == {
        "student": {"source": "healthy"},
        "teacher": {"source": "healthy"},
        "teach": {"file": first, "held_out": second, "match": "contains", "rehearse": False},
    }


@pytest.mark.parametrize(
    "options", [[], ["--teacher", "b", "--held-out", __file__], ["--teacher", "b", "--match", "number"]]
)
def test_a_recovery_needs_a_teacher_and_has_nothing_of_a_teaching(run, service, options):
    result = run("submit", "--student", "a", *options)
    assert result.exit_code == 2 and "--teach" in result.output
    assert (service.jobs, service.files) == ({}, {})


def test_submit_uploads_the_files_of_tasks(run, service, tmp_path):
    sums, capitals = tmp_path / "sums.jsonl", tmp_path / "of:all.jsonl"
    for path in (sums, capitals):
        path.write_text('{"prompt": "a", "completion": "b"}\n')
    result = run(*SUBMIT, "--task", f"sums={sums}:number", "--task", f"capitals={capitals}")
    assert result.exit_code == 0, result.output
    first, second = service.files
    assert [file["filename"] for file in service.files.values()] == ["sums.jsonl", "of:all.jsonl"]
    assert json.loads(service.sent("POST", "/v1/recoveries")[0].body)["evaluation"] == {
        "tasks": [
            {"name": "sums", "file": first, "match": "number"},
            {"name": "capitals", "file": second, "match": "exact"},
        ]
    }


def test_submit_names_tasks_of_the_harness_beside_its_own(run, service, tmp_path):
    (tmp_path / "sums.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    result = run(
        *SUBMIT, "--harness", "arc:200", "--harness", "gsm8k", "--task", f"s={tmp_path / 'sums.jsonl'}"
    )
    assert result.exit_code == 0, result.output
    asked = json.loads(service.sent("POST", "/v1/recoveries")[0].body)["evaluation"]
    assert asked["harness"] == [{"name": "arc", "limit": 200}, {"name": "gsm8k"}]
    assert [task["name"] for task in asked["tasks"]] == ["s"]


@pytest.mark.parametrize("harness", ["arc:many", "arc:3", "../arc", ""])
def test_a_harness_task_that_cannot_be_is_2(run, service, harness):
    assert run(*SUBMIT, "--harness", harness).exit_code == 2
    assert service.seen == []


@pytest.mark.parametrize(
    "task", ["{file}", "sums=", "sums={file}:regex", "sums=/no/such/file", "My sums={file}"]
)
def test_a_task_that_cannot_be_read_is_2_and_nothing_is_uploaded(run, service, tmp_path, task):
    (tmp_path / "sums.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    result = run(*SUBMIT, "--task", task.format(file=tmp_path / "sums.jsonl"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "task" in result.stderr
    assert service.seen == []


@pytest.mark.parametrize(
    ("options", "named"),
    [(["--steps", "0"], "training.steps"), (["--damage", "dropped"], "damage"), (["--seed", "-1"], "seed")],
)
def test_a_wrong_option_is_named_and_nothing_is_uploaded(run, service, tmp_path, options, named):
    (tmp_path / "general.jsonl").write_text('{"prompt": "a"}\n')
    result = run(*SUBMIT, *options, "--prompts", tmp_path / "general.jsonl")
    assert (result.exit_code, result.stdout) == (2, "")
    assert named in result.stderr
    assert service.seen == []


def test_prompts_are_given_or_written_by_the_teacher_and_not_both(run, service, tmp_path):
    (tmp_path / "general.jsonl").write_text('{"prompt": "a"}\n')
    assert run(*SUBMIT, "--compose", 80).exit_code == 0
    (sent,) = service.sent("POST", "/v1/recoveries")
    assert json.loads(sent.body)["prompts"] == {"compose": 80}
    result = run(*SUBMIT, "--compose", 80, "--prompts", tmp_path / "general.jsonl")
    assert (result.exit_code, len(service.sent("POST", "/v1/recoveries"))) == (2, 1)


@pytest.mark.parametrize(
    "arguments", [["submit"], ["sumbit"], [*SUBMIT, "--keep", "/no/such/file"], ["list", "--limit", "0"]]
)
def test_wrong_usage_is_2(run, arguments):
    assert run(*arguments).exit_code == 2


def test_the_verdict_of_a_teaching_tells_what_was_learnt_and_what_was_lost():
    taught = {
        "train": 80,
        "validation": 8,
        "test": 24,
        "loss": {
            "before": 5.0,
            "after": 1.5,
            "change": {"value": -3.5, "low": -4.0, "high": -3.0},
            "n": 24,
        },
        "right": {
            "before": 0.0,
            "after": 0.75,
            "change": {"value": 0.75, "low": 0.6, "high": 0.9},
            "n": 24,
        },
        "drift": {"value": 0.05, "low": 0.04, "high": 0.06},
        "in_context": {
            "shots": 4,
            "loss": 4.0,
            "right": 0.25,
            "lead": {"value": 2.5, "low": 2.0, "high": 3.0},
        },
    }
    rows = json.loads((Path(__file__).parent / "report.json").read_text())
    report = recoup.Report.model_validate(rows | {"outcome": "taught", "recovered": None, "teaching": taught})
    assert _render.verdict_lines(report)[2:] == [
        "loss on held-out demonstrations: 5 → 1.5, change -3.500 [-4.000, -3.000]",
        "answered rightly: 0 → 0.75, change 0.750 [0.600, 0.900]",
        "drift from what it was: 0.050 [0.040, 0.060]",
        "untaught, with 4 demonstrations in its context: loss 4, right 0.25; "
        "lead of the training over it: 2.500 [2.000, 3.000]",
    ]


def test_submit_and_watch_ends_with_the_verdict(run):
    result = run(*SUBMIT, "--watch")
    assert result.exit_code == 0, result.output
    for line in ("generate: started", "distil: 12/60 steps, 1 min 30 s left", "train: step 12, loss 0.4200"):
        assert line in result.stdout
    assert "outcome: recovered\n" in result.stdout


def test_watch_as_json_is_a_line_an_event_and_the_recovery_last(run, id, service):
    result = run("watch", id, "--json")
    *events, last = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 0
    assert [line["seq"] for line in events] == [*range(1, len(service.events[id]) + 1)]
    assert (last["object"], last["state"]) == ("recovery", "succeeded")


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_failed_job_is_1_and_says_why(failing, run, options):
    result = run(*SUBMIT, "--watch", *options)
    assert result.exit_code == 1
    assert "The device has too little memory. (out_of_memory)" in result.stderr


def test_a_cancelled_job_is_1(run, id):
    assert run("cancel", id).stdout == f"{id} cancelling\n"
    result = run("watch", id)
    assert (result.exit_code, result.stderr) == (
        1,
        f"{id} was cancelled; `recoup retry {id}` runs it again.\n",
    )


def test_a_refused_request_is_2_and_says_why(run):
    result = run("show", "rec_404")
    assert result.exit_code == 2
    assert "404 (not_found): There is no recovery rec_404. [request req_1]" in result.stderr
    assert run("show", "../files").exit_code == 2


def test_a_server_out_of_reach_is_3(run, monkeypatch):
    monkeypatch.setenv("RECOUP_BASE_URL", "http://127.0.0.1:1")
    result = run("list")
    assert result.exit_code == 3
    assert "Cannot reach http://127.0.0.1:1" in result.stderr


@pytest.mark.parametrize(
    ("fault", "code", "advice"),
    [
        ({"status": 401}, 2, "Set RECOUP_API_KEY"),
        ({"status": 403}, 2, "Use a key that may do this"),
        ({"status": 429, "headers": {"Retry-After": "90"}}, 2, "Try again in 1 min 30 s."),
        ({"status": 500}, 3, "`recoup doctor` shows"),
        ({"status": 200}, 3, "set RECOUP_BASE_URL"),
        ({"status": 404, "body": b'{"code":"recovery_not_found"}'}, 2, None),
    ],
)
def test_an_error_says_what_to_do(run, service, faults, fault, code, advice):
    service.faults.append(faults(**fault))
    result = run("show", "rec_1")
    assert (result.exit_code, result.stdout) == (code, "")
    assert (advice or "404") in result.stderr
    assert "Traceback" not in result.stderr


def test_an_error_as_json_is_one_object_on_stderr(run):
    result = run("show", "rec_404", "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    error = json.loads(result.stderr)["error"]
    assert (error["type"], error["exit_code"]) == ("NotFoundError", 2)
    assert (error["problem"]["code"], error["problem"]["request_id"]) == ("not_found", "req_1")


def test_a_wrong_field_as_json_is_one_object_on_stderr(run):
    result = run(*SUBMIT, "--steps", "0", "--json")
    assert result.exit_code == 2
    assert "training.steps" in json.loads(result.stderr)["error"]["message"]


def test_the_verbs_print_the_state(run, id):
    assert run("pause", id).stdout == f"{id} paused\n"
    assert json.loads(run("resume", id, "--json").stdout)["state"] == "queued"
    run("cancel", id)
    run("watch", id)
    again, state = run("retry", id).stdout.split()
    assert (again != id, state) == (True, "queued")
    assert f"retry of: {id}" in run("show", again).stdout.splitlines()
    result = run("resume", again)
    assert (result.exit_code, "The recovery is queued" in result.stderr) == (2, True)


def test_a_job_that_is_about_to_pause_says_so(run, id, service):
    service.jobs[id] |= {"state": "running", "pausing": True, "losses": 2}
    lines = run("show", id).stdout.splitlines()
    assert {"state: running, pausing", "losses: 2"} <= {*lines}
    assert not any(line.startswith(("failures", "retry of")) for line in lines)


def test_samples_are_side_by_side(run, id, report):
    (first, *_) = report(id).samples
    lines = run("samples", id, "--limit", "1").stdout.splitlines()
    assert lines == [
        "[explain]",
        "prompt:  What is a tide?",
        "teacher: The sea's daily rise and fall.",
        "before:  tide tide tide",
        "after:   The rise and fall",
        "         of the sea.",
    ]
    assert json.loads(run("samples", id, "--json").stdout)[0] == first.model_dump(mode="json")


def test_files_are_uploaded_listed_fetched_and_removed(run, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n')
    id, *rest = run("files", "upload", path).stdout.split()
    assert rest == ["1", "rows"]
    assert id in run("files", "list").stdout
    assert [file["id"] for file in json.loads(run("files", "list", "--json").stdout)] == [id]
    assert "name: prompts.jsonl" in run("files", "show", id).stdout
    assert run("files", "content", id, tmp_path / "back").exit_code == 0
    assert (tmp_path / "back").read_bytes() == path.read_bytes()
    assert run("files", "delete", id).stdout == f"{id} deleted\n"
    assert run("files", "show", id).exit_code == 2


def test_an_uploaded_file_is_named_by_its_id(run, service):
    id = f"file-{'a' * 24}"
    assert run(*SUBMIT, "--prompts", id, "--task", f"sums={id}:number").exit_code == 0
    asked = json.loads(service.sent("POST", "/v1/recoveries")[0].body)
    assert (asked["prompts"], asked["evaluation"]["tasks"][0]["file"]) == ({"file": id}, id)
    assert not service.sent("POST", "/v1/files")


def test_a_doctor_finds_a_server_that_is_well(run):
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert [line[:4] for line in result.stdout.splitlines()] == ["ok  "] * 5
    assert all(finding["ok"] for finding in json.loads(run("doctor", "--json").stdout))


def test_a_doctor_says_what_is_wrong_and_what_to_do(run, service, monkeypatch):
    service.key = "rk_other"
    result = run("doctor")
    assert result.exit_code == 2
    assert "FAIL key: " in result.stdout
    assert "Set RECOUP_API_KEY" in result.stdout
    monkeypatch.setenv("RECOUP_BASE_URL", "http://127.0.0.1:1")
    (address, server) = json.loads(run("doctor", "--json").stdout)
    assert (address["ok"], server["ok"], server["exit_code"]) == (True, False, 3)
    monkeypatch.setenv("RECOUP_BASE_URL", "nonsense")
    assert run("doctor").exit_code == 2


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell"])
def test_completion_is_a_script_that_asks_this_command(run, shell):
    assert "_RECOUP_COMPLETE" in run("completion", shell).stdout


def test_a_shell_is_told_the_commands(shell):
    asked = {"_RECOUP_COMPLETE": "complete_bash", "COMP_WORDS": "recoup re", "COMP_CWORD": "1"}
    assert shell(asked).stdout.split() == ["resume", "retry", "report", "recipe"]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["submit", "--help"], ["list"], ["sumbit"], ["show", "rec_404"], ["doctor"]]
)
def test_what_is_piped_has_no_colours(shell, arguments):
    result = shell({}, *arguments)
    assert result.stdout + result.stderr
    assert "\x1b" not in result.stdout + result.stderr


@pytest.fixture
def shell(service):
    """Runs the command as a process whose output is piped."""

    def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
        code = "import sys; sys.argv[0] = 'recoup'; from recoup.cli import main; main()"
        known = {name: value for name, value in os.environ.items() if name not in {"FORCE_COLOR", "COLUMNS"}}
        known |= {"RECOUP_BASE_URL": service.url, "PYTHONPATH": str(Path(recoup.__file__).parents[1])}
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(
            command, check=False, capture_output=True, text=True, env=known | environment, timeout=60
        )

    return run


def test_the_version_is_printed(run):
    assert run("--version").stdout == f"recoup {recoup.__version__}\n"


def test_report_prints_the_verdict_and_writes_the_page(run, id, tmp_path):
    result = run("report", id, "--html", tmp_path / "report.html")
    assert result.exit_code == 0, result.output
    assert "recovered fraction: 0.830 [0.780, 0.880]" in result.stdout
    assert "note: Alignment and behaviour agree." in result.stdout
    assert "alignment (mean) with recovery: Spearman 0.900 [0.550, 0.980], Kendall –, n = 9" in result.stdout
    assert (tmp_path / "report.html").read_text() == "<html>the report</html>"


def test_report_as_json_is_the_report(run, id, report):
    assert json.loads(run("report", id, "--json").stdout) == report(id).model_dump(mode="json")


def test_recipe_prints_the_script_or_writes_it(run, id, tmp_path):
    assert run("recipe", id).stdout == 'print("trained: β")\n'
    result = run("recipe", id, "--output", tmp_path / "again.py")
    assert (result.exit_code, result.stdout) == (0, "")
    assert (tmp_path / "again.py").read_text(encoding="utf-8") == 'print("trained: β")\n'
    assert run("recipe", "rec_404").exit_code == 2


def test_list_shows_the_newest_asked_for(run, client):
    ids = [client.recoveries.create(student="damaged", teacher="healthy").id for _ in range(4)]
    plain = run("list", "--limit", "3").stdout
    assert all(id in plain for id in ids[:3])
    assert ids[3] not in plain
    assert [job["id"] for job in json.loads(run("list", "--json").stdout)] == ids


def test_list_asks_for_what_is_wanted(run, service):
    filters = ["--outcome", "partial", "--damage", "pruning", "--metadata", "team=a=b", "--metadata", "run=1"]
    assert run("list", *filters).exit_code == 0
    (sent,) = service.sent("GET", "/v1/recoveries")
    wanted = {"outcome": "partial", "damage": "pruning", "metadata[team]": "a=b", "metadata[run]": "1"}
    assert wanted.items() <= sent.query.items()
    assert run("list", "--metadata", "team").exit_code == 2


def test_show_prints_what_is_known(run, id, client):
    client.recoveries.wait(id)
    lines = run("show", id).stdout.splitlines()
    assert f"id: {id}" in lines
    assert "state: succeeded" in lines
    assert "outcome: recovered" in lines
    assert not any(line.startswith("error") for line in lines)


def test_download_prints_the_paths(run, id, service, tmp_path):
    result = run("download", id, tmp_path / "out")
    assert result.exit_code == 0
    assert [Path(line).read_bytes() for line in result.stdout.splitlines()] == [*service.artifacts.values()]
    service.artifacts["../evil"] = b""
    assert run("download", id, tmp_path / "out").exit_code == 3


def test_interrupting_a_watch_is_130_and_says_how_to_come_back(endless, id):
    # A shell starts what it runs in the background with SIGINT ignored, and the suite may run there.
    listens = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code = [sys.executable, "-c", f"{listens}from recoup.cli import main; main()", "watch", id]
    environment = os.environ | {"RECOUP_BASE_URL": endless.url, "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = str(Path(recoup.__file__).parents[1])
    watching = subprocess.Popen(
        code, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    while not any("wait" in request.query for request in [*endless.seen]):
        time.sleep(0.05)
    watching.send_signal(signal.SIGINT)
    _, errors = watching.communicate(timeout=10)
    assert watching.returncode == 130
    assert f"{id} goes on; watch it again with: recoup watch {id}" in errors
    assert "Traceback" not in errors


def test_a_terminal_gets_a_bar_a_stage(client, id):
    console = Console(force_terminal=True, width=120, file=io.StringIO())
    assert _watch.watch(client, id, console).state == "succeeded"
    screen = console.file.getvalue()
    for part in ("generate", "distil", "12/60 steps", "step 12, loss 0.4200, KL 0.3100", "picked up"):
        assert part in screen


def test_plain_lines_do_not_follow_every_step():
    console = Console(file=io.StringIO(), width=80)
    now = iter([0.0, 1.0, 4.9, 5.0])
    view = _watch.LineView(console, every=5.0, clock=lambda: next(now))
    for step in range(4):
        view.event(event("metric", name="train", step=step, loss=1.0))
    view.event(event("metric", name="validation", step=4, kl=0.5))
    assert console.file.getvalue().splitlines() == [
        "train: step 0, loss 1.0000",
        "train: step 3, loss 1.0000",
        "validation: step 4, KL 0.5000",
    ]


def test_the_verdict_table_shows_measures_alignment_and_cost(report):
    console = Console(file=io.StringIO(), width=140)
    console.print(_render.verdict_table(report()))
    rows = [" ".join(line.replace("│", " ").split()) for line in console.file.getvalue().splitlines()]
    assert "KL to the teacher (nats) 0.0004 1.25 0.2125 0.830 [0.780, 0.880]" in rows
    assert "skill 0.2 0.9 0.882 kept 0.980 [0.950, 1.000]" in rows
    assert "alignment, last layer 0.99 0.6 0.9 0.770 [0.700, 0.840]" in rows
    assert "60 steps on 12,345 tokens, 9,000 generated; 3 min 20 s and 2.0 GiB on cpu" in rows


def test_the_forms_of_a_packed_student_are_told(report):
    form = {"form": "merged", "kl": 0.2, "recovered": {"value": 0.8, "low": 0.7, "high": 0.9, "n": 64}}
    (line,) = _render.form_lines(report(forms=[form | {"bytes": 3 * 2**20, "handed_over": True}]).forms)
    assert line == "as merged: recovered 0.800 [0.700, 0.900], 3.0 MiB, handed over"


def test_an_untrained_report_has_a_verdict_too(report):
    untrained = report(
        outcome="not_needed", recovered=None, training=None, promoted=False, repairs=[], baseline=None
    )
    assert _render.verdict_lines(untrained)[::2] == [
        "outcome: not_needed",
        "recovered fraction: not measured",
    ]
    assert _render.verdict_table(untrained).row_count == 4


def test_what_a_server_writes_cannot_steer_the_terminal(report):
    evil = "\x1b]0;owned\x07[bold]fine[/bold]"
    assert "\x1b" not in "".join(_render.verdict_lines(report(reason=evil)))
    assert "\x1b" not in _watch.line(event("log", message=evil))
    console = Console(file=io.StringIO(), width=140)
    _render.print_verdict(report(remarks=[evil]), console)
    assert "[bold]fine[/bold]" in console.file.getvalue()
    assert "\x1b" not in console.file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7_500, "2 h 5 min")]
)
def test_durations_are_for_readers(seconds, words):
    assert _render.span(seconds) == words


def test_a_stage_without_an_estimate_shows_none():
    row = {"stage": "distil", "done": 1, "total": 2, "unit": "steps", "eta_seconds": None}
    assert _watch.count(Progress.model_validate(row)) == "1/2 steps"


def test_a_metric_without_a_figure_of_the_training_says_what_it_has():
    told = _watch.line(event("metric", name="tokens", generated=700))
    assert told == "tokens: generated 700"
