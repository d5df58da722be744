import json

import numpy
import pytest
from safetensors.numpy import save_file

from recoup.schemas import (
    ComposedPrompts,
    EvaluationSpec,
    FilePrompts,
    HarnessSpec,
    MethodSpec,
    ModelRef,
    OutputSpec,
    TaskSpec,
    TeachSpec,
    TrainingSpec,
)
from recoup_jobs import preflight as module
from recoup_jobs.datasets import Upload, store_file
from recoup_jobs.errors import Unprocessable
from recoup_jobs.machines import announce
from recoup_jobs.preflight import preflight
from recoup_jobs.sources import model_names

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 4, "vocab_size": 3}
STUDENT = "/student/source"


@pytest.fixture
def teacher(write_model):
    return write_model("teacher")


@pytest.fixture
def student(write_model):
    return write_model("student")


@pytest.fixture
def findings(ledger, settings, teacher, asked):
    """(pointer, code) of everything that preflight has to say."""

    def run(settings=settings, **changes):
        try:
            preflight(asked.model_copy(update=changes), ledger, settings)
        except Unprocessable as refusal:
            return [(item.pointer, item.code) for item in refusal.items]
        return []

    return run


def write_json(path, value):
    path.write_text(json.dumps(value))


def test_a_sound_pair_passes_and_its_folders_are_told(ledger, settings, asked, student, teacher):
    seen = preflight(asked, ledger, settings)
    assert (seen.student.path, seen.teacher.path) == (student.resolve(), teacher.resolve())


def test_a_model_may_be_named_by_its_absolute_path(findings, student):
    assert findings(student=ModelRef(source=str(student))) == []


def test_a_model_may_be_a_link_to_another_folder_below_the_root(findings, settings, teacher):
    (settings.model_roots[0] / "student").symlink_to(teacher)
    assert findings() == []


@pytest.mark.parametrize("source", ["missing", "a/../../outside", "/etc", "link", "/", "teacher/config.json"])
def test_nothing_outside_the_model_roots_is_a_model(findings, settings, tmp_path, source):
    (tmp_path / "home" / "outside").mkdir()
    (settings.model_roots[0] / "link").symlink_to(tmp_path)
    assert findings(student=ModelRef(source=source)) == [(STUDENT, "model_not_found")]


def test_a_file_that_leads_out_of_the_root_is_not_read(findings, student, tmp_path):
    write_json(tmp_path / "config.json", CONFIG)
    (student / "config.json").unlink()
    (student / "config.json").symlink_to(tmp_path / "config.json")
    assert (STUDENT, "invalid_model") in findings()


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{", b'{"a": NaN' + b"[" * 9999])
def test_a_folder_without_a_readable_config_is_no_model(findings, student, content):
    (student / "config.json").unlink()
    if content is not None:
        (student / "config.json").write_bytes(content)
    assert (STUDENT, "invalid_model") in findings()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "hook",
    [
        {"auto_map": {"AutoModel": "modeling.Evil"}},
        {"nested": [{"deep": {"auto_map": {"AutoModel": "modeling.Evil"}}}]},
        {"custom_pipelines": {"evil": {}}},
        {"model_file": "evil.py"},
        {"_attn_implementation_internal": "someone/kernel"},
        {"attn_implementation": "someone/kernel"},
    ],
)
def test_a_configuration_that_names_code_is_refused(findings, student, file, hook):
    before = json.loads((student / file).read_text()) if (student / file).exists() else {}
    write_json(student / file, before | hook)
    assert findings() == [(STUDENT, "remote_code_refused")]


def test_a_flag_that_older_versions_wrote_is_no_code(findings, student):
    write_json(student / "config.json", CONFIG | {"_attn_implementation_autoset": True, "auto_map": None})
    assert findings() == []


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.pkl"])
def test_weights_that_may_carry_code_are_refused(findings, student, name):
    (student / "model.safetensors").rename(student / name)
    assert findings() == [(STUDENT, "unsafe_weights_format")]


def test_a_folder_without_weights_is_refused(findings, student):
    (student / "model.safetensors").unlink()
    assert findings() == [(STUDENT, "weights_not_found")]


def test_truncated_weights_are_refused(findings, student):
    path = student / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert findings() == [(STUDENT, "corrupt_weights")]


def test_weights_in_shards_are_read(findings, student):
    (student / "model.safetensors").rename(student / "model-1.safetensors")
    write_json(student / "model.safetensors.index.json", {"weight_map": {"w": "model-1.safetensors"}})
    assert findings() == []


@pytest.mark.parametrize(
    "weight_map",
    [
        {},
        {"w": "missing.safetensors"},
        {"w": "../teacher/model.safetensors"},
        {"w": "config.json"},
        {"w": 5},
        {"w": "model.safetensors", "lost": "model.safetensors"},
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(findings, student, weight_map):
    write_json(student / "model.safetensors.index.json", {"weight_map": weight_map})
    assert findings() == [(STUDENT, "corrupt_weights")]


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "incompatible_architectures"),
        ({"hidden_size": 8}, "incompatible_models"),
        ({"vocab_size": 5}, "vocabulary_mismatch"),
    ],
)
def test_a_student_of_another_make_is_refused(findings, student, changed, code):
    write_json(student / "config.json", CONFIG | changed)
    assert findings() == [(STUDENT, code)]


