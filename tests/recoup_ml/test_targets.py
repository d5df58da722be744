"""Targets: what is left of a divergence when only the teacher's likeliest tokens, or one, are kept."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from recoup_ml.divergence import between, forward_kl
from recoup_ml.models import Head
from recoup_ml.objective import Divergence
from recoup_ml.targets import Hidden, Target, Tokens, TopK, join

POSITIONS, VOCABULARY = 11, 29

every_divergence = pytest.mark.parametrize(
    "divergence",
    [
        Divergence("forward_kl"),
        Divergence("reverse_kl"),
        Divergence("jsd", beta=0.3),
        Divergence("skew_kl", beta=0.1),
        Divergence("reverse_kl", temperature=2.0),
    ],
    ids=str,
)


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def pair(draw: torch.Generator) -> Tensor:
    """Logits of a teacher and of a student, float64."""
    return 2 * torch.randn(2, POSITIONS, VOCABULARY, generator=draw, dtype=torch.float64)


def test_hidden_states_stand_for_the_logits_of_their_head(draw: torch.Generator) -> None:
    head = Head(torch.randn(VOCABULARY, 5, generator=draw), torch.randn(VOCABULARY, generator=draw), 3.0)
    hidden_ND = torch.randn(POSITIONS, 5, generator=draw)
    student_NV = torch.randn(POSITIONS, VOCABULARY, generator=draw)
    found = Hidden(hidden_ND, head).loss(Divergence("jsd"), student_NV)
    assert torch.equal(found, between(Divergence("jsd"), head(hidden_ND), student_NV))


@every_divergence
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("k", [1, 4, VOCABULARY])
def test_the_top_of_equal_distributions_has_no_divergence(
    divergence: Divergence, tail: bool, k: int, pair: Tensor
) -> None:
    target = TopK.of(pair[0], k, divergence.temperature, tail)
    assert target.loss(divergence, pair[0]).abs().max() < 1e-12


@every_divergence
def test_the_top_with_its_tail_is_a_lower_bound_that_grows_with_k(
    divergence: Divergence, pair: Tensor
) -> None:
    teacher_NV, student_NV = pair
    bounds = torch.stack(
        [
            TopK.of(teacher_NV, k, divergence.temperature).loss(divergence, student_NV)
            for k in range(1, VOCABULARY + 1)
        ]
    )
    assert (bounds > 0).all()
    assert (bounds.diff(dim=0) > -1e-9).all()
    assert (bounds[:-2] < between(divergence, teacher_NV, student_NV)).all()


@every_divergence
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("k", [VOCABULARY, 10 * VOCABULARY])
def test_the_top_of_all_is_the_whole(divergence: Divergence, tail: bool, k: int, pair: Tensor) -> None:
    teacher_NV, student_NV = pair
    target = TopK.of(teacher_NV, k, divergence.temperature, tail)
    torch.testing.assert_close(
        target.loss(divergence, student_NV), between(divergence, teacher_NV, student_NV)
    )


@every_divergence
def test_a_tail_is_one_outcome_with_the_mass_of_the_rest(divergence: Divergence, pair: Tensor) -> None:
    p, q = (logits_NV.div(divergence.temperature).softmax(-1) for logits_NV in pair)
    target = TopK.of(pair[0], 4, divergence.temperature)
    lumped = [
        torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1).log()
        for kept in (p.gather(-1, target.ids_NK), q.gather(-1, target.ids_NK))
    ]
    expected = between(replace(divergence, temperature=1.0), *lumped)
    torch.testing.assert_close(target.loss(divergence, pair[1]), expected)


def test_without_a_tail_both_sides_are_renormalised_over_the_teachers_tokens(pair: Tensor) -> None:
    teacher_NV, student_NV = pair
    target = TopK.of(teacher_NV, 4, tail=False)
    expected = forward_kl(teacher_NV.gather(-1, target.ids_NK), student_NV.gather(-1, target.ids_NK))
    torch.testing.assert_close(target.loss(Divergence(), student_NV), expected)


@every_divergence
@pytest.mark.parametrize("tail", [True, False])
def test_only_a_tail_lets_the_other_tokens_be_seen(divergence: Divergence, tail: bool, pair: Tensor) -> None:
    target = TopK.of(pair[0], 4, divergence.temperature, tail)
    student_NV = pair[1].requires_grad_()
    (slope_NV,) = torch.autograd.grad(target.loss(divergence, student_NV).sum(), student_NV)
    kept_NV = torch.zeros_like(slope_NV, dtype=torch.bool).scatter(-1, target.ids_NK, True)
    assert (slope_NV[kept_NV] != 0).all()
    assert (slope_NV[~kept_NV] != 0).all() if tail else (slope_NV[~kept_NV] == 0).all()


def test_truncation_without_renormalising_is_no_divergence(pair: Tensor) -> None:
    teacher_NV = pair[0]
    ids_NK = TopK.of(teacher_NV, 4).ids_NK
    student_NV = teacher_NV.scatter_add(-1, ids_NK, torch.full_like(ids_NK, -3.0, dtype=torch.float64))
    log_p, log_q = (logits_NV.log_softmax(-1).gather(-1, ids_NK) for logits_NV in (teacher_NV, student_NV))
    truncated_reverse = (log_q.exp() * (log_q - log_p)).sum(-1)
    assert (truncated_reverse < 0).all()
    for tail in (True, False):
        assert (TopK.of(teacher_NV, 4, tail=tail).loss(Divergence("reverse_kl"), student_NV) > -1e-12).all()


@every_divergence
def test_a_tail_too_small_for_one_minus_the_rest_still_counts(divergence: Divergence) -> None:
    """In float32 the student's tail of e⁻³⁰ is lost in 1 - Σ q, not in the logits."""
    target = TopK.of(torch.tensor([[4.0, 0.0, 0.0]]), 1, divergence.temperature)
    scale = 30 * divergence.temperature
    student_NV = torch.tensor([[scale, 0.0, 0.0]], requires_grad=True)
    loss_N = target.loss(divergence, student_NV)
    (slope_NV,) = torch.autograd.grad(loss_N.sum(), student_NV)
    torch.testing.assert_close(
        loss_N.double(), target.loss(divergence, student_NV.double()).detach().double()
    )
    assert torch.isfinite(slope_NV).all()


