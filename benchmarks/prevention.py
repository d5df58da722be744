"""Teaching a narrow skill so that nothing else is lost: what each way of teaching forgets.

    python benchmarks/prevention.py run [--only sft]     appends rows to benchmarks/prevention.jsonl
    python benchmarks/prevention.py table                the table of docs/02-results.md

A healthy SmolLM2-135M learns to route support tickets, eight a step, always the same tickets and
steps. Along the way it is asked other tickets (exact match), and its drift is measured: token KL
from the model that it was, on that model's answers to general prompts of which none was trained on.

    sft                  the queues as they are
    rewrite_sft          the queues as the model itself would say them, where it gets them right
    self_demonstration   its own answers, scored by what it was, shown the queue (Shenfeld et al. 2601.19897)
    sft_beside_general   the queues; beside them every step, its old distribution on general prompts
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recoup.schemas import ChatRow, Message, Prompt
from recoup_ml import models, scores, smollm
from recoup_ml.divergence import Divergence
from recoup_ml.generate import LocalEngine
from recoup_ml.lessons import Course, FixedCourse, Lesson, RolloutCourse, distributions, texts
from recoup_ml.observation import Observation, observe
from recoup_ml.plan import Data, Phase, Plan, Trainable
from recoup_ml.rewrite import demonstrated, rewriting, settle
from recoup_ml.sequences import Answered, Encoded, encode, with_answer
from recoup_ml.tickets import ticket_rows
from recoup_ml.trainable import prepare
from recoup_ml.training import Training, Watchers

ROWS = Path(__file__).with_name("prevention.jsonl")
WAYS = ("sft", "rewrite_sft", "self_demonstration", "sft_beside_general")
DATA: dict[str, Data] = {"rewrite_sft": "rewrites", "self_demonstration": "demonstrated"}
STEPS, BATCH, RATE, RANK = 30, 8, 5e-4, 16
TICKETS, ASKED, GENERAL, HELD_OUT = 240, 64, 240, 48
ANSWER_TOKENS, TICKET_TOKENS, PROMPT_TOKENS = 40, 12, 512


@dataclass(frozen=True)
class Lectern:
    """What stays as it is while a model is taught."""

    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    seed: int
    tickets: list[Prompt]
    general: list[Encoded]

    @property
    def pad_id(self) -> int:
        return models.pad_id(self.tokenizer)

    def encoded(self, rows: Sequence[Prompt]) -> list[Encoded]:
        return encode(rows, self.tokenizer, PROMPT_TOKENS)

    def observed(self, prompts: Sequence[Encoded]) -> tuple[list[Answered], Observation]:
        """The healthy model's answers, and it as it gives them."""
        return LocalEngine(self.teacher, self.tokenizer).observed(prompts, ANSWER_TOKENS, _quiet)

    def course(self, way: str, student: PreTrainedModel) -> Course:
        if way == "self_demonstration":
            return self._rollouts(student)
        rows = self._rewritten() if way == "rewrite_sft" else self.tickets
        items = [with_answer(item, self.tokenizer, PROMPT_TOKENS) for item in self.encoded(rows)]
        return FixedCourse(texts(items), BATCH, self.seed)

    def _rewritten(self) -> list[Prompt]:
        questions = self.encoded([rewriting(row) for row in self.tickets])
        given = LocalEngine(self.teacher, self.tokenizer).answer(questions, 2 * ANSWER_TOKENS, _quiet)
        settled = [
            settle(row, said.answer, said.finish) for row, said in zip(self.tickets, given, strict=True)
        ]
        kept = sum(origin.source == "rewrite" for _, origin in settled)
        print(f"{kept} of {len(settled)} rewrites kept", flush=True)
        return [
            row.model_copy(update={"completion": text})
            for row, (text, _) in zip(self.tickets, settled, strict=True)
        ]

    def _rollouts(self, student: PreTrainedModel) -> RolloutCourse:
        items = self.encoded(self.tickets)
        shown = self.encoded([demonstrated(row) for row in self.tickets])
        showing = {item.ids: there.ids for item, there in zip(items, shown, strict=True)}
        engine = LocalEngine(student, self.tokenizer, temperature=1.0)

        def answer(prompts: Sequence[Encoded]) -> Sequence[Answered]:
            student.eval()
            return engine.answer(prompts, ANSWER_TOKENS, _quiet)

        def teach(given: Sequence[Answered]) -> Lesson:
            heard = [replace(item, prompt_ids=showing[item.prompt_ids]) for item in given]
            return distributions(given, observe(self.teacher, heard, self.pad_id), None, 1.0)

        return RolloutCourse(items, answer, teach, BATCH, refresh=5, seed=self.seed)


