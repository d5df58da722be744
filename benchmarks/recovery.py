"""Which method recovers what, and at what cost: a grid of damages and methods on SmolLM2-135M.

    python benchmarks/recovery.py screen [--only wanda50:forward_kl …]   one seed, equal small budget
    python benchmarks/recovery.py check  [--only magnitude40 …]          the same with two other seeds
    python benchmarks/recovery.py final  [--only wanda50:auto …]         three seeds, `auto`'s own budget
    python benchmarks/recovery.py table                                  the tables of docs/03-methods.md

A cell is one recovery by the product's own `recover()`, in a process of its own. Its row is
appended to `benchmarks/recovery.jsonl` (or `--rows`), and a cell whose row is there is not run again.
What `auto` does was settled on the rows of seed 0; `check`, and the damage `magnitude40`, had no part in it.

Prompts and references are the 999 rows of alpaca_en_demo.json in the source package of
llamafactory 0.9.5, fetched by pip at run time and not kept in this repository; natural text is
Python's documentation. Kinds of instructions (by their first word) are held out for the test.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recoup_ml import durable

ROWS = Path(__file__).with_name("recovery.jsonl")
PACKAGE = "llamafactory==0.9.5"
MEMBER = "data/alpaca_en_demo.json"
SEEDS = {"screen": (0,), "check": (1, 2), "final": (0, 1, 2)}
TICKETS, TICKET_SEED = 192, 7
LEAST_OF_A_KIND = 12
NO_FILE = "file-" + 24 * "0"
"""The rows of the task are at hand; a request must name a file."""
POSITIONS = 1024
"""For alignment."""
AT_VALIDATION = 1_000_000
"""Alignment along the training is measured then alone."""

TRAINED: dict[str, dict[str, Any]] = {
    "forward_kl": {"type": "off_policy"},
    "reverse_kl": {"type": "off_policy", "divergence": "reverse_kl"},
    "jsd": {"type": "off_policy", "divergence": "jsd"},
    "on_policy": {"type": "on_policy", "divergence": "reverse_kl"},
    "two_stage": {"type": "two_stage"},
    "rewrite_sft": {"type": "rewrite_sft"},
    "sft": {"type": "sft"},
}


@dataclass(frozen=True)
class Damage:
    kind: str
    make: Callable[[Path, Path], None]
    repairs: tuple[str, ...]


def damages() -> dict[str, Damage]:
    from recoup_ml import injure

    weights = ("interpolate", "spectral", "restore_layers")
    return {
        "finetuned": Damage("finetuning", injure.finetune, weights),
        "rounded3": Damage("quantization", injure.quantize, ("low_rank_patch",)),
        "nf4": Damage("quantization", injure.pack_nf4, ("low_rank_patch",)),
        "ffn10": Damage("pruning", injure.cut_channels, ("reconstruct",)),
        "wanda50": Damage("pruning", injure.wanda, ("reconstruct",)),
        "wanda24": Damage("pruning", lambda t, s: injure.wanda(t, s, pattern="2:4"), ("reconstruct",)),
        "drop4": Damage("pruning", lambda t, s: injure.drop_layers(t, s, 4), ("reconstruct",)),
        "drop6": Damage("pruning", lambda t, s: injure.drop_layers(t, s, 6), ("reconstruct",)),
        "magnitude40": Damage("pruning", lambda t, s: injure.prune(t, s, share=0.4), ("reconstruct",)),
    }


def cells(stage: str) -> Iterator[tuple[str, str, int]]:
    """Method after method, so that a grid that is not through yet says something of every damage."""
    repairs = dict.fromkeys(repair for damage in damages().values() for repair in damage.repairs)
    for seed in SEEDS[stage]:
        for method in ("auto", "sft") if stage == "final" else (*TRAINED, *repairs, "auto"):
            for name, damage in damages().items():
                if method not in repairs or method in damage.repairs:
                    yield name, method, seed


def request(stage: str, damage: Damage, method: str, seed: int) -> dict[str, Any]:
    """The body of the recovery; all cells of a stage and damage share everything but the method."""
    training: dict[str, Any] = {"max_length": 128}
    if stage != "final":
        training |= {"steps": 16, "stop_early": False}
        if method != "auto":
            training |= {"start": "student", "learn_prompts": False}
    chosen = TRAINED.get(method, {"type": method})
    return {
        "student": {"source": "student"},
        "teacher": {"source": "teacher"},
        "damage": damage.kind,
        "method": chosen,
        "training": training,
        "generation": {"max_new_tokens": 40},
        "evaluation": {
            "test_sequences": 96 if stage == "final" else 64,
            "validation_sequences": 32 if stage == "final" else 24,
            "baselines": stage == "final" and method == "auto",
            "tasks": [{"name": "capitals", "file": NO_FILE, "match": "contains", "max_new_tokens": 16}],
        },
        "alignment": {"positions": POSITIONS, "every_steps": AT_VALIDATION},
        "seed": seed,
    }


def run_cell(stage: str, name: str, method: str, seed: int, home: Path) -> dict[str, Any]:
    """Runs one cell in this process; returns its row."""
    from transformers.utils import logging

    from recoup.schemas import ChatRow, CreateRecovery
    from recoup_ml import smollm
    from recoup_ml.recipe import recover
    from recoup_ml.run import Run
    from recoup_ml.tickets import ticket_rows

    logging.disable_progress_bar()
    damage = damages()[name]
    teacher, student = home / "teacher", home / name
    smollm.convert(teacher)
    if not student.exists():
        aside = home / f".{name}"
        damage.make(teacher, aside)
        aside.rename(student)
    body = CreateRecovery.model_validate(request(stage, damage, method, seed))
    keep = [ChatRow.model_validate(row).as_prompt() for row in ticket_rows(TICKETS, TICKET_SEED)]
    run = Run(
        job_id=f"{stage}-{name}-{method}-{seed}",
        student=student,
        teacher=teacher,
        request=body,
        prompts=prompts(home),
        keep=keep if damage.kind == "finetuning" else [],
        tasks=[capitals(body.evaluation.tasks[0])],
        natural_text=[],
        vllm_urls=(),
    )
    began = time.monotonic()
    journal = FolderJournal(
        home / "runs" / run.job_id,
        home / "shared" / f"{stage}-{name}-{seed}",
        {"teacher": home / "answered" / "teacher", "student": home / "answered" / name},
    )
    recover(run, journal)
    seconds = time.monotonic() - began
    report = json.loads((journal.place / "artifacts" / "report.json").read_text())
    found = row(stage, name, method, seed, report, seconds) | {"sequences": journal.sequences()}
    durable.remove(journal.place)
    return found


class FolderJournal:
    """A journal of folders.

    What cells have in common is made once, and its minutes count in no later cell: the diagnosis, alike
    for all cells of a damage, and the batches that a model has answered, by the model's name.
    """

    def __init__(self, place: Path, shared: Path, answered: dict[str, Path]) -> None:
        self.place, self._shared, self._answered = place, shared, answered
        self._seconds: dict[str, float] = {}

    def stage(self, name: str, work: Callable[[Path], None]) -> Path:
        folder = (self._shared if name == "diagnose" else self.place) / name
        if not folder.exists():
            began = time.monotonic()
            aside = folder.with_name(f".{name}")
            for left in aside.iterdir() if aside.exists() else ():  # by a cell that was killed
                if left.name != durable.UNFINISHED:
                    durable.remove(left)
            (aside / durable.UNFINISHED).mkdir(parents=True, exist_ok=True)
            if name == "generate":
                self._take_up(aside / durable.UNFINISHED)
            work(aside)
            aside.rename(folder)
            self._seconds[name] = time.monotonic() - began
        return folder

    def _take_up(self, unfinished: Path) -> None:
        """What others were answered lies where a stage that goes on looks for its own."""
        for model, folder in self._answered.items():
            folder.mkdir(parents=True, exist_ok=True)
            link = unfinished / model
            link.unlink(missing_ok=True)
            link.symlink_to(folder.absolute())

    def progress(self, done: int, total: int, unit: str) -> None:
        print(f"\r{self.place.name}: {done} of {total} {unit}   ", end="", file=sys.stderr)

    def stopping(self) -> bool:
        return False

    def metric(self, **values: str | float | int | bool | None) -> None: ...

    def publish(self, files: dict[str, Path]) -> None:
        for name, path in files.items():
            if "/" not in name:
                target = self.place / "artifacts" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())

    def stage_seconds(self) -> dict[str, float]:
        return self._seconds

    def sequences(self) -> dict[str, list[float]] | None:
        """Of each test sequence its tokens and their summed KL, nats, so that two runs can be paired."""
        from recoup_ml import evaluate, results
        from recoup_ml.results import Behaviour, Diagnosis

        path = self.place / "evaluate" / evaluate.AFTER
        if not path.exists():
            return None
        diagnosis = results.read(self._shared / "diagnose" / "diagnosis.json", Diagnosis)
        models = {
            "floor": diagnosis.floor,
            "before": diagnosis.before.scores,
            "after": results.read(path, Behaviour).scores,
        }
        sums = {name: [float(f"{sum(kl):.6g}") for kl in scores.kl] for name, scores in models.items()}
        return {"tokens": [len(kl) for kl in diagnosis.floor.kl], **sums}


def row(
    stage: str, name: str, method: str, seed: int, report: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """What the table and the correlations need of a report."""
    measures = {item["name"]: item for item in report["measures"]}
    training, alignment = report["training"], report["alignment"]
    kept, used = measures.get("keep"), resource.getrusage(resource.RUSAGE_SELF)
    return {
        "stage": stage,
        "damage": name,
        "method": method,
        "seed": seed,
        "outcome": report["outcome"],
        "recovered": report["recovered"],
        "measures": {key: [item["teacher"], item["before"], item["after"]] for key, item in measures.items()},
        "retained": kept and kept["retained"],
        "cka_last": _both(alignment, lambda diagonal: diagonal[-1]["value"]),
        "cka_mean": _both(alignment, lambda diagonal: _mean([item["value"] for item in diagonal if item])),
        "headroom_last": alignment["headroom_recovered_last"],
        "headroom_mean": alignment["headroom_recovered_mean"],
        "plan": {item["name"]: item["value"] for item in report["plan"]},
        "phases": training and training["phases"],
        "steps": training and training["steps"],
        "points": training and training["trajectory"] and training["trajectory"]["points"],
        "rewrites": training and training["rewrites"],
        "tokens": training["tokens"] if training else 0,
        "repairs": report["repairs"],
        "baseline": report["baseline"],
        "minutes": seconds / 60,
        "train_minutes": sum(phase["seconds"] for phase in training["phases"]) / 60 if training else 0.0,
        "cpu_minutes": (used.ru_utime + used.ru_stime) / 60,
        "peak_gib": used.ru_maxrss / 2**20,
        **device(),
        "versions": report["provenance"]["versions"],
        "machine": platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _both(alignment: dict[str, Any], value: Callable[[Any], float]) -> list[float | None]:
    after = alignment["after"]
    return [value(alignment["before"]["diagonal"]), value(after["diagonal"]) if after else None]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def device() -> dict[str, Any]:
    """Where it ran; of a GPU its memory, too."""
    import torch

    if torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(), "gpu_gib": torch.cuda.max_memory_allocated() / 2**30}
    return {"device": "cpu", "gflops": gflops()}


def gflops() -> float:
    """What the machine's matrix products reach just now, float32: minutes mean little without it."""
    import torch

    a_NN, began, products = torch.randn(1024, 1024), time.monotonic(), 32
    for _ in range(products):
        a_NN @ a_NN
    return products * 2 * 1024**3 / (time.monotonic() - began) / 1e9


