"""The generate stage: the answers that the student will learn from.

The teacher answers training and validation prompts, or rewrites their reference answers; the
student, as it is, answers the prompts of `keep`, so that it can be held to its own distribution
there (a dual teacher). A student that is taught a skill learns from demonstrations; general prompts
are among what it is to keep. With each answer the last hidden states of who gave it are kept (of its
prompt, too, where that is learnt) or, with `method.top_k`, of training answers what the teacher held
likeliest (`tops.py`), which its servers tell themselves: no teacher is in memory while the student learns
from them. Only as many prompts are answered as the plan will use.

No answer is made twice: those of a model in this process are kept batch by batch until the stage
is done, those of a server in a cache that recoveries share. Servers are asked for everything before a
model is loaded here: where both have one device, they take turns (`turns.py`).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recoup.schemas import Prompt, RewriteCounts
from recoup_ml import diagnose, durable, models, results, skill, tops
from recoup_ml.cached_engine import CachedEngine
from recoup_ml.errors import EmptyDataset
from recoup_ml.generate import Engine, LocalEngine, require_an_end, usable
from recoup_ml.kept_batches import KeptBatches
from recoup_ml.lessons import Lesson, distributions, likeliest, texts
from recoup_ml.observation import Observation, observe
from recoup_ml.plan import Plan, make_plan
from recoup_ml.probe import KEPT, keep_tokens
from recoup_ml.rewrite import Rewritten, demonstrated, rewriting, settle
from recoup_ml.run import Counter, Done, Journal, Run
from recoup_ml.sequences import (
    Answered,
    Encoded,
    encode,
    read_jsonl,
    with_answer,
    with_prompts,
    write_jsonl,
)
from recoup_ml.splits import Split, split_keep
from recoup_ml.targets import TopK
from recoup_ml.turns import served
from recoup_ml.vllm_engine import VllmEngine
from recoup_ml.weights import sha256

CALIBRATION = 64
"""Answers of the teacher, and of the student to `keep`, that there are at least: repairs look at them."""
ROOM = 2
"""A rewrite may be this many times as long as an answer."""

Seen = Literal["validation", "keep"]
"""Parts whose giver is always observed."""


def generate(run: Run, journal: Journal, done: Done, folder: Path) -> None:
    """Fills `folder` with the plan and the answers `train`, `validation`, and as planned `keep`, `texts`."""
    tokenizer = models.load_tokenizer(run.teacher)
    parts = diagnose.split_prompts(run)
    learnt = skill.split(run).train if run.teaches else parts.train
    found = diagnose.read(done)
    gap = found.before.scores.mean_kl - found.floor.mean_kl
    plan = make_plan(run.request, found.damage, len(learnt), gap)
    results.write(folder / "plan.json", plan)
    wanted = 0 if run.teaches else max(plan.answers("teacher"), CALIBRATION)
    kept = _to_keep(run, parts)[: max(plan.steps * plan.batch_size, CALIBRATION)]
    chosen = parts.train[:wanted], parts.validation, kept
    train, validation, keep = (encode(part, tokenizer, run.prompt_tokens) for part in chosen)
    referenced = _with_references(learnt)[: plan.answers("rewrites")]
    rewritten = [(prompt, rewriting(prompt)) for prompt in referenced]
    counter = Counter(journal, 2 * (len(train) + len(validation) + len(keep)) + len(rewritten), "answers")
    limit = run.request.generation.max_new_tokens
    unfinished = folder / durable.UNFINISHED
    asked = encode([question for _, question in rewritten], tokenizer, run.request.training.max_length)
    first = keep if run.teaches else train  # a healthy student is its own teacher
    questions = Questions(first, validation, asked)
    teacher = _teacher(run, plan, journal, tokenizer, unfinished, questions, counter)
    if run.teaches:
        answers = _answer(teacher, keep, limit, folder / "keep", counter) if keep else []
    else:
        answers = _teach(teacher, train, limit, plan, folder / "train", counter)
    answers += _answer(teacher, validation, limit, folder / "validation", counter)
    if rewritten:
        _rewrite(run, teacher, rewritten, tokenizer, folder, counter)
    del teacher
    models.release()
    if plan.answers("references"):
        references = _with_references(learnt)[: plan.answers("references")]
        write_jsonl(folder / "texts.jsonl", _written(run, references, tokenizer))
    if keep and not run.teaches:
        student = _student(run, tokenizer, KeptBatches(unfinished / "student"))
        answers += _answer(student, keep, keep_tokens(keep, tokenizer), folder / "keep", counter)
    journal.metric(name="tokens", generated=sum(len(answer.answer_ids) for answer in answers))


def read_plan(done: Done) -> Plan:
    return results.read(done["generate"] / "plan.json", Plan)


def training_answers(done: Done) -> list[Answered]:
    """The teacher's answers to training prompts."""
    return read_jsonl(done["generate"] / "train.jsonl")


