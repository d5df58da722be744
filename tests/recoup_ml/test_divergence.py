"""Divergences: zero on equal distributions, never negative, the plain formula, and their limits."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from recoup_ml.divergence import between, forward_kl, jsd, reverse_kl, skew_kl
from recoup_ml.objective import Divergence

POSITIONS, VOCABULARY = 37, 53

every_divergence = pytest.mark.parametrize(
    "divergence",
    [
        Divergence("forward_kl"),
        Divergence("reverse_kl"),
        Divergence("jsd"),
        Divergence("jsd", beta=0.1),
        Divergence("skew_kl", beta=0.1),
        Divergence("skew_kl", beta=0.9),
        Divergence("forward_kl", temperature=2.0),
        Divergence("jsd", temperature=0.5),
    ],
    ids=str,
)


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def pair(draw: torch.Generator) -> Tensor:
    """Logits of a teacher and of a student, float64."""
    return 3 * torch.randn(2, POSITIONS, VOCABULARY, generator=draw, dtype=torch.float64)


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a / b).log()).sum(-1)


PLAIN: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "forward_kl": lambda p, q, _: kl(p, q),
    "reverse_kl": lambda p, q, _: kl(q, p),
    "jsd": lambda p, q, beta: (
        beta * kl(p, beta * p + (1 - beta) * q) + (1 - beta) * kl(q, beta * p + (1 - beta) * q)
    ),
    "skew_kl": lambda p, q, beta: kl(p, beta * p + (1 - beta) * q),
}
"""The formulas on probabilities in float64, without a logarithm of a softmax."""


def plain(divergence: Divergence, teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
    p, q = (logits_NV.double().div(divergence.temperature).exp() for logits_NV in (teacher_NV, student_NV))
    return PLAIN[divergence.name](p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True), divergence.beta)


@every_divergence
@pytest.mark.parametrize("scale", [1.0, 20.0, 1e4])
def test_equal_logits_have_no_divergence(divergence: Divergence, scale: float, draw: torch.Generator) -> None:
    logits_NV = scale * torch.randn(POSITIONS, VOCABULARY, generator=draw)
    assert between(divergence, logits_NV, logits_NV).abs().max() < 1e-6


@every_divergence
@pytest.mark.parametrize("distance", [1e-3, 1e-1, 1.0, 30.0])
def test_different_logits_have_some(divergence: Divergence, distance: float, draw: torch.Generator) -> None:
    teacher_NV = 3 * torch.randn(2000, VOCABULARY, generator=draw, dtype=torch.float64)
    student_NV = teacher_NV + distance * torch.randn(2000, VOCABULARY, generator=draw, dtype=torch.float64)
    assert (between(divergence, teacher_NV, student_NV) > 0).all()


@every_divergence
def test_it_is_the_plain_formula(divergence: Divergence, pair: Tensor) -> None:
    torch.testing.assert_close(between(divergence, *pair), plain(divergence, *pair))


@every_divergence
def test_float32_is_close_to_the_plain_formula(divergence: Divergence, pair: Tensor) -> None:
    torch.testing.assert_close(
        between(divergence, *pair.float()).double(), plain(divergence, *pair), rtol=1e-5, atol=1e-6
    )


@every_divergence
def test_a_constant_added_to_all_logits_changes_nothing(divergence: Divergence, pair: Tensor) -> None:
    teacher_NV, student_NV = pair
    torch.testing.assert_close(
        between(divergence, teacher_NV + 7, student_NV - 3), between(divergence, teacher_NV, student_NV)
    )


@every_divergence
def test_its_gradient_is_that_of_finite_differences(divergence: Divergence, pair: Tensor) -> None:
    teacher_NV, student_NV = pair[:, :4, :7]
    assert torch.autograd.gradcheck(
        partial(between, divergence), (teacher_NV, student_NV.clone().requires_grad_())
    )


@every_divergence
def test_extreme_logits_give_finite_values_and_gradients(divergence: Divergence) -> None:
    teacher_NV = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0], [1e4, 0.0, -1e4]])
    student_NV = torch.tensor([[-1e4, 0.0, 1e4], [1e4, 0.0, -1e4], [0.0, 0.0, 0.0]], requires_grad=True)
    values_N = between(divergence, teacher_NV, student_NV)
    values_N.sum().backward()
    assert torch.isfinite(values_N).all()
    assert (values_N > 0).all()
    assert torch.isfinite(student_NV.grad).all()


@every_divergence
def test_logits_of_another_shape_are_refused(divergence: Divergence) -> None:
    with pytest.raises(AssertionError):
        between(divergence, torch.zeros(2, 3), torch.zeros(2, 4))


def test_forward_kl_is_not_symmetric_and_the_teacher_weighs() -> None:
    sure, unsure = torch.tensor([[9.0, 0.0, 0.0]]), torch.zeros(1, 3)
    assert forward_kl(unsure, sure) > 4 * forward_kl(sure, unsure)


def test_reverse_kl_is_forward_kl_with_roles_exchanged(pair: Tensor) -> None:
    teacher_NV, student_NV = pair
    assert torch.equal(reverse_kl(teacher_NV, student_NV, 2.0), forward_kl(student_NV, teacher_NV, 2.0))


def test_jsd_over_beta_tends_to_forward_kl(pair: Tensor) -> None:
    torch.testing.assert_close(jsd(*pair, beta=1e-9) / 1e-9, forward_kl(*pair), rtol=1e-4, atol=1e-4)


def test_jsd_over_one_minus_beta_tends_to_reverse_kl(pair: Tensor) -> None:
    torch.testing.assert_close(jsd(*pair, beta=1 - 1e-9) / 1e-9, reverse_kl(*pair), rtol=1e-4, atol=1e-4)


def test_jsd_vanishes_towards_its_ends_and_jumps_to_the_kls_at_them(pair: Tensor) -> None:
    assert jsd(*pair, beta=1e-9).max() < 1e-6 < forward_kl(*pair).min()
    assert torch.equal(jsd(*pair, beta=0.0), forward_kl(*pair))
    assert torch.equal(jsd(*pair, beta=1.0), reverse_kl(*pair))


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_jsd_with_roles_and_shares_exchanged_is_the_same(beta: float, pair: Tensor) -> None:
    teacher_NV, student_NV = pair
    torch.testing.assert_close(jsd(teacher_NV, student_NV, beta), jsd(student_NV, teacher_NV, 1 - beta))


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_distributions_that_do_not_meet_are_as_far_as_the_mixtures_allow(beta: float) -> None:
    teacher_NV, student_NV = torch.tensor([[1e3, 0.0]]), torch.tensor([[0.0, 1e3]])
    entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert float(jsd(teacher_NV, student_NV, beta)) == pytest.approx(entropy)
    assert float(skew_kl(teacher_NV, student_NV, beta)) == pytest.approx(-math.log(beta))


def test_skew_kl_tends_to_forward_kl_and_is_it_at_zero(pair: Tensor) -> None:
    torch.testing.assert_close(skew_kl(*pair, beta=1e-12), forward_kl(*pair))
    assert torch.equal(skew_kl(*pair, beta=0.0), forward_kl(*pair))


@pytest.mark.parametrize(
    "divergence", [Divergence("skew_kl", beta=1.0), Divergence("jsd", beta=-0.1), Divergence("jsd", beta=1.1)]
)
def test_shares_that_give_no_divergence_are_refused(divergence: Divergence, pair: Tensor) -> None:
    with pytest.raises(AssertionError):
        between(divergence, *pair)


def test_its_name_tells_what_matters_to_it() -> None:
    assert str(Divergence("forward_kl", beta=0.3)) == "forward_kl"
    assert str(Divergence("jsd", beta=0.3, temperature=2.0)) == "jsd with β = 0.3 at τ = 2"
