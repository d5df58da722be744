"""`recoup-server align`: two model folders compared layer by layer, without a recovery.

The comparison is `recoup_ml.cka`'s; here are the texts that both models read, the progress, the table
and the files.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recoup.schemas import TextRow
from recoup_jobs.datasets import BUILTIN, read_rows
from recoup_jobs.errors import RecoupError
from recoup_jobs.rows import Row
from recoup_ml import alignment, cka, damage, models
from recoup_ml.errors import RecoveryError
from recoup_ml.sequences import encode, with_answer

BATCH = 8
"""Texts that go through the models together; tokens are compared with those of the others."""


@dataclass(frozen=True)
class Comparison:
    """What is asked for."""

    student: Path
    teacher: Path
    prompts: Path | None
    """JSONL rows of prompts or text; none: the built-in prompts."""
    out: Path
    texts: int
    tokens: int
    max_length: int
    completion_only: bool
    controls: bool
    pooled: bool
    seed: int


@dataclass(frozen=True)
class Text:
    ids: tuple[int, ...]
    begin: int
    """The first token that counts."""


def run_align(asked: Comparison, as_json: bool) -> int:
    """Compares, prints and writes; the exit code."""
    console, notes = Console(), Console(stderr=True)
    try:
        found = compare(asked, notes)
    except (RecoveryError, RecoupError, ValueError, OSError) as error:
        notes.print(f"[red]{error}[/red]")
        return 1
    write(found, asked.out)
    if as_json:
        print(found.to_json())
    else:
        console.print(table(found))
    for problem in found.problems:
        notes.print(f"[yellow]{problem}[/yellow]")
    notes.print(f"alignment.json, .csv, .png, .svg and .safetensors are in {asked.out}")
    return 0


def compare(asked: Comparison, console: Console) -> cka.Alignment:
    transformers.utils.logging.disable_progress_bar()
    inspected = damage.inspect(asked.student, asked.teacher)
    layer_map = alignment.with_embeddings(inspected.layer_map)
    tokenizer = models.load_tokenizer(asked.teacher)
    texts = read_texts(asked, tokenizer)
    student, teacher = models.load(asked.student), models.load(asked.teacher)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("comparing", total=len(texts))
        return cka.align(
            student,
            teacher,
            batches(texts, models.pad_id(tokenizer)),
            layer_map=layer_map,
            tokens=asked.tokens,
            controls=asked.controls,
            pooled=asked.pooled,
            seed=asked.seed,
            tick=lambda done: progress.update(bar, completed=done),
        )


def read_texts(asked: Comparison, tokenizer: PreTrainedTokenizerBase) -> list[Text]:
    """At most so many texts, in random order, each cut at the longest length.

    Raises:
        ValueError: fewer than two are left.
    """
    rows = list(read_rows(asked.prompts or BUILTIN / "general.jsonl"))
    random.Random(asked.seed).shuffle(rows)
    found = [text for row in rows for text in _texts(row, tokenizer, asked)][: asked.texts]
    if len(found) < 2:
        wanted = " with a completion" if asked.completion_only else ""
        raise ValueError(f"{len(found)} texts{wanted} are left to compare the models on; give more.")
    return _without_shared_start(found)


def batches(texts: list[Text], pad_id: int) -> Iterator[dict[str, Tensor]]:
    """A last text alone joins the batch before it."""
    starts = list(range(0, len(texts), BATCH))
    if len(texts) % BATCH == 1 and len(starts) > 1:
        starts.pop()
    for start, end in zip(starts, [*starts[1:], len(texts)], strict=True):
        rows = texts[start:end]
        width = max(len(text.ids) for text in rows)
        places_T = torch.arange(width)
        lengths_B1 = torch.tensor([[len(text.ids)] for text in rows])
        begins_B1 = torch.tensor([[text.begin] for text in rows])
        yield {
            "input_ids": torch.tensor([[*text.ids, *[pad_id] * (width - len(text.ids))] for text in rows]),
            "attention_mask": (places_T < lengths_B1).long(),
            "completion_mask": (places_T >= begins_B1).long(),
        }


def table(found: cka.Alignment) -> Table:
    """A line for each pair of corresponding layers."""
    title = (
        f"CKA over {'the means of ' * found.pooled}{found.tokens:,} tokens of {found.texts:,} texts "
        f"({found.dropped_first:,} first tokens and {found.dropped_outliers:,} outliers dropped)"
    )
    shown = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("layer", "CKA, 95 %", "ceiling", "floor", "with outliers", "rel. L2", "cosine"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in found.rows():
        mine, theirs = (_layer(int(row[side])) for side in ("student", "teacher"))
        shown.add_row(
            mine if mine == theirs else f"{mine} → {theirs}",
            f"{row['cka']:.4f} ± {row['high'] - row['cka']:.4f}",
            *(f"{row[name]:.4f}" for name in ("ceiling", "floor", "with_outliers", "relative_l2", "cosine")),
        )
    return shown


def write(found: cka.Alignment, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "alignment.json").write_text(found.to_json(), "utf-8")
    (folder / "alignment.csv").write_text(found.to_csv(), "utf-8")
    found.save(folder / "alignment.safetensors")
    for suffix in ("png", "svg"):
        found.plot(folder / f"alignment.{suffix}")


def _layer(index: int) -> str:
    return str(index - 1) if index else "emb."


def _without_shared_start(texts: list[Text]) -> list[Text]:
    """What all texts begin with (a template's system prompt) counts nowhere: it says nothing."""
    columns = enumerate(zip(*(text.ids for text in texts), strict=False))
    shortest = min(len(text.ids) for text in texts)
    shared = next((place for place, tokens in columns if len(set(tokens)) > 1), shortest)
    return [replace(text, begin=max(text.begin, shared)) for text in texts]


def _texts(row: Row, tokenizer: PreTrainedTokenizerBase, asked: Comparison) -> list[Text]:
    """The text of a row; of natural text as many stretches as it holds."""
    if isinstance(row, TextRow):
        ids = tokenizer(row.text, add_special_tokens=False)["input_ids"]
        starts = range(0, 0 if asked.completion_only else len(ids), asked.max_length)
        return [Text(tuple(ids[start : start + asked.max_length]), 0) for start in starts]
    items = encode([row.as_prompt()], tokenizer, asked.max_length)
    if asked.completion_only and not row.as_prompt().completion:
        return []
    if not row.as_prompt().completion:
        return [Text(item.ids, 0) for item in items]
    answered = [with_answer(item, tokenizer, asked.max_length) for item in items]
    begin = [len(item.prompt_ids) if asked.completion_only else 0 for item in answered]
    return [Text((*item.prompt_ids, *item.answer_ids), at) for item, at in zip(answered, begin, strict=True)]