def answered(done: Done, part: Seen) -> tuple[list[Answered], Observation]:
    """The answers of one part, and their giver as observed on them."""
    place = done["generate"] / part
    return read_jsonl(place.with_suffix(".jsonl")), Observation.load(place.with_suffix(".safetensors"))


def taught(done: Done, plan: Plan) -> Lesson:
    """The lesson on the teacher's distributions."""
    place = done["generate"] / "train.safetensors"
    if plan.top_k is not None:
        return Lesson(training_answers(done), tops.read(place))
    seen = Observation.load(place)
    pairs = zip(training_answers(done), seen.hidden, strict=True)
    learnt = [answer.ending(len(hidden_ND)) for answer, hidden_ND in pairs]
    return distributions(learnt, seen, None, plan.divergence.temperature)


def has_keep(done: Done) -> bool:
    """Whether there is a skill to keep."""
    return (done["generate"] / "keep.jsonl").exists()


def kept(done: Done, plan: Plan) -> Lesson | None:
    """The lesson on the damaged student's own distributions on `keep`, if there is a skill to keep."""
    if not has_keep(done):
        return None
    return distributions(*answered(done, "keep"), plan.top_k, plan.divergence.temperature)


def written(done: Done) -> Lesson:
    """The lesson on references, rewritten or as they are."""
    return texts(read_jsonl(done["generate"] / "texts.jsonl"))


def demonstrations(
    run: Run, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Encoded], dict[tuple[int, ...], tuple[int, ...]]]:
    """The training prompts that have a reference, and for each the prompt that shows the reference.

    Raises:
        EmptyDataset: there are none, or with their reference all are longer than `training.max_length`.
    """
    learnt = (skill.split(run) if run.teaches else diagnose.split_prompts(run)).train
    items = encode(_with_references(learnt), tokenizer, run.prompt_tokens)
    showing = [demonstrated(item.prompt) for item in items]
    short = encode(showing, tokenizer, run.request.training.max_length)
    ids = {id(shown.prompt): shown.ids for shown in short}
    pairs = [(item, ids[id(shown)]) for item, shown in zip(items, showing, strict=True) if id(shown) in ids]
    if not pairs:
        raise EmptyDataset(
            "self_demonstration shows the teacher each prompt with its reference answer, and no training "
            "prompt has one that fits into training.max_length."
        )
    return [item for item, _ in pairs], {item.ids: shown for item, shown in pairs}


def rewrite_counts(done: Done) -> RewriteCounts | None:
    place = done["generate"] / "rewrites.jsonl"
    if not place.exists():
        return None
    with place.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    reasons = [row["reason"] for row in rows if row["source"] == "original"]
    refused = {reason: reasons.count(reason) for reason in sorted(set(reasons))}
    return RewriteCounts(kept=len(rows) - len(reasons), originals=len(reasons), refused=refused)


def _to_keep(run: Run, parts: Split) -> list[Prompt]:
    """Prompts on which the student is held to its own distribution."""
    teach = run.request.teach
    return [*split_keep(run.keep, KEPT)[0], *(parts.train if teach and teach.rehearse else ())]


@dataclass(frozen=True)
class Questions:
    """All that the teacher is asked."""

    train: Sequence[Encoded]
    validation: Sequence[Encoded]
    rewritings: Sequence[Encoded]


@dataclass(frozen=True)
class Speaker:
    """Who answers, and the model whose hidden states are kept."""

    model: PreTrainedModel
    engine: Engine
    pad_id: int

    def speak(
        self, prompts: Sequence[Encoded], limit: int, counter: Counter, whole: bool = False
    ) -> tuple[list[Answered], Observation]:
        """The usable answers, and the model observed on them, or on the `whole` of prompts and answers."""
        size = len(prompts)
        if isinstance(self.engine, LocalEngine):
            tick = counter.part(2 * size)
            return self.engine.observed(prompts, limit, lambda done: tick(2 * done), whole)
        answers = usable(self.say(prompts, limit, counter))
        texts = with_prompts(answers) if whole else answers
        return answers, observe(self.model, texts, self.pad_id, tick=counter.part(size))

    def say(self, prompts: Sequence[Encoded], limit: int, counter: Counter) -> list[Answered]:
        """Answers alone; a server's are found in the cache, and were counted when it gave them."""
        local = isinstance(self.engine, LocalEngine)
        return self.engine.answer(prompts, limit, counter.part(len(prompts)) if local else _counted)

    def teach(
        self, prompts: Sequence[Encoded], limit: int, top_k: int, temperature: float, counter: Counter
    ) -> tuple[list[Answered], list[TopK]]:
        """The usable answers, and the giver's likeliest tokens; servers know those at temperature 1."""
        if isinstance(self.engine, CachedEngine) and temperature == 1:
            return self.engine.taught(prompts, limit, top_k, _counted)
        answers, seen = self.speak(prompts, limit, counter)
        return answers, likeliest(seen, top_k, temperature)


def _counted(_done: int) -> None: ...


