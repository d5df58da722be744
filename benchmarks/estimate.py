"""How far a dry run's estimate is off, on recoveries that a machine has calibrated itself on.

    python benchmarks/estimate.py [--runs 10] [--demo .recoup/models]

Starts an installation of its own, damages a random model of two layers, and recovers it RUNS times with other
steps, lengths, modes and amounts of prompts each; with `--demo`, SmolLM2-135M as `make demo` has damaged it,
on the built-in prompts. Before each recovery a dry run is asked, after it the report: a line gives estimate
and actual of seconds, tokens and memory, and the last line the median error of the seconds over the runs that
had an estimate. Only recoveries that came before calibrate.
"""

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

PORT = 18431
KINDS = ("add", "name", "sort", "find", "tell")


def main() -> None:
    from recoup import Client
    from recoup_jobs.settings import Settings
    from recoup_server.embedded import running

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--demo", type=Path, help="where smollm2 and smollm2-finetuning lie")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        settings = Settings(home=Path(home) / "home")
        if asked.demo:
            settings = settings.model_copy(update={"model_roots": [asked.demo.absolute()]})
        else:
            _write_models(settings.model_roots[0])
        requests = _demo_requests(asked.runs) if asked.demo else _requests(asked.runs, Path(home))
        with running(settings, "127.0.0.1", PORT) as server, Client(server.url) as client:
            errors = [_one(client, request) for request in requests]
    known = [error for error in errors if error is not None]
    print(f"median error of {len(known)} estimates of time: {100 * statistics.median(known):.0f} %")


def _one(client: Any, request: dict[str, Any]) -> float | None:
    """The relative error of the seconds; None where no estimate of them was given."""
    if path := request.pop("path", None):
        request |= {"prompts": {"file": client.files.create(path).id}}
    expected = client.recoveries.dry_run(**request).estimate
    job = client.recoveries.wait(client.recoveries.create(**request).id)
    cost = client.recoveries.report(job.id).cost
    actual = sum(cost.stage_seconds[stage] for stage in cost.stage_seconds if stage != "preflight")
    tokens = cost.tokens_generated + cost.tokens_trained
    told = "none" if expected.seconds is None else f"{expected.seconds:.1f}"
    print(
        f"{request['training']}: {told} s expected, {actual:.1f} s; {expected.tokens:,} tokens, "
        f"{tokens:,}; {expected.memory_bytes >> 20} MiB, {cost.peak_memory_bytes >> 20} MiB",
        flush=True,
    )
    return None if expected.seconds is None else abs(expected.seconds - actual) / actual


def _requests(runs: int, home: Path) -> list[dict[str, Any]]:
    draw, found = random.Random(0), []
    for run in range(runs):
        path = home / f"prompts-{run}.jsonl"
        rows = draw.choice([120, 200, 400])
        path.write_text("".join(f"{json.dumps(_row(at))}\n" for at in range(rows)))
        found.append(
            {
                "student": "student",
                "teacher": "teacher",
                "path": path,
                "generation": {"max_new_tokens": draw.choice([8, 16, 32])},
                "training": {
                    "steps": draw.choice([6, 24, 96]),
                    "mode": draw.choice(["lora", "full"]),
                    "learning_rate": 0.01,
                    "stop_early": False,
                },
                "evaluation": {"test_sequences": draw.choice([32, 64]), "validation_sequences": 16},
                "alignment": {"positions": 256},
            }
        )
    return found


def _demo_requests(runs: int) -> list[dict[str, Any]]:
    draw = random.Random(0)
    return [
        {
            "student": "smollm2-finetuning",
            "teacher": "smollm2",
            "generation": {"max_new_tokens": draw.choice([16, 24, 40])},
            "training": {"steps": draw.choice([8, 16, 24]), "stop_early": False},
            "evaluation": {"test_sequences": draw.choice([32, 64, 112]), "validation_sequences": 32},
            "alignment": {"positions": draw.choice([256, 1024])},
        }
        for _ in range(runs)
    ]


def _row(at: int) -> dict[str, str]:
    words = " ".join(f"w{(at * step + step) % 120}" for step in (1, 7, 11))
    return {"prompt": f"{words} w{at // 120}", "kind": KINDS[at % 5]}


def _write_models(root: Path) -> None:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    special = ["<pad>", "</s>", "<unk>"]
    names = [*special, *(f"w{number}" for number in range(120))]
    words = Tokenizer(WordLevel({word: at for at, word in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    config = LlamaConfig(
        vocab_size=len(names),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    set_seed(0)
    teacher = LlamaForCausalLM(config)
    for weight in teacher.parameters():
        weight.data.mul_(4.0)
    teacher.save_pretrained(root / "teacher")
    for weight in teacher.parameters():
        weight.data.add_(weight.data.std() * 0.4 * weight.data.new_empty(weight.shape).normal_())
    teacher.save_pretrained(root / "student")
    for name in ("teacher", "student"):
        tokenizer.save_pretrained(root / name)


if __name__ == "__main__":
    main()
