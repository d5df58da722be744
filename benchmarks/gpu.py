"""What this project's steps take on one GPU, in seconds and bytes, beside what its code expects of them.

    python benchmarks/gpu.py memory        of a training step, by tokens; what `room.py` and a dry run say
    python benchmarks/gpu.py training      useful tokens a second, and what would make them more
    python benchmarks/gpu.py divergence    the fused loss beside Liger's and the formula on whole logits
    python benchmarks/gpu.py alignment     what CKA costs beside the forward passes, and its error
    python benchmarks/gpu.py generation    tokens a second of the local engine
    python benchmarks/gpu.py all --out gpu.json

`--only` names models (0.5B, 1.7B, 8B); `--tiny` runs everything small, on whatever there is. Models are
Llamas with random weights in bfloat16, made on the device: speed and memory do not ask what weights say.
`divergence` compares with liger-kernel where it is installed. On an H100 all of it takes minutes.
"""

import argparse
import gc
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from distil import work
from measuring import on_gpu, settle
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from recoup.schemas import CreateRecovery, Message, Prompt
from recoup_jobs import estimate
from recoup_ml import cka, fused, generate, hsic, models, room
from recoup_ml.divergence import Divergence, forward_kl
from recoup_ml.fused import hidden_divergence
from recoup_ml.hsic_sums import Batch, batch_sums
from recoup_ml.lessons import FixedCourse, Lesson, distributions
from recoup_ml.models import Head
from recoup_ml.observation import Observation
from recoup_ml.paired_states import Chosen, choose, read
from recoup_ml.plan import Phase, Plan, Trainable
from recoup_ml.sequences import Answered, Encoded, packs
from recoup_ml.targets import Hidden, Target, Tokens, TopK
from recoup_ml.trainable import Trainee, prepare
from recoup_ml.training import Training, Watchers, learn

GIB = 1 << 30
RANK, ROW = 16, 512
"""Tokens of a row, a quarter of them the prompt's, where all are alike."""
FORWARD_KL = Divergence("forward_kl", 0.5, 1.0)
LEAST_TRIED, MOST_TRIED = 1024, 16_384
Found = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """Of a Llama."""

    width: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    tied: bool

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
            max_position_embeddings=32_768,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )


SIZES = {
    "0.5B": Size(896, 4864, 24, 14, 2, 151_936, True),
    "1.7B": Size(2048, 6144, 28, 16, 8, 151_936, True),
    "8B": Size(4096, 14_336, 32, 32, 8, 128_256, False),
}
TINY = {"0.5B": Size(32, 64, 2, 2, 1, 512, True), "8B": Size(64, 128, 3, 4, 2, 768, False)}


@dataclass(frozen=True)
class Asked:
    sizes: dict[str, Size]
    tiny: bool

    def pick(self, large: Any, tiny: Any) -> Any:
        return tiny if self.tiny else large


def device() -> torch.device:
    return models.device()


def held() -> int:
    return torch.cuda.memory_allocated() if on_gpu() else 0


def timed(run: Callable[[], Any]) -> tuple[float, int]:
    """Seconds, and bytes that were taken at most beyond what was held before; no bytes of a CPU."""
    settle()
    before = held()
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    run()
    settle()
    seconds = time.perf_counter() - began
    return seconds, (torch.cuda.max_memory_allocated() - before if on_gpu() else 0)


def median_of(run: Callable[[], Any], times: int = 3) -> tuple[float, int]:
    """Seconds and bytes, after one run that does not count."""
    run()
    found = [timed(run) for _ in range(times)]
    return median(seconds for seconds, _ in found), max(taken for _, taken in found)


