"""What `auto` decides for each damage, and that what was asked for wins."""

import pytest

from recoup.schemas import CreateRecovery, DamageReport
from recoup_ml.errors import UnsupportedRequest
from recoup_ml.plan import DATA, REPAIRS, RULES, Phase, Plan, make_plan


def damage(kind: str, pattern: str = "none") -> DamageReport:
    return DamageReport(
        kind=kind,
        evidence=["It was seen.", "Twice."],
        weight_distance=0.1,
        zero_fraction=0.5 if pattern != "none" else 0.0,
        zero_pattern=pattern,
        missing_layers=0,
        layer_map=[(0, 0)],
        distance_by_layer=[0.1],
    )


def plan(found: DamageReport, available: int = 100, gap: float | None = None, **request: object) -> Plan:
    asked = {"student": {"source": "student"}, "teacher": {"source": "teacher"}} | request
    return make_plan(CreateRecovery.model_validate(asked), found, available, gap)


@pytest.mark.parametrize(
    ("found", "mode", "output", "keep_zeros"),
    [
        (damage("finetuning"), "lora", "adapter", False),
        (damage("quantization"), "lora", "adapter", False),
        (damage("pruning", "unstructured"), "full", "merged", True),
        (damage("pruning", "2:4"), "full", "merged", True),
        (damage("pruning"), "full", "merged", False),
        (damage("none"), "lora", "adapter", False),
    ],
)
def test_auto_decides_by_the_damage(found: DamageReport, mode: str, output: str, keep_zeros: bool) -> None:
    made = plan(found)
    rule = RULES["finetuning" if found.kind == "none" else found.kind]
    assert made.method == rule.method
    assert (made.trainable.mode, made.output, made.trainable.keep_zeros) == (mode, output, keep_zeros)
    assert made.divergence.name == "forward_kl"


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("mode", ["lora", "dora", "full", "norms"])
def test_steps_and_rate_are_those_seen_to_work(kind: str, mode: str) -> None:
    made = plan(damage(kind), method={"type": "off_policy"}, training={"mode": mode})
    assert made.phases == (Phase("teacher", RULES[kind].steps, RULES[kind].rates[mode]),)


@pytest.mark.parametrize(
    ("gap", "share"), [(None, 1.0), (4.8, 1.0), (2.0, 1.0), (0.7, 0.35), (0.33, 0.165), (0.01, 0.1)]
)
@pytest.mark.parametrize(("kind", "whole"), [("pruning", 2e-4), ("quantization", 1e-3)])
def test_a_small_gap_is_closed_in_small_steps(
    gap: float | None, share: float, kind: str, whole: float
) -> None:
    made, rate = plan(damage(kind), gap=gap), pytest.approx(share * whole, rel=0.04)
    assert [phase.learning_rate for phase in made.phases] == [rate]
    (told,) = [choice for choice in made.choices if choice.name == "learning_rate"]
    assert float(told.value) == rate
    assert ("here it is" in told.why) == (share < 1)
    asked = plan(damage(kind), gap=gap, training={"learning_rate": 0.5})
    assert [phase.learning_rate for phase in asked.phases] == [0.5]


HEALTHY = {"teacher": {"source": "student"}, "teach": {"file": "file-" + "0" * 24}}


def test_a_healthy_model_is_taught_in_its_own_words_beside_what_it_was() -> None:
    made = plan(damage("none"), **HEALTHY)
    chosen = {choice.name: choice.value for choice in made.choices}
    assert (made.method, made.trainable.mode, made.output) == ("rewrite_sft", "lora", "adapter")
    assert (chosen["rehearsal"], chosen["objective"]) == ("general prompts", "cross_entropy")
    assert "damage" not in chosen and "start" not in chosen
    alone = plan(damage("none"), **HEALTHY | {"teach": HEALTHY["teach"] | {"rehearse": False}})
    assert alone.choices[0].value == "none"


@pytest.mark.parametrize(("available", "steps"), [(20, 30), (240, 30), (800, 100), (100_000, 300)])
def test_each_demonstration_is_taught_about_once_within_bounds(available: int, steps: int) -> None:
    assert plan(damage("none"), available, **HEALTHY).steps == steps


