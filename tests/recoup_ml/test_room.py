"""How many tokens go through a student at once: laws of the number, and what is told before a recovery."""

import pytest

from recoup_jobs.estimate import FORMS_OF_LOSS, Machine, machine_of, micro_batch
from recoup_ml import room
from recoup_ml.fused import CHUNK
from recoup_ml.room import Room, Shape, room_for

GIB = 1 << 30
SMOLLM2, LLAMA_8B, LLAMA_70B = (
    Shape(576, 30, 49_152, 2),
    Shape(4096, 32, 128_256, 2),
    Shape(8192, 80, 128_256, 2),
)


def kept(shape: Shape, room_: Room) -> int:
    """Bytes that are kept for the way back."""
    layers = (
        room.RECOMPUTED * shape.layers + room.WORKING * room.ACTIVATIONS
        if room_.recomputes
        else room.ACTIVATIONS * shape.layers
    )
    return layers * shape.number_bytes * shape.hidden * room_.tokens


def test_a_cpu_takes_a_number_of_its_own() -> None:
    assert room_for(None, LLAMA_70B, 10**9) == Room(room.CPU_TOKENS, False)


@pytest.mark.parametrize("shape", [SMOLLM2, LLAMA_8B, LLAMA_70B])
@pytest.mark.parametrize("free", [16 * GIB, 24 * GIB, 64 * GIB, 140 * GIB])
def test_what_goes_through_at_once_fits_into_half_of_what_is_free(shape: Shape, free: int) -> None:
    found = room_for(free, shape, 0)
    assert found.tokens & (found.tokens - 1) == 0
    assert kept(shape, found) <= room.SHARE * free
    more = Room(2 * found.tokens, found.recomputes)
    assert found.tokens == room.MOST_TOKENS or 2 * kept(shape, more) > free - 2.2 * GIB  # the head's


def test_eight_billion_parameters_train_an_adapter_on_80_gib_and_on_24() -> None:
    adapter = 42_000_000
    assert room_for(64 * GIB, LLAMA_8B, adapter) == Room(2048, False)
    assert room_for(8 * GIB, LLAMA_8B, adapter) == Room(2048, True)
    assert room_for(64 * GIB, SMOLLM2, adapter) == Room(room.MOST_TOKENS, False)


def test_layers_are_run_again_where_few_tokens_fit_and_nothing_forbids_it() -> None:
    again, plain = room_for(16 * GIB, LLAMA_8B, 0), room_for(16 * GIB, LLAMA_8B, 0, may_recompute=False)
    assert again.recomputes and not plain.recomputes
    assert plain.tokens < room.RECOMPUTE_BELOW < again.tokens


def test_what_the_optimizer_will_hold_is_left_to_it() -> None:
    trained = 3 * 10**9
    later = room_for(64 * GIB, LLAMA_8B, trained)
    assert later.tokens < room_for(64 * GIB, LLAMA_8B, 0).tokens
    assert later == room_for(64 * GIB - room.OPTIMIZER_BYTES * trained, LLAMA_8B, 0)


def test_where_there_is_no_room_the_fewest_are_tried() -> None:
    assert room_for(0, LLAMA_70B, 10**9) == Room(room.FEWEST_TOKENS, True)


@pytest.mark.parametrize("shape", [SMOLLM2, LLAMA_8B, LLAMA_70B])
@pytest.mark.parametrize(
    ("memory", "weights"), [(24 * GIB, 1 * GIB), (24 * GIB, 16 * GIB), (80 * GIB, 16 * GIB)]
)
def test_an_estimate_counts_on_what_training_will_do(shape: Shape, memory: int, weights: int) -> None:
    rows = machine_of("gpu.1x80g").logit_rows
    assert rows == CHUNK["cuda"]
    logits = 4 * FORMS_OF_LOSS * rows * shape.vocabulary
    width = shape.number_bytes * shape.hidden
    tokens, each = micro_batch(width, shape.layers, weights + logits, Machine(None, rows, memory))
    found = room_for(memory - weights, shape, 0)
    assert (tokens, tokens * each) == (found.tokens, kept(shape, found))