def make(size: Size, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    models.release()
    with torch.device(device()):
        model = LlamaForCausalLM._from_config(size.config(), dtype=torch.bfloat16)
    return model.eval()


def matrix_rate(asked: Asked) -> float:
    """FLOP a second of a large product in bfloat16; the best of three tries."""
    side, times = asked.pick(8192, 64), asked.pick(100, 2)
    a, b = (torch.randn(side, side, device=device(), dtype=torch.bfloat16) for _ in range(2))
    a @ b

    def run() -> None:
        for _ in range(times):
            a @ b

    return max(times * 2 * side**3 / timed(run)[0] for _ in range(3))


def row(prompt: int, answer: int, vocabulary: int, draw: random.Random) -> Answered:
    ids = [draw.randrange(3, vocabulary) for _ in range(prompt + answer)]
    return Answered("", "", tuple(ids[:prompt]), "", tuple(ids[prompt:]), "length")


def lesson_of(model: PreTrainedModel, answers: Sequence[Answered], *, head_there: bool = False) -> Lesson:
    """As a stage leaves it: hidden states and head on the CPU, unless the head is to be on the device."""
    draw = torch.Generator().manual_seed(0)
    width = model.config.hidden_size
    hidden = [torch.randn(len(item.answer_ids), width, generator=draw).bfloat16() for item in answers]
    head = models.head(model).detached()
    if not head_there:
        head = head.like(torch.empty(0, dtype=torch.bfloat16))
    return distributions(answers, Observation(hidden, head, []), None, 1.0)


def plan_of(steps: int, batch_size: int) -> Plan:
    return Plan(
        damage="finetuning",
        method="off_policy",
        phases=(Phase("teacher", steps, 1e-4),),
        divergence=FORWARD_KL,
        top_k=None,
        trainable=Trainable("lora", False, RANK, 2 * RANK, "all-linear", False),
        batch_size=batch_size,
        start="student",
        output="adapter",
        choices=(),
    )


def trainee_of(student: PreTrainedModel) -> Trainee:
    trainable = plan_of(1, 1).trainable
    return prepare(student, trainable, [0.0] * student.config.num_hidden_layers)


def table(head: Sequence[str]) -> None:
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head), flush=True)


def line(*cells: Any) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def recomputing(student: PreTrainedModel, on: bool) -> None:
    """Gradient checkpointing of decoder blocks, as transformers has it."""
    if on:
        student.activation_checkpointing_enable()
    else:
        student.activation_checkpointing_disable()


def half_adapters(student: PreTrainedModel) -> AbstractContextManager[None]:
    """Adapters stay float32, and their products are taken in bfloat16."""
    from peft.helpers import disable_input_dtype_casting

    ends = ExitStack()
    ends.enter_context(disable_input_dtype_casting(student))
    ends.enter_context(torch.autocast(device().type, torch.bfloat16, cache_enabled=False))
    return ends


def memory(asked: Asked) -> Found:
    print("\nmemory: forward and backward pass of one pack, LoRA of rank 16, forward KL on cached states.")
    print("Above weights, adapters and their gradients; the teacher's head comes from the CPU each time.")
    found: Found = {}
    for name, size in asked.sizes.items():
        found[name] = memory_of(name, size, asked)
        models.release()
    found["load"] = loading(asked)
    return found


