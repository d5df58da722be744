"""The student as it is, answering on vLLM servers that hold it without its adapter.

Whenever it is to answer, the adapter of the moment is written into a folder that the servers see, loaded
by each of them under a name that was never used before (one that was may serve what it served then), and
the one before is unloaded and removed. What comes back are samples with the log-probability that
the server gave each token. Only an adapter of one rank can be served so: whole models, masked
and weight-decomposed adapters and those with ranks by damage answer in this process.
"""

import secrets
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import httpx2
import torch
from transformers import PreTrainedTokenizerBase

from recoup_ml import durable
from recoup_ml.errors import RolloutMismatch, RolloutsUnavailable, TeacherUnavailable
from recoup_ml.mismatch import MOST, Mismatch
from recoup_ml.observation import Observation
from recoup_ml.sequences import Answered, Encoded
from recoup_ml.vllm_engine import VllmEngine

LOAD_SECONDS = 300.0
LOOK_SECONDS = 10.0


def serving(urls: Sequence[str], student: Path, source: str) -> list[str]:
    """Those servers whose first model is this student: by its source, its folder, or the name of that.

    Raises:
        RolloutsUnavailable: one of them does not say what it serves.
    """
    names = {source, str(student), student.name}
    return [url.rstrip("/") for url in urls if _served(url.rstrip("/")) in names]


class ServedStudent:
    """The servers of one student; call `withdraw` in the end, so that none holds an adapter any more."""

    def __init__(self, urls: Sequence[str], folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self._urls, self._folder = urls, folder
        self._engine = VllmEngine(urls, tokenizer)
        self._name: str | None = None
        for left in folder.glob("rollouts-*"):  # by a process that was killed
            self._name = left.name
            self.withdraw()

    def publish(self, save: Callable[[Path], None]) -> None:
        """Makes the adapter that `save` writes the one that answers."""
        name = f"rollouts-{secrets.token_hex(8)}"
        durable.place(self._folder / name, save)
        for url in self._urls:
            place = str((self._folder / name).resolve())
            _post(url, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": place})
        self.withdraw()
        self._name = name

    def answer(
        self, prompts: Sequence[Encoded], max_new_tokens: int, seed: int
    ) -> list[tuple[Answered, tuple[float, ...]]]:
        """A sample at temperature 1 for each prompt, and the log-probability of each of its tokens."""
        assert self._name
        try:
            return self._engine.sampled(prompts, max_new_tokens, seed, self._name)
        except TeacherUnavailable as error:
            raise RolloutsUnavailable(
                f"The student's servers do not answer: {error} They are those of RECOUP_ROLLOUT_URLS."
            ) from error

    def withdraw(self) -> None:
        """Unloads what was published last, wherever it can still be unloaded."""
        if self._name is None:
            return
        for url in self._urls:
            with suppress(RolloutsUnavailable):  # one that is gone, or has forgotten it, holds it no more
                _post(url, "/v1/unload_lora_adapter", {"lora_name": self._name})
        shutil.rmtree(self._folder / self._name, ignore_errors=True)
        self._name = None


def drifted(given: Sequence[tuple[Answered, tuple[float, ...]]], student: Observation) -> list[Answered]:
    """The answers with log p - log q of their tokens, p being the student that was observed on them.

    Raises:
        RolloutMismatch: the servers drew them from another model.
    """
    found = []
    for (answer, log_q), hidden_ND in zip(given, student.hidden, strict=True):
        log_p_NV = student.head(hidden_ND.to(student.head.weight_VD)).log_softmax(-1).cpu()
        log_p_N = log_p_NV.gather(-1, torch.tensor(answer.answer_ids).unsqueeze(-1)).squeeze(-1)
        found.append(replace(answer, drift=tuple((log_p_N - torch.tensor(log_q)).tolist())))
    mean = Mismatch.of(answer.drift for answer in found if answer.drift).mean
    if mean > MOST:
        raise RolloutMismatch(
            f"What answers for the student at RECOUP_ROLLOUT_URLS is not the student that learns: "
            f"log-probabilities differ by {mean:.2g} nats a token. The server holds another model, or has "
            "lost the adapter that it was given."
        )
    return found


def _served(url: str) -> str:
    try:
        listed = httpx2.get(f"{url}/v1/models", timeout=LOOK_SECONDS).raise_for_status().json()["data"]
        return str(listed[0]["id"])
    except (httpx2.HTTPError, ValueError, LookupError, TypeError) as error:
        raise RolloutsUnavailable(
            f"{url} of RECOUP_ROLLOUT_URLS does not say what it serves: {error}"
        ) from error


def _post(url: str, path: str, body: dict[str, str]) -> None:
    try:
        response = httpx2.post(f"{url}{path}", json=body, timeout=LOAD_SECONDS)
    except httpx2.HTTPError as error:
        raise RolloutsUnavailable(f"{url} of RECOUP_ROLLOUT_URLS does not answer {path}: {error}") from error
    if response.status_code != 200:
        raise RolloutsUnavailable(
            f"{url} of RECOUP_ROLLOUT_URLS refuses {path}: {response.status_code} {response.text[:300]}. It "
            "needs --enable-lora, VLLM_ALLOW_RUNTIME_LORA_UPDATING, --max-lora-rank of training.lora.rank or "
            "more, and the folder `jobs` below RECOUP_HOME under the same path."
        )