@every_divergence
def test_a_teacher_that_left_nothing_to_the_tail_gives_finite_values(divergence: Divergence) -> None:
    """Rounded log-probabilities of an inference server can add up to more than one."""
    target = TopK.given(torch.tensor([[0, 1]]), torch.tensor([[math.log(0.75), math.log(0.2500001)]]))
    student_NV = torch.zeros(1, 9, requires_grad=True)
    loss_N = target.loss(divergence, student_NV)
    (slope_NV,) = torch.autograd.grad(loss_N.sum(), student_NV)
    assert torch.isfinite(loss_N).all()
    assert (loss_N > 0).all()
    assert torch.isfinite(slope_NV).all()


@every_divergence
def test_what_is_kept_of_the_top_is_the_top_within_the_rounding_of_half_floats(
    divergence: Divergence, draw: torch.Generator
) -> None:
    """Of ids that need 17 bits, and of a teacher so sure that a tail of 1 - Σ p would be noise."""
    sure_NV, student_NV = 4 * torch.randn(2, POSITIONS, 70_000, generator=draw)
    sure_NV[:, -1] = 20.0
    whole = TopK.of(sure_NV, 16, divergence.temperature)
    kept = whole.compact()
    assert (kept.ids_NK.dtype, kept.log_p_NK.dtype, kept.log_rest_N.dtype) == (
        *(torch.int32, torch.float16, torch.float16),
    )
    assert torch.equal(kept.ids_NK.long(), whole.ids_NK)
    torch.testing.assert_close(
        kept.loss(divergence, student_NV), whole.loss(divergence, student_NV), rtol=1e-3, atol=1e-4
    )
    assert kept.loss(divergence, sure_NV).abs().max() < 1e-6


def test_ids_that_fit_are_kept_in_16_bits(pair: Tensor) -> None:
    kept = TopK.of(pair[0], 4).compact()
    assert kept.ids_NK.dtype == torch.uint16
    assert sum(tensor.nbytes for tensor in vars(kept).values()) == POSITIONS * (4 * (2 + 2) + 2)


def test_a_token_is_forward_kl_from_a_teacher_who_is_sure_of_it(pair: Tensor) -> None:
    student_NV = pair[1]
    ids_N = torch.arange(POSITIONS)
    sure_NV = 1e3 * torch.nn.functional.one_hot(ids_N, VOCABULARY).double()
    torch.testing.assert_close(Tokens(ids_N).loss(Divergence(), student_NV), forward_kl(sure_NV, student_NV))


@every_divergence
def test_a_token_is_the_same_for_every_divergence(divergence: Divergence, pair: Tensor) -> None:
    target = Tokens(torch.arange(POSITIONS))
    assert torch.equal(target.loss(divergence, pair[1]), target.loss(Divergence(), pair[1]))


@pytest.fixture(params=["hidden", "top k", "tokens"])
def target(request: pytest.FixtureRequest, draw: torch.Generator) -> Target:
    teacher = Hidden(
        torch.randn(POSITIONS, 5, generator=draw), Head(torch.randn(VOCABULARY, 5, generator=draw))
    )
    kinds = {
        "hidden": teacher,
        "top k": TopK.of(teacher.logits(), 4, tail=False),
        "tokens": Tokens(torch.arange(POSITIONS)),
    }
    return kinds[request.param]


@pytest.mark.parametrize("size", [1, 4, 100])
def test_split_and_joined_a_target_is_the_same(size: int, target: Target, draw: torch.Generator) -> None:
    student_NV = torch.randn(POSITIONS, VOCABULARY, generator=draw)
    parts = target.split(size)
    expected = target.loss(Divergence(), student_NV)
    by_parts = [
        part.loss(Divergence(), rows) for part, rows in zip(parts, student_NV.split(size), strict=True)
    ]
    torch.testing.assert_close(torch.cat(by_parts), expected)
    torch.testing.assert_close(join(parts, student_NV).loss(Divergence(), student_NV), expected)


def test_joined_hidden_states_and_their_head_take_the_dtype_of_the_student() -> None:
    hidden = Hidden(torch.randn(3, 5), Head(torch.randn(7, 5)))
    joined = join([hidden, hidden], torch.zeros(1, dtype=torch.bfloat16))
    assert (joined.hidden_ND.dtype, joined.head.weight_VD.dtype) == (torch.bfloat16, torch.bfloat16)
    assert joined.hidden_ND.shape == (6, 5)


def test_joined_log_probabilities_keep_their_dtype(pair: Tensor) -> None:
    joined = join([TopK.of(pair[0].float(), 4)], torch.zeros(1, dtype=torch.bfloat16))
    assert joined.log_p_NK.dtype == torch.float32