def capitals(spec: Any) -> Any:
    """A task that the teacher mostly knows, by exact answers."""
    from capitals import CAPITALS

    from recoup.schemas import Message, Prompt
    from recoup_ml.run import Task

    return Task(
        spec,
        [
            Prompt(
                messages=[Message(role="user", content=f"What is the capital of {land}?")], completion=city
            )
            for land, city in CAPITALS.items()
        ],
    )


def prompts(home: Path) -> list[Any]:
    """The instructions with their references, each with its kind."""
    from recoup.schemas import Message, Prompt

    rows = json.loads(alpaca(home).read_text("utf-8"))
    words = [item["instruction"].split()[0].lower() for item in rows]
    common = {word for word, count in Counter(words).items() if count >= LEAST_OF_A_KIND}
    return [
        Prompt(
            messages=[
                Message(role="user", content="\n\n".join(filter(None, (i["instruction"], i["input"]))))
            ],
            completion=i["output"],
            kind=word if word in common else "other",
        )
        for i, word in zip(rows, words, strict=True)
        if i["output"].strip()
    ]


def alpaca(home: Path) -> Path:
    """The file of instructions, taken out of the source package that pip downloads once."""
    place = home / "alpaca.json"
    if not place.exists():
        home.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=llamafactory"]
        subprocess.run([*pip, "--dest", str(home), PACKAGE], check=True)
        (archive,) = home.glob("llamafactory-*.tar.gz")
        with tarfile.open(archive) as package:
            member = next(name for name in package.getnames() if name.endswith(MEMBER))
            content = package.extractfile(member)
            assert content is not None
            place.write_bytes(content.read())
    return place


