"""CKA: its laws (rotation, scale, shift), its truth on known populations, and its honesty where others fail.

Groups of whole sequences are numbered row by row; unless a test says otherwise every row is its own
sequence, so that rows may be dealt to groups in turn.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from recoup_ml import hsic

T_975_15 = 2.131


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(1337)


def dealt(rows: int, groups: int = 16) -> Tensor:
    return torch.arange(rows) % groups


def value(x: Tensor, y: Tensor, groups_N: Tensor | None = None) -> float:
    groups_N = dealt(len(x)) if groups_N is None else groups_N
    return float(hsic.matrix(hsic.products([x], [y], groups_N))[0, 0])


def interval(x: Tensor, y: Tensor, groups_N: Tensor) -> hsic.Interval:
    sums = hsic.products([x], [y], groups_N)
    left_out = [float(hsic.matrix(sums.without(group))[0, 0]) for group in range(sums.groups)]
    return hsic.jackknife(float(hsic.matrix(sums)[0, 0]), left_out, T_975_15)


def song_debiased(x: Tensor, y: Tensor) -> float:
    """The debiased CKA of the literature (Song et al. 2012, HSIC_1), by its formula, on all rows."""

    def hsic(k: Tensor, el: Tensor) -> float:
        n = len(k)
        k, el = k - torch.diag(k.diag()), el - torch.diag(el.diag())
        cross = (k @ el).sum() * 2 / (n - 2)
        return float(((k * el).sum() + k.sum() * el.sum() / ((n - 1) * (n - 2)) - cross) / (n * (n - 3)))

    k, el = (z.double() @ z.double().T for z in (x, y))
    return hsic(k, el) / math.sqrt(hsic(k, k) * hsic(el, el))


def related(draw: torch.Generator, rows: int = 400, width: int = 24) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, width, generator=draw)
    return x, x @ torch.randn(width, width, generator=draw) / 5 + torch.randn(rows, width, generator=draw)


def rotation(width: int, draw: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(width, width, generator=draw, dtype=torch.float64))[0].float()


@pytest.fixture
def published() -> tuple[Tensor, Tensor]:
    """Kornblith's case: its debiased CKA over all rows is 0.51346."""
    generator = np.random.RandomState(1337)
    x = generator.randn(100, 10)
    return torch.from_numpy(x), torch.from_numpy(generator.randn(100, 10) + x)


def test_the_published_value_lies_within_our_own_interval(published: tuple[Tensor, Tensor]) -> None:
    assert song_debiased(*published) == pytest.approx(0.51346, abs=1e-5)
    ours = interval(*published, dealt(100))
    assert abs(ours.value - 0.51346) < ours.se


def test_with_a_row_a_group_it_is_the_published_value(published: tuple[Tensor, Tensor]) -> None:
    assert value(*published, torch.arange(100)) == pytest.approx(0.51346, abs=1e-3)


@pytest.mark.parametrize("width", [8, 64, 512])
def test_a_known_population_lies_within_four_standard_errors(width: int, draw: torch.Generator) -> None:
    """For x = z A, y = z B with Gaussian z the truth is ‖A'B‖² / (‖A'A‖ ‖B'B‖)."""
    a, b = torch.randn(2, 40, width, generator=draw, dtype=torch.float64)
    b = a + b
    truth = float((a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm()))
    z = torch.randn(640, 40, generator=draw, dtype=torch.float64)
    found = interval(z @ a, z @ b, dealt(640))
    assert abs(found.value - truth) < 4 * found.se
    assert found.se < 0.03


def test_rotating_either_side_changes_nothing(draw: torch.Generator) -> None:
    x, y = related(draw)
    turned = value(x @ rotation(24, draw), y @ rotation(24, draw))
    assert turned == pytest.approx(value(x, y), abs=1e-6)


@pytest.mark.parametrize("scale", [1e-4, 0.03, 1e4])
def test_scaling_either_side_changes_nothing(scale: float, draw: torch.Generator) -> None:
    x, y = related(draw)
    assert value(scale * x, y) == pytest.approx(value(x, y), abs=1e-6)
    assert value(x, scale * y) == pytest.approx(value(x, y), abs=1e-6)


def test_a_shift_of_a_hundred_sigma_in_float32_changes_nothing(draw: torch.Generator) -> None:
    x, y = related(draw)
    shifted = value(x + 100 * x.std() * torch.sign(torch.randn(24, generator=draw)), y - 100 * y.std())
    assert abs(shifted - value(x, y)) <= 1e-5


def test_the_order_of_rows_changes_nothing(draw: torch.Generator) -> None:
    x, y = related(draw)
    order = torch.randperm(len(x), generator=draw)
    assert value(x[order], y[order], dealt(len(x))[order]) == pytest.approx(value(x, y), abs=1e-6)


def test_stretching_single_channels_does_change_it(draw: torch.Generator) -> None:
    x, y = related(draw)
    stretched = value(x * torch.logspace(-1, 1, 24), y)
    assert abs(stretched - value(x, y)) > 0.1


def test_a_model_is_perfectly_aligned_with_itself(draw: torch.Generator) -> None:
    layers = [torch.randn(200, width, generator=draw) for width in (8, 16, 300)]
    found = hsic.matrix(hsic.products(layers, layers, dealt(200)))
    assert np.diag(found) == pytest.approx(1.0, abs=1e-6)
    assert found == pytest.approx(found.T, abs=1e-6)


def test_every_layer_pair_is_what_it_is_alone(draw: torch.Generator) -> None:
    x, y = related(draw)
    wide = torch.randn(400, 100, generator=draw)
    found = hsic.matrix(hsic.products([x, wide], [y, x, wide], dealt(400)))
    assert found.shape == (2, 3)
    assert found[0, 0] == pytest.approx(value(x, y), abs=1e-7)
    assert found[1, 1] == pytest.approx(value(wide, x), abs=1e-7)