@dataclass
class Examiner:
    """Looks at a model while it is taught."""

    lectern: Lectern
    way: str
    asked: list[Prompt]
    rows: list[dict[str, Any]] = field(default_factory=list)
    _steps: int = 0

    def __post_init__(self) -> None:
        self._held_out, self._before = self.lectern.observed(self.lectern.general[GENERAL:])
        self._began = time.monotonic()

    def count(self, point: Any) -> None:
        self._steps += hasattr(point, "loss")

    def look(self, model: PreTrainedModel) -> float:
        """Adds a row; returns the drift, mean token KL from the healthy model, nats."""
        seen = observe(model, self._held_out, self.lectern.pad_id)
        drift = scores.compare(self._before, seen, self._held_out)
        engine = LocalEngine(model, self.lectern.tokenizer)
        said = engine.answer(self.lectern.encoded(self.asked), TICKET_TOKENS, _quiet)
        right = scores.matches([given.answer for given in said], [row.completion or "" for row in self.asked])
        self.rows.append(
            {
                "way": self.way,
                "seed": self.lectern.seed,
                "step": self._steps,
                "skill": fmean(right),
                "drift": drift.mean_kl,
                "agreement": sum(drift.agreement) / sum(len(given.answer_ids) for given in self._held_out),
                "minutes": (time.monotonic() - self._began) / 60,
            }
        )
        print(json.dumps(self.rows[-1]), flush=True)
        return drift.mean_kl


def teach(way: str, seed: int, home: Path) -> list[dict[str, Any]]:
    """Teaches one model; a row each time it was looked at."""
    smollm.convert(home / "teacher")
    tokenizer = models.load_tokenizer(home / "teacher")
    rows = [ChatRow.model_validate(row).as_prompt() for row in ticket_rows(TICKETS + ASKED, seed)]
    general = encode(general_prompts(seed), tokenizer, PROMPT_TOKENS)[: GENERAL + HELD_OUT]
    lectern = Lectern(models.load(home / "teacher"), tokenizer, seed, rows[:TICKETS], general)
    student, examiner = models.load(home / "teacher"), Examiner(lectern, way, rows[TICKETS:])
    torch.manual_seed(seed)
    examiner.look(student)
    trainable = Trainable("lora", False, RANK, 2 * RANK, "all-linear", False)
    phase = Phase(DATA.get(way, "references"), STEPS, RATE)
    divergence = Divergence("reverse_kl" if way == "self_demonstration" else "forward_kl", 0.5, 1.0)
    plan = Plan("finetuning", "sft", (phase,), divergence, None, trainable, BATCH, "student", "adapter", ())
    trainee = prepare(student, trainable, [0.0] * student.config.num_hidden_layers, seed, None)
    watchers = Watchers(examiner.look, 0.0, examiner.count)
    place = home / "prevention" / f"{way}-{seed}"
    training = Training(trainee, plan, lectern.pad_id, watchers, 1.0, False, place)
    if way == "sft_beside_general":
        lesson = distributions(*lectern.observed(general[:GENERAL]), None, 1.0)
        training.keep(FixedCourse(lesson, BATCH, seed))
    training.run(phase, lectern.course(way, student))
    return examiner.rows


def _quiet(_done: int) -> None: ...


def general_prompts(seed: int) -> list[Prompt]:
    """The built-in prompts in an order of their own for each seed; the last ones are held out."""
    builtin = Path(__file__).parents[1] / "service/recoup_jobs/builtin/general.jsonl"
    rows = [json.loads(line) for line in builtin.read_text("utf-8").splitlines()]
    random.Random(seed).shuffle(rows)
    return [Prompt(messages=[Message(role="user", content=row["prompt"])], kind=row["kind"]) for row in rows]


def table() -> str:
    """Markdown: each way at every look, means over its seeds."""
    rows = [json.loads(line) for line in ROWS.read_text("utf-8").splitlines()]
    lines = ["| way | step | seeds | skill | drift, nats | agreement |", "|---|---|---|---|---|---|"]
    for way in WAYS:
        mine = [row for row in rows if row["way"] == way]
        for step in sorted({row["step"] for row in mine}):
            there = [row for row in mine if row["step"] == step]
            skill, drift, same = (fmean(row[key] for row in there) for key in ("skill", "drift", "agreement"))
            lines.append(f"| {way} | {step} | {len(there)} | {skill:.3f} | {drift:.4f} | {same:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--only", nargs="*", default=WAYS, choices=WAYS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--home", type=Path, default=Path(".recoup/grid"), help="where the teacher is made")
    chosen = parser.parse_args()
    if chosen.what == "table":
        print(table())
        return
    for way in chosen.only:
        found = teach(way, chosen.seed, chosen.home)
        with ROWS.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)


if __name__ == "__main__":
    main()
