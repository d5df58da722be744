"""How many tokens go through a student at once: laws of the number, and what is told before a recovery."""

import pytest

from recoup_jobs.estimate import ACTIVATIONS, FORMS_OF_LOSS, Machine, micro_tokens
from recoup_ml import room
from recoup_ml.room import Shape, tokens_at_once

GIB = 1 << 30
SMOLLM2, LLAMA_8B, LLAMA_70B = (
    Shape(576, 30, 49_152, 2),
    Shape(4096, 32, 128_256, 2),
    Shape(8192, 80, 128_256, 2),
)


def activations(shape: Shape, tokens: int) -> int:
    return room.ACTIVATIONS * shape.number_bytes * shape.hidden * shape.layers * tokens


def test_a_cpu_takes_a_number_of_its_own() -> None:
    assert tokens_at_once(None, LLAMA_70B, 10**9) == room.CPU_TOKENS


@pytest.mark.parametrize("shape", [SMOLLM2, LLAMA_8B, LLAMA_70B])
@pytest.mark.parametrize("free", [16 * GIB, 24 * GIB, 64 * GIB, 140 * GIB])
def test_what_goes_through_at_once_fits_into_half_of_what_is_free(shape: Shape, free: int) -> None:
    tokens = tokens_at_once(free, shape, 0)
    assert tokens & (tokens - 1) == 0
    assert tokens == room.FEWEST_TOKENS or activations(shape, tokens) <= room.SHARE * free
    assert tokens == room.MOST_TOKENS or 2 * activations(shape, 2 * tokens) > free - 2.2 * GIB  # the head's


def test_eight_billion_parameters_train_an_adapter_on_80_gib() -> None:
    """Sixteen thousand tokens of it keep more than a hundred GiB."""
    free, adapter = 64 * GIB, 42_000_000
    assert activations(LLAMA_8B, room.MOST_TOKENS) > 2 * free
    assert tokens_at_once(free, LLAMA_8B, adapter) == 2048
    assert tokens_at_once(free, SMOLLM2, adapter) == room.MOST_TOKENS


def test_what_the_optimizer_will_hold_is_left_to_it() -> None:
    trained = 2 * 10**9
    later = tokens_at_once(40 * GIB, LLAMA_8B, trained)
    assert later < tokens_at_once(40 * GIB, LLAMA_8B, 0)
    assert later == tokens_at_once(40 * GIB - room.OPTIMIZER_BYTES * trained, LLAMA_8B, 0)


def test_where_there_is_no_room_the_fewest_are_tried() -> None:
    assert tokens_at_once(0, LLAMA_70B, 10**9) == room.FEWEST_TOKENS


@pytest.mark.parametrize("shape", [SMOLLM2, LLAMA_8B, LLAMA_70B])
@pytest.mark.parametrize(("memory", "weights"), [(24 * GIB, 1 * GIB), (80 * GIB, 16 * GIB)])
def test_an_estimate_counts_on_what_training_will_do(shape: Shape, memory: int, weights: int) -> None:
    each = ACTIVATIONS * shape.number_bytes * shape.hidden * shape.layers
    logits = 4 * FORMS_OF_LOSS * 1024 * shape.vocabulary
    expected = micro_tokens(each, weights + logits, Machine(None, 1024, memory))
    assert tokens_at_once(memory - weights, shape, 0) == expected