def test_the_number_of_layers_may_differ(findings, student):
    write_json(student / "config.json", CONFIG | {"num_hidden_layers": 1})
    assert findings() == []


def test_the_width_between_two_layers_may_differ(findings, student):
    write_json(student / "config.json", CONFIG | {"intermediate_size": 6})
    assert findings() == []


@pytest.fixture
def quantize(student):
    """Gives the student this entry of its configuration, and bytes for weights."""

    def quantize(**packing):
        write_json(student / "config.json", CONFIG | {"quantization_config": packing})
        save_file(
            {"w": numpy.zeros((6, 1), numpy.uint8), "w.absmax": numpy.zeros(1, numpy.float32)},
            student / "model.safetensors",
        )

    return quantize


@pytest.mark.parametrize(
    "packing",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"load_in_8bit": True},
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "fp8"},
    ],
)
def test_a_student_with_packed_weights_passes_and_keeps_them(findings, quantize, packing):
    quantize(**packing)
    assert findings() == []
    assert findings(training=TrainingSpec(mode="full"), output=OutputSpec(kind="merged")) == [
        ("/training/mode", "unsupported_request"),
        *(
            []
            if packing.get("quant_method", "bitsandbytes") == "bitsandbytes"
            else [("/output/kind", "unsupported_request")]
        ),
    ]


def test_only_what_is_packed_is_packed_again(findings, quantize):
    asked = OutputSpec(kind="requantized")
    assert findings(output=asked) == [("/output/kind", "unsupported_request")]
    quantize(quant_method="bitsandbytes", load_in_4bit=True)
    assert findings(output=asked) == []


@pytest.mark.parametrize(
    ("mode", "refused"), [("auto", False), ("lora", False), ("dora", False), ("full", True), ("norms", True)]
)
def test_only_adapters_are_trained_beside_packed_weights(findings, student, quantize, mode, refused):
    training = TrainingSpec(mode=mode)
    assert findings(training=training) == []
    quantize(quant_method="bitsandbytes", load_in_4bit=True)
    assert findings(training=training) == ([("/training/mode", "unsupported_request")] if refused else [])


@pytest.mark.parametrize(
    "packing", [{"quant_method": "quanto"}, {"quant_method": "hqq"}, {"quant_method": ["gptq"]}, {}, 4]
)
def test_weights_that_nothing_can_train_beside_are_refused(
    ledger, settings, asked, student, teacher, packing
):
    for model, pointer in ((student, STUDENT), (teacher, "/teacher/source")):
        write_json(model / "config.json", CONFIG | {"quantization_config": packing})
        with pytest.raises(Unprocessable, match=r"use bitsandbytes, torchao, gptq") as refusal:
            preflight(asked, ledger, settings)
        assert (refusal.value.items[-1].pointer, refusal.value.code) == (pointer, "unsupported_quantization")


def test_a_packed_teacher_asks_nothing_of_the_training(findings, student, teacher):
    packing = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    write_json(teacher / "config.json", CONFIG | {"quantization_config": packing})
    assert findings(training=TrainingSpec(mode="full")) == []


@pytest.mark.parametrize(
    "tokenizer",
    [
        {"model": {"vocab": {"a": 0, "b": 1}}},
        {"model": {"vocab": {"a": 0, "b": 2, "c": 1}}},
        {"model": {"vocab": [["a", 0.0], ["x", -1.0], ["c", -2.0]]}},
        {"model": {"vocab": {"a": 0, "b": 1, "c": 2}}, "added_tokens": [{"id": 3, "content": "<new>"}]},
    ],
)
def test_a_student_that_reads_other_tokens_is_refused(findings, student, tokenizer):
    write_json(student / "tokenizer.json", tokenizer)
    assert findings() == [(STUDENT, "vocabulary_mismatch")]


def test_a_vocabulary_is_the_same_in_whatever_form_it_is_written(findings, student):
    write_json(student / "tokenizer.json", {"model": {"vocab": [["a", 0.0], ["b", -1.0], ["c", -2.0]]}})
    assert findings() == []


def test_the_sizes_of_both_vocabularies_are_told(ledger, settings, asked, student, teacher):
    write_json(student / "tokenizer.json", {"model": {"vocab": {"a": 0, "b": 1}}})
    with pytest.raises(Unprocessable, match=r"2 tokens.*3 tokens.*works on text"):
        preflight(asked, ledger, settings)