def test_a_skill_is_taught_by_demonstrations_alone() -> None:
    with pytest.raises(UnsupportedRequest, match="cannot teach"):
        plan(damage("none"), **HEALTHY, method={"type": "off_policy"})
    made = plan(damage("none"), **HEALTHY, method={"type": "self_demonstration"})
    assert made.divergence.name == "forward_kl"


@pytest.mark.parametrize(
    ("asked", "rate", "named"),
    [
        ({}, None, "frozen"),
        ({"teacher": "ema"}, 0.02, "moving average, rate 0.02"),
        ({"teacher": "ema", "ema_rate": 0.5}, 0.5, "moving average, rate 0.5"),
    ],
)
def test_who_is_shown_the_demonstrations_is_named(asked: dict, rate: float | None, named: str) -> None:
    made = plan(damage("none"), **HEALTHY, method={"type": "self_demonstration"} | asked)
    (teacher,) = [choice for choice in made.choices if choice.name == "teacher"]
    assert (made.ema_rate, teacher.value) == (rate, named)


def test_the_teacher_of_a_recovery_does_not_move() -> None:
    made = plan(damage("finetuning"), method={"type": "self_demonstration"})
    (why,) = [choice.why for choice in made.choices if choice.name == "teacher"]
    assert made.ema_rate is None and "must not move" in why
    assert not any(choice.name == "teacher" for choice in plan(damage("finetuning")).choices)


@pytest.mark.parametrize("method", DATA)
def test_a_trained_method_learns_from_the_answers_it_is_known_for(method: str) -> None:
    made = plan(damage("finetuning"), method={"type": method}, training={"steps": 30, "learning_rate": 1e-3})
    assert tuple(phase.data for phase in made.phases) == DATA[method]
    assert made.steps == 30


def test_the_second_stage_is_gentle_and_on_probation() -> None:
    first, second = plan(damage("finetuning"), method={"type": "two_stage"}).phases
    assert second.probation and not first.probation
    assert second.steps < first.steps
    assert second.learning_rate < first.learning_rate


@pytest.mark.parametrize(("kind", "others"), [("finetuning", "pruning"), ("pruning", "quantization")])
def test_a_repair_of_another_damage_is_refused(kind: str, others: str) -> None:
    for method in REPAIRS[others]:
        with pytest.raises(UnsupportedRequest, match=f"{method} does not repair {kind}"):
            plan(damage(kind), method={"type": method})


@pytest.mark.parametrize("kind", REPAIRS)
def test_a_repair_plans_no_training(kind: str) -> None:
    for method in REPAIRS[kind]:
        made = plan(damage(kind), method={"type": method})
        assert made.phases == () and made.steps == 0
        assert made.output == ("adapter" if method == "low_rank_patch" else "merged")
        assert {choice.name for choice in made.choices} == {"damage", "method", "output"}


def test_a_repair_in_place_gives_no_adapter() -> None:
    with pytest.raises(UnsupportedRequest, match="changes weights in place"):
        plan(damage("finetuning"), method={"type": "interpolate"}, output={"kind": "adapter"})


def test_an_adapter_goes_everywhere_unless_told_otherwise() -> None:
    trainable = plan(damage("finetuning")).trainable
    assert (trainable.targets, trainable.rank, trainable.alpha) == ("all-linear", 16, 32)


def test_a_drift_without_a_known_mark_is_treated_as_fine_tuning() -> None:
    assert plan(damage("none")).damage == "finetuning"


def test_what_was_asked_for_wins() -> None:
    made = plan(
        damage("finetuning"),
        damage="quantization",
        method={"temperature": 2.0},
        training={
            "mode": "full",
            "steps": 7,
            "learning_rate": 3e-6,
            "batch_size": 5,
            "lora": {"rank": 4, "alpha": 9, "targets": ["q_proj"]},
        },
        output={"kind": "merged"},
    )
    assert (made.damage, made.trainable.mode, made.output) == ("quantization", "full", "merged")
    assert made.phases == (Phase("teacher", 7, 3e-6),)
    assert (made.batch_size, made.divergence.temperature, made.answers("teacher")) == (5, 2.0, 35)
    trainable = made.trainable
    assert (trainable.rank, trainable.alpha, trainable.targets) == (4, 9, ["q_proj"])
    reasons = {choice.name: choice.why for choice in made.choices}
    assert {reasons[name] for name in ("damage", "mode", "steps", "learning_rate", "batch_size")} == {
        "as requested"
    }


