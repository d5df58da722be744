"""The first stage: where the student stands before anything is done to it.

The teacher answers the test prompts, and both models are run over those answers. The
teacher is also rounded to bfloat16 and back, which gives the floor of the divergence and
the ceiling of the alignment: no student can be asked to come closer than that.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recoup.schemas import Composition, Splits
from recoup_ml import compose, damage, measures, models, results, skill, verdict
from recoup_ml.alignment import GROUPS, Positions, choose_positions
from recoup_ml.errors import EmptyDataset, NonFiniteWeights, TeacherMismatch
from recoup_ml.generate import LocalEngine, Tick, usable
from recoup_ml.observation import Observation, observe, save_states
from recoup_ml.probe import Probe, make_probe
from recoup_ml.results import Behaviour, Diagnosis
from recoup_ml.run import Counter, Done, Journal, Run
from recoup_ml.scores import Scores, compare, greedy_share
from recoup_ml.sequences import Answered, Encoded, encode, read_jsonl, write_jsonl
from recoup_ml.splits import Split, others, prompts_sha256, split
from recoup_ml.turns import served
from recoup_ml.vllm_engine import VllmEngine

MIN_TEST = GROUPS
"""Every group of sequences that alignment is estimated from needs one."""
MIN_GREEDY = 0.9
"""Share of a server's greedy tokens that must be the teacher's own; rounding and ties cost a few."""


def diagnose(run: Run, journal: Journal, done: Done, folder: Path) -> None:
    """Fills `folder` with the diagnosis, the test answers and the states that alignment compares."""
    tokenizer = models.load_tokenizer(run.teacher)
    parts = split_prompts(run)
    if not parts.train and parts.task_duplicates_dropped:
        raise EmptyDataset("No prompt is left to train on: they all stand in evaluation.tasks too.")
    prompts = encode(parts.test, tokenizer, run.prompt_tokens)
    if len(prompts) < MIN_TEST:
        raise EmptyDataset(f"{len(prompts)} test prompts are left; at least {MIN_TEST} are needed.")
    probe = make_probe(run, prompts, tokenizer)
    asked = skill.held_out(run, tokenizer)
    counted = 4 * len(prompts) + 2 * probe.answers + (2 * skill.PASSES * len(asked.items) if asked else 0)
    counter = Counter(journal, counted, "sequences")
    found = damage.inspect(run.student, run.teacher)
    exam, teacher, floor = _examine_teacher(run, journal, prompts, probe, folder, counter)
    models.release()
    student = models.load(run.student)
    before, states = sit(student, exam, probe, counter)
    if not math.isfinite(before.scores.mean_kl):
        raise NonFiniteWeights(f"{run.student.name} computes NaN or infinity on test prompts.")
    save_states(folder / "before-states.safetensors", states)
    if asked:
        skill.measure_untaught(run, student, asked, counter, folder)
    deficits = measures.deficits(probe, teacher, before, run.request.seed)
    composed = compose.composition(done)
    results.write(
        folder / "diagnosis.json",
        Diagnosis(
            damage=found,
            splits=_splits(parts, len(exam.test), tokenizer, run.prompt_tokens, composed),
            needed=run.teaches or not verdict.not_needed(before.scores.mean_kl, floor.mean_kl, deficits),
            teacher=teacher,
            floor=floor,
            before=before,
            tokens_generated=sum(len(answer.answer_ids) for answer in exam.test)
            + (composed.tokens if composed else 0),
        ),
    )


def read(done: Done) -> Diagnosis:
    return results.read(done["diagnose"] / "diagnosis.json", Diagnosis)


@dataclass(frozen=True)
class Exam:
    """The teacher's answers to the test prompts, and the teacher's states on them."""

    test: list[Answered]
    teacher: Observation
    positions: Positions
    pad_id: int

    @staticmethod
    def load(folder: Path, run: Run, tokenizer: PreTrainedTokenizerBase) -> "Exam":
        """The exam that an earlier `diagnose` left in `folder`."""
        test = read_jsonl(folder / "test.jsonl")
        positions = choose_positions(test, run.request.alignment.positions, run.request.seed)
        teacher = Observation.load(folder / "teacher.safetensors")
        return Exam(test, teacher, positions, models.pad_id(tokenizer))


def sit(model: PreTrainedModel, exam: Exam, probe: Probe, counter: Counter) -> tuple[Behaviour, list[Tensor]]:
    """What `model` does on test and probe, and its states at the chosen positions."""
    seen = observe(model, exam.test, exam.pad_id, exam.positions, counter.part(len(exam.test)))
    scored = compare(exam.teacher, seen, exam.test)
    return probe.behaviour(model, scored, counter), seen.states


def split_prompts(run: Run) -> Split:
    """The same division in every stage: it depends on the prompts alone. Demonstrations are none of them."""
    wanted = run.request.evaluation
    asked = chain.from_iterable(task.prompts for task in run.tasks)
    general = others(run.prompts, [*run.teach, *run.held_out])
    return split(general, wanted.test_sequences, wanted.validation_sequences, asked)


def _examine_teacher(
    run: Run, journal: Journal, prompts: Sequence[Encoded], probe: Probe, folder: Path, counter: Counter
) -> tuple[Exam, Behaviour, Scores]:
    """The exam, the teacher's own behaviour, and its divergence to itself after rounding."""
    asked, model = _ask_teacher(run, journal, prompts, probe.tokenizer, counter.part(len(prompts)))
    test = usable(asked)
    if len(test) < MIN_TEST:
        raise EmptyDataset(f"The teacher answered {len(test)} test prompts; at least {MIN_TEST} are needed.")
    write_jsonl(folder / "test.jsonl", test)
    exam = _observe_teacher(run, model, probe.tokenizer, folder, counter)
    behaviour = probe.behaviour(model, compare(exam.teacher, exam.teacher, exam.test), counter)
    models.round_to_bfloat16(model)
    rounded = observe(model, exam.test, exam.pad_id, exam.positions, counter.part(len(exam.test)))
    save_states(folder / "ceiling-states.safetensors", rounded.states)
    return exam, behaviour, compare(exam.teacher, rounded, exam.test)