def run_grid(stage: str, only: list[str], seeds: Sequence[int], home: Path, place: Path) -> None:
    """Runs the cells that have no row yet, each in its own process; a failed one is named and left out."""
    for name, method, seed in cells(stage):
        wanted = not only or f"{name}:{method}" in only or name in only or method in only
        if not wanted or seed not in seeds or (stage, name, method, seed) in done(place):
            continue
        cell = [sys.executable, __file__, "cell", stage, name, method, str(seed), "--home", str(home)]
        result = subprocess.run(cell, stdout=subprocess.PIPE, text=True, check=False)
        if result.returncode:
            print(f"{stage} {name} {method} {seed}: failed", file=sys.stderr)
            continue
        with place.open("a") as file:
            file.write(result.stdout.strip().splitlines()[-1] + "\n")
        found = json.loads(result.stdout.strip().splitlines()[-1])
        print(f"{stage} {name} {method} {seed}: {summary(found)}", flush=True)


def done(place: Path) -> set[tuple[str, str, str, int]]:
    return {(item["stage"], item["damage"], item["method"], item["seed"]) for item in rows(place)}


def rows(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in place.read_text().splitlines()] if place.exists() else []


def summary(found: dict[str, Any]) -> str:
    recovered = found["recovered"]
    share = f"{recovered['value']:.3f}" if recovered else "–"
    return f"{found['outcome']}, r = {share}, {found['minutes']:.1f} min"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=(*SEEDS, "cell", "table"))
    parser.add_argument("cell", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="*", default=[], help="damages, methods, or damage:method")
    parser.add_argument("--seeds", nargs="*", type=int, help="of those of the stage")
    parser.add_argument("--home", type=Path, default=Path(".recoup/grid"), help="models and runs")
    parser.add_argument("--rows", type=Path, default=ROWS)
    chosen = parser.parse_args()
    if chosen.what == "cell":
        stage, name, method, seed = chosen.cell
        print("\n" + json.dumps(run_cell(stage, name, method, int(seed), chosen.home)))
    elif chosen.what == "table":
        from recovery_table import tables

        print(tables(rows(chosen.rows)))
    else:
        run_grid(chosen.what, chosen.only, chosen.seeds or SEEDS[chosen.what], chosen.home, chosen.rows)


if __name__ == "__main__":
    main()
