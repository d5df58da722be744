"""The held-out material of a recovery, the same for every model that is measured on it."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recoup_ml import harness, scores
from recoup_ml.errors import EmptyDataset
from recoup_ml.generate import LocalEngine
from recoup_ml.natural_text import python_documentation
from recoup_ml.results import Behaviour
from recoup_ml.run import Counter, HarnessTask, Run
from recoup_ml.scores import Scores
from recoup_ml.sequences import Answered, Encoded, encode, reference_room
from recoup_ml.splits import split_keep
from recoup_ml.tasks import Questions, questions

SAMPLES, KEPT = 16, 128
WINDOWS, WINDOW_TOKENS = 32, 128
DEFAULT_KEEP_TOKENS = 64


@dataclass(frozen=True)
class Probe:
    samples: list[Encoded]
    """Test prompts that every model answers itself."""
    windows: list[tuple[int, ...]]
    """Natural text."""
    keep: list[Encoded]
    tasks: list[Questions]
    harness: Sequence[HarnessTask]
    tokenizer: PreTrainedTokenizerBase
    sample_tokens: int
    keep_tokens: int

    def behaviour(self, model: PreTrainedModel, scored: Scores, counter: Counter) -> Behaviour:
        """Everything that `model` does on the probe, beside its scores on the test answers."""
        engine = LocalEngine(model, self.tokenizer)

        def answer(items: Sequence[Encoded], most: int) -> list[Answered]:
            return engine.answer(items, most, counter.part(len(items)))

        answers = answer(self.samples, self.sample_tokens)
        return Behaviour(
            scores=scored,
            natural=scores.natural_text(model, self.tokenizer, self.windows),
            greedy=[given.answer for given in answers],
            repetition=[scores.repetition(given.answer_ids) for given in answers],
            kept=[given.answer for given in answer(self.keep, self.keep_tokens)],
            tasks={
                task.spec.name: task.marked(answer(task.items, task.max_new_tokens)) for task in self.tasks
            },
            harness={
                task.spec.name: harness.scores(model, self.tokenizer, task, counter.part(task.spec.limit))
                for task in self.harness
            },
        )

    @property
    def answers(self) -> int:
        own = len(self.samples) + len(self.keep) + sum(len(task.items) for task in self.tasks)
        return own + sum(task.spec.limit for task in self.harness)


def make_probe(run: Run, test: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase) -> Probe:
    """`test` are the test prompts in their order; samples are taken from all over them."""
    keep = encode(split_keep(run.keep, KEPT)[1], tokenizer, run.prompt_tokens)
    texts = run.natural_text or python_documentation()
    windows = scores.text_windows(texts, tokenizer, WINDOW_TOKENS, WINDOWS)
    if not windows:
        raise EmptyDataset(f"evaluation.natural_text holds fewer than {WINDOW_TOKENS} tokens.")
    return Probe(
        samples=list(test[:: max(1, len(test) // SAMPLES)])[:SAMPLES],
        windows=windows,
        keep=keep,
        tasks=[questions(task, run, tokenizer) for task in run.tasks],
        harness=harness.installed(run.harness),
        tokenizer=tokenizer,
        sample_tokens=run.request.generation.max_new_tokens,
        keep_tokens=keep_tokens(keep, tokenizer),
    )


def keep_tokens(keep: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase) -> int:
    """Room for the longest reference answer, and a little more."""
    return reference_room(keep, tokenizer) or DEFAULT_KEEP_TOKENS
