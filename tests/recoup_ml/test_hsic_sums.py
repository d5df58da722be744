"""Streaming HSIC: the sums of its definition, and the truth where others see texts as agreement."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recoup_ml import hsic
from recoup_ml.feature_space import Moments
from recoup_ml.hsic_sums import PANELS, Batch, Sums, batch_sums
from recoup_ml.principal import SUMS_BYTES, Sketch, most_axes

MAP = [(0, 0), (1, 2)]


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def layers(draw: torch.Generator, count: int, tokens: int, width: int = 12) -> list[Tensor]:
    return list(torch.randn(count, tokens, width, generator=draw))


def a_batch(draw: torch.Generator, texts: int = 6, tokens: int = 5) -> Batch:
    text_N = torch.arange(texts).repeat_interleave(tokens)
    kept_N = torch.rand(len(text_N), generator=draw) > 0.2
    return Batch(layers(draw, 2, len(text_N)), layers(draw, 3, len(text_N), 20), text_N, kept_N)


def by_definition(batch: Batch, kept_N: Tensor) -> tuple[np.ndarray, float]:
    """Σ k(a, b) l(a, b) over pairs of tokens of different texts, in float64, and how many there are."""
    apart_NN = (batch.text_N[:, None] < batch.text_N[None]) & kept_N[:, None] & kept_N[None]
    grams = [[(z.double() @ z.double().T) for z in side] for side in (batch.x_LND, batch.y_MND)]
    found = [[float((k * el)[apart_NN].sum()) for el in grams[1]] for k in grams[0]]
    return np.array(found), float(apart_NN.sum())


def test_most_pairs_of_different_texts_count_and_no_others(draw: torch.Generator) -> None:
    batch = everything(a_batch(draw))
    _, pairs = by_definition(batch, batch.kept_N)
    assert 0.7 * pairs < batch_sums(batch, MAP, 0, 1).pairs_G[0] <= pairs


def everything(batch: Batch) -> Batch:
    return Batch(batch.x_LND, batch.y_MND, batch.text_N, torch.ones_like(batch.kept_N))


@pytest.mark.parametrize("texts", [2, 3, 4])
def test_with_no_more_texts_than_panels_every_pair_of_texts_counts(texts: int, draw: torch.Generator) -> None:
    assert texts <= PANELS
    batch = a_batch(draw, texts=texts)
    found = batch_sums(batch, MAP, 0, 1)
    expected, pairs = by_definition(batch, batch.kept_N)
    assert found.pairs_G[0] == pairs
    np.testing.assert_allclose(found.xy_GLM[0], expected, rtol=1e-5, atol=1e-4)
    for own, side in ((found.xx_GL, batch.x_LND), (found.yy_GM, batch.y_MND)):
        alone, _ = by_definition(Batch(side, side, batch.text_N, batch.kept_N), batch.kept_N)
        np.testing.assert_allclose(own[0], np.diag(alone), rtol=1e-5)
    whole, _ = by_definition(batch, torch.ones_like(batch.kept_N))
    np.testing.assert_allclose(
        found.all_xy_GK[0], [whole[row, column] for row, column in MAP], rtol=1e-5, atol=1e-4
    )


def axes(draw: torch.Generator, count: int, width: int, size: int) -> list[Tensor]:
    return [torch.linalg.qr(torch.randn(width, size, generator=draw)).Q for _ in range(count)]


def test_within_a_batch_any_directions_give_the_same_mean(draw: torch.Generator) -> None:
    batch = a_batch(draw, texts=2)
    batch = replace(batch, x_axes=axes(draw, 2, 12, 3), y_axes=axes(draw, 3, 20, 5))
    expected, pairs = by_definition(batch, batch.kept_N)
    found = batch_sums(batch, MAP, 0, 1).products()
    np.testing.assert_allclose(found.xy_KLM[-1], expected / pairs, rtol=1e-4, atol=1e-5)


def test_in_all_directions_every_pair_of_texts_counts(draw: torch.Generator) -> None:
    """Of two texts a batch, a batch a group: those across groups, and in a batch those of its two texts."""
    everywhere = axes(draw, 2, 12, 12), axes(draw, 3, 20, 20)
    batches = [replace(a_batch(draw, texts=2), x_axes=everywhere[0], y_axes=everywhere[1]) for _ in range(6)]
    sums = None
    for group, batch in enumerate(batches):
        sums = batch_sums(batch, MAP, group, 6, into=sums)
    assert sums is not None
    for left_out in (None, 1):
        rest = [batch for group, batch in enumerate(batches) if group != left_out]
        whole = Batch(
            [torch.cat([batch.x_LND[layer] for batch in rest]) for layer in range(2)],
            [torch.cat([batch.y_MND[layer] for batch in rest]) for layer in range(3)],
            torch.cat([batch.text_N + 2 * index for index, batch in enumerate(rest)]),
            torch.cat([batch.kept_N for batch in rest]),
        )
        expected, pairs = by_definition(whole, whole.kept_N)
        found = sums.products().xy_KLM[-1 if left_out is None else left_out]
        np.testing.assert_allclose(found, expected / pairs, rtol=1e-3, atol=1e-4)


def test_a_token_meets_as_many_others_as_it_is_told(draw: torch.Generator) -> None:
    batch = everything(a_batch(draw, texts=16, tokens=4))
    batch = replace(batch, x_axes=axes(draw, 2, 12, 3), y_axes=axes(draw, 3, 20, 3))
    for meets in (4, 8, 16, 32):
        assert batch_sums(batch, MAP, 0, 1, meets).pairs_G[0] == 64 * meets / 2
    assert batch_sums(batch, MAP, 0, 1, 1000).pairs_G[0] == 64 * 32 / 2


def falling(draw: torch.Generator, rows: int, width: int = 48) -> tuple[Tensor, Tensor]:
    """Two related layers whose variance falls as 1/i with the direction, as in language models."""
    x = torch.randn(rows, width, generator=draw) * torch.arange(1, width + 1) ** -0.5
    y = x + 0.3 * torch.randn(rows, width, generator=draw) * torch.arange(1, width + 1) ** -0.5
    return x - x.mean(0), y - y.mean(0)


def test_principal_directions_bring_the_estimate_nearer_to_all_pairs(draw: torch.Generator) -> None:
    x, y = falling(draw, 4096)
    exact = Moments(torch.zeros(48), torch.zeros(48))
    exact.add(x, y)
    errors = {}
    for named in (False, True):
        sketches = [Sketch(48), Sketch(48)]
        for sketch, side in zip(sketches, (x, y), strict=True):
            sketch.add(side[:1024])
        directions = [
            [sketch.axes(torch.zeros(48).double(), 1024, 16)[0]] if named else [] for sketch in sketches
        ]
        errors[named] = []
        for _ in range(8):
            order, sums = torch.randperm(4096, generator=draw), None
            for group, rows in enumerate(order.split(64)):
                batch = Batch([x[rows]], [y[rows]], torch.arange(64), torch.ones(64).bool(), *directions)
                sums = batch_sums(batch, [(0, 0)], group % 32, 32, into=sums)
            assert sums is not None
            errors[named].append(float(hsic.matrix(sums.products())[0, 0]) - exact.cka())
    assert np.square(errors[True]).mean() < 0.25 * np.square(errors[False]).mean()


def test_directions_are_where_the_rows_vary(draw: torch.Generator) -> None:
    strong = torch.linalg.qr(torch.randn(40, 4, generator=draw)).Q.double()
    rows_ND = 5 * torch.randn(600, 4, generator=draw).double() @ strong.T + 100
    rows_ND += 0.1 * torch.randn(600, 40, generator=draw)
    sketch = Sketch(40)
    for part in rows_ND.float().split(250):
        sketch.add(part)
    found_DR, share = sketch.axes(rows_ND.mean(0), 600, 16)
    assert found_DR.shape == (40, 16)
    torch.testing.assert_close(found_DR.T @ found_DR, torch.eye(16), atol=1e-5, rtol=0)
    assert float((found_DR.T.double() @ strong).norm()) > 1.99
    assert share > 0.99


def test_of_a_flat_spectrum_directions_hold_their_number(draw: torch.Generator) -> None:
    sketch = Sketch(400)
    sketch.add(torch.randn(8192, 400, generator=draw))
    _, share = sketch.axes(torch.zeros(400).double(), 8192, 16)
    assert 0.03 < share < 0.1


def test_a_layer_that_does_not_vary_has_no_share() -> None:
    sketch = Sketch(30)
    sketch.add(torch.ones(50, 30))
    found_DR, share = sketch.axes(torch.ones(30).double(), 50, 16)
    assert share == 0.0
    assert torch.isfinite(found_DR).all()


@pytest.mark.parametrize("layers", [13, 31, 81, 400])
def test_directions_fit_the_memory_that_they_may_have(layers: int) -> None:
    size = most_axes(layers, layers, 32)
    assert 8 * 32 * (layers * size) ** 2 <= SUMS_BYTES
    assert size == 16 or 8 * 32 * (layers * (size + 1)) ** 2 > SUMS_BYTES


def test_sums_from_before_there_were_directions_are_read_and_added_to(
    draw: torch.Generator, tmp_path: Path
) -> None:
    found = batch_sums(a_batch(draw), MAP, 1, 2)
    of_old = {
        name: array for name, array in found.tensors().items() if not name.startswith(("near", "inside"))
    }
    del of_old["tokens_G"]
    save_file(of_old, tmp_path / "sums.safetensors")
    again = Sums.of(load_file(tmp_path / "sums.safetensors")) + batch_sums(a_batch(draw), MAP, 0, 2)
    assert again.products().groups == 2


def test_sums_of_parts_are_the_sums_of_the_whole_in_any_order(draw: torch.Generator) -> None:
    parts = [batch_sums(a_batch(draw), MAP, index % 3, 3) for index in range(7)]
    one = sum(parts[1:], parts[0])
    other = sum(parts[::-1][1:], parts[-1])
    for name, value in vars(one).items():
        np.testing.assert_allclose(getattr(other, name), value, rtol=1e-12)


def test_sums_are_the_same_after_a_file(draw: torch.Generator, tmp_path: Path) -> None:
    found = batch_sums(a_batch(draw), MAP, 1, 2)
    save_file(found.tensors(), tmp_path / "sums.safetensors")
    again = Sums.of(load_file(tmp_path / "sums.safetensors"))
    assert all(np.array_equal(getattr(again, name), value) for name, value in vars(found).items())


def test_leaving_a_group_out_is_adding_up_the_others(draw: torch.Generator) -> None:
    parts = [batch_sums(a_batch(draw), MAP, index % 5, 5) for index in range(10)]
    left_out = sum(parts[1:], parts[0]).products().without(2)
    others = [part for index, part in enumerate(parts) if index % 5 != 2]
    alone = sum(others[1:], others[0]).products()
    np.testing.assert_allclose(hsic.matrix(left_out), hsic.matrix(alone), rtol=1e-9)


def test_groups_without_a_batch_do_not_count(draw: torch.Generator) -> None:
    assert batch_sums(a_batch(draw), MAP, 3, 32).products().groups == 1


def test_one_text_alone_is_refused(draw: torch.Generator) -> None:
    with pytest.raises(ValueError, match="two texts"):
        batch_sums(a_batch(draw, texts=1), MAP, 0, 1)


def streamed(x: Tensor, y: Tensor, text_N: Tensor, texts: int = 8, groups: int = 32) -> hsic.Products:
    """Batches of some texts each, centred by the mean of all; x and y are [N, D]."""
    sums, (x, y) = [], (side - side.mean(0) for side in (x, y))
    for index, start in enumerate(range(0, int(text_N.max()) + 1, texts)):
        here = (text_N >= start) & (text_N < start + texts)
        batch = Batch([x[here]], [y[here]], text_N[here], torch.ones(int(here.sum()), dtype=torch.bool))
        sums.append(batch_sums(batch, [(0, 0)], index % groups, groups))
    return sum(sums[1:], sums[0]).products()


def interval(products: hsic.Products) -> hsic.Interval:
    left_out = [float(hsic.matrix(products.without(group))[0, 0]) for group in range(products.groups)]
    return hsic.jackknife(float(hsic.matrix(products)[0, 0]), left_out, hsic.t_975(products.groups - 1))


def clustered(draw: torch.Generator, texts: int, shared: float) -> tuple[Tensor, Tensor, Tensor]:
    """Four tokens around a topic of their text in each model; the truth across texts is (4 shared)² / 25."""
    topic_x, other = 2 * torch.randn(2, texts, 1, 6, generator=draw)
    topic_y = shared * topic_x + math.sqrt(1 - shared**2) * other
    noise_x, noise_y = torch.randn(2, texts, 4, 6, generator=draw)
    return (
        (topic_x + noise_x).flatten(0, 1),
        (topic_y + noise_y).flatten(0, 1),
        torch.arange(texts).repeat_interleave(4),
    )


def test_tokens_of_one_text_are_no_agreement(draw: torch.Generator) -> None:
    x, y, text_N = clustered(draw, texts=1024, shared=0.0)
    found = interval(streamed(x, y, text_N))
    assert abs(found.value) < 3 * found.se < 0.06


def test_clustered_tokens_are_scored_by_what_their_topics_share(draw: torch.Generator) -> None:
    found = interval(streamed(*clustered(draw, texts=2048, shared=0.8)))
    assert abs(found.value - (4 * 0.8) ** 2 / 25) < 3 * found.se


def test_the_interval_covers_the_truth_of_clustered_data(draw: torch.Generator) -> None:
    truth, covered = (4 * 0.8) ** 2 / 25, 0
    for _ in range(200):
        found = interval(streamed(*clustered(draw, texts=512, shared=0.8)))
        covered += found.low <= truth <= found.high
    assert 0.90 <= covered / 200 <= 0.99


def test_it_agrees_with_the_exact_value_over_independent_rows(draw: torch.Generator) -> None:
    x = torch.randn(4096, 24, generator=draw)
    y = x @ torch.randn(24, 24, generator=draw) / 5 + torch.randn(4096, 24, generator=draw)
    exact = Moments(torch.zeros(24), torch.zeros(24))
    for part_x, part_y in zip(x.split(1000), y.split(1000), strict=True):
        exact.add(part_x, part_y)
    found = interval(streamed(x, y, torch.arange(4096), texts=128))
    assert abs(found.value - exact.cka()) < 2 * found.se < 0.05


def test_the_exact_value_is_the_published_one() -> None:
    generator = np.random.RandomState(1337)
    x = generator.randn(100, 10)
    x, y = torch.from_numpy(x), torch.from_numpy(generator.randn(100, 10) + x)
    for shift in (0.0, 3.0):
        found = Moments(torch.full((10,), shift, dtype=torch.float64), torch.zeros(10, dtype=torch.float64))
        found.add(x[:30], y[:30])
        found.add(x[30:], y[30:])
        assert found.cka() == pytest.approx(0.51346, abs=1e-5)


def test_the_exact_value_is_that_of_the_gram_matrix(draw: torch.Generator) -> None:
    """Song et al. by its formula, and Székely and Rizzo's U-centred one: the same to 1e-9."""
    x = torch.randn(60, 300, generator=draw, dtype=torch.float64)
    y = x[:, :40] + torch.randn(60, 40, generator=draw, dtype=torch.float64)
    found = Moments(torch.zeros(300), torch.zeros(40))
    found.add(x, y)
    grams = [side @ side.T for side in (x, y)]
    for hsic_1 in (song, u_centred):
        xy, xx, yy = (hsic_1(k, el) for k, el in ((grams[0], grams[1]), (grams[0],) * 2, (grams[1],) * 2))
        assert found.cka() == pytest.approx(xy / math.sqrt(xx * yy), rel=1e-9)


def song(k: Tensor, el: Tensor) -> float:
    n, (k, el) = len(k), (side - torch.diag(side.diag()) for side in (k, el))
    cross = (k @ el).sum() * 2 / (n - 2)
    return float(((k * el).sum() + k.sum() * el.sum() / ((n - 1) * (n - 2)) - cross) / (n * (n - 3)))


def u_centred(k: Tensor, el: Tensor) -> float:
    def centred(side: Tensor) -> Tensor:
        n, side = len(side), side - torch.diag(side.diag())
        rows = side.sum(1, keepdim=True) / (n - 2)
        found = side - rows - rows.T + side.sum() / ((n - 1) * (n - 2))
        return found - torch.diag(found.diag())

    return float((centred(k) * centred(el)).sum() / (len(k) * (len(k) - 3)))


def test_fewer_than_four_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4"):
        Moments(torch.zeros(2), torch.zeros(2)).cka()
