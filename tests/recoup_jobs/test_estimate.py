"""Counts that must come out right whatever the constants are."""

from dataclasses import dataclass, field, replace

import pytest

from recoup.schemas import (
    Choice,
    ComposedPrompts,
    EvaluationSpec,
    GenerationSpec,
    HarnessSpec,
    MethodSpec,
    TeachSpec,
)
from recoup_jobs.estimate import BASE_BYTES, CPU, Amounts, Sizes, machine_of, need_of, sizes_of
from recoup_jobs.inspection import Model
from recoup_jobs.weights import TensorInfo

SMALL = Sizes(135_000_000, 270_000_000, 1_000_000, 35_000, 576, 30, 49_152)
ROWS = Amounts(rows=756, prompt_tokens=30)


@dataclass(frozen=True)
class Phase:
    data: str = "teacher"
    steps: int = 24


@dataclass(frozen=True)
class Training:
    mode: str = "lora"
    rank: int = 16


@dataclass(frozen=True)
class Plan:
    damage: str = "finetuning"
    start: str = "student"
    phases: tuple[Phase, ...] = (Phase(),)
    trainable: Training = Training()
    batch_size: int = 8
    prompts: bool = False
    output: str = "adapter"
    choices: list[Choice] = field(default_factory=list)


@pytest.fixture
def need(asked):
    def estimate(plan=Plan(), sizes=SMALL, amounts=ROWS, machine=CPU, **changes):
        return need_of(asked.model_copy(update=changes), plan, sizes, sizes, amounts, machine)

    return estimate


def test_a_model_is_as_large_as_its_tensors_say():
    tensors = {
        "model.embed_tokens.weight": TensorInfo(dtype="BF16", shape=[100, 8], data_offsets=(0, 1600)),
        "model.layers.0.up.weight": TensorInfo(dtype="BF16", shape=[32, 8], data_offsets=(0, 512)),
        "model.norm.weight": TensorInfo(dtype="F32", shape=[8], data_offsets=(0, 32)),
    }
    sizes = sizes_of(Model(None, {}, None, None, None, tensors), 8, "two")
    assert sizes == Sizes(1064, 2144, 40, 8, 8, 0, 100)


def test_a_cpu_loads_four_bytes_a_parameter_and_a_gpu_what_is_stored():
    assert SMALL.loaded_bytes(CPU) == 4 * SMALL.parameters
    assert SMALL.loaded_bytes(machine_of("gpu.1x80g")) == SMALL.stored_bytes


def test_a_larger_gpu_takes_more_tokens_at_once_and_none_takes_more_than_it_has(need):
    large = Sizes(8_000_000_000, 16_000_000_000, 2_600_000, 300_000, 4096, 32, 128_256)
    of = {
        queue: need(sizes=large, machine=machine_of(queue)).memory_bytes
        for queue in ("gpu.1x24g", "gpu.8x80g")
    }
    assert of["gpu.1x24g"] < 24 << 30 < of["gpu.8x80g"] < 80 << 30


def test_a_class_of_machine_without_a_size_is_taken_for_a_usual_one():
    assert machine_of("gpu.big") == machine_of("gpu.1x80g")


def test_work_grows_with_steps_and_only_where_they_are_taken(need):
    few, many = need(), need(Plan(phases=(Phase(steps=240),)))
    assert many.work["distil"].trained == 10 * few.work["distil"].trained
    assert many.work["evaluate"] == few.work["evaluate"]


def test_answers_are_no_more_than_there_are_prompts(need):
    many = need(Plan(phases=(Phase(steps=10_000),)))
    assert many.work["generate"].generated <= 256 * ROWS.rows


@pytest.mark.parametrize(("rows", "tested"), [(9, 3), (48, 16), (60, 20), (100, 20), (200, 40)])
def test_of_few_prompts_a_larger_share_decides(need, rows, tested):
    few, one = (need(amounts=Amounts(count, 30)).work["diagnose"].generated for count in (rows, 1))
    assert few - one == (tested - 1) * GenerationSpec().max_new_tokens


def test_prompts_that_the_teacher_writes_are_generated_before_anything_else(need):
    written = need(prompts=ComposedPrompts(compose=500, max_tokens=100))
    assert next(iter(written.work)) == "compose"
    assert written.work["compose"].generated == 50_000
    assert written.tokens == need().tokens + 50_000


def test_a_method_without_training_trains_nothing(need):
    assert need(Plan(phases=())).work["distil"].trained == 0


