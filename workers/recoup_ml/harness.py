"""Tasks of EleutherAI's lm-evaluation-harness (PyPI: lm-eval), measured as tasks of one's own.

The harness makes prompts of the operator's documents, asks the model that is loaded here, and marks each
document by the task's metric; the marks are paired over documents, before and after. Every model gets the
teacher's tokenizer, its chat template if it has one, the same documents and the same examples: a digest of
what was asked stands beside the marks. This module alone imports the harness, and only where a task asks for
it. It does not aggregate: what the harness would add up by anything but a mean is refused.
"""

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recoup_ml.errors import UnsupportedRequest
from recoup_ml.generate import Tick
from recoup_ml.results import HarnessScores
from recoup_ml.run import HarnessTask

if TYPE_CHECKING:
    from lm_eval.api.task import Task

SEED = 1234
"""The harness's own, so that examples are those that it shows by itself."""
BATCH = 4
"""Of requests; the harness holds logits of every position."""


def installed(tasks: Sequence[HarnessTask]) -> Sequence[HarnessTask]:
    """The tasks.

    Raises:
        UnsupportedRequest: there are some, but no harness.
    """
    if tasks and find_spec("lm_eval") is None:
        raise UnsupportedRequest(
            "evaluation.harness needs the package lm-eval on the worker: pip install 'recoup-server[harness]'"
        )
    return tasks


def scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: HarnessTask, tick: Tick
) -> HarnessScores:
    """The task's metric for each document.

    Raises:
        UnsupportedRequest: the task cannot be loaded, reads anything but local JSON, or has no such metric.
    """
    loaded = _load(task)
    metric = _metric(loaded, task)
    rows = _asked(model, tokenizer, loaded, task.spec.limit, tick)
    filters = list(dict.fromkeys(row["filter"] for row in rows))
    chosen = (task.spec.metric or "").partition(",")[2] or filters[0]
    if chosen not in filters:
        raise UnsupportedRequest(f"The task {task.spec.name} has the filters {', '.join(filters)}.")
    kept = sorted((row for row in rows if row["filter"] == chosen), key=lambda row: row["doc_id"])
    tick(task.spec.limit)
    return HarnessScores(
        metric=f"{metric},{chosen}",
        better="higher" if loaded.higher_is_better()[metric] else "lower",
        values=[float(row[metric]) for row in kept],
        asked_sha256=_digest(kept),
    )


def _load(task: HarnessTask) -> "Task":
    from lm_eval.tasks import TaskManager

    name, folder = task.spec.name, task.file.parent
    known = TaskManager(include_path=folder, include_defaults=False)
    entry = known.task_index.get(name)
    if entry is None or entry.yaml_path != task.file:
        raise UnsupportedRequest(f"{task.file.name} must be a task file of lm-eval that says `task: {name}`.")
    _require_local_json(name, entry.cfg or {})
    try:
        with chdir(folder):  # the harness takes `data_files` from where it runs
            loaded: Task = known.load([name])["tasks"][name]
    except Exception as error:  # whatever a file of the operator's may do
        raise UnsupportedRequest(f"lm-eval cannot load {task.file.name}: {error!r}") from error
    shots = loaded.get_config("num_fewshot") if task.spec.shots is None else task.spec.shots
    loaded.set_config("num_fewshot", shots or 0)
    loaded.set_fewshot_seed(SEED)
    return loaded


def _require_local_json(name: str, config: Mapping[str, Any]) -> None:
    files = list(_names((config.get("dataset_kwargs") or {}).get("data_files")))
    if config.get("dataset_path") != "json" or not files or any("://" in file for file in files):
        raise UnsupportedRequest(
            f"The task {name} must read local files: `dataset_path: json`, in dataset_kwargs `data_files`, "
            "named from the folder of the task file."
        )


def _names(files: Any) -> Iterator[str]:
    """Of `data_files`, which may be one, a list, or either of them by split."""
    if isinstance(files, str):
        yield files
    elif files:
        for part in files.values() if isinstance(files, Mapping) else files:
            yield from _names(part)


def _metric(loaded: "Task", task: HarnessTask) -> str:
    """The one that was asked for, or the task's first."""
    from lm_eval.api.metrics import mean

    found = loaded.aggregation()
    name = task.spec.metric.partition(",")[0] if task.spec.metric else next(iter(found))
    if found.get(name) is not mean:
        means = [metric for metric, how in found.items() if how is mean]
        raise UnsupportedRequest(
            f"{name} is no metric of the task {task.spec.name} that is a mean over documents; "
            f"those are: {', '.join(means) or 'none'}."
        )
    return name


def _asked(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, loaded: "Task", limit: int, tick: Tick
) -> list[dict[str, Any]]:
    """The harness's samples: one for each filter and document.

    `lm_eval.evaluate` is what `simple_evaluate` calls, which also runs git, pip and nvidia-smi each time.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with _watched(model, tick), torch.random.fork_rng():
        torch.manual_seed(SEED)
        found = lm_eval.evaluate(
            lm=HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=BATCH),
            task_dict={"tasks": {loaded.task_name: loaded}},
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=tokenizer.chat_template is not None,
            fewshot_as_multiturn=True,
        )
    return list(found["samples"][loaded.task_name])


@contextmanager
def _watched(model: PreTrainedModel, tick: Tick) -> Iterator[None]:
    """Tells at each pass of the model that it is at work; there the recovery can be stopped."""
    hook = model.register_forward_pre_hook(lambda _model, _inputs: tick(0))
    try:
        yield
    finally:
        hook.remove()


def _digest(rows: Sequence[Mapping[str, Any]]) -> str:
    parts = [[row[part] for part in ("doc_hash", "prompt_hash", "target_hash")] for row in rows]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