def _ask_teacher(
    run: Run, journal: Journal, prompts: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, tick: Tick
) -> tuple[list[Answered], PreTrainedModel]:
    """Its answers, from servers if the run names any, and the teacher itself, loaded once they were asked."""
    limit = run.request.generation.max_new_tokens
    if not run.vllm_urls:
        model = models.load(run.teacher)
        return LocalEngine(model, tokenizer).answer(prompts, limit, tick), model
    with served(run, journal):
        answers = VllmEngine(run.vllm_urls, tokenizer).answer(prompts, limit, tick)
    return answers, models.load(run.teacher)


def _observe_teacher(
    run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, counter: Counter
) -> Exam:
    test = read_jsonl(folder / "test.jsonl")
    positions = choose_positions(test, run.request.alignment.positions, run.request.seed)
    seen = observe(model, test, models.pad_id(tokenizer), positions, counter.part(len(test)))
    if run.vllm_urls and greedy_share(seen, test) < MIN_GREEDY:
        raise TeacherMismatch(
            f"What answers at {', '.join(run.vllm_urls)} is not {run.teacher.name}: it serves another "
            "model, or another revision. Check what RECOUP_VLLM_URLS points to."
        )
    seen.save(folder / "teacher.safetensors")
    save_states(folder / "teacher-states.safetensors", seen.states)
    return Exam.load(folder, run, tokenizer)


def _splits(
    parts: Split, test: int, tokenizer: PreTrainedTokenizerBase, room: int, composed: Composition | None
) -> Splits:
    """How many prompts each part has left when those without room for an answer are dropped."""
    whole = parts.train, parts.validation, parts.test
    train, validation, tested = (len(encode(part, tokenizer, room)) for part in whole)
    return Splits(
        train=train,
        validation=validation,
        test=test,
        test_kinds=list(parts.test_kinds),
        duplicates_dropped=parts.duplicates_dropped,
        task_duplicates_dropped=parts.task_duplicates_dropped,
        too_long_dropped=sum(map(len, whole)) - train - validation - tested,
        prompts_sha256=prompts_sha256([*parts.train, *parts.validation, *parts.test]),
        composed=composed,
    )
