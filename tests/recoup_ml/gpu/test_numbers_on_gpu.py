"""What a GPU computes against the plain float64 formula on the CPU, and what memory it takes for it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from recoup_ml import cka, hsic, models
from recoup_ml.divergence import between
from recoup_ml.fused import hidden_divergence
from recoup_ml.hidden import capture
from recoup_ml.lessons import distributions
from recoup_ml.models import Head
from recoup_ml.objective import Divergence
from recoup_ml.observation import observe
from recoup_ml.plan import Trainable
from recoup_ml.room import Shape, free_bytes, room_for
from recoup_ml.scores import compare
from recoup_ml.sequences import Answered, batches, packs
from recoup_ml.targets import Hidden, Tokens, TopK
from recoup_ml.trainable import prepare
from recoup_ml.training import learn

VOCABULARY, WIDTH, POSITIONS = 151_936, 128, 48
DIVERGENCES = [
    Divergence("forward_kl"),
    Divergence("reverse_kl", temperature=2.0),
    Divergence("jsd", beta=0.3),
    Divergence("skew_kl", beta=0.1),
]


def drawn(positions: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(student's states, its head, the teacher's states, its head); logits of a few nats."""
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(positions, WIDTH, generator=draw)
    weight = 0.2 * torch.randn(VOCABULARY, WIDTH, generator=draw)
    noise = 0.2 * torch.randn(positions, WIDTH, generator=draw)
    other = weight + 0.02 * torch.randn(VOCABULARY, WIDTH, generator=draw)
    return tuple(tensor.to(dtype).to(device) for tensor in (states + noise, other, states, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["hidden", "top k", "tokens"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_the_fused_loss_is_the_plain_formula(
    divergence: Divergence, kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    if kind == "tokens" and divergence.name != "forward_kl":
        pytest.skip("a divergence means nothing to tokens")
    student, weight, theirs, their_weight = drawn(POSITIONS, dtype, device)
    weights_N = torch.linspace(0.0, 1.0, POSITIONS) / POSITIONS
    exact = [tensor.double().cpu().requires_grad_() for tensor in (student, weight)]
    there = Hidden(theirs, Head(their_weight))
    exact_there = Hidden(theirs.double().cpu(), Head(their_weight.double().cpu()))
    target, exact_target = {
        "hidden": (there, exact_there),
        "top k": tuple(TopK.of(own.logits(), 64, divergence.temperature) for own in (there, exact_there)),
        "tokens": tuple(Tokens(own.logits().argmax(-1)) for own in (exact_there, exact_there)),
    }[kind]
    if kind == "tokens":
        target = Tokens(exact_target.ids_N.to(device))
    expected = (exact_target.loss(divergence, exact[0] @ exact[1].T) * weights_N).sum()
    expected.backward()
    leaves = [tensor.detach().requires_grad_() for tensor in (student, weight)]
    found = hidden_divergence(leaves[0], Head(leaves[1]), target, divergence, weights_N.to(device), chunk=20)
    found.backward()
    rough = dtype == torch.bfloat16
    assert found.item() == pytest.approx(expected.item(), rel=2e-3 if rough else 1e-4)
    for leaf, other in zip(leaves, exact, strict=True):
        apart = (leaf.grad.double().cpu() - other.grad).norm() / other.grad.norm()
        assert leaf.grad.dtype == dtype
        assert float(apart) < (1.5e-2 if rough else 1e-4)


def test_half_precision_hides_no_small_divergence(device: torch.device) -> None:
    """Logits rounded to bfloat16 would add about a thousandth of a nat to every divergence."""
    student, weight, theirs, _ = drawn(POSITIONS, torch.bfloat16, device)
    near = (theirs.float() + 0.01 * (student.float() - theirs.float())).bfloat16()
    with torch.no_grad():
        found = between(DIVERGENCES[0], Head(weight)(theirs), Head(weight)(near)).mean()
    logits = [(states.double() @ weight.double().T).cpu() for states in (theirs, near)]
    expected = between(DIVERGENCES[0], *logits).mean()
    assert float(found) == pytest.approx(float(expected), rel=0.02)


def test_the_fused_losss_memory_does_not_grow_with_positions(
    device: torch.device, memory: Callable[[], int]
) -> None:
    peaks = []
    for positions in (2048, 8192):
        student, weight, theirs, their_weight = drawn(positions, torch.bfloat16, device)
        student.requires_grad_()
        held = torch.cuda.memory_allocated()
        memory()
        weights_N = torch.full((positions,), 1 / positions, device=device)
        target = Hidden(theirs, Head(their_weight))
        hidden_divergence(student, Head(weight), target, DIVERGENCES[0], weights_N, chunk=512).backward()
        peaks.append(memory() - held)
    assert peaks[1] - peaks[0] < 64 << 20
    assert peaks[1] < 8 * 4 * 512 * VOCABULARY


@pytest.fixture
def pair(make_model: Callable[..., LlamaForCausalLM], device: torch.device) -> tuple[PreTrainedModel, ...]:
    """A student and its teacher, in float32."""
    teacher, student = (make_model(layers=3, hidden_size=64).eval().to(device) for _ in range(2))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_((0.05 * torch.randn(weight.shape, generator=draw)).to(device))
    return student, teacher


def texts(batches_: int) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(3)
    found = []
    for _ in range(batches_):
        ids = torch.randint(3, 128, (8, 32), generator=draw)
        lengths = torch.randint(16, 33, (8, 1), generator=draw)
        found.append({"input_ids": ids, "attention_mask": (torch.arange(32) < lengths).long()})
    return found


@pytest.mark.parametrize("pooled", [False, True], ids=["tokens", "texts"])
def test_cka_in_one_stream_is_that_of_the_cpu_in_float64(
    pooled: bool, pair: tuple[PreTrainedModel, ...]
) -> None:
    found = cka.align(*pair, texts(24), pooled=pooled, pilot=64)
    exact = cka.align(*(model.cpu().double() for model in pair), texts(24), pooled=pooled, pilot=64)
    assert found.positions_sha256 == exact.positions_sha256
    assert abs(found.matrix - exact.matrix).max() < 1e-5
    for mine, theirs in zip(found.diagonal, exact.diagonal, strict=True):
        assert abs(mine.value - theirs.value) < 2 * theirs.se + 1e-6


def test_cka_in_one_stream_agrees_with_the_estimate_over_all_groups(
    pair: tuple[PreTrainedModel, ...],
) -> None:
    """An independent formula, all states held at once, on the same tokens."""
    student, teacher = pair
    found = cka.align(student, teacher, texts(24), pilot=192, tokens=64, controls=False)
    states: list[list[Tensor]] = []
    for model in pair:
        with capture(model) as seen, torch.inference_mode():
            for batch in texts(24):
                there = batch["attention_mask"].bool().to(model.device)
                there[:, 0] = False
                seen.positions_BT = there
                ids = batch["input_ids"].to(model.device)
                models.last_hidden(model, ids, batch["attention_mask"].to(model.device))
        states.append(seen.states())
    lengths = torch.cat([batch["attention_mask"].sum(1) - 1 for batch in texts(24)])
    groups_N = torch.arange(len(lengths)).remainder(16).repeat_interleave(lengths)
    exact = hsic.matrix(hsic.products(*states, groups_N))
    for layer, own in enumerate(found.diagonal):
        assert abs(own.value - exact[layer, layer]) < 2 * own.se + 1e-3


def test_comparing_leaves_no_hook_and_no_memory_behind(
    pair: tuple[PreTrainedModel, ...], memory: Callable[[], int]
) -> None:
    peaks = []
    for count in (8, 64):
        torch.cuda.empty_cache()
        memory()
        cka.align(*pair, texts(count), pilot=32)
        peaks.append(memory())
    assert peaks[1] < 1.05 * peaks[0] + (1 << 20)
    for model in pair:
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.fixture
def model(teacher: Path, half: Callable[[Path], Path]) -> PreTrainedModel:
    """The tiny teacher as a GPU loads it, in bfloat16."""
    return models.load(half(teacher)).bfloat16()


def test_rows_that_are_packed_and_rows_that_are_padded_teach_the_same(
    model: PreTrainedModel, answered: list[Answered]
) -> None:
    assert models.can_pack(model)
    lesson = distributions(answered[:16], observe(model, answered[:16], 0), None, 1.0)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            weight.mul_(1 + 0.3 * torch.randn_like(weight))
    found = []
    for pieces in (packs(lesson.answers, 128), batches(lesson.answers, 0, 128)):
        loss = learn(model, lesson, Divergence(), pieces)
        found.append((loss, torch.cat([weight.grad.flatten().float() for weight in model.parameters()])))
        model.zero_grad()
    assert found[0][0] == pytest.approx(found[1][0], rel=2e-2)
    assert float((found[0][1] - found[1][1]).norm() / found[1][1].norm()) < 0.05


def test_halving_the_tokens_at_once_changes_rounding_alone(
    model: PreTrainedModel, answered: list[Answered]
) -> None:
    lesson = distributions(answered[:16], observe(model, answered[:16], 0), None, 1.0)
    plan = Trainable("full", False, 8, 16, "all-linear", False)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            weight.mul_(1 + 0.3 * torch.randn_like(weight))
    trainee = prepare(model, plan, [])
    found = []
    for tokens in (1024, 256, 64):
        learn(model, lesson, Divergence(), packs(lesson.answers, tokens))
        found.append(torch.cat([weight.grad.flatten() for weight in trainee.parameters]))
        for weight in trainee.parameters:
            weight.grad = None
    for other in found[1:]:
        assert float((other - found[0]).norm() / found[0].norm()) < 0.05


def test_out_of_memory_says_so_and_fewer_tokens_have_room(
    model: PreTrainedModel, device: torch.device
) -> None:
    if device.type != "cuda":
        pytest.skip("a GPU's memory is what runs out")
    from recoup_jobs.failures import OUT_OF_MEMORY, TOLD_BY

    shape = Shape.of(model)
    before = free_bytes(model.device)
    assert room_for(before, shape, 0).tokens >= room_for(before // 64, shape, 0).tokens
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(0.02)
    try:
        with pytest.raises(torch.OutOfMemoryError) as told:
            torch.empty(total // 8, dtype=torch.uint8, device=device)
        assert TOLD_BY[OUT_OF_MEMORY].search(f"{type(told.value).__name__}: {told.value}")
        torch.empty(total // 200, dtype=torch.uint8, device=device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    models.release()


def test_a_model_that_was_let_go_leaves_the_gpu(
    teacher: Path, half: Callable[[Path], Path], answered: list[Answered], memory: Callable[[], int]
) -> None:
    models.release()
    held = torch.cuda.memory_allocated()
    loaded = models.load(half(teacher))
    seen = observe(loaded, answered, 0)
    compare(seen, seen, answered)
    del loaded, seen
    models.release()
    assert torch.cuda.memory_allocated() - held < 1 << 20


@pytest.mark.parametrize("name", ["reverse_kl", "jsd"])
def test_liger_finds_the_same_divergence(name: str, device: torch.device) -> None:
    """Liger's own kernels, which know equal weights and whole distributions alone."""
    if device.type != "cuda":
        pytest.skip("Liger's kernels are a GPU's")
    pytest.importorskip("liger_kernel")
    from liger_kernel.transformers.functional import liger_jsd

    student, weight, theirs, their_weight = drawn(64, torch.float32, device)
    beta = {"reverse_kl": 1.0, "jsd": 0.3}[name]
    divergence = Divergence("jsd", beta=0.3) if name == "jsd" else Divergence("reverse_kl")
    log_q, log_p = (
        (states @ head.T).log_softmax(-1) for states, head in ((student, weight), (theirs, their_weight))
    )
    expected = liger_jsd(log_q, log_p, None, beta)
    weights_N = torch.full((64,), 1 / 64, device=device)
    found = hidden_divergence(
        student, Head(weight), Hidden(theirs, Head(their_weight)), divergence, weights_N
    )
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)