def test_a_tokenizer_that_cannot_be_read_is_refused(findings, student):
    write_json(student / "tokenizer.json", {"model": {}})
    assert findings() == [(STUDENT, "invalid_model")]


def test_another_chat_template_is_refused_wherever_it_is_kept(findings, student):
    (student / "chat_template.jinja").write_text("{{ other }}")
    assert findings() == [(STUDENT, "chat_template_mismatch")]
    (student / "chat_template.jinja").write_text("{{ messages }}\n")
    assert findings() == []


@pytest.fixture
def upload(ledger, settings):
    def upload(*rows):
        content = "\n".join(map(json.dumps, rows)).encode()
        return FilePrompts(file=store_file(ledger, settings, Upload("data.jsonl", "fine-tune"), [content]).id)

    return upload


def prompts(count):
    return [{"prompt": f"What is {number}?"} for number in range(count)]


def test_prompts_are_counted_without_their_duplicates(findings, student, upload):
    assert findings(prompts=upload(*prompts(48))) == []
    assert findings(prompts=upload(*prompts(47), *prompts(10))) == [("/prompts/file", "too_few_prompts")]


def test_files_must_be_there_and_hold_what_they_are_used_for(findings, student, upload):
    unknown, text = FilePrompts(file="file-" + "0" * 24), upload({"text": "It rained."})
    asked = {"prompts": text, "keep": unknown, "evaluation": EvaluationSpec(natural_text=upload(*prompts(1)))}
    assert findings(**asked) == [
        ("/prompts/file", "wrong_rows"),
        ("/keep/file", "file_not_found"),
        ("/evaluation/natural_text/file", "wrong_rows"),
    ]


@pytest.mark.parametrize("method", ["sft", "rewrite_sft", "self_demonstration"])
def test_a_method_that_learns_from_references_needs_one(findings, student, upload, method):
    wanted = {"method": MethodSpec(type=method)}
    bare = prompts(60)
    assert findings(**wanted) == [("/method/type", "missing_reference")]
    assert findings(**wanted, prompts=upload(*bare)) == [("/method/type", "missing_reference")]
    assert findings(**wanted, prompts=upload(*bare, {"prompt": "1+1?", "completion": "2"})) == []


def test_a_teacher_that_writes_the_prompts_needs_a_chat_template(findings, student, teacher):
    written = ComposedPrompts(compose=80)
    assert findings(prompts=written) == []
    for folder in (student, teacher):
        write_json(folder / "tokenizer_config.json", {})
    assert findings(prompts=written) == [("/prompts/compose", "unsupported_request")]


def test_prompts_that_the_teacher_writes_have_no_references(findings, student):
    found = findings(prompts=ComposedPrompts(compose=80), method=MethodSpec(type="sft"))
    assert found == [("/method/type", "missing_reference")]


@pytest.fixture
def task_findings(findings, student, upload):
    """What preflight says of tasks with these matches, each with the file of these rows, or of this id."""

    def run(*tasks):
        specs = [
            TaskSpec(
                name=f"t{index}", file=rows if isinstance(rows, str) else upload(*rows).file, match=match
            )
            for index, (match, rows) in enumerate(tasks)
        ]
        return findings(evaluation=EvaluationSpec(tasks=specs))

    return run


def test_a_task_has_a_reference_in_every_row(task_findings):
    sums = [{"prompt": "1+1?", "completion": "2"}, {"prompt": "1+2?", "completion": "3"}]
    chat = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is 4."}]}
    assert task_findings(("exact", sums), ("contains", [chat]), ("number", [*sums, chat])) == []


@pytest.mark.parametrize(
    ("match", "row"),
    [
        ("exact", {"prompt": "1+1?"}),
        ("contains", {"prompt": "1+1?", "completion": " "}),
        ("exact", {"messages": [{"role": "user", "content": "1+1?"}]}),
        ("number", {"prompt": "1+1?", "completion": "two"}),
    ],
)
def test_a_task_with_a_row_that_no_answer_can_match_is_refused(task_findings, match, row):
    sound = {"prompt": "1+2?", "completion": "3"}
    found = task_findings((match, [sound]), (match, [sound, row]))
    assert found == [("/evaluation/tasks/1/file", "missing_reference")]


def test_a_task_must_be_a_file_of_prompts(task_findings):
    found = task_findings(("exact", [{"text": "It rained."}]), ("exact", "file-" + "0" * 24))
    assert found == [
        ("/evaluation/tasks/0/file", "wrong_rows"),
        ("/evaluation/tasks/1/file", "file_not_found"),
    ]


