"""One pass over answered prompts: the same whatever the padding and the batches, and safe in a file."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from recoup_ml import layout, observation
from recoup_ml.alignment import Positions, choose_positions
from recoup_ml.models import Head
from recoup_ml.observation import Observation, load_states, observe, save_states
from recoup_ml.sequences import Answered


@pytest.fixture
def positions(answered: list[Answered]) -> Positions:
    return choose_positions(answered, 256, seed=0)


def assert_same(one: Observation, other: Observation) -> None:
    for ours, theirs in zip([*one.hidden, *one.states], [*other.hidden, *other.states], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_another_padding_token_changes_nothing(
    healthy: PreTrainedModel, answered: list[Answered], positions: Positions
) -> None:
    one, other = (observe(healthy, answered, pad_id, positions) for pad_id in (0, 57))
    for ours, theirs in zip([*one.hidden, *one.states], [*other.hidden, *other.states], strict=True):
        assert torch.equal(ours, theirs)


@torch.inference_mode()
def test_every_sequence_is_what_it_is_alone(
    healthy: PreTrainedModel, answered: list[Answered], positions: Positions
) -> None:
    seen = observe(healthy, answered, 0, positions)
    states = [[] for _ in seen.states]
    for row, sequence in enumerate(answered):
        ids = torch.tensor([[*sequence.prompt_ids, *sequence.answer_ids]])
        hidden = healthy(input_ids=ids, output_hidden_states=True).hidden_states
        first = len(sequence.prompt_ids) - 1
        torch.testing.assert_close(seen.hidden[row], hidden[-1][0, first:-1], rtol=1e-4, atol=1e-4)
        for layer, state in enumerate(hidden[:-1]):
            states[layer] += [state[0, first + place] for place in positions.chosen[row]]
    for layer, expected in enumerate(states[:-1]):
        torch.testing.assert_close(seen.states[layer], torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 50, 200])
def test_the_size_of_batches_changes_nothing(
    tokens: int,
    healthy: PreTrainedModel,
    answered: list[Answered],
    positions: Positions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = observe(healthy, answered, 0, positions)
    monkeypatch.setattr(observation, "BATCH_TOKENS", tokens)
    assert_same(observe(healthy, answered, 0, positions), expected)


@pytest.mark.parametrize("tokens", [24, 512])
def test_what_all_sequences_begin_with_is_passed_once_a_row_and_changes_nothing(
    tokens: int, healthy: PreTrainedModel, answered: list[Answered], monkeypatch: pytest.MonkeyPatch
) -> None:
    system = (11, 12, 13, 14, 15, 16, 17, 18)
    sequences = [replace(sequence, prompt_ids=system + sequence.prompt_ids) for sequence in answered]
    positions = choose_positions(sequences, 256, seed=0)
    monkeypatch.setattr(layout, "ROW_TOKENS", tokens)
    passed: list[int] = []
    hook = (
        healthy.get_decoder()
        .layers[0]
        .register_forward_pre_hook(lambda _layer, args: passed.append(args[0].shape[:2].numel()))
    )
    found, rows = observe(healthy, sequences, 0, positions), [*passed]
    passed.clear()
    monkeypatch.setattr(layout, "LEAST_SHARED", 2.0)
    expected = observe(healthy, sequences, 0, positions)
    hook.remove()
    assert_same(found, expected)
    assert sum(rows) < sum(passed) * (0.6 if tokens == 512 else 1)


def test_the_order_of_sequences_is_kept(healthy: PreTrainedModel, answered: list[Answered]) -> None:
    forwards, backwards = observe(healthy, answered, 0), observe(healthy, answered[::-1], 0)
    assert_same(Observation(backwards.hidden[::-1], backwards.head, []), forwards)


def test_sequences_without_a_chosen_position_are_passed_over(
    healthy: PreTrainedModel, answered: list[Answered]
) -> None:
    one_word = Answered("", "", (5,), "", (9,), "stop")
    sequences = [one_word, *answered[:3]]
    positions = choose_positions(sequences, 256, seed=0)
    assert positions.chosen[0] == ()
    seen = observe(healthy, sequences, 0, positions)
    assert len(seen.states[0]) == sum(map(len, positions.chosen))


def test_the_head_makes_the_models_logits_again(healthy: PreTrainedModel, answered: list[Answered]) -> None:
    seen = observe(healthy, answered[:1], 0)
    ids = torch.tensor([[*answered[0].prompt_ids, *answered[0].answer_ids]])
    with torch.inference_mode():
        logits_TV = healthy(input_ids=ids).logits[0, len(answered[0].prompt_ids) - 1 : -1]
    torch.testing.assert_close(seen.head(seen.hidden[0]), logits_TV, rtol=1e-4, atol=1e-4)


def test_progress_ends_at_the_number_of_sequences(healthy: PreTrainedModel, answered: list[Answered]) -> None:
    told: list[int] = []
    observe(healthy, answered, 0, tick=told.append)
    assert told == sorted(told)
    assert told[-1] == len(answered)


@pytest.mark.parametrize("head", [Head(torch.rand(9, 4)), Head(torch.rand(9, 4), torch.rand(9), 30.0, 0.25)])
def test_an_observation_survives_a_file(head: Head, tmp_path: Path) -> None:
    seen = Observation([torch.rand(3, 4), torch.rand(0, 4), torch.rand(5, 4)], head, [])
    seen.save(tmp_path / "seen.safetensors")
    loaded = Observation.load(tmp_path / "seen.safetensors")
    for ours, theirs in zip(loaded.hidden, seen.hidden, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(loaded.head.weight_VD, head.weight_VD)
    assert (loaded.head.softcap, loaded.head.scale) == (head.softcap, head.scale)
    hidden_ND = torch.rand(2, 4)
    assert torch.equal(loaded.head(hidden_ND), head(hidden_ND))


def test_states_survive_a_file_in_their_order(tmp_path: Path) -> None:
    states = [torch.rand(3, 4) for _ in range(12)]
    save_states(tmp_path / "states.safetensors", states)
    for ours, theirs in zip(load_states(tmp_path / "states.safetensors"), states, strict=True):
        assert torch.equal(ours, theirs)
