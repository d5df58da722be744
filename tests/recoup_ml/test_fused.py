"""A divergence from hidden states: the plain formula and its gradient, without the plain formula's memory."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from recoup_ml.divergence import between
from recoup_ml.fused import hidden_divergence
from recoup_ml.models import Head
from recoup_ml.objective import Divergence
from recoup_ml.targets import Hidden, Target, Tokens, TopK, join

POSITIONS, WIDTH, VOCABULARY = 37, 6, 31
WEIGHTS_N = torch.linspace(0.0, 1.0, POSITIONS, dtype=torch.float64)


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@dataclass
class Student:
    hidden_ND: Tensor
    head: Head

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden_ND, self.head.weight_VD, self.head.bias_V]


@pytest.fixture(params=[(None, 1.0), (4.0, 1.0), (4.0, 0.25)], ids=["linear head", "soft cap", "scale"])
def student(request: pytest.FixtureRequest, draw: torch.Generator) -> Student:
    shapes = (POSITIONS, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,)
    leaves = [torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes]
    return Student(leaves[0], Head(*leaves[1:], *request.param))


def _teacher(draw: torch.Generator) -> Hidden:
    hidden_ND = torch.randn(POSITIONS, WIDTH, generator=draw, dtype=torch.float64)
    weight_VD = torch.randn(VOCABULARY, WIDTH, generator=draw, dtype=torch.float64)
    return Hidden(hidden_ND, Head(weight_VD))


def _observed(draw: torch.Generator) -> Hidden:
    weight_VD = torch.randn(VOCABULARY, WIDTH, generator=draw)
    return Hidden(torch.randn(POSITIONS, WIDTH, generator=draw), Head(weight_VD))


TARGETS: dict[str, Callable[[Hidden], Target]] = {
    "hidden": lambda teacher: teacher,
    "top k": lambda teacher: TopK.of(teacher.logits(), 5),
    "top k without tail": lambda teacher: TopK.of(teacher.logits(), 5, tail=False),
    "tokens": lambda teacher: Tokens(teacher.logits().argmax(-1)),
}


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, draw: torch.Generator) -> Target:
    return TARGETS[request.param](_teacher(draw))


every_divergence = pytest.mark.parametrize(
    "divergence",
    [
        Divergence("forward_kl"),
        Divergence("forward_kl", temperature=2.0),
        Divergence("reverse_kl"),
        Divergence("jsd", temperature=0.5),
        Divergence("skew_kl", beta=0.1),
    ],
    ids=str,
)


@every_divergence
@pytest.mark.parametrize("chunk", [1, 7, 37, 256])
def test_value_and_gradients_are_those_of_the_plain_formula(
    divergence: Divergence, chunk: int, target: Target, student: Student
) -> None:
    plain = (target.loss(divergence, student.head(student.hidden_ND)) * WEIGHTS_N).sum()
    fused = hidden_divergence(student.hidden_ND, student.head, target, divergence, WEIGHTS_N, chunk)
    torch.testing.assert_close(fused, plain)
    expected = torch.autograd.grad(plain, student.leaves)
    found = torch.autograd.grad(fused, student.leaves)
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right)


@every_divergence
def test_gradients_are_those_of_finite_differences(
    divergence: Divergence, target: Target, student: Student
) -> None:
    def fused(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor) -> Tensor:
        head = replace(student.head, weight_VD=weight_VD, bias_V=bias_V)
        return hidden_divergence(hidden_ND, head, target, divergence, WEIGHTS_N, 8)

    assert torch.autograd.gradcheck(fused, student.leaves, fast_mode=True)


def test_positions_of_weight_zero_count_nowhere(target: Target, student: Student) -> None:
    weights_N = (torch.arange(POSITIONS) % 3 > 0).double()
    elsewhere_ND = student.hidden_ND.detach().clone()
    elsewhere_ND[weights_N == 0] *= -5
    elsewhere_ND.requires_grad_()
    losses = [
        hidden_divergence(hidden_ND, student.head, target, Divergence("reverse_kl"), weights_N, 8)
        for hidden_ND in (student.hidden_ND, elsewhere_ND)
    ]
    torch.testing.assert_close(*losses)
    (first_ND, *first), (second_ND, *second) = (
        torch.autograd.grad(loss, [hidden_ND, *student.leaves[1:]])
        for loss, hidden_ND in zip(losses, (student.hidden_ND, elsewhere_ND), strict=True)
    )
    assert (first_ND[weights_N == 0] == 0).all()
    torch.testing.assert_close(first_ND, second_ND)
    torch.testing.assert_close(first, second)


def test_what_comes_after_it_scales_its_gradient(target: Target, student: Student) -> None:
    loss = hidden_divergence(student.hidden_ND, student.head, target, Divergence(), WEIGHTS_N, 8)
    once = torch.autograd.grad(loss, student.leaves, retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, student.leaves)
    torch.testing.assert_close(thrice, tuple(3 * grad for grad in once))


def test_the_teacher_gets_no_gradient(student: Student, draw: torch.Generator) -> None:
    teacher = _teacher(draw)
    teacher.hidden_ND.requires_grad_()
    teacher.head.weight_VD.requires_grad_()
    for divergence in (Divergence(), Divergence("reverse_kl")):
        hidden_divergence(student.hidden_ND, student.head, teacher, divergence, WEIGHTS_N).backward()
    assert teacher.hidden_ND.grad is None
    assert teacher.head.weight_VD.grad is None


@pytest.mark.parametrize("make", TARGETS.values(), ids=TARGETS)
@every_divergence
def test_what_a_teacher_left_in_inference_mode_can_be_learnt_from(
    make: Callable[[Hidden], Target], divergence: Divergence, student: Student, draw: torch.Generator
) -> None:
    with torch.inference_mode():
        left = make(_observed(draw))
    hidden_ND = student.hidden_ND.detach().float().requires_grad_()
    hidden_divergence(
        hidden_ND, Head(torch.ones(VOCABULARY, WIDTH)), join([left], hidden_ND), divergence, WEIGHTS_N
    ).backward()
    assert torch.isfinite(hidden_ND.grad).all()


def test_a_frozen_head_gets_no_gradient(target: Target, student: Student) -> None:
    for leaf in student.leaves[1:]:
        leaf.requires_grad_(False)
    hidden_divergence(student.hidden_ND, student.head, target, Divergence(), WEIGHTS_N).backward()
    assert student.hidden_ND.grad is not None
    assert student.head.weight_VD.grad is None


@pytest.mark.parametrize("softcap", [None, 30.0])
@every_divergence
def test_bfloat16_hidden_states_get_bfloat16_gradients(
    divergence: Divergence, softcap: float | None, draw: torch.Generator
) -> None:
    hidden_ND = torch.randn(POSITIONS, WIDTH, generator=draw).bfloat16().requires_grad_()
    weight_VD = torch.randn(VOCABULARY, WIDTH, generator=draw).bfloat16().requires_grad_()
    teacher = Hidden(hidden_ND.detach() + 1, Head(weight_VD.detach()))
    loss = hidden_divergence(
        hidden_ND, Head(weight_VD, None, softcap), teacher, divergence, WEIGHTS_N.float(), 8
    )
    loss.backward()
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden_ND, weight_VD)]
    plain_NV = between(divergence, teacher.logits().double(), Head(exact[1], None, softcap)(exact[0]))
    (plain_NV * WEIGHTS_N).sum().backward()
    assert loss.dtype == torch.float32
    for ours, right in zip((hidden_ND, weight_VD), exact, strict=True):
        assert ours.grad.dtype == torch.bfloat16
        torch.testing.assert_close(
            ours.grad.double(), right.grad, rtol=0.1, atol=0.02 * float(right.grad.abs().max())
        )


def test_a_target_of_other_length_is_refused(student: Student, target: Target) -> None:
    shorter = target.split(POSITIONS - 1)[0]
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        hidden_divergence(student.hidden_ND, student.head, shorter, Divergence(), WEIGHTS_N)


class Watch(TorchDispatchMode):
    """Sees every tensor that is made and every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple | list) else [out]
        self.largest = max(self.largest, *(one.numel() for one in made if isinstance(one, Tensor)), 0)
        self.products += func.overloadpacket in {
            torch.ops.aten.mm,
            torch.ops.aten.addmm,
            torch.ops.aten.addmm_,
        }
        return out


@every_divergence
def test_positions_by_vocabulary_is_never_held_whole(
    divergence: Divergence, target: Target, student: Student
) -> None:
    with Watch() as watch:
        hidden_divergence(student.hidden_ND, student.head, target, divergence, WEIGHTS_N, 8).backward()
    assert watch.largest == 8 * VOCABULARY


@pytest.mark.parametrize("head_trains", [True, False])
def test_each_head_is_multiplied_with_once_a_direction(
    head_trains: bool, student: Student, draw: torch.Generator
) -> None:
    student.head.weight_VD.requires_grad_(head_trains)
    chunks = POSITIONS
    with Watch() as forward:
        loss = hidden_divergence(student.hidden_ND, student.head, _teacher(draw), Divergence(), WEIGHTS_N, 1)
    with Watch() as backward:
        loss.backward()
    assert forward.products == (3 + head_trains) * chunks
    assert backward.products == 0