@pytest.mark.parametrize(
    ("folder", "name", "codes"),
    [
        ("tasks", "arc", []),
        ("tasks", "arc_hard", ["harness_task_not_found"]),
        ("tasks", "ARC", ["harness_task_not_found"]),
        (None, "arc", ["harness_task_not_found"]),
    ],
)
def test_a_harness_task_is_a_file_in_the_operators_folder(
    findings, student, settings, tmp_path, folder, name, codes
):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "arc.yaml").write_text("task: arc\n")
    here = settings.model_copy(update={"harness_tasks": folder and tmp_path / folder})
    found = findings(here, evaluation=EvaluationSpec(harness=[HarnessSpec(name=name)]))
    assert found == [("/evaluation/harness/0/name", code) for code in codes]


def demonstrations(count, answer="yes", start=0):
    return [{"prompt": f"Is {n} even?", "completion": answer} for n in range(start, start + count)]


@pytest.fixture
def teach_findings(findings, student, upload):
    """What preflight says of a teaching by these rows, and by these that are held out."""

    def run(rows, held_out=None, method="auto", match="exact"):
        held = held_out if held_out is None or isinstance(held_out, str) else upload(*held_out).file
        spec = TeachSpec(file=upload(*rows).file, held_out=held, match=match)
        return findings(teach=spec, teacher=ModelRef(source="student"), method=MethodSpec(type=method))

    return run


@pytest.mark.parametrize("method", ["auto", "rewrite_sft", "self_demonstration", "sft"])
def test_a_skill_is_taught_by_demonstrations_alone(teach_findings, method):
    assert teach_findings(demonstrations(24), method=method) == []


def test_a_demonstration_shows_an_answer(teach_findings):
    bare, sound = {"prompt": "Is 99 even?"}, demonstrations(30)
    assert teach_findings([*sound, bare]) == [("/teach/file", "missing_reference")]
    assert teach_findings(sound, [*demonstrations(10), bare]) == [("/teach/held_out", "missing_reference")]
    assert teach_findings(sound, match="number") == [("/teach/file", "missing_reference")]


def test_demonstrations_are_enough_to_learn_from_and_to_decide(teach_findings):
    few = demonstrations(23)
    assert teach_findings([*few, *few]) == [("/teach/file", "too_few_prompts")]
    assert teach_findings(few, demonstrations(10, start=50)) == []
    assert teach_findings(few, demonstrations(9)) == [("/teach/held_out", "too_few_prompts")]
    assert teach_findings(few[:9], demonstrations(10)) == [("/teach/file", "too_few_prompts")]


def test_files_of_a_teaching_must_be_there(teach_findings):
    found = teach_findings([{"text": "It rained."}], "file-" + "0" * 24)
    assert found == [("/teach/file", "wrong_rows"), ("/teach/held_out", "file_not_found")]


@pytest.mark.parametrize("method", ["off_policy", "two_stage", "interpolate"])
def test_a_method_without_demonstrations_cannot_teach(teach_findings, method):
    assert teach_findings(demonstrations(24), method=method) == [("/method/type", "unsupported_request")]


def test_everything_that_is_wrong_is_said_at_once(findings, student):
    write_json(student / "config.json", CONFIG | {"auto_map": {"a": "b"}, "hidden_size": 8})
    (student / "model.safetensors").rename(student / "pytorch_model.bin")
    assert findings(keep=FilePrompts(file="file-" + "0" * 24)) == [
        (STUDENT, "remote_code_refused"),
        (STUDENT, "unsafe_weights_format"),
        (STUDENT, "incompatible_models"),
        ("/keep/file", "file_not_found"),
    ]


def test_the_names_of_all_models_are_told(settings, student, teacher, write_model):
    write_model("someone/other")
    assert model_names(settings.model_roots) == ["someone/other", "student", "teacher"]


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_a_model_that_no_worker_can_hold_is_refused(findings, ledger, student, monkeypatch, name):
    monkeypatch.setattr(module, "SMALL_BYTES", 0)
    assert findings() == []  # nobody has told of a machine
    announce(ledger, "host:1", "gpu.h100", 10)
    assert findings() == []  # nor of one of this class
    announce(ledger, "host:2", "gpu.cpu", 47)
    assert {code for _, code in findings()} == {"no_capable_worker"}
    assert f"/{name}/source" in {pointer for pointer, _ in findings()}
    announce(ledger, "host:3", "gpu.cpu", 48)  # 12 parameters of four bytes
    assert findings() == []


@pytest.mark.parametrize(
    ("template", "code"),
    [
        ("{% for i in range(10**9) %}x{% endfor %}", "template_too_expensive"),
        ("{{ cycler.__init__.__globals__ }}", "template_refused"),
    ],
)
def test_a_template_that_is_a_trap_is_refused(findings, write_model, template, code):
    write_model("student", **{"tokenizer_config.json": {"chat_template": template}})
    assert (STUDENT, code) in findings()
