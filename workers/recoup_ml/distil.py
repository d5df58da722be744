"""The training loop: the student learns the teacher's distribution on the teacher's answers.

Off-policy distillation (QAD, arXiv 2601.20088; the first stage of arXiv 2604.15794): the loss
is the mean over answer positions of KL(teacher‖student) on the full vocabulary. The teacher is
frozen and absent: its last hidden states were kept when it answered, and its head makes the
logits again. The checkpoint is chosen by KL on validation prompts, never by training loss.

Prompts of `keep` enter with the damaged student's own distribution as their target, so that the
skill it was tuned for stays (two teachers, one for each kind of prompt).

It does not decide whether the student got better; `verdict.py` does, on other prompts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from recoup.schemas import Checkpoint, TrainingPoint, TrainingReport
from recoup_ml import answers, models
from recoup_ml.answers import Lesson
from recoup_ml.divergence import hidden_forward_kl
from recoup_ml.hidden import decoder_blocks
from recoup_ml.models import head, last_hidden
from recoup_ml.observation import observe
from recoup_ml.plan import Plan
from recoup_ml.run import Done, Journal, Run
from recoup_ml.scores import compare
from recoup_ml.sequences import batches

WARMUP_SHARE, FINAL_SHARE = 0.1, 0.1
MAX_GRADIENT_NORM = 1.0
VALIDATIONS = 4
MICRO_TOKENS = {"cpu": 512, "cuda": 16_384}
"""Padded tokens that go through the student at once; what a batch holds more comes one after another."""
BEST = "best"


def distil(run: Run, journal: Journal, done: Done, folder: Path) -> None:
    """Fills `folder` with the training report and, in `best`, the checkpoint chosen on validation."""
    plan = answers.read_plan(done)
    validation = Lesson.load(done, "validation")
    pad_id = models.pad_id(models.load_tokenizer(run.teacher))

    def validate(student: PreTrainedModel) -> float:
        seen = observe(student, validation.answers, pad_id)
        return compare(validation.teacher, seen, validation.answers).mean_kl

    def tell(point: TrainingPoint | Checkpoint) -> None:
        journal.progress(point.step, plan.steps, "steps")
        if isinstance(point, TrainingPoint):
            journal.metric(name="train", **point.model_dump())
        else:
            journal.metric(name="validation", step=point.step, kl=point.validation_kl)

    student = models.load(run.student)
    lessons = [Lesson.load(done, "train")]
    if answers.has_keep(done):
        lessons.append(Lesson.load(done, "keep"))
    report = train(student, lessons, plan, run.request.seed, pad_id, Watchers(validate, tell), folder / BEST)
    (folder / "training.json").write_text(report.model_dump_json())


def read(done: Done) -> TrainingReport:
    return TrainingReport.model_validate_json((done["distil"] / "training.json").read_text())


def best(done: Done) -> Path | None:
    """The folder of the best checkpoint; none if nothing was trained or nothing finite came of it."""
    folder = done["distil"] / BEST if "distil" in done else None
    return folder if folder and folder.exists() else None


@dataclass(frozen=True)
class Watchers:
    """Who looks on while a student trains."""

    validate: Callable[[PreTrainedModel], float]
    """Mean token KL of the model on validation prompts, nats."""
    tell: Callable[[TrainingPoint | Checkpoint], None]


@dataclass
class Trainee:
    """The student with what trains of it."""

    model: PreTrainedModel
    """The student itself; layers of an adapter stand inside it."""
    peft: PeftModel | None
    masks: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)
    """Matrices of a pruned student, and where they are zero and stay so."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def save(self, folder: Path) -> None:
        (self.peft or self.model).save_pretrained(folder)

    def restore_zeros(self) -> None:
        with torch.no_grad():
            for weight, mask in self.masks:
                weight.masked_fill_(mask, 0.0)


def train(
    student: PreTrainedModel,
    lessons: Sequence[Lesson],
    plan: Plan,
    seed: int,
    pad_id: int,
    watchers: Watchers,
    best: Path,
) -> TrainingReport:
    """Trains `student` by `plan` and leaves the best checkpoint in the folder `best`.

    A step takes a batch of every lesson; each lesson's mean divergence counts alike.

    `best` stays absent if training diverged before any checkpoint had a finite validation KL.
    """
    torch.manual_seed(seed)
    trainee = prepare(student, plan)
    optimizer = torch.optim.AdamW(
        trainee.parameters, lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, plan.steps))
    curve: list[TrainingPoint] = []
    checkpoints: list[Checkpoint] = []
    tokens = 0
    courses = [draws(len(lesson.answers), plan.steps, plan.batch_size, seed) for lesson in lessons]
    for step, chosen in enumerate(zip(*courses, strict=True), start=1):
        student.train()
        rate = schedule.get_last_lr()[0]
        loss = _learn(student, lessons, chosen, plan, pad_id)
        if not math.isfinite(loss):
            break
        _descend(trainee, optimizer)
        schedule.step()
        tokens += _tokens(lessons, chosen)
        curve.append(TrainingPoint(step=step, loss=loss, learning_rate=rate))
        watchers.tell(curve[-1])
        if step in validation_steps(plan.steps):
            checkpoints = _checkpoint(step, trainee, watchers, checkpoints, best)
    return TrainingReport(
        method=plan.method,
        mode=plan.mode,
        steps=len(curve),
        batch_size=plan.batch_size,
        learning_rate=plan.learning_rate,
        trainable_parameters=sum(parameter.numel() for parameter in trainee.parameters),
        keep_answers=sum(len(lesson.answers) for lesson in lessons[1:]),
        tokens=tokens,
        masked_weights=sum(int(mask.sum()) for _, mask in trainee.masks),
        diverged=len(curve) < plan.steps or not best.exists(),
        curve=curve,
        checkpoints=checkpoints,
    )


