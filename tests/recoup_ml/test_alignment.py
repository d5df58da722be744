"""Which positions are compared, and what the comparison says about a recovery."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from recoup_ml import hsic
from recoup_ml.alignment import GROUPS, Positions, States, align, choose_positions, csv_table
from recoup_ml.sequences import Answered

LAYERS, WIDTH, SEQUENCES, TOKENS = 3, 12, 48, 6
LAYER_MAP = [(layer, layer) for layer in range(LAYERS)]


def sequence(prompt: int, answer: int) -> Answered:
    return Answered("", "", tuple(range(prompt)), "", tuple(range(answer)), "stop")


@pytest.fixture
def positions() -> Positions:
    return Positions(tuple(tuple(range(TOKENS)) for _ in range(SEQUENCES)))


@pytest.fixture
def states() -> States:
    """A teacher, a student that drifted from it by as much again, and one that came half the way back."""
    draw = torch.Generator().manual_seed(0)
    shape = (2, LAYERS, SEQUENCES * TOKENS, WIDTH)
    healthy, drift = torch.randn(shape, generator=draw).unbind()
    teacher = list(healthy.unbind())
    return States(
        teacher=teacher,
        before=list((healthy + drift).unbind()),
        after=list((healthy + drift / 2).unbind()),
        ceiling=[state.bfloat16().float() for state in teacher],
    )


def test_positions_are_drawn_evenly_from_all_sequences() -> None:
    chosen = choose_positions([sequence(5, 40) for _ in range(20)], total=256, seed=0).chosen
    counts = [len(places) for places in chosen]
    assert max(counts) - min(counts) <= 1
    assert 240 <= sum(counts) <= 256
    for places in chosen:
        assert list(places) == sorted(set(places))
        assert set(places) <= set(range(40))


def test_a_short_answer_gives_all_its_positions() -> None:
    chosen = choose_positions([sequence(5, 3), sequence(5, 40)], total=256, seed=0).chosen
    assert chosen == ((0, 1, 2), tuple(range(40)))


def test_no_more_positions_are_taken_than_were_asked_for() -> None:
    chosen = choose_positions([sequence(5, 4) for _ in range(300)], total=256, seed=0).chosen
    assert sum(map(len, chosen)) <= 256


def test_the_first_token_of_a_sequence_is_never_compared() -> None:
    assert choose_positions([sequence(1, 4)], total=256, seed=0).chosen == ((1, 2, 3),)


def test_positions_depend_on_the_seed_alone() -> None:
    sequences = [sequence(5, 40) for _ in range(20)]
    first, again, other = (choose_positions(sequences, 256, seed) for seed in (7, 7, 8))
    assert (first.chosen, first.sha256) == (again.chosen, again.sha256)
    assert first.chosen != other.chosen
    assert first.sha256 != other.sha256


def test_all_positions_of_a_sequence_are_in_one_group(positions: Positions) -> None:
    groups = positions.groups.view(SEQUENCES, TOKENS)
    assert (groups == groups[:, :1]).all()
    assert set(groups[:, 0].tolist()) == set(range(GROUPS))


def test_alignment_rises_from_before_over_after_to_the_ceiling(states: States, positions: Positions) -> None:
    found = align(states, positions, LAYER_MAP, seed=0)
    for layer in range(LAYERS):
        before, after = found.before.diagonal[layer], found.after.diagonal[layer]
        assert before.low < before.value < before.high < after.low < after.value < found.ceiling[layer]
        assert found.ceiling[layer] == pytest.approx(1.0, abs=1e-3)
        assert abs(found.floor[layer]) < 0.05


def test_the_diagonal_follows_the_layer_map(states: States, positions: Positions) -> None:
    shallow = replace(states, before=states.before[:2], after=states.after[:2])
    found = align(shallow, positions, [(0, 0), (1, 2)], seed=0)
    assert np.shape(found.before.matrix) == (2, 3)
    assert [estimate.value for estimate in found.before.diagonal] == [
        found.before.matrix[0][0],
        found.before.matrix[1][2],
    ]
    assert (found.student_layers, found.teacher_layers) == (
        ["embeddings", "block 0"],
        ["embeddings", "block 0", "block 1"],
    )
    assert found.ceiling == pytest.approx([1.0, 1.0], abs=1e-3)


def test_reaching_the_ceiling_recovers_all_headroom(states: States, positions: Positions) -> None:
    found = align(replace(states, after=states.ceiling), positions, LAYER_MAP, seed=0)
    for won in (found.headroom_recovered_last, found.headroom_recovered_mean):
        assert (won.value, won.low, won.high) == pytest.approx((1.0, 1.0, 1.0))


def test_a_student_that_did_not_change_recovers_no_headroom(states: States, positions: Positions) -> None:
    found = align(replace(states, after=states.before), positions, LAYER_MAP, seed=0)
    for won in (found.headroom_recovered_last, found.headroom_recovered_mean):
        assert (won.value, won.low, won.high) == (0.0, 0.0, 0.0)


def test_headroom_is_the_share_of_the_way_to_the_ceiling(states: States, positions: Positions) -> None:
    found = align(states, positions, LAYER_MAP, seed=0)
    before, after = found.before.diagonal[-1].value, found.after.diagonal[-1].value
    expected = (after - before) / (found.ceiling[-1] - before)
    last = found.headroom_recovered_last
    assert last.value == pytest.approx(expected)
    assert last.low < expected < last.high


def test_without_training_there_is_neither_after_nor_headroom(states: States, positions: Positions) -> None:
    found = align(replace(states, after=None), positions, LAYER_MAP, seed=0)
    assert (found.after, found.headroom_recovered_last, found.headroom_recovered_mean) == (None, None, None)


@pytest.mark.parametrize("model", ["teacher", "before", "after"])
def test_massive_activations_are_dropped_and_counted(
    model: str, states: States, positions: Positions
) -> None:
    """One channel that a few tokens share would otherwise decide the similarity alone."""
    clean = align(states, positions, LAYER_MAP, seed=0)
    sinks = slice(0, None, 64)
    layers = [layer.clone() for layer in getattr(states, model)]
    layers[1][sinks, 0] += 500.0
    found = align(replace(states, **{model: layers}), positions, LAYER_MAP, seed=0)
    assert found.dropped_outliers == len(range(0, SEQUENCES * TOKENS, 64))
    assert found.positions == clean.positions - found.dropped_outliers
    for layer in range(LAYERS):
        assert found.before.diagonal[layer].value == pytest.approx(
            clean.before.diagonal[layer].value, abs=0.02
        )
        assert found.after.diagonal[layer].value == pytest.approx(clean.after.diagonal[layer].value, abs=0.02)


def test_ordinary_positions_all_stay(states: States, positions: Positions) -> None:
    found = align(states, positions, LAYER_MAP, seed=0)
    assert (found.dropped_outliers, found.positions, found.sequences) == (0, 288, SEQUENCES)


def test_eight_sequences_are_eight_groups_with_the_interval_of_eight(states: States) -> None:
    """Student's t at 97.5 % is 2.365 with 7 degrees of freedom; 2.131 belongs to sixteen groups."""
    few = Positions(tuple(tuple(range(TOKENS)) for _ in range(8)))
    rows = slice(0, 8 * TOKENS)
    cut = States(*([layer[rows] for layer in getattr(states, name)] for name in vars(states)))
    sums = hsic.products(cut.before[:1], cut.teacher[:1], few.groups)
    left_out = [float(hsic.matrix(sums.without(group))[0, 0]) for group in range(8)]
    expected = hsic.jackknife(float(hsic.matrix(sums)[0, 0]), left_out, 2.365)
    found = align(cut, few, LAYER_MAP, seed=0)
    assert found.groups == 8
    first = found.before.diagonal[0]
    assert (first.low, first.high) == pytest.approx((expected.low, expected.high), abs=1e-3)