def test_independent_states_wider_than_many_have_no_alignment(draw: torch.Generator) -> None:
    """Where biased CKA says 0.98: 32 rows of 1024 independent channels."""
    found = [
        value(*torch.randn(2, 32, 1024, generator=draw), groups_N=torch.arange(32) % 8) for _ in range(100)
    ]
    assert abs(np.mean(found)) < 3 * np.std(found) / 10
    assert min(found) < 0 < max(found)


def clustered(
    draw: torch.Generator, sequences: int, tokens: int, width: int, shared: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens around a topic of their sequence, in both models; `shared` of the topics is the same in both.

    The truth over tokens of different sequences is ‖Cov(x, y)‖² / (‖Cov(x)‖ ‖Cov(y)‖).
    """
    topic_x, other = 2 * torch.randn(2, sequences, 1, width, generator=draw)
    topic_y = shared * topic_x + math.sqrt(1 - shared**2) * other
    noise_x, noise_y = torch.randn(2, sequences, tokens, width, generator=draw)
    sequence_N = torch.arange(sequences).repeat_interleave(tokens)
    return (topic_x + noise_x).flatten(0, 1), (topic_y + noise_y).flatten(0, 1), sequence_N


def clustered_truth(shared: float) -> float:
    return (4 * shared) ** 2 / 25


def test_tokens_of_one_text_are_no_agreement(draw: torch.Generator) -> None:
    """Models that group tokens by text but share no topic: the literature's estimator gives them credit."""
    x, y, sequence_N = clustered(draw, sequences=96, tokens=8, width=24, shared=0.0)
    found = interval(x, y, sequence_N % 16)
    assert abs(found.value) < 3 * found.se
    assert song_debiased(x, y) > found.value + 3 * found.se


def test_few_texts_are_no_agreement_either(draw: torch.Generator) -> None:
    """Sixteen texts on unrelated topics: centring by the mean of so few must not tie them together."""
    found = []
    for _ in range(40):
        x, y, sequence_N = clustered(draw, sequences=16, tokens=4, width=128, shared=0.0)
        found.append(value(x, y, sequence_N))
    assert abs(np.mean(found)) < 3 * np.std(found) / math.sqrt(40)


def test_clustered_tokens_are_scored_by_what_their_topics_share(draw: torch.Generator) -> None:
    x, y, sequence_N = clustered(draw, sequences=320, tokens=8, width=6, shared=0.8)
    found = interval(x, y, sequence_N % 16)
    assert abs(found.value - clustered_truth(0.8)) < 3 * found.se


@pytest.mark.slow  # hundreds of data sets; its twin of streamed sums is among the fast tests
def test_the_jackknife_interval_covers_the_truth_of_clustered_data(draw: torch.Generator) -> None:
    covered = 0
    for _ in range(300):
        x, y, sequence_N = clustered(draw, sequences=64, tokens=4, width=4, shared=0.8)
        found = interval(x, y, sequence_N % 16)
        covered += found.low <= clustered_truth(0.8) <= found.high
    assert 0.88 <= covered / 300 <= 0.99


def test_the_jackknife_is_its_formula() -> None:
    """For the mean of G values the jackknife's standard error is s / √G, exactly."""
    values = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    found = hsic.jackknife(values.mean(), [np.delete(values, g).mean() for g in range(5)], 2.5)
    assert found.se == pytest.approx(values.std(ddof=1) / math.sqrt(5))
    assert (found.low, found.high) == pytest.approx((6.2 - 2.5 * found.se, 6.2 + 2.5 * found.se))


def test_leaving_a_group_out_is_computing_without_its_rows(draw: torch.Generator) -> None:
    """Where every group's mean is the overall mean, centring is the same and so is the value, to 1e-6."""
    x, y = related(draw)
    groups_N = dealt(400, 8)
    for side in (x, y):
        for group in range(8):
            side[groups_N == group] -= side[groups_N == group].mean(0)
    stay = groups_N != 7
    left_out = hsic.products([x], [y], groups_N).without(7)
    assert left_out.groups == 7
    assert hsic.matrix(left_out)[0, 0] == pytest.approx(value(x[stay], y[stay], groups_N[stay]), abs=1e-6)


def test_leaving_a_group_out_is_close_to_computing_anew_on_any_data(draw: torch.Generator) -> None:
    """The centre is not taken anew: that moves the value far less than leaving the group out does."""
    x, y = related(draw)
    groups_N = dealt(400, 8)
    stay = groups_N != 3
    left_out = float(hsic.matrix(hsic.products([x], [y], groups_N).without(3))[0, 0])
    anew = value(x[stay], y[stay], groups_N[stay] - (groups_N[stay] > 3).long())
    assert left_out == pytest.approx(anew, abs=2e-3)


def test_constant_states_have_no_alignment_rather_than_a_wrong_one(draw: torch.Generator) -> None:
    x, _ = related(draw)
    assert math.isnan(value(torch.full_like(x, 3.0), x))


@pytest.mark.parametrize("groups", [1, 2])
def test_fewer_than_three_groups_are_refused(groups: int, draw: torch.Generator) -> None:
    x, y = related(draw)
    with pytest.raises(ValueError, match="groups of sequences"):
        hsic.products([x], [y], dealt(400, groups))


def test_states_of_other_positions_are_refused(draw: torch.Generator) -> None:
    x, y = related(draw)
    with pytest.raises(ValueError, match="same positions"):
        hsic.products([x], [y[1:]], dealt(400))
