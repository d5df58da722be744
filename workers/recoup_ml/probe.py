"""The held-out material of a recovery, the same for every model that is measured on it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recoup_ml import scores
from recoup_ml.errors import EmptyDataset
from recoup_ml.generate import LocalEngine
from recoup_ml.natural_text import python_documentation
from recoup_ml.results import Behaviour
from recoup_ml.run import Run
from recoup_ml.scores import Scores
from recoup_ml.sequences import Encoded, encode
from recoup_ml.splits import split_keep

SAMPLES, KEPT = 16, 128
WINDOWS, WINDOW_TOKENS = 32, 128
DEFAULT_KEEP_TOKENS, KEEP_MARGIN = 64, 8


@dataclass(frozen=True)
class Probe:
    samples: list[Encoded]
    """Test prompts that every model answers itself."""
    windows: list[tuple[int, ...]]
    """Natural text."""
    keep: list[Encoded]
    tokenizer: PreTrainedTokenizerBase
    sample_tokens: int
    keep_tokens: int

    def behaviour(self, model: PreTrainedModel, scored: Scores, tick: Callable[[int], None]) -> Behaviour:
        """Everything that `model` does on the probe, beside its scores on the test answers."""
        engine = LocalEngine(model, self.tokenizer)
        answers = engine.answer(self.samples, self.sample_tokens, tick)
        kept = engine.answer(self.keep, self.keep_tokens, lambda done: tick(len(self.samples) + done))
        return Behaviour(
            scores=scored,
            natural=scores.natural_text(model, self.tokenizer, self.windows),
            greedy=[answer.answer for answer in answers],
            repetition=[scores.repetition(answer.answer_ids) for answer in answers],
            kept=[answer.answer for answer in kept],
        )

    @property
    def answers(self) -> int:
        return len(self.samples) + len(self.keep)


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
        tokenizer=tokenizer,
        sample_tokens=run.request.generation.max_new_tokens,
        keep_tokens=keep_tokens(keep, tokenizer),
    )


def keep_tokens(keep: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase) -> int:
    """Room for the longest reference answer, and a little more."""
    references = [item.prompt.completion for item in keep if item.prompt.completion]
    if not references:
        return DEFAULT_KEEP_TOKENS
    return max(len(tokenizer(text)["input_ids"]) for text in references) + KEEP_MARGIN