def prepare(student: PreTrainedModel, plan: Plan) -> Trainee:
    """Attaches an adapter, or frees all weights and remembers the zeros that must stay."""
    if plan.mode == "lora":
        config = LoraConfig(
            r=plan.rank,
            lora_alpha=plan.alpha,
            target_modules=plan.targets,
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )
        return Trainee(student, get_peft_model(student, config))
    student.requires_grad_(True)
    masks = []
    if plan.keep_zeros:
        matrices = [weight for weight in decoder_blocks(student).parameters() if weight.dim() >= 2]
        masks = [(weight, weight.detach() == 0) for weight in matrices]
    return Trainee(student, None, masks)


def _learn(
    student: PreTrainedModel, lessons: Sequence[Lesson], chosen: Sequence[list[int]], plan: Plan, pad_id: int
) -> float:
    """Adds the gradient of every lesson's divergence; returns that of the first, nats a position."""
    losses = [
        _learn_lesson(student, lesson, rows, plan.temperature, pad_id)
        for lesson, rows in zip(lessons, chosen, strict=True)
    ]
    return losses[0] if all(map(math.isfinite, losses)) else math.nan


def _learn_lesson(
    student: PreTrainedModel, lesson: Lesson, rows: list[int], temperature: float, pad_id: int
) -> float:
    """Mean KL(teacher‖student) over all answer positions of `rows`, by micro-batches of like length."""
    answers = [lesson.answers[row] for row in rows]
    positions = sum(len(answer.answer_ids) for answer in answers)
    total = 0.0
    for batch in batches(answers, pad_id, MICRO_TOKENS[student.device.type]):
        there = batch.to(student.device)
        student_ND = last_hidden(student, there.ids_BT, there.mask_BT)[there.answer_BT]
        teacher_ND = torch.cat([lesson.teacher.hidden[rows[place]] for place in batch.rows]).to(student_ND)
        frozen = lesson.teacher.head.like(student_ND)
        kl_N = hidden_forward_kl(teacher_ND, frozen, student_ND, head(student), temperature)
        loss = kl_N.sum() / positions
        loss.backward()
        total += loss.item()
    return total


def _tokens(lessons: Sequence[Lesson], chosen: Sequence[list[int]]) -> int:
    pairs = zip(lessons, chosen, strict=True)
    return sum(len(lesson.answers[row].answer_ids) for lesson, rows in pairs for row in rows)


def _descend(trainee: Trainee, optimizer: torch.optim.Optimizer) -> None:
    for weight, mask in trainee.masks:
        if weight.grad is not None:
            weight.grad.masked_fill_(mask, 0.0)
    nn.utils.clip_grad_norm_(trainee.parameters, MAX_GRADIENT_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    trainee.restore_zeros()


def draws(answers: int, steps: int, size: int, seed: int) -> Iterator[list[int]]:
    """`steps` times `size` of the numbers below `answers`; each once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[int] = []
    for _ in range(steps):
        while len(rows) < size:
            rows += torch.randperm(answers, generator=generator).tolist()
        yield rows[:size]
        rows = rows[size:]


def rate_share(step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine down to a tenth of the rate."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * done))


def validation_steps(steps: int) -> set[int]:
    return {round(steps * part / VALIDATIONS) for part in range(1, VALIDATIONS + 1)} - {0}


def _checkpoint(
    step: int, trainee: Trainee, watchers: Watchers, earlier: list[Checkpoint], best: Path
) -> list[Checkpoint]:
    """Adds this step's checkpoint, and saves and marks it as chosen if it is the best so far."""
    trainee.model.eval()
    kl = watchers.validate(trainee.model)
    finite = [point.validation_kl for point in earlier if point.validation_kl is not None]
    chosen = math.isfinite(kl) and kl < min(finite, default=math.inf)
    if chosen:
        trainee.save(best)
    now = Checkpoint(step=step, validation_kl=kl if math.isfinite(kl) else None, chosen=chosen)
    watchers.tell(now)
    return [*(point.model_copy(update={"chosen": point.chosen and not chosen}) for point in earlier), now]