def test_an_undefined_alignment_is_null_and_not_a_number_that_misleads(
    states: States, positions: Positions
) -> None:
    constant = torch.ones(SEQUENCES * TOKENS, WIDTH)
    before = [constant, *states.before[1:]]
    found = align(replace(states, before=before, after=None), positions, LAYER_MAP, seed=0)
    assert found.before.diagonal[0] is None
    assert found.before.matrix[0] == [None] * LAYERS
    assert math.isfinite(found.before.diagonal[1].value)


def test_beside_cka_stands_what_outliers_would_make_of_it(states: States, positions: Positions) -> None:
    clean = align(states, positions, LAYER_MAP, seed=0)
    values = [estimate.value for estimate in clean.before.diagonal]
    assert clean.before.with_outliers == values
    layers = [layer.clone() for layer in states.teacher]
    layers[1][::64, 0] += 500.0
    found = align(replace(states, teacher=layers), positions, LAYER_MAP, seed=0)
    assert found.before.with_outliers[1] < 0.5 * values[1]
    assert found.before.with_outliers[0] == pytest.approx(values[0], abs=0.02)


def test_beside_cka_stand_distances_in_the_shared_basis(states: States, positions: Positions) -> None:
    found = align(states, positions, LAYER_MAP, seed=0)
    for before, after, (mine, theirs) in zip(
        found.before.distances, found.after.distances, LAYER_MAP, strict=True
    ):
        x, y = states.before[mine], states.teacher[theirs]
        assert before.relative_l2 == pytest.approx(float((x - y).norm() / y.norm()), rel=1e-4)
        assert before.cosine == pytest.approx(float(torch.cosine_similarity(x, y).mean()), rel=1e-4)
        assert before.teacher_norm == after.teacher_norm
        assert after.relative_l2 < before.relative_l2
    lines = csv_table(found).splitlines()
    assert {len(line.split(",")) for line in lines} == {2 + 2 * 8 + 2}
    assert "after_cosine" in lines[0]
