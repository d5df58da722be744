"""Which prompts train, which choose the checkpoint, and which decide.

A verdict is worth what its test split is worth. Where prompts carry a `kind`, whole
kinds are held out, so that the test asks for ability, not for memory of a template;
otherwise the split goes by hash. Duplicates are dropped first, so that no prompt can
stand on both sides. Places depend on the prompts' text alone, never on their order.
What stands in a task of the evaluation is neither trained nor validated on.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from recoup.schemas import Prompt

TEST_SHARE, VALIDATION_SHARE = 0.20, 0.12
LEAST_TESTED, MOST_TESTED_SHARE = 20, 1 / 3
"""Of a small set a larger share decides: intervals need prompts, and some get no answer that counts."""
MOST_HELD = 0.4
"""A kind that would take more than this from training is not held out."""
MIN_KINDS = 4


@dataclass(frozen=True)
class Split:
    train: tuple[Prompt, ...]
    validation: tuple[Prompt, ...]
    test: tuple[Prompt, ...]
    test_kinds: tuple[str, ...]
    duplicates_dropped: int
    task_duplicates_dropped: int


def split(prompts: Sequence[Prompt], test: int, validation: int, tasks: Iterable[Prompt] = ()) -> Split:
    """Divides prompts into train, validation and test; at most `test` and `validation` prompts in those.

    Prompts that stand in `tasks` come into test alone.
    """
    ordered = by_hash(prompts)
    kinds = held_out_kinds(ordered)
    candidates = [prompt for prompt in ordered if prompt.kind in kinds] if kinds else ordered
    share = len(candidates) if kinds else round(_least_tested(len(ordered)))
    tested = candidates[: min(test, share)]
    others = [prompt for prompt in ordered if prompt.kind not in kinds] if kinds else ordered[len(tested) :]
    asked = {_key(prompt) for prompt in tasks}
    rest = [prompt for prompt in others if _key(prompt) not in asked]
    chosen = min(validation, max(1, round(VALIDATION_SHARE * len(rest))))
    return Split(
        train=tuple(rest[chosen:]),
        validation=tuple(rest[:chosen]),
        test=tuple(tested),
        test_kinds=tuple(sorted(kinds)),
        duplicates_dropped=len(prompts) - len(ordered),
        task_duplicates_dropped=len(others) - len(rest),
    )


def split_demonstrations(
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    test: int,
    validation: int,
    tasks: Iterable[Prompt] = (),
) -> Split:
    """Divides demonstrations of a skill by hash; a skill cannot be asked for in kinds that were never shown.

    `held_out`, where there are any, are those that test; what stands there too is not trained on.
    """
    ordered = by_hash(prompts)
    own = ordered[: min(test, max(1, round(TEST_SHARE * len(ordered))))]
    tested = by_hash(held_out)[:test] or own
    asked = {_key(prompt) for prompt in (*tasks, *(held_out or own))}
    rest = [prompt for prompt in ordered if _key(prompt) not in asked]
    chosen = min(validation, max(1, round(VALIDATION_SHARE * len(rest))))
    return Split(
        train=tuple(rest[chosen:]),
        validation=tuple(rest[:chosen]),
        test=tuple(tested),
        test_kinds=(),
        duplicates_dropped=len(prompts) - len(ordered),
        task_duplicates_dropped=len(ordered) - len(rest) - (0 if held_out else len(own)),
    )


def others(prompts: Sequence[Prompt], than: Sequence[Prompt]) -> list[Prompt]:
    """Those prompts that do not stand in the second set."""
    known = {_key(prompt) for prompt in than}
    return [prompt for prompt in prompts if _key(prompt) not in known] if known else list(prompts)


def split_keep(prompts: Sequence[Prompt], test: int) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts of `keep` as (train, test), by hash: at most half of them, at most `test`, are tested."""
    ordered = by_hash(prompts)
    tested = min(test, (len(ordered) + 1) // 2)
    return ordered[tested:], ordered[:tested]


def held_out_kinds(prompts: Sequence[Prompt]) -> frozenset[str]:
    """Whole kinds for test alone: by hash of their name, until they hold a fifth of the prompts, and enough.

    Empty where there are fewer than four kinds, some prompts have none, or kinds that may be held out are
    too small.
    """
    counts: dict[str, int] = {}
    for prompt in prompts:
        if prompt.kind is None:
            return frozenset()
        counts[prompt.kind] = counts.get(prompt.kind, 0) + 1
    if len(counts) < MIN_KINDS:
        return frozenset()
    held: set[str] = set()
    wanted = _least_tested(len(prompts))
    for kind in sorted(counts, key=lambda name: hashlib.sha256(name.encode()).digest()):
        size = sum(counts[name] for name in held)
        if size < wanted and size + counts[kind] <= MOST_HELD * len(prompts):
            held.add(kind)
    few = sum(counts[name] for name in held) < min(wanted, LEAST_TESTED)
    return frozenset() if few else frozenset(held)


def _least_tested(prompts: int) -> float:
    return max(1.0, TEST_SHARE * prompts, min(LEAST_TESTED, MOST_TESTED_SHARE * prompts))


def prompts_sha256(prompts: Sequence[Prompt]) -> str:
    """A fingerprint of a set of prompts, whatever their order."""
    return hashlib.sha256("".join(sorted(_key(prompt) for prompt in prompts)).encode()).hexdigest()


def by_hash(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Each prompt once, in the order of its hash; of twins the same one, whatever order they came in."""
    twins = sorted(prompts, key=lambda prompt: prompt.model_dump_json())
    unique = {_key(prompt): prompt for prompt in twins}
    return [unique[key] for key in sorted(unique)]


def _key(prompt: Prompt) -> str:
    turns = [[message.role, " ".join(message.content.split())] for message in prompt.messages]
    return hashlib.sha256(json.dumps(turns, ensure_ascii=False).encode()).hexdigest()
