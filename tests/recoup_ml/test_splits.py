"""Which prompts train and which decide: never the same, whatever the order they came in."""

import random

import pytest

from recoup.schemas import Message, Prompt
from recoup_jobs.preflight import FEWEST_PROMPTS
from recoup_ml.diagnose import MIN_TEST
from recoup_ml.splits import Split, held_out_kinds, prompts_sha256, split, split_keep

KINDS = ["sums", "capitals", "poems", "letters", "code", "jokes"]


def prompt(text: str, kind: str | None = None, completion: str | None = None) -> Prompt:
    return Prompt(messages=[Message(role="user", content=text)], kind=kind, completion=completion)


def texts(prompts: tuple[Prompt, ...] | list[Prompt]) -> set[str]:
    return {item.messages[0].content for item in prompts}


@pytest.fixture
def of_kinds() -> list[Prompt]:
    return [prompt(f"question {n}", KINDS[n % len(KINDS)]) for n in range(240)]


@pytest.fixture
def without_kinds() -> list[Prompt]:
    return [prompt(f"question {n}") for n in range(240)]


@pytest.fixture(params=["of_kinds", "without_kinds"])
def prompts(request: pytest.FixtureRequest) -> list[Prompt]:
    return request.getfixturevalue(request.param)


def shuffled(prompts: list[Prompt], seed: int = 0) -> list[Prompt]:
    return random.Random(seed).sample(prompts, len(prompts))


def test_no_prompt_stands_in_two_splits(prompts: list[Prompt]) -> None:
    found = split(prompts, 128, 64)
    parts = [texts(part) for part in (found.train, found.validation, found.test)]
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert all(parts)


def test_held_out_kinds_are_in_test_alone(of_kinds: list[Prompt]) -> None:
    found = split(of_kinds, 128, 64)
    assert found.test_kinds
    assert {item.kind for item in found.test} == set(found.test_kinds)
    assert not {item.kind for item in (*found.train, *found.validation)} & set(found.test_kinds)


def test_held_out_kinds_hold_a_fifth_and_hardly_more(of_kinds: list[Prompt]) -> None:
    assert 0.2 <= len(held_out_kinds(of_kinds)) / len(KINDS) <= 0.2 + 1 / len(KINDS)


def test_the_order_of_prompts_changes_nothing(prompts: list[Prompt]) -> None:
    assert split(shuffled(prompts), 32, 16) == split(prompts, 32, 16)
    assert prompts_sha256(shuffled(prompts)) == prompts_sha256(prompts)


def test_the_order_of_prompts_changes_nothing_even_where_twins_differ_in_kind() -> None:
    twins = [prompt(f"question {n}", kind) for n in range(60) for kind in random.Random(n).sample(KINDS, 2)]
    assert split(shuffled(twins), 32, 16) == split(twins, 32, 16)


def test_splits_are_no_larger_than_asked_for(prompts: list[Prompt]) -> None:
    found = split(prompts, 16, 8)
    assert (len(found.test), len(found.validation)) == (16, 8)


def test_without_kinds_a_fifth_is_tested_and_nothing_is_lost(without_kinds: list[Prompt]) -> None:
    found = split(without_kinds, 128, 64)
    assert (len(found.test), len(found.validation), len(found.train)) == (48, 23, 169)
    assert found.test_kinds == ()


@pytest.mark.parametrize(
    "kinds", [KINDS[:3], [*KINDS, None]], ids=["too few kinds", "a prompt without a kind"]
)
def test_where_kinds_cannot_be_held_out_the_hash_divides(kinds: list[str | None]) -> None:
    prompts = [prompt(f"question {n}", kinds[n % len(kinds)]) for n in range(100)]
    found = split(prompts, 128, 64)
    assert held_out_kinds(prompts) == frozenset()
    assert (len(found.test), found.test_kinds) == (20, ())


@pytest.mark.parametrize("largest", KINDS)
def test_one_large_kind_leaves_enough_to_train_on(largest: str) -> None:
    prompts = [prompt(f"{kind} {n}", kind) for kind in KINDS for n in range(200 if kind == largest else 8)]
    found = split(prompts, 128, 64)
    assert len(found.train) >= len(prompts) / 2


@pytest.mark.parametrize("kinds", [[None], KINDS, KINDS[:5]], ids=["no kinds", "six kinds", "five kinds"])
def test_the_fewest_prompts_that_are_taken_are_enough_to_decide(kinds: list[str | None]) -> None:
    few = [prompt(f"question {n}", kinds[n % len(kinds)]) for n in range(FEWEST_PROMPTS)]
    found = split(few, 64, 24)
    assert len(found.test) >= MIN_TEST
    assert len(found.train) >= len(few) / 2


def test_duplicates_are_dropped_and_counted(without_kinds: list[Prompt]) -> None:
    spaced = [prompt(f"  question   {n}\n") for n in range(30)]
    found = split([*without_kinds, *spaced, *without_kinds[:5]], 128, 64)
    assert found.duplicates_dropped == 35
    parts = [*found.train, *found.validation, *found.test]
    assert len({" ".join(item.messages[0].content.split()) for item in parts}) == len(parts) == 240


def test_a_new_prompt_moves_no_other_between_train_and_test(without_kinds: list[Prompt]) -> None:
    """Places go by hash: what is added shifts the borders a little, and shuffles nothing."""
    one, other = split(without_kinds, 48, 23), split([*without_kinds, prompt("one more")], 48, 23)
    assert len(texts(one.test) & texts(other.test)) >= 47


def test_another_role_or_turn_makes_another_prompt() -> None:
    system = [Message(role="system", content="be brief"), Message(role="user", content="question")]
    found = split([prompt("question"), Prompt(messages=system)], 16, 8)
    assert found.duplicates_dropped == 0


def test_a_fingerprint_is_of_the_set(without_kinds: list[Prompt]) -> None:
    assert prompts_sha256(without_kinds) != prompts_sha256(without_kinds[1:])


@pytest.mark.parametrize(("count", "train", "test"), [(0, 0, 0), (1, 0, 1), (9, 4, 5), (300, 172, 128)])
def test_half_of_keep_is_tested_at_most_as_many_as_asked(count: int, train: int, test: int) -> None:
    keep = [prompt(f"ticket {n}") for n in range(count)]
    taught, tested = split_keep(keep, 128)
    assert (len(taught), len(tested)) == (train, test)
    assert not texts(taught) & texts(tested)
    assert split_keep(shuffled(keep), 128) == (taught, tested)


def test_a_split_is_a_value() -> None:
    assert split([], 16, 8) == Split((), (), (), (), 0, 0)


def test_what_stands_in_a_task_is_neither_trained_nor_validated_on(prompts: list[Prompt]) -> None:
    before, task = split(prompts, 16, 64), [prompt(f" question  {n}") for n in range(50)]
    after = split(prompts, 16, 64, task)
    asked = {f"question {n}" for n in range(50)}
    assert not texts([*after.train, *after.validation]) & asked
    lost = texts([*before.train, *before.validation]) - texts([*after.train, *after.validation])
    assert lost == texts([*before.train, *before.validation]) & asked
    assert after.task_duplicates_dropped == len(lost) > 0


def test_a_task_changes_nothing_about_the_test(prompts: list[Prompt]) -> None:
    before, after = split(prompts, 128, 64), split(prompts, 128, 64, prompts[:100])
    assert (after.test, after.test_kinds) == (before.test, before.test_kinds)
