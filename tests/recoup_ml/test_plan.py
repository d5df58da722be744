"""What `auto` decides for each damage, and that what was asked for wins."""

import pytest

from recoup.schemas import CreateRecovery, DamageReport
from recoup_ml.errors import UnsupportedRequest
from recoup_ml.plan import RECIPES, Plan, make_plan


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


def plan(found: DamageReport, available: int = 100, **request: object) -> Plan:
    asked = {"student": {"source": "student"}, "teacher": {"source": "teacher"}} | request
    return make_plan(CreateRecovery.model_validate(asked), found, available)


@pytest.mark.parametrize(
    ("found", "mode", "output", "keep_zeros"),
    [
        (damage("finetuning"), "lora", "adapter", False),
        (damage("quantization"), "lora", "adapter", False),
        (damage("pruning", "unstructured"), "full", "merged", True),
        (damage("pruning", "2:4"), "full", "merged", True),
        (damage("pruning"), "lora", "adapter", False),
        (damage("none"), "lora", "adapter", False),
    ],
)
def test_auto_decides_by_the_damage(found: DamageReport, mode: str, output: str, keep_zeros: bool) -> None:
    made = plan(found)
    assert (made.method, made.mode, made.output, made.keep_zeros) == (
        "off_policy",
        mode,
        output,
        keep_zeros,
    )


@pytest.mark.parametrize("kind", RECIPES)
def test_steps_and_rate_are_those_seen_to_work(kind: str) -> None:
    lora, full = plan(damage(kind)), plan(damage(kind), training={"mode": "full"})
    assert lora.steps == full.steps == RECIPES[kind].steps
    assert (lora.learning_rate, full.learning_rate) == (RECIPES[kind].lora_rate, RECIPES[kind].full_rate)


def test_an_adapter_goes_everywhere_unless_told_otherwise() -> None:
    made = plan(damage("finetuning"))
    assert (made.targets, made.rank, made.alpha) == ("all-linear", 16, 32)


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
    assert (made.damage, made.mode, made.output) == ("quantization", "full", "merged")
    assert (made.steps, made.learning_rate, made.batch_size, made.temperature) == (7, 3e-6, 5, 2.0)
    assert (made.rank, made.alpha, made.targets, made.answers) == (4, 9, ["q_proj"], 35)
    reasons = {choice.name: choice.why for choice in made.choices}
    assert {reasons[name] for name in ("damage", "mode", "steps", "learning_rate", "batch_size")} == {
        "as requested"
    }


@pytest.mark.parametrize("rate", [1e-05, 0.1, 1 / 3, 10.0])
def test_a_rate_is_taken_to_the_last_digit(rate: float) -> None:
    assert plan(damage("finetuning"), training={"learning_rate": rate}).learning_rate == rate


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_merging_an_adapter_into_a_pruned_student_is_refused(pattern: str) -> None:
    with pytest.raises(UnsupportedRequest, match="fill the student's pruned zeros"):
        plan(damage("pruning", pattern), training={"mode": "lora"}, output={"kind": "merged"})


def test_an_adapter_beside_a_pruned_student_is_allowed() -> None:
    assert plan(damage("pruning", "2:4"), training={"mode": "lora"}).output == "adapter"


def test_a_student_without_layers_may_be_merged() -> None:
    assert plan(damage("pruning"), output={"kind": "merged"}).output == "merged"


def test_an_adapter_that_was_asked_for_is_not_turned_into_a_whole_model() -> None:
    """`auto` may choose how to train, but no other output than the one that was named."""
    assert plan(damage("pruning", "2:4"), output={"kind": "adapter"}).output == "adapter"


def test_a_batch_is_no_larger_than_what_there_is() -> None:
    assert [plan(damage("finetuning"), available=n).batch_size for n in (3, 8, 100)] == [3, 8, 8]


def test_every_choice_has_its_reason() -> None:
    made = plan(damage("pruning", "2:4"))
    assert [choice.name for choice in made.choices] == [
        "damage",
        "method",
        "mode",
        "learning_rate",
        "steps",
        "batch_size",
        "output",
    ]
    assert all(choice.why for choice in made.choices)
    assert made.choices[0].why == "It was seen. Twice."
