"""Teaching a narrow skill so that nothing else is lost: what each way of teaching forgets.

    python benchmarks/prevention.py run [--only sft …] [--seeds 0 1 2]   appends to prevention.jsonl
    python benchmarks/prevention.py table                                the table of docs/02-results.md

A healthy SmolLM2-135M learns to route support tickets by the product's own `recover()`, with `teach`: for all
ways the same tickets, steps and rate. Asked are other tickets (loss, exact match); drift is the token KL from
the model that it was, on its answers to general prompts of kinds that were never trained on. A row that is
there is not made again; the diagnosis, alike for all ways of a seed, is made once.

    sft, rewrite_sft, self_demonstration   by that method alone
    *_beside_general                       and in every step held to what it was on general prompts
"""

import argparse
import json
import resource
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from recovery import FolderJournal, device

ROWS = Path(__file__).with_name("prevention.jsonl")
METHODS = ("sft", "rewrite_sft", "self_demonstration")
BESIDE = "_beside_general"
WAYS = (*METHODS, *(method + BESIDE for method in METHODS))
TICKETS, ASKED = 240, 64
FILE, HELD_OUT = "file-" + "0" * 24, "file-" + "1" * 24
"""The rows are at hand; a request must name files."""


def request(way: str, seed: int, steps: int) -> dict[str, Any]:
    """The body of the teaching; all ways share everything but the method and what stands beside."""
    return {
        "student": {"source": "teacher"},
        "teacher": {"source": "teacher"},
        "teach": {"file": FILE, "held_out": HELD_OUT, "rehearse": way.endswith(BESIDE)},
        "method": {"type": way.removesuffix(BESIDE)},
        "training": {"steps": steps, "learning_rate": 5e-4, "stop_early": False, "max_length": 640},
        "generation": {"max_new_tokens": 40},
        "evaluation": {"test_sequences": ASKED, "validation_sequences": 24},
        "alignment": {"positions": 1024},
        "seed": seed,
    }


def teach(way: str, seed: int, steps: int, home: Path) -> dict[str, Any]:
    """Teaches one model; its row."""
    from recoup.schemas import ChatRow, CreateRecovery
    from recoup_jobs.datasets import BUILTIN, read_rows
    from recoup_ml import smollm
    from recoup_ml.recipe import recover
    from recoup_ml.run import Run
    from recoup_ml.tickets import ticket_rows

    smollm.convert(home / "teacher")
    tickets = [ChatRow.model_validate(row).as_prompt() for row in ticket_rows(TICKETS + ASKED, seed)]
    run = Run(
        job_id=f"{way}-{seed}-{steps}",
        student=home / "teacher",
        teacher=home / "teacher",
        request=CreateRecovery.model_validate(request(way, seed, steps)),
        prompts=[row.as_prompt() for row in read_rows(BUILTIN / "general.jsonl")],
        keep=[],
        tasks=[],
        natural_text=[],
        vllm_urls=(),
        teach=tickets[:TICKETS],
        held_out=tickets[TICKETS:],
    )
    began = time.monotonic()
    journal = FolderJournal(home / "prevention" / run.job_id, home / "prevention" / f"shared-{seed}", {})
    recover(run, journal)
    report = json.loads((journal.place / "artifacts" / "report.json").read_text())
    return row(way, seed, report, (time.monotonic() - began) / 60)


def row(way: str, seed: int, report: dict[str, Any], minutes: float) -> dict[str, Any]:
    """What the table needs of a report."""
    measures = {item["name"]: item["after"] for item in report["measures"]}
    training, used = report["training"], resource.getrusage(resource.RUSAGE_SELF)
    return {
        "way": way,
        "seed": seed,
        "outcome": report["outcome"],
        "reason": report["reason"],
        "teaching": report["teaching"],
        "agreement": measures["agreement"],
        "bits_per_character": measures["bits_per_character"],
        "steps": training["steps"],
        "tokens": training["tokens"],
        "rewrites": training["rewrites"],
        "checkpoints": training["checkpoints"],
        "minutes": minutes,
        "cpu_minutes": (used.ru_utime + used.ru_stime) / 60,
        **device(),
        "versions": report["provenance"]["versions"],
        "date": time.strftime("%Y-%m-%d"),
    }


def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text("utf-8").splitlines()] if ROWS.exists() else []


def table() -> str:
    """Markdown: each way, means over its seeds."""
    lines = [
        "| way | seeds | right | loss, nats | drift, nats (by seed) | agreement | outcomes |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_line(way, mine) for way in WAYS if (mine := [item for item in rows() if item["way"] == way])]
    return "\n".join(lines)


def _line(way: str, mine: list[dict[str, Any]]) -> str:
    right, loss = (fmean(item["teaching"][part]["after"] for item in mine) for part in ("right", "loss"))
    drift = ", ".join(f"{item['teaching']['drift']['value']:.3f}" for item in mine)
    agreement = fmean(item["agreement"] for item in mine)
    outcomes = ", ".join(sorted({item["outcome"] for item in mine}))
    return f"| {way} | {len(mine)} | {right:.3f} | {loss:.3f} | {drift} | {agreement:.3f} | {outcomes} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--only", nargs="*", default=WAYS, choices=WAYS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--home", type=Path, default=Path(".recoup/grid"), help="models and runs")
    chosen = parser.parse_args()
    if chosen.what == "table":
        print(table())
        return
    for seed in chosen.seeds:
        for way in chosen.only:
            if (way, seed) in {(item["way"], item["seed"]) for item in rows()}:
                continue
            found = teach(way, seed, chosen.steps, chosen.home)
            with ROWS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            print(f"{way} {seed}: {found['outcome']}, {found['cpu_minutes']:.1f} CPU min so far", flush=True)


if __name__ == "__main__":
    main()
