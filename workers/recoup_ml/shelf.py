"""Models that answer in this process, one base at a time with its adapters, a token after another.

For an installation without vLLM: what was recovered can be tried, one request after the other. A base is
loaded at its first use and let go when another is asked for; its adapters stand inside it and are switched.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recoup.schemas import Message, Prompt
from recoup_ml import models
from recoup_ml.generate import end_ids
from recoup_ml.sampling import Sampling, choose
from recoup_ml.sequences import encode

NOT_A_CHARACTER = "\ufffd"
"""What a decoder shows where the bytes of a character are not all there yet."""


@dataclass(frozen=True)
class Token:
    """One token of an answer."""

    text: str
    """What it adds to the answer; empty while the bytes of a character are not all there."""
    id: int
    log_p: float
    """Under the model itself, before any setting of sampling; nats."""
    top: list[tuple[int, float]]
    """The likeliest tokens in its place, with theirs."""
    ends: bool
    """Whether the model ended its answer with it."""


@dataclass
class Speaker:
    """A model that is ready to answer, its adapter switched on or off."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def longest(self) -> int:
        """Tokens that a sequence may have."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 32_768))

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """A conversation as the student was trained to see it."""
        (found,) = encode([Prompt(messages=list(messages))], self.tokenizer, 1 << 30)
        return list(found.ids)

    def answer(
        self, prompt: Sequence[int], most: int, sampling: Sampling, seed: int | None, top: int = 0
    ) -> Iterator[Token]:
        """At most `most` tokens, each as it is chosen."""
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed % (1 << 63))
        ends = set(end_ids(self.model, self.tokenizer))
        said: list[int] = []
        shown, cache, fresh = "", None, list(prompt)
        while len(said) < most:
            logits_V, cache = self._next(fresh, cache)
            token = choose(logits_V, sampling, prompt, said, generator)
            said.append(token)
            fresh = [token]
            text = "" if token in ends else self._decoded(said)[len(shown) :]
            text = "" if text.endswith(NOT_A_CHARACTER) else text
            shown += text
            yield self._told(token, text, logits_V.log_softmax(-1), top, token in ends)
            if token in ends:
                return

    @torch.inference_mode()
    def _next(self, ids: Sequence[int], cache: object) -> tuple[Tensor, object]:
        out = self.model(input_ids=self._tensor(ids), past_key_values=cache, use_cache=True)
        return out.logits[0, -1].float().cpu(), out.past_key_values

    def _told(self, token: int, text: str, log_p_V: Tensor, top: int, ends: bool) -> Token:
        best = log_p_V.topk(top)
        pairs = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return Token(text, token, float(log_p_V[token]), pairs, ends)

    def _decoded(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=self.model.device)


@dataclass
class Shelf:
    """Holds the base that was asked for last."""

    _folder: Path | None = None
    _model: PreTrainedModel | None = None
    _adapted: PeftModel | None = None
    _tokenizer: PreTrainedTokenizerBase | None = None
    _loaded: set[str] = field(default_factory=set)

    def speaker(self, base: Path, adapter: Path | None) -> Speaker:
        """The model of `base`, as `adapter` changes it.

        Raises:
            RecoveryError, OSError, ValueError: it cannot be loaded.
        """
        if self._folder != base or self._model is None or self._tokenizer is None:
            self.clear()
            self._model, self._tokenizer = models.load(base), models.load_tokenizer(base)
            self._folder = base
        if adapter is not None:
            self._put_on(self._model, adapter)
        elif self._adapted is not None:
            self._adapted.base_model.disable_adapter_layers()
        return Speaker(self._model, self._tokenizer)

    def drop(self, adapter: Path) -> None:
        """Takes an adapter out of memory."""
        if adapter.name in self._loaded and self._adapted is not None:
            if len(self._loaded) == 1:
                self.clear()
            else:
                self._adapted.delete_adapter(adapter.name)
                self._loaded.discard(adapter.name)

    def clear(self) -> None:
        """Lets go of everything."""
        self._folder = self._model = self._adapted = self._tokenizer = None
        self._loaded.clear()
        models.release()

    def _put_on(self, model: PreTrainedModel, adapter: Path) -> None:
        name = adapter.name
        if self._adapted is None:
            self._adapted = PeftModel.from_pretrained(model, adapter, adapter_name=name).eval()
        elif name not in self._loaded:
            self._adapted.load_adapter(adapter, adapter_name=name)
        self._loaded.add(name)
        self._adapted.base_model.enable_adapter_layers()
        self._adapted.set_adapter(name)
