"""How sequences are laid out for models that read them: padded or, where all begin alike, with that once."""

from collections.abc import Iterator, Sequence

from transformers import PreTrainedModel

from recoup_ml.models import can_share
from recoup_ml.sequences import Answered, Batch, batches, packs, shared_tokens

ROW_TOKENS = 512
"""Of a row on a CPU, where it is felt that attention looks at all of it."""
LEAST_SHARED = 0.15
"""Share of all tokens: from here on it outweighs that."""


def laid_out(
    sequences: Sequence[Answered], pad_id: int, tokens: int, *readers: PreTrainedModel
) -> Iterator[Batch]:
    """All sequences once, at most `tokens` at once, so that each of the `readers` can read them."""
    shared = shared_tokens(sequence.prompt_ids for sequence in sequences)
    worth = shared * len(sequences) >= LEAST_SHARED * sum(map(len, sequences))
    if not worth or not all(can_share(reader) for reader in readers):
        return batches(sequences, pad_id, tokens)
    on_cpu = any(reader.device.type == "cpu" for reader in readers)
    return packs(sequences, min(tokens, ROW_TOKENS) if on_cpu else tokens, shared)