@pytest.mark.parametrize("rate", [1e-05, 0.1, 1 / 3, 10.0])
def test_a_rate_is_taken_to_the_last_digit(rate: float) -> None:
    (phase,) = plan(damage("finetuning"), training={"learning_rate": rate}).phases
    assert phase.learning_rate == rate


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_an_adapter_that_is_merged_into_a_pruned_student_is_masked(pattern: str) -> None:
    made = plan(damage("pruning", pattern), training={"mode": "lora"}, output={"kind": "merged"})
    assert made.trainable.keep_zeros
    assert "masked lora" in {choice.value for choice in made.choices}


def test_dora_cannot_hold_zeros() -> None:
    with pytest.raises(UnsupportedRequest, match="cannot hold a pruned student's zeros"):
        plan(damage("pruning", "2:4"), training={"mode": "dora"}, output={"kind": "merged"})


def test_an_adapter_beside_a_pruned_student_is_allowed() -> None:
    assert plan(damage("pruning", "2:4"), training={"mode": "lora"}).output == "adapter"


def test_a_student_without_layers_may_be_merged() -> None:
    assert plan(damage("pruning"), output={"kind": "merged"}).output == "merged"


def test_an_adapter_that_was_asked_for_is_not_turned_into_a_whole_model() -> None:
    """`auto` may choose how to train, but no other output than the one that was named."""
    assert plan(damage("pruning", "2:4"), output={"kind": "adapter"}).output == "adapter"


def test_a_batch_is_no_larger_than_what_there_is() -> None:
    assert [plan(damage("finetuning"), available=n).batch_size for n in (3, 8, 100)] == [3, 8, 8]


@pytest.mark.parametrize(
    ("kind", "asked", "start"),
    [
        ("finetuning", "auto", "student"),
        ("quantization", "auto", "repair"),
        ("pruning", "auto", "repair"),
        ("finetuning", "repair", "repair"),
        ("pruning", "student", "student"),
    ],
)
def test_training_starts_from_a_repair_where_no_skill_is_at_stake(kind: str, asked: str, start: str) -> None:
    assert plan(damage(kind), training={"start": asked}).start == start


def test_every_choice_has_its_reason() -> None:
    made = plan(damage("pruning", "2:4"))
    assert [choice.name for choice in made.choices] == [
        "damage",
        "method",
        "objective",
        "learn_prompts",
        "start",
        "mode",
        "learning_rate",
        "steps",
        "batch_size",
        "output",
    ]
    assert all(choice.why for choice in made.choices)
    assert made.choices[0].why == "It was seen. Twice."


@pytest.mark.parametrize(
    ("kind", "asked", "expected"),
    [
        ("pruning", {}, True),
        ("pruning", {"training": {"learn_prompts": False}}, False),
        ("pruning", {"method": {"type": "two_stage"}}, True),
        ("pruning", {"method": {"type": "on_policy"}}, False),
        ("pruning", {"method": {"top_k": 8}}, False),
        ("finetuning", {}, False),
        ("finetuning", {"training": {"learn_prompts": True}}, True),
    ],
)
def test_whether_prompts_are_learnt_is_decided_and_told(kind: str, asked: dict, expected: bool) -> None:
    made = plan(damage(kind), **asked)
    assert made.prompts == expected
    told = {choice.name: choice.value for choice in made.choices}.get("learn_prompts")
    assert told == (
        None if asked.get("method", {}).get("type") == "on_policy" else "yes" if expected else "no"
    )


@pytest.mark.parametrize("method", [{"type": "sft"}, {"type": "reconstruct"}, {"top_k": 8}])
def test_prompts_are_not_learnt_where_the_teacher_says_nothing_of_them(method: dict) -> None:
    with pytest.raises(UnsupportedRequest, match="learn_prompts"):
        plan(damage("pruning"), method=method, training={"learn_prompts": True})
