"""Forward KL: zero on equal distributions, the plain formula elsewhere, the same gradient in chunks."""

import pytest
import torch
from torch import Tensor

from recoup_ml.divergence import forward_kl, hidden_forward_kl
from recoup_ml.models import Head

POSITIONS, WIDTH, VOCABULARY = 37, 16, 53


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def plain_kl(teacher_NV: Tensor, student_NV: Tensor, temperature: float) -> Tensor:
    """Σ p log(p / q) from probabilities in float64, without log_softmax."""
    p = (teacher_NV.double() / temperature).exp()
    q = (student_NV.double() / temperature).exp()
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    return (p * (p / q).log()).sum(-1)


def test_equal_logits_have_no_divergence(draw: torch.Generator) -> None:
    logits_NV = 5 * torch.randn(POSITIONS, VOCABULARY, generator=draw)
    assert (forward_kl(logits_NV, logits_NV) == 0).all()


def test_a_constant_added_to_all_logits_changes_nothing(draw: torch.Generator) -> None:
    teacher_NV, student_NV = torch.randn(2, POSITIONS, VOCABULARY, generator=draw, dtype=torch.float64)
    torch.testing.assert_close(forward_kl(teacher_NV + 7, student_NV - 3), forward_kl(teacher_NV, student_NV))


@pytest.mark.parametrize("distance", [1e-3, 1e-1, 1.0, 30.0])
def test_a_divergence_is_never_negative(distance: float, draw: torch.Generator) -> None:
    teacher_NV = 3 * torch.randn(2000, VOCABULARY, generator=draw, dtype=torch.float64)
    student_NV = teacher_NV + distance * torch.randn(2000, VOCABULARY, generator=draw, dtype=torch.float64)
    assert (forward_kl(teacher_NV, student_NV) > 0).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 10.0])
def test_it_is_the_plain_formula(temperature: float, draw: torch.Generator) -> None:
    teacher_NV, student_NV = 3 * torch.randn(2, POSITIONS, VOCABULARY, generator=draw, dtype=torch.float64)
    torch.testing.assert_close(
        forward_kl(teacher_NV, student_NV, temperature), plain_kl(teacher_NV, student_NV, temperature)
    )


def test_it_is_not_symmetric_and_the_teacher_weighs(draw: torch.Generator) -> None:
    sure, unsure = torch.tensor([[9.0, 0.0, 0.0]]), torch.zeros(1, 3)
    torch.testing.assert_close(forward_kl(sure, unsure), plain_kl(sure, unsure, 1.0).float())
    assert forward_kl(unsure, sure) > 4 * forward_kl(sure, unsure)


def test_extreme_logits_give_finite_values() -> None:
    teacher_NV = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]])
    student_NV = torch.tensor([[-1e4, 0.0, 1e4], [1e4, 0.0, -1e4]])
    assert torch.isfinite(forward_kl(teacher_NV, student_NV)).all()


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises(AssertionError):
        forward_kl(torch.zeros(2, 3), torch.zeros(2, 4))


class Sides:
    """Hidden states and heads of a teacher and a student, in float32 so that a head can be used as it is."""

    def __init__(self, draw: torch.Generator, softcap: float | None) -> None:
        self.teacher_ND, self.student_ND = torch.randn(2, POSITIONS, WIDTH, generator=draw)
        weights = torch.randn(2, VOCABULARY, WIDTH, generator=draw)
        biases = torch.randn(2, VOCABULARY, generator=draw)
        self.teacher_head, self.student_head = (
            Head(weight, bias, softcap)
            for weight, bias in zip(weights.unbind(), biases.unbind(), strict=True)
        )
        self.leaves = [self.student_ND, self.student_head.weight_VD, self.student_head.bias_V]
        for leaf in self.leaves:
            leaf.requires_grad_()

    def logits(self) -> tuple[Tensor, Tensor]:
        return self.teacher_head(self.teacher_ND), self.student_head(self.student_ND)

    def hidden_kl(self, chunk: int, temperature: float = 1.0) -> Tensor:
        return hidden_forward_kl(
            self.teacher_ND, self.teacher_head, self.student_ND, self.student_head, temperature, chunk
        )


@pytest.fixture(params=[None, 5.0], ids=["linear head", "soft cap"])
def sides(request: pytest.FixtureRequest, draw: torch.Generator) -> Sides:
    return Sides(draw, request.param)


@pytest.mark.parametrize("chunk", [1, 7, 36, 37, 256])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_from_hidden_states_it_is_the_same_whatever_the_chunk(
    chunk: int, temperature: float, sides: Sides
) -> None:
    torch.testing.assert_close(sides.hidden_kl(chunk, temperature), forward_kl(*sides.logits(), temperature))


@pytest.mark.parametrize("chunk", [1, 7, 37, 256])
def test_its_gradient_is_that_of_the_plain_formula(chunk: int, sides: Sides) -> None:
    weight_N = torch.linspace(0.1, 1.0, POSITIONS)
    expected = torch.autograd.grad((plain_kl(*sides.logits(), 2.0) * weight_N).sum(), sides.leaves)
    found = torch.autograd.grad((sides.hidden_kl(chunk, 2.0) * weight_N).sum(), sides.leaves)
    for right, ours in zip(expected, found, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)


def test_the_teacher_gets_no_gradient(sides: Sides) -> None:
    sides.hidden_kl(8).sum().backward()
    assert sides.teacher_ND.grad is None
    assert sides.teacher_head.weight_VD.grad is None