def memory_of(name: str, size: Size, asked: Asked) -> Found:
    student = make(size)
    weights = held()
    trainee = trainee_of(student)
    trained = sum(weight.numel() for weight in trainee.parameters)
    shape = room.Shape.of(student)
    at_once = room.room_for(room.free_bytes(device()), shape, trained).tokens
    each = room.ACTIVATIONS * shape.number_bytes * shape.hidden * shape.layers
    head = 4 * room.HEAD_COPIES * fused.CHUNK["cuda"] * shape.vocabulary
    print(f"\n{name}: weights {gib(weights)} GiB, {trained:,} trained parameters; {at_once:,} tokens at once")
    print(f"room.py: {each:,} bytes a token and {gib(head)} GiB for the head")
    found: Found = {"weights": weights, "trained": trained, "at_once": at_once, "each": each, "head": head}
    found["dry_run"] = dry_run(student, at_once)
    forms: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "as it is": nullcontext,
        "adapters in bfloat16": lambda: half_adapters(student),
        "recomputing": nullcontext,
        "recomputing, adapters in bfloat16": lambda: half_adapters(student),
    }
    draw = random.Random(0)
    rows = asked.pick(MOST_TRIED, LEAST_TRIED) // ROW
    answers = [row(ROW // 4, ROW - ROW // 4, size.vocabulary, draw) for _ in range(rows)]
    lesson = lesson_of(student, answers)
    table(["form", "tokens", "bytes a token more than before", "GiB", "room.py, GiB", "seconds", "tokens/s"])
    for form, inside in forms.items():
        recomputing(student, form.startswith("recomputing"))
        with inside():
            found[form] = by_tokens(student, form, lesson, (each, head))
    return found


def by_tokens(student: PreTrainedModel, form: str, lesson: Lesson, expected: tuple[int, int]) -> list[Found]:
    """By powers of two, until memory runs out. The first pass is not told: it makes the gradients."""
    student.train()
    found: list[Found] = []
    tokens = LEAST_TRIED
    one_pack(student, lesson, tokens)
    while tokens <= ROW * len(lesson.answers):
        said = expected[0] * tokens + expected[1]
        try:
            seconds, taken = timed(lambda tokens=tokens: one_pack(student, lesson, tokens))
        except torch.OutOfMemoryError:
            line(form, f"{tokens:,}", "", "out of memory", gib(said), "", "")
            break
        finally:
            models.release()
        slope = (taken - found[-1]["bytes"]) / (tokens - found[-1]["tokens"]) if found else math.nan
        cells = gib(taken), gib(said), f"{seconds:.3f}", f"{tokens / seconds:,.0f}"
        line(form, f"{tokens:,}", f"{slope:,.0f}", *cells)
        found.append({"tokens": tokens, "bytes": taken, "seconds": seconds})
        tokens *= 2
    student.zero_grad(set_to_none=True)
    return found


def one_pack(student: PreTrainedModel, lesson: Lesson, tokens: int) -> None:
    part = lesson.rows(range(tokens // ROW))
    learn(student, part, FORWARD_KL, packs(part.answers, tokens))


def dry_run(student: PreTrainedModel, at_once: int) -> Found:
    """What a request's dry run would say of memory on an 80 GB GPU, and what it counts of."""
    config, shape = student.config, room.Shape.of(student)
    plain = {
        name.replace(".base_layer", ""): w for name, w in student.named_parameters() if "lora" not in name
    }
    linear = [w.shape for name, w in plain.items() if w.dim() == 2 and estimate._is_linear(name)]
    sizes = estimate.Sizes(
        parameters=sum(w.numel() for w in plain.values()),
        stored_bytes=sum(2 * w.numel() for w in plain.values()),
        edges=sum(map(sum, linear)),
        vectors=sum(w.numel() for w in plain.values() if w.dim() == 1),
        hidden=shape.hidden,
        layers=config.num_hidden_layers,
        vocabulary=shape.vocabulary,
    )
    request = CreateRecovery.model_validate(
        {"student": {"source": "student"}, "teacher": {"source": "teacher"}}
    )
    machine = estimate.machine_of("gpu.1x80g")
    amounts = estimate.Amounts(rows=512, prompt_tokens=128)
    need = estimate.need_of(request, plan_of(64, 8), sizes, sizes, amounts, machine)
    training = sizes.loaded_bytes(machine) + estimate.OPTIMIZER_BYTES * RANK * sizes.edges
    logits = 4 * estimate.FORMS_OF_LOSS * machine.logit_rows * sizes.vocabulary
    tokens, each = estimate.micro_batch(2 * sizes.hidden, sizes.layers, training + logits, machine)
    print(
        f"a dry run for 80 GB: {gib(need.memory_bytes)} GiB, of it weights and optimizer {gib(training)}, "
        f"activations of {tokens:,} tokens {gib(tokens * each + logits)} (room.py here: {at_once:,} tokens)"
    )
    return {
        "memory": need.memory_bytes,
        "held": training,
        "tokens": tokens,
        "activations": tokens * each + logits,
    }


def loading(asked: Asked) -> Found:
    """`models.load` of the middle model, from a folder."""
    name = [*asked.sizes][len(asked.sizes) // 2]
    with tempfile.TemporaryDirectory() as folder:
        make(asked.sizes[name]).save_pretrained(folder)
        gc.collect()
        models.release()
        kept: list[PreTrainedModel] = []
        seconds, peak = timed(lambda: kept.append(models.load(Path(folder))))
        stored = sum(weight.numel() * weight.element_size() for weight in kept[0].parameters())
    print(f"\nmodels.load, {name}: {gib(stored)} GiB of weights, {gib(peak)} GiB at most, {seconds:.1f} s")
    return {"model": name, "weights": stored, "peak": peak, "seconds": seconds}


def training(asked: Asked) -> Found:
    rate = matrix_rate(asked)
    print(
        "\ntraining: `Training.run`, rows of 96 to 768 tokens, answers two thirds of them; useful tokens are"
    )
    print("the answers'. FLOP: 2 (2 P tokens + 3 H answers), P the linear layers' weights, H the head's.")
    print(f"Matrix products of bfloat16 reach {rate / 1e12:.1f} TFLOP/s here.")
    found: Found = {"rate": rate}
    head = [
        "model",
        "rows a step",
        "form",
        "pieces' tokens",
        "useful tokens/s",
        "tokens/s",
        "of the rate",
        "GiB",
    ]
    table(head)
    for name, size in asked.sizes.items():
        found[name] = training_of(name, size, rate, asked)
        models.release()
    return found


def training_of(name: str, size: Size, rate: float, asked: Asked) -> Found:
    student = make(size)
    trainee = trainee_of(student)
    found: Found = {}
    for rows in asked.pick((8, 32), (2,)):
        draw = random.Random(0)
        lengths = [draw.randrange(96, 769) for _ in range(rows)]
        answers = [row(length // 3, length - length // 3, size.vocabulary, draw) for length in lengths]
        course = FixedCourse(lesson_of(student, answers), rows, 0)
        near = FixedCourse(lesson_of(student, answers, head_there=True), rows, 0)
        forms: dict[str, tuple[FixedCourse, Callable[[], AbstractContextManager[None]], bool, bool]] = {
            "as it is": (course, nullcontext, False, True),
            "head on the device": (near, nullcontext, False, True),
            "and adapters in bfloat16": (near, lambda: half_adapters(student), False, True),
            "and recomputing": (near, lambda: half_adapters(student), True, True),
            "rows padded, not packed": (near, nullcontext, False, False),
        }
        for form, (lessons, inside, again, packed) in forms.items():
            recomputing(student, again)
            with inside():
                step = Step(trainee, rows, lessons, again, packed)
                seconds, taken = step.measure(asked.pick(3, 1))
            recomputing(student, False)
            useful, total = sum(len(item.answer_ids) for item in answers), sum(map(len, answers))
            share = work(student, answers, beside=False) / seconds / rate
            cells = (f"{useful / seconds:,.0f}", f"{total / seconds:,.0f}", f"{share:.1%}", gib(taken))
            line(name, rows, form, f"{step.tokens:,}", *cells)
            found[f"{rows} rows, {form}"] = {
                "seconds": seconds,
                "useful": useful,
                "tokens": total,
                "share": share,
            }
    found["packs"] = models.can_pack(student.eval())
    print(f"    sequences may lie in one row: {found['packs']}; where a step's time goes, {name} as it is:")
    found["ops"] = where_time_goes(Step(trainee, rows, course, False, True))
    return found


class Step:
    """One optimizer step after another, by the product's own loop."""

    def __init__(self, trainee: Trainee, rows: int, course: FixedCourse, again: bool, packed: bool) -> None:
        watchers = Watchers(lambda _model: math.nan, 0.0, lambda _point: None)
        self._rows, self._course = rows, course
        self._training = Training(trainee, plan_of(1, rows), 0, watchers, 1.0, False, Path("unused"))
        self._training._packs = packed
        if again:
            self._training._tokens_at_once = lambda: room.MOST_TOKENS  # type: ignore[method-assign]
        self.tokens = self._training._tokens_at_once()

    def run(self, steps: int) -> None:
        self._training.run(Phase("teacher", steps, 1e-5), self._course)

    def measure(self, steps: int) -> tuple[float, int]:
        """Seconds of a step, and what it took above weights."""
        self.run(1)
        seconds, taken = timed(lambda: self.run(steps))
        return seconds / steps, taken


def where_time_goes(step: Step) -> list[Found]:
    from torch.profiler import ProfilerActivity, profile

    step.run(1)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu() else [])]
    with profile(activities=kinds) as seen:
        step.run(1)
        settle()
    name = "self_device_time_total" if on_gpu() else "self_cpu_time_total"
    ops = sorted(seen.key_averages(), key=lambda op: -getattr(op, name))
    total = sum(getattr(op, name) for op in ops) or 1
    found = [
        {"op": op.key, "share": getattr(op, name) / total, "ms": getattr(op, name) / 1e3, "calls": op.count}
        for op in ops[:25]
    ]
    for op in found[:12]:
        print(f"    {op['share']:6.1%} {op['ms']:9.2f} ms {op['calls']:6} × {op['op'][:90]}", flush=True)
    return found


def divergence(asked: Asked) -> Found:
    print("\ndivergence: forward and backward pass, the student's head frozen; seconds (median of 3) and GiB")
    print("beyond what was there. Error: of the hidden states' gradient, relative to float32, at N = 512.")
    if not has_liger():
        print("liger-kernel is left out: it is not installed, or there is no GPU for its kernels.")
    found: Found = {}
    table(["D", "V", "N", "what", "ms", "GiB", "error"])
    for width, vocabulary in asked.pick(((2048, 151_936), (4096, 128_256)), ((32, 512),)):
        given = Given.make(width, vocabulary, asked.pick(16_384, 1024))
        for what, run in given.contenders().items():
            error = given.error(what)
            for positions in counts(what, asked):
                sample = given.first(positions)
                seconds, taken = median_of(lambda run=run, sample=sample: run(sample))
                cells = f"{1e3 * seconds:.1f}", gib(taken), f"{error:.1e}"
                line(width, f"{vocabulary:,}", f"{positions:,}", what, *cells)
                measured = {"seconds": seconds, "bytes": taken, "error": error}
                found[f"{width} {vocabulary} {positions} {what}"] = measured
                models.release()
    return found


def counts(what: str, asked: Asked) -> tuple[int, ...]:
    """Positions: whole logits have room for few; of forward KL both numbers are told."""
    if asked.tiny:
        return (1024,)
    if "whole" in what:
        return (4096,)
    return (4096, 16_384) if what.startswith("forward KL") else (16_384,)


def has_liger() -> bool:
    return on_gpu() and find_spec("liger_kernel") is not None


@dataclass(frozen=True)
class Given:
    """What every contender is given: hidden states and heads of both models, and tokens."""

    student_ND: Tensor
    student_VD: Tensor
    teacher_ND: Tensor
    teacher_VD: Tensor
    ids_N: Tensor
    tops: dict[int, TopK] = field(default_factory=dict)
    """Of so many positions, once made."""

    @staticmethod
    def make(width: int, vocabulary: int, positions: int) -> "Given":
        """Logits of a deviation of two, and models that resemble each other."""
        torch.manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device(), dtype=torch.bfloat16)

        head_VD = 2 * normal(vocabulary, width) / width**0.5
        hidden_ND = normal(positions, width)
        return Given(
            hidden_ND + 0.3 * normal(positions, width),
            head_VD + 0.1 * normal(vocabulary, width) / width**0.5,
            hidden_ND,
            head_VD,
            torch.randint(0, vocabulary, (positions,), device=device()),
        )

    def first(self, positions: int) -> "Given":
        rows = (self.student_ND[:positions], self.teacher_ND[:positions], self.ids_N[:positions])
        return replace(self, student_ND=rows[0], teacher_ND=rows[1], ids_N=rows[2])

    def contenders(self) -> dict[str, Callable[["Given"], Tensor]]:
        """Each gives the gradient of the mean divergence by the student's hidden states."""
        chunks = 512, 1024, 2048, 4096, 8192
        jsd = Divergence("jsd", 0.5, 1.0)
        found: dict[str, Callable[[Given], Tensor]] = {
            f"forward KL, ours, chunks of {chunk}": lambda given, chunk=chunk: ours(
                given, Hidden(given.teacher_ND, Head(given.teacher_VD)), FORWARD_KL, chunk
            )
            for chunk in chunks
        }
        found["forward KL, whole logits"] = whole_logits
        for chunk in (1024, 4096):
            found[f"JSD 0.5, ours, chunks of {chunk}"] = lambda given, chunk=chunk: ours(
                given, Hidden(given.teacher_ND, Head(given.teacher_VD)), jsd, chunk
            )
            found[f"top 64, ours, chunks of {chunk}"] = lambda given, chunk=chunk: ours(
                given, top_64(given), FORWARD_KL, chunk
            )
            found[f"cross-entropy, ours, chunks of {chunk}"] = lambda given, chunk=chunk: ours(
                given, Tokens(given.ids_N), FORWARD_KL, chunk
            )
        return found | (liger() if has_liger() else {})

    def error(self, what: str) -> float:
        """Of the gradient over 512 positions, to the same contender's objective on float32 logits."""
        few = self.first(512)
        rounded = "student_ND", "student_VD", "teacher_ND", "teacher_VD"
        exact = replace(few, **{name: getattr(few, name).float() for name in rounded})
        name = what.split(",", maxsplit=1)[0]
        targets: dict[str, tuple[Target, Divergence]] = {
            "forward KL": (Hidden(exact.teacher_ND, Head(exact.teacher_VD)), FORWARD_KL),
            "JSD 0.5": (Hidden(exact.teacher_ND, Head(exact.teacher_VD)), Divergence("jsd", 0.5, 1.0)),
            "top 64": (top_64(few), FORWARD_KL),
            "cross-entropy": (Tokens(exact.ids_N), FORWARD_KL),
        }
        expected = ours(exact, *targets[name], 512)
        got = self.contenders()[what](few).float()
        return float((got - expected).norm() / expected.norm())


def top_64(given: Given) -> TopK:
    """Made once for these positions, as a teacher's stage would."""
    key, kept = len(given.ids_N), given.tops
    if key not in kept:
        head = Head(given.teacher_VD)
        tops = [TopK.of(head(part), 64) for part in given.teacher_ND.split(512)]
        kept[key] = TopK(*(torch.cat([getattr(top, name) for top in tops]) for name in vars(tops[0])))
    return kept[key]


def ours(given: Given, target: Target, measure: Divergence, chunk: int) -> Tensor:
    leaf_ND = given.student_ND.detach().requires_grad_()
    weights_N = torch.full((len(leaf_ND),), 1 / len(leaf_ND), device=leaf_ND.device)
    hidden_divergence(leaf_ND, Head(given.student_VD), target, measure, weights_N, chunk).backward()
    return gradient(leaf_ND)


def whole_logits(given: Given) -> Tensor:
    leaf_ND = given.student_ND.detach().requires_grad_()
    with torch.no_grad():
        teacher_NV = Head(given.teacher_VD)(given.teacher_ND)
    forward_kl(teacher_NV, Head(given.student_VD)(leaf_ND)).mean().backward()
    return gradient(leaf_ND)


def liger() -> dict[str, Callable[[Given], Tensor]]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

    def triton_jsd(given: Given, beta: float) -> Tensor:
        leaf_ND = given.student_ND.detach().requires_grad_()
        loss = LigerFusedLinearJSD(jsd_beta=beta)
        loss(leaf_ND, given.student_VD, given.teacher_ND, given.teacher_VD, None).backward()
        return gradient(leaf_ND)

    def chunked_jsd(given: Given, beta: float) -> Tensor:
        """Not compiled, which takes minutes; it makes the head's gradient though nobody asks for it."""
        leaf_ND = given.student_ND.detach().requires_grad_()
        loss = LigerFusedLinearJSDLoss(0.0, 1.0, beta=beta, compiled=False, chunk_size=1024)
        loss(leaf_ND, given.student_VD, given.teacher_ND, given.teacher_VD, given.ids_N).backward()
        return gradient(leaf_ND)

    def cross_entropy(given: Given) -> Tensor:
        leaf_ND = given.student_ND.detach().requires_grad_()
        LigerFusedLinearCrossEntropyLoss()(given.student_VD, leaf_ND, given.ids_N).backward()
        return gradient(leaf_ND)

    return {
        "forward KL, Liger's fused JSD": lambda given: triton_jsd(given, 0.0),
        "JSD 0.5, Liger's fused JSD": lambda given: triton_jsd(given, 0.5),
        "forward KL, Liger's chunked JSD": lambda given: chunked_jsd(given, 0.0),
        "JSD 0.5, Liger's chunked JSD": lambda given: chunked_jsd(given, 0.5),
        "cross-entropy, Liger's": cross_entropy,
    }


def gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def alignment(asked: Asked) -> Found:
    print("\nalignment: `cka.align` without controls, 8 texts of 512 tokens a batch, 32 read of each, beside")
    print("the same forward passes of both models with nothing read.")
    found: Found = {"error": cka_error(asked)}
    chosen = {name: size for name, size in asked.sizes.items() if name != "1.7B"}
    for name, size in chosen.items():
        student, teacher = make(size, 0), make(size, 1)
        found[name] = cka_cost(name, student, teacher, asked)
        del student, teacher
        models.release()
    return found


def cka_cost(name: str, student: PreTrainedModel, teacher: PreTrainedModel, asked: Asked) -> Found:
    texts, length, count = 8, asked.pick(512, 16), 6
    draw = torch.Generator().manual_seed(0)
    size = student.config.vocab_size
    batches = [{"input_ids": torch.randint(3, size, (texts, length), generator=draw)} for _ in range(count)]
    pilot = 2 * texts
    twice = [*batches[:2], *batches]
    chosen: list[Chosen] = [choose(batch, 32, draw) for batch in twice]

    def forward() -> None:
        with torch.inference_mode():
            for batch in chosen:
                for model in (student, teacher):
                    models.last_hidden(model, batch.ids_BT.to(device()), batch.mask_BT.long().to(device()))

    def reading() -> None:
        for batch in chosen:
            for model in (student, teacher):
                read(model, batch)

    def align() -> None:
        cka.align(student, teacher, batches, tokens=32, pilot=pilot, controls=False)

    bare, captured, (whole, taken) = (median_of(run, 1) for run in (forward, reading, align))
    layers = student.config.num_hidden_layers + 1
    print(
        f"{name}, {layers}×{layers} layers of {student.config.hidden_size}: forward passes {bare[0]:.2f} s, "
        f"with what is read {captured[0]:.2f} s, all of it {whole:.2f} s: "
        f"measuring costs {whole / bare[0] - 1:.1%}; {gib(taken)} GiB",
        flush=True,
    )
    return {"forward": bare[0], "reading": captured[0], "align": whole, "bytes": taken}


def cka_error(asked: Asked) -> Found:
    """`batch_sums` here against the same sums in float64 on the CPU."""
    layers, rows, width = asked.pick((12, 2048, 896), (3, 256, 16))
    draw = torch.Generator().manual_seed(0)
    shared = torch.randn(rows, width, generator=draw)
    x, y = (
        [layer / layers * torch.randn(rows, width, generator=draw) + shared for layer in range(layers)]
        for _ in range(2)
    )

    def matrix(change: Callable[[Tensor], Tensor]) -> Any:
        sums = None
        for at in range(0, rows, 256):
            mine, theirs = ([change(layer[at : at + 256]) for layer in side] for side in (x, y))
            where = mine[0].device
            batch = Batch(
                mine, theirs, torch.arange(256, device=where), torch.ones(256, dtype=torch.bool, device=where)
            )
            found = batch_sums(batch, [(0, 0)], at // 256, 32)
            sums = found if sums is None else sums + found
        assert sums is not None
        return hsic.matrix(sums.products())

    exact, here = matrix(Tensor.double), matrix(lambda part: part.to(device()))
    largest = float(abs(here - exact).max())
    print(f"largest error of {layers}×{layers} values against float64: {largest:.1e}")
    return {"largest": largest, "values": exact.size}


def generation(asked: Asked) -> Found:
    name, size = next(iter(asked.sizes.items()))
    model, new = make(size), asked.pick(96, 4)
    draw = random.Random(0)
    prompt = Prompt(messages=[Message(role="user", content="-")])
    engine = generate.LocalEngine(model, tokenizer())
    print(f"\ngeneration: LocalEngine, {name}, greedy, {new} new tokens after prompts of 64 to 128.")
    found: Found = {"model": name, "new": new}
    table(["sequences at once", "seconds", "tokens/s"])
    usual = generate.BATCH
    for batch in asked.pick((64, 256), (4,)):
        generate.BATCH = batch
        items = [
            Encoded(prompt, tuple(draw.randrange(3, size.vocabulary) for _ in range(draw.randrange(64, 129))))
            for _ in range(batch)
        ]
        engine.answer(items, 2, lambda _done: None)
        answers: list[Answered] = []

        def answer(items: list[Encoded] = items, kept: list[Answered] = answers) -> None:
            kept += engine.answer(items, new, lambda _done: None)

        seconds, taken = timed(answer)
        tokens = sum(len(item.answer_ids) for item in answers)
        line(batch, f"{seconds:.2f}", f"{tokens / seconds:,.0f}")
        found[str(batch)] = {"seconds": seconds, "tokens": tokens, "bytes": taken}
    generate.BATCH = usual
    return found


def tokenizer() -> Any:
    """Of a few words: what is answered is random."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


PARTS: dict[str, Callable[[Asked], Found]] = {
    "memory": memory,
    "training": training,
    "divergence": divergence,
    "alignment": alignment,
    "generation": generation,
}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", nargs="+", choices=[*PARTS, "all"])
    parser.add_argument("--only", nargs="+", choices=[*SIZES], help="these models; all by default")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, help="where everything that was measured is written, as JSON")
    chosen = parser.parse_args(words)
    sizes = TINY if chosen.tiny else SIZES
    asked = Asked({name: size for name, size in sizes.items() if name in (chosen.only or sizes)}, chosen.tiny)
    print(torch.cuda.get_device_name() if on_gpu() else "no GPU", f"torch {torch.__version__}", flush=True)
    found: Found = {}
    for what in PARTS if "all" in chosen.what else chosen.what:
        began = time.perf_counter()
        found[what] = PARTS[what](asked)
        print(f"{what}: {time.perf_counter() - began:.1f} s", flush=True)
        models.release()
        if chosen.out:
            chosen.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    main()