def _teacher(
    run: Run,
    plan: Plan,
    journal: Journal,
    tokenizer: PreTrainedTokenizerBase,
    unfinished: Path,
    questions: Questions,
    counter: Counter,
) -> Speaker:
    """The teacher; if servers answer for it, they have answered by now."""
    engine: Engine
    if run.vllm_urls:
        with served(run, journal):
            engine = _ask(run, plan, tokenizer, run.answers or unfinished / "answers", questions, counter)
        model = models.load(run.teacher)
    else:
        model = models.load(run.teacher)
        engine = LocalEngine(model, tokenizer, kept=KeptBatches(unfinished / "teacher"))
    return Speaker(model, engine, models.pad_id(tokenizer))


def _ask(
    run: Run,
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
    questions: Questions,
    counter: Counter,
) -> CachedEngine:
    """Has servers answer everything; an engine that knows the answers.

    Raises:
        TeacherTruncated: no answer to train on has an end, or no rewrite.
    """
    limit = run.request.generation.max_new_tokens
    engine = CachedEngine(VllmEngine(run.vllm_urls, tokenizer), cache, sha256(run.teacher), tokenizer)
    tick = counter.part(len(questions.train))
    if run.teaches or plan.top_k is None or plan.divergence.temperature != 1:
        answers = engine.answer(questions.train, limit, tick)
    else:  # of each thing that is told of twice as many one is counted
        answers, _ = engine.taught(questions.train, limit, plan.top_k, lambda done: tick(done // 2))
    if tokenizer.chat_template is not None:  # without one it continues texts
        require_an_end(answers, limit)
    engine.answer(questions.validation, limit, counter.part(len(questions.validation)))
    rewrites = engine.answer(questions.rewritings, ROOM * limit, counter.part(len(questions.rewritings)))
    require_an_end(rewrites, ROOM * limit)
    return engine


def _student(run: Run, tokenizer: PreTrainedTokenizerBase, kept: KeptBatches) -> Speaker:
    model = models.load(run.student)
    return Speaker(model, LocalEngine(model, tokenizer, kept=kept), models.pad_id(tokenizer))


def _answer(
    speaker: Speaker,
    prompts: Sequence[Encoded],
    limit: int,
    place: Path,
    counter: Counter,
    whole: bool = False,
) -> list[Answered]:
    if not prompts:
        raise EmptyDataset(f"No prompt for {place.name} is shorter than training.max_length.")
    answers, seen = speaker.speak(prompts, limit, counter, whole)
    write_jsonl(place.with_suffix(".jsonl"), answers)
    seen.save(place.with_suffix(".safetensors"))
    return answers


def _teach(
    speaker: Speaker, prompts: Sequence[Encoded], limit: int, plan: Plan, place: Path, counter: Counter
) -> list[Answered]:
    """As `_answer`, but with `method.top_k` only the likeliest tokens are kept."""
    if plan.top_k is None or not prompts:
        return _answer(speaker, prompts, limit, place, counter, plan.prompts)
    answers, found = speaker.teach(prompts, limit, plan.top_k, plan.divergence.temperature, counter)
    write_jsonl(place.with_suffix(".jsonl"), answers)
    tops.write(place.with_suffix(".safetensors"), found)
    return answers


def _with_references(prompts: Sequence[Prompt]) -> list[Prompt]:
    return [prompt for prompt in prompts if prompt.completion]


def _rewrite(
    run: Run,
    teacher: Speaker,
    rewritten: Sequence[tuple[Prompt, Prompt]],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    counter: Counter,
) -> None:
    """Leaves the texts to learn in `texts.jsonl`, and where each comes from in `rewrites.jsonl`.

    `rewritten` has each prompt, and the one that asks the teacher to rewrite its reference.
    """
    questions = [question for _, question in rewritten]
    short = encode(questions, tokenizer, run.request.training.max_length)
    answers = teacher.say(short, ROOM * run.request.generation.max_new_tokens, counter)
    given = {answer.prompt_ids: answer for answer in answers}
    asked_ids = {id(item.prompt): item.ids for item in short}
    rows, origins = [], []
    for prompt, question in rewritten:
        answer = given.get(asked_ids.get(id(question), ()))
        text, origin = settle(prompt, answer.answer if answer else "", answer.finish if answer else "length")
        rows.append(prompt.model_copy(update={"completion": text}))
        origins.append(origin)
    write_jsonl(folder / "texts.jsonl", _written(run, rows, tokenizer))
    (folder / "rewrites.jsonl").write_text("".join(map(_line, rows, origins)), "utf-8")


def _line(row: Prompt, origin: Rewritten) -> str:
    shown = {"prompt": row.messages[-1].content, "answer": row.completion} | asdict(origin)
    return json.dumps(shown, ensure_ascii=False) + "\n"


def _written(run: Run, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> list[Answered]:
    """Prompts with their reference answers, cut at the longest sequence."""
    items = encode(prompts, tokenizer, run.prompt_tokens)
    if not items:
        raise EmptyDataset(
            "This method learns from reference answers, and no training prompt has one: give `prompts` as a "
            "file whose rows have a completion."
        )
    return [with_answer(item, tokenizer, run.request.training.max_length) for item in items]
