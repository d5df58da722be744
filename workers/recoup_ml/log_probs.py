"""The likeliest tokens of an answer and their log-probabilities, as vLLM tells them.

They come in two ways: `logprobs` with the tokens that the server generates, and `prompt_logprobs`
with those that it is given. An answer that is given is sent but for its last token, and that one's
position is generated: so scoring takes no longer a sequence than answering did. At a position the
token that stands there is told too, likely or not; only the likeliest are taken.

vLLM tells the model's own log-probabilities, before temperature (`--logprobs-mode raw_logprobs`).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from recoup_ml.targets import TopK

TOKEN = "token_id:"
"""What names a token, where it is asked for by `return_tokens_as_token_ids`; its text may name several."""


def request(k: int, given: Sequence[int]) -> dict[str, Any]:
    """What is asked for beside everything else; `given` is an answer that is to be scored."""
    asked: dict[str, Any] = {"logprobs": k, "return_tokens_as_token_ids": True}
    return asked | ({"prompt_logprobs": k} if given else {})


def read(choice: dict[str, Any], k: int, prompt: int, positions: int) -> TopK:
    """The `k` likeliest at all positions of an answer, generated or given after `prompt` tokens.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: the choice does not hold them.
    """
    given = choice.get("prompt_logprobs") or []
    told = [{int(token): item["logprob"] for token, item in place.items()} for place in given[prompt:]]
    for place in choice["logprobs"]["top_logprobs"]:
        told.append({int(token.removeprefix(TOKEN)): value for token, value in place.items()})
    if len(told) != positions:
        raise ValueError(f"log-probabilities: {len(told)} positions of {positions}")
    best = [_best(place.items(), k) for place in told]
    ids_NK = torch.tensor([[token for token, _ in row] for row in best])
    log_p_NK = torch.tensor([[value for _, value in row] for row in best])
    return TopK.given(ids_NK, log_p_NK).compact()


def _best(told: Iterable[tuple[int, float]], k: int) -> list[tuple[int, float]]:
    best = sorted(told, key=lambda pair: -pair[1])[:k]
    if len(best) < k:
        raise ValueError(f"log-probabilities: {len(best)} at a position where {k} were asked for")
    return best
