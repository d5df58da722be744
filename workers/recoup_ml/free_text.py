"""What a model writes unasked: text of every kind that it knows, for a repair to be fitted to beside answers.

A repair that saw nothing but short answers makes a model worse at all other text. So the teacher writes some,
sampled from tokens drawn at random on (data-free distillation, LLM-QAT, arXiv 2305.17888).
"""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recoup.schemas import Message, Prompt
from recoup_ml.generate import LocalEngine
from recoup_ml.sequences import Answered, Encoded

SEED, TEMPERATURE = 0, 0.7
"""At 1 a small model loses the thread, and what is fitted to its words fits less (docs/03-methods.md)."""
NOTHING = Prompt(messages=[Message(role="user", content="?")])
"""Stands where an answer has its prompt."""


def free_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, tokens: int
) -> list[Answered]:
    """`count` texts, each of a first token and at most `tokens` more; the same ones every time."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", tokens + 1)
    tokens = min(tokens, room - 1)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        ordinary_V = torch.ones(len(tokenizer))
        ordinary_V[tokenizer.all_special_ids] = 0.0
        first = torch.multinomial(ordinary_V, count, replacement=count > int(ordinary_V.sum())).tolist()
        begun = [Encoded(NOTHING, (token,)) for token in first]
        writer = LocalEngine(model, tokenizer, temperature=TEMPERATURE)
        return writer.answer(begun, tokens, lambda _done: None)