def test_rollouts_are_generated_while_the_student_learns(need):
    assert need().work["distil"].generated == 0
    assert need(Plan(phases=(Phase("student"),))).work["distil"].generated == 24 * 8 * 256


TEACH = TeachSpec(file="file-" + "0" * 24)


def test_a_teaching_trains_twice_as_much_where_it_rehearses(need):
    rows = replace(ROWS, demonstrations=200)
    plan = Plan(phases=(Phase("rewrites", 30),))
    beside, alone = (
        need(plan, amounts=rows, teach=TEACH.model_copy(update={"rehearse": rehearse}))
        for rehearse in (True, False)
    )
    assert beside.work["distil"].trained == 2 * alone.work["distil"].trained
    assert beside.work["generate"].generated > alone.work["generate"].generated


def test_demonstrations_that_decide_are_answered_before_and_after(need):
    few, many = (
        need(Plan(phases=(Phase("references", 30),)), amounts=rows, teach=TEACH)
        for rows in (replace(ROWS, demonstrations=100), replace(ROWS, demonstrations=100, held_out=120))
    )
    for stage, times in (("diagnose", 2), ("evaluate", 1)):
        more = many.work[stage].generated - few.work[stage].generated
        assert more == times * (120 - 20) * 256


def test_a_skill_to_keep_doubles_what_is_trained(need):
    kept = need(amounts=Amounts(756, 30, keep_rows=100))
    assert kept.work["distil"].trained == 2 * need().work["distil"].trained


def test_full_training_needs_more_memory_than_an_adapter_and_more_than_the_weights(need):
    adapter, full = need(), need(Plan(trainable=Training("full")))
    assert BASE_BYTES + SMALL.loaded_bytes(CPU) < adapter.memory_bytes < full.memory_bytes
    assert full.least_memory_bytes > adapter.least_memory_bytes


def test_a_teacher_beside_the_student_needs_its_own_memory(need):
    beside = (
        need(Plan(phases=(Phase("student"),))).memory_bytes - need(Plan(phases=(Phase("x"),))).memory_bytes
    )
    assert beside == SMALL.loaded_bytes(CPU)


def test_a_moving_average_takes_four_bytes_a_trained_parameter_and_no_second_model(need):
    plan = Plan(phases=(Phase("demonstrated"),), trainable=Training("full"))
    frozen, ema = (need(plan, method=MethodSpec(teacher=name)) for name in ("frozen", "ema"))
    assert ema.disk_bytes - frozen.disk_bytes == 4 * SMALL.parameters
    assert ema.memory_bytes - frozen.memory_bytes == 4 * SMALL.parameters - SMALL.loaded_bytes(CPU)


@pytest.mark.parametrize(
    ("damage", "passes", "free"), [("finetuning", 0, 0), ("quantization", 2, 0), ("pruning", 3, 8_192)]
)
def test_repairs_read_what_they_are_fitted_to(need, damage, passes, free):
    plain, fitting = need().work["distil"], need(Plan(damage=damage)).work["distil"]
    assert fitting.read - plain.read == passes * (16_384 + free)
    assert fitting.generated - plain.generated == free
    none = EvaluationSpec(baselines=False)
    assert need(Plan(damage=damage), evaluation=none).work == need(evaluation=none).work
    starting = need(Plan(damage=damage, start="repair"), evaluation=none).work["distil"]
    assert starting.read - need(evaluation=none).work["distil"].read == passes * (16_384 + free)


def test_the_fitted_weights_of_a_pruned_student_lie_on_the_disk(need):
    assert need(Plan(damage="pruning")).disk_bytes - need().disk_bytes == 4 * SMALL.parameters


def test_what_the_teacher_holds_of_prompts_that_are_learnt_is_kept_too(need):
    answers = min(ROWS.rows, Plan().batch_size * Plan().phases[0].steps)
    more = 4 * SMALL.hidden * answers * ROWS.prompt_tokens
    assert need(Plan(prompts=True)).disk_bytes - need().disk_bytes == more
    assert need(Plan(prompts=True)).memory_bytes - need().memory_bytes == more


def test_a_whole_model_takes_more_disk_than_an_adapter(need):
    assert need(Plan(output="merged")).disk_bytes > need().disk_bytes


def test_documents_of_the_harness_are_read_by_each_model_before_and_after(need):
    def work(limit):
        asked = [HarnessSpec(name="arc", limit=limit)]
        return need(evaluation=EvaluationSpec(harness=asked)).work

    less, more = work(100), work(200)
    grown = {stage for stage in less if more[stage].read > less[stage].read}
    assert grown == {"diagnose", "evaluate"}
