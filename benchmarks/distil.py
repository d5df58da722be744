"""How fast a student learns from its teacher's distributions, beside TRL's trainers.

    python benchmarks/distil.py speed     useful tokens a second, long and short answers mixed, and equal ones
    python benchmarks/distil.py memory    above the weights, at two sizes of the vocabulary
    python benchmarks/distil.py rollouts  on the student's own answers: DistillationTrainer and `on_policy`
    python benchmarks/distil.py agree     loss and gradients of one batch, Recoup's and TRL's
    python benchmarks/distil.py answers   makes benchmarks/answers.jsonl anew

Needs `pip install trl==1.16.0` beside Recoup's own packages. Every contender trains the same LoRA
adapter of SmolLM2-135M in float32 on the same answers, eight a step, by forward KL on the whole
distribution (TRL: GKDTrainer with lmbda=0, beta=0, its length grouping on), in a process of its
own; contenders take turns. On a GPU it is bfloat16, and memory is the GPU's; `--random` makes a
teacher of random weights, with a tokenizer learnt from the answers, where there is no model.
Useful tokens are those of the answers: prompts and padding are work, not progress. The limit is
what the machine's matrix products would take for the student's and the heads' alone, at the speed
they reach in the same run.

With rollouts the student itself answers the same prompts, at most 64 tokens at temperature 1, before it
learns: TRL eight of them before each step, Recoup those of one step or, its default, of four at once.
"""

import argparse
import json
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from measuring import memory, on_gpu, settle

ANSWERS = Path(__file__).with_name("answers.jsonl")
CONTENDERS = ("trl", "beside", "cached", "top64")
ROLLED: dict[str, int | None] = {"trl_rollouts": None, "rollouts_1": 1, "rollouts_4": 4}
"""On the student's own answers, and for how many steps at once it gives them."""
ROLLED_TOKENS = 64
BATCH, RANK, RATE = 8, 16, 5e-4
EQUAL_TOKENS, EQUAL_ROWS = 128, 48
VOCABULARIES = 49_152, 151_936
LAYERS_FOR_MEMORY = 6


@dataclass(frozen=True)
class Measured:
    tokens: int
    seconds: float
    weights_mib: float
    peak_mib: float
    """Of the process while it trained."""
    flop: float
    """What the student's linear layers and the heads need, from the shapes."""

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


def answered(home: Path, kind: str) -> list[Any]:
    """The answers as token ids, `Answered`."""
    from dataclasses import replace

    from recoup.schemas import Message, Prompt
    from recoup_ml import models
    from recoup_ml.sequences import encode, with_answer

    tokenizer = models.load_tokenizer(home / "teacher")
    given = [
        Prompt(messages=[Message(role="user", content=row["prompt"])], completion=row["answer"])
        for row in map(json.loads, ANSWERS.read_text("utf-8").splitlines())
    ]
    items = [with_answer(item, tokenizer, 1024) for item in encode(given, tokenizer, 1024)]
    if kind == "mixed":
        return items
    long = [item for item in items if len(item) >= EQUAL_TOKENS]
    return [
        replace(item, answer_ids=item.answer_ids[: EQUAL_TOKENS - len(item.prompt_ids)])
        for item in long[:EQUAL_ROWS]
    ]


def load(home: Path, vocabulary: int | None) -> Any:
    """SmolLM2-135M, or fewer of its layers with random weights and a vocabulary of that size."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from recoup_ml import models

    if vocabulary is None:
        return models.load(home / "teacher")
    config = AutoConfig.from_pretrained(home / "teacher")
    config.vocab_size, config.num_hidden_layers = vocabulary, LAYERS_FOR_MEMORY
    torch.manual_seed(0)
    dtype = torch.bfloat16 if on_gpu() else torch.float32
    return AutoModelForCausalLM.from_config(config, dtype=dtype).to(models.device()).eval()


def adapter() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")


def train_recoup(contender: str, home: Path, kind: str, vocabulary: int | None) -> Measured:
    from recoup_ml import models
    from recoup_ml.lessons import FixedCourse, Lesson, distributions
    from recoup_ml.observation import observe

    given = answered(home, kind)
    teacher = load(home, vocabulary)
    top_k = 64 if contender == "top64" else None
    if contender == "beside":
        lesson = Lesson(given, given)

        class Beside(FixedCourse):
            def next(self) -> Lesson:
                chosen = super().next().answers
                return distributions(chosen, observe(teacher, chosen, 0), None, 1.0)

        course = Beside(lesson, BATCH, 0)
    else:
        course = FixedCourse(distributions(given, observe(teacher, given, 0), top_k, 1.0), BATCH, 0)
        del teacher
    models.release()
    training = training_of(load(home, vocabulary), "teacher", len(given) // BATCH, top_k)
    seconds, used = clocked(lambda: training.run(training.plan.phases[0], course))
    tokens, student = sum(len(item.answer_ids) for item in given), training.trainee.model
    return Measured(tokens, seconds, used[0], max(used), work(student, given, beside=contender == "beside"))


def clocked(train: Callable[[], object]) -> tuple[float, list[float]]:
    """Seconds that it took, and the memory of the process meanwhile, MiB, at first as it was before."""
    with memory(gpu=on_gpu()) as used:
        began = time.perf_counter()
        train()
        settle()
        return time.perf_counter() - began, used


def training_of(student: Any, data: Any, steps: int, top_k: int | None) -> Any:
    """A `Training` of the student that validates nothing."""
    import math

    from recoup_ml.divergence import Divergence
    from recoup_ml.plan import Phase, Plan, Trainable
    from recoup_ml.trainable import prepare
    from recoup_ml.training import Training, Watchers

    trainable = Trainable("lora", False, RANK, 2 * RANK, "all-linear", False)
    plan = Plan(
        damage="finetuning",
        method="on_policy" if data == "student" else "off_policy",
        phases=(Phase(data, steps, RATE),),
        divergence=Divergence("forward_kl", 0.5, 1.0),
        top_k=top_k,
        trainable=trainable,
        batch_size=BATCH,
        start="student",
        output="adapter",
        choices=(),
    )
    trainee = prepare(student, trainable, [0.0] * student.config.num_hidden_layers, 0, None)
    watchers = Watchers(lambda _model: math.nan, 0.0, lambda _point: None)
    return Training(trainee, plan, 0, watchers, 1.0, False, Path("unused"))


def train_on_rollouts(home: Path, refresh: int) -> Measured:
    from contextlib import ExitStack

    from recoup.schemas import CreateRecovery
    from recoup_ml import models
    from recoup_ml.rollouts import Room, rollouts
    from recoup_ml.run import Run
    from recoup_ml.sequences import encode
    from recoup_ml.team import ALONE

    teacher = home / "teacher"
    asked = {"max_new_tokens": ROLLED_TOKENS, "refresh_steps": refresh}
    body = {
        "student": {"source": "teacher"},
        "teacher": {"source": "teacher"},
        "method": {"type": "on_policy", "rollouts": asked},
    }
    run = Run(
        job_id="distil",
        student=teacher,
        teacher=teacher,
        request=CreateRecovery.model_validate(body),
        prompts=questions(),
        keep=[],
        tasks=[],
        natural_text=[],
        vllm_urls=(),
    )
    training = training_of(models.load(teacher), "student", len(run.prompts) // BATCH, None)
    room = Room(run, training.plan, training.trainee, tokenizer(home), Path("unused"), ALONE)
    with ExitStack() as ends:
        course = rollouts(room, encode(run.prompts, room.tokenizer, 1024), {}, ends)
        seconds, used = clocked(lambda: training.run(training.plan.phases[0], course))
    return Measured(training.report("student", 0, 0, None).tokens, seconds, used[0], max(used), 0.0)


def train_trl_on_rollouts(home: Path) -> Measured:
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    from recoup_ml import models

    class Counting(DistillationTrainer):  # type: ignore[misc]
        useful = 0

        def _compute_loss(self, student: Any, inputs: dict[str, Any], count: Any) -> Any:
            self.useful += int(inputs["completion_mask"].sum())
            return super()._compute_loss(student, inputs, count)

    asked = questions()
    conversations = [{"prompt": [{"role": "user", "content": item.messages[0].content}]} for item in asked]
    student, teacher = models.load(home / "teacher"), models.load(home / "teacher")
    trainer = Counting(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(**alike(steps=len(asked) // BATCH), max_completion_length=ROLLED_TOKENS),
        train_dataset=Dataset.from_list(conversations),
        processing_class=tokenizer(home),
        peft_config=adapter(),
    )
    seconds, used = clocked(trainer.train)
    return Measured(trainer.useful, seconds, used[0], max(used), 0.0)


def alike(steps: int) -> dict[str, Any]:
    """What both of TRL's trainers are told: forward KL on whole distributions, nothing beside the steps."""
    return {
        "output_dir": "unused",
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATE,
        "beta": 0.0,
        "temperature": 1.0,
        "bf16": on_gpu(),
        "use_cpu": not on_gpu(),
        "gradient_checkpointing": False,
        "dataloader_num_workers": 0,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }


def questions() -> list[Any]:
    """The prompts of the committed answers."""
    from recoup.schemas import Message, Prompt

    rows = map(json.loads, ANSWERS.read_text("utf-8").splitlines())
    return [Prompt(messages=[Message(role="user", content=row["prompt"])]) for row in rows]


def train_trl(home: Path, kind: str, vocabulary: int | None) -> Measured:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    given, student, teacher = answered(home, kind), load(home, vocabulary), load(home, vocabulary)
    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=GKDConfig(
            **alike(steps=len(given) // BATCH),
            lmbda=0.0,
            train_sampling_strategy="group_by_length",
            length_column_name="length",
        ),
        train_dataset=dataset(given),
        data_collator=collate,
        processing_class=tokenizer(home),
        peft_config=adapter(),
    )
    seconds, used = clocked(trainer.train)
    tokens = sum(len(item.answer_ids) for item in given)
    return Measured(tokens, seconds, used[0], max(used), work(student, given, beside=True))


def tokenizer(home: Path) -> Any:
    from recoup_ml import models

    return models.load_tokenizer(home / "teacher")


def dataset(given: Sequence[Any]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(
        [
            {
                "input_ids": [*item.prompt_ids, *item.answer_ids],
                "labels": [-100] * len(item.prompt_ids) + [*item.answer_ids],
                "length": len(item),
            }
            for item in given
        ]
    )


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Padded to the longest of a batch, as a careful user of TRL would have it."""
    import torch

    width = max(len(item["input_ids"]) for item in items)

    def padded(key: str, fill: int) -> Any:
        return torch.tensor([item[key] + [fill] * (width - len(item[key])) for item in items])

    ids, labels = padded("input_ids", 0), padded("labels", -100)
    mask = torch.tensor(
        [[1] * len(item["input_ids"]) + [0] * (width - len(item["input_ids"])) for item in items]
    )
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def work(student: Any, given: Sequence[Any], *, beside: bool) -> float:
    """Multiply-adds times two: the student's linear layers forth and back to their inputs, the two heads."""
    from torch import nn

    inner = sum(
        module.weight.numel()
        for name, module in student.named_modules()
        if isinstance(module, nn.Linear) and "lm_head" not in name and "lora" not in name
    )
    head = student.get_output_embeddings().weight.numel()
    tokens, answers = sum(map(len, given)), sum(len(item.answer_ids) for item in given)
    return 2.0 * ((2 + beside) * inner * tokens + 3 * head * answers)


def flops() -> float:
    """Of one layer-sized matrix product, a second, all threads; the best of three tries."""
    import torch

    where = {"device": "cuda", "dtype": torch.bfloat16} if on_gpu() else {}
    x_NI, w_IO = torch.randn(512, 576, **where), torch.randn(576, 1536, **where)

    def once() -> float:
        began, times = time.perf_counter(), 300
        for _ in range(times):
            last = x_NI @ w_IO
        last.sum().item()
        return times * 2 * 512 * 576 * 1536 / (time.perf_counter() - began)

    return max(once() for _ in range(3))


def child(contender: str, home: Path, kind: str, vocabulary: int | None) -> Measured:
    if contender == "trl":
        return train_trl(home, kind, vocabulary)
    if contender in ROLLED:
        refresh = ROLLED[contender]
        return train_on_rollouts(home, refresh) if refresh else train_trl_on_rollouts(home)
    return train_recoup(contender, home, kind, vocabulary)


def measure(contender: str, kind: str, home: Path, vocabulary: int | None = None) -> Measured:
    """In a process of its own, so that its memory is its own."""
    command = [sys.executable, __file__, "child", contender, kind, str(vocabulary or 0), "--home", str(home)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Measured(**json.loads(done.stdout.strip().splitlines()[-1]))


def speed(home: Path, rounds: int) -> None:
    print(f"{platform.machine()}, {flops() / 1e9:.0f} GFLOP/s in matrix products, {rounds} rounds, medians\n")
    print("| answers | contender | useful tokens/s | × TRL | share of the limit | peak MiB | above weights |")
    print("|---|---|---|---|---|---|---|")
    for kind in ("mixed", "equal"):
        found: dict[str, list[Measured]] = {name: [] for name in CONTENDERS}
        limits = []
        for _ in range(rounds):
            for name in CONTENDERS:
                found[name].append(measure(name, kind, home))
            limits.append(flops())
        for name, runs in found.items():
            ratio = median(mine.speed / theirs.speed for mine, theirs in zip(runs, found["trl"], strict=True))
            share = median(run.flop / run.seconds / limit for run, limit in zip(runs, limits, strict=True))
            above = median(run.peak_mib - run.weights_mib for run in runs)
            cells = (
                *(kind, name, f"{median(run.speed for run in runs):.1f}", f"{ratio:.2f}", f"{share:.0%}"),
                *(f"{median(run.peak_mib for run in runs):,.0f}", f"{above:,.0f}"),
            )
            print("| " + " | ".join(cells) + " |", flush=True)


def rollout_table(home: Path, rounds: int) -> None:
    print(f"{platform.machine()}, {flops() / 1e9:.0f} GFLOP/s in matrix products, {rounds} rounds, medians\n")
    print("| contender | useful tokens | useful tokens/s | × TRL | peak MiB |")
    print("|---|---|---|---|---|")
    found: dict[str, list[Measured]] = {name: [] for name in ROLLED}
    for _ in range(rounds):
        for name, runs in found.items():
            runs.append(measure(name, "mixed", home))
    for name, runs in found.items():
        pairs = zip(runs, found["trl_rollouts"], strict=True)
        cells = (
            *(name, f"{median(run.tokens for run in runs):,.0f}"),
            f"{median(run.speed for run in runs):.1f}",
            f"{median(mine.speed / theirs.speed for mine, theirs in pairs):.2f}",
            f"{median(run.peak_mib for run in runs):,.0f}",
        )
        print("| " + " | ".join(cells) + " |", flush=True)


def memory_table(home: Path) -> None:
    print(f"{LAYERS_FOR_MEMORY} layers, random weights; MiB above the weights\n")
    print("| contender | " + " | ".join(f"V = {size:,}" for size in VOCABULARIES) + " |")
    print("|---|---|---|")
    for name in CONTENDERS:
        above = [measure(name, "equal", home, size) for size in VOCABULARIES]
        print(f"| {name} | " + " | ".join(f"{run.peak_mib - run.weights_mib:,.0f}" for run in above) + " |")


def agree(home: Path) -> None:
    """Loss and gradient of one padded batch by TRL's formula, and of the same answers packed, by Recoup's."""
    import torch
    from peft import get_peft_model
    from trl.experimental.gkd import GKDTrainer

    from recoup_ml.divergence import Divergence
    from recoup_ml.lessons import distributions
    from recoup_ml.observation import observe
    from recoup_ml.sequences import packs
    from recoup_ml.training import learn

    given = random.Random(0).sample(answered(home, "mixed"), BATCH)
    teacher, student = load(home, None), load(home, None)
    torch.manual_seed(0)
    adapted = get_peft_model(student, adapter())
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    learning = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    batch = {
        key: tensor.to(student.device)
        for key, tensor in collate([row | {} for row in dataset(given)]).items()
    }
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        theirs_BTV = teacher(**inputs).logits[:, :-1]
    theirs = GKDTrainer.generalized_jsd_loss(
        adapted(**inputs).logits[:, :-1], theirs_BTV, labels=batch["labels"][:, 1:], beta=0.0
    )
    theirs.backward()
    expected = {name: p.grad.clone() for name, p in learning.items()}
    adapted.zero_grad()
    lesson = distributions(given, observe(teacher, given, 0), None, 1.0)
    mine = learn(student, lesson, Divergence("forward_kl", 0.5, 1.0), packs(given, 512))
    apart = torch.cat([(learning[name].grad - expected[name]).flatten() for name in learning]).norm()
    size = torch.cat([grad.flatten() for grad in expected.values()]).norm()
    print(f"loss: TRL {float(theirs):.6f}, Recoup {mine:.6f} nats a token")
    print(f"gradients: relative distance {float(apart / size):.1e}")


def make_random(folder: Path) -> None:
    """A model of SmolLM2-135M's shape, and a tokenizer that cuts the answers into tokens of like number."""
    import torch
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    rows = [json.loads(line) for line in ANSWERS.read_text("utf-8").splitlines()]
    texts = [text for row in rows for text in (row["prompt"], row["answer"])]
    learnt = Tokenizer(BPE())
    learnt.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learnt.decoder = decoders.ByteLevel()
    special, alphabet = ["<pad>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    learnt.train_from_iterator(
        texts, trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=learnt, pad_token="<pad>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARIES[0],
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    dtype = torch.bfloat16 if on_gpu() else torch.float32
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)


def make_answers(home: Path) -> None:
    """The teacher's own answers of 10 to 250 tokens, greedy, to built-in prompts and to short questions."""
    from capitals import CAPITALS

    from recoup.schemas import Message, Prompt
    from recoup_ml import models, smollm
    from recoup_ml.generate import LocalEngine
    from recoup_ml.sequences import encode

    smollm.convert(home / "teacher")
    builtin = Path(__file__).parents[1] / "service/recoup_jobs/builtin/general.jsonl"
    asked = [json.loads(line)["prompt"] for line in builtin.read_text("utf-8").splitlines()]
    random.Random(0).shuffle(asked)
    asked = asked[:160] + [f"What is the capital of {land}?" for land in list(CAPITALS)[:24]]
    prompts = [Prompt(messages=[Message(role="user", content=text)]) for text in asked]
    speaker = LocalEngine(models.load(home / "teacher"), tokenizer(home))
    found = speaker.answer(encode(prompts, tokenizer(home), 200), 250, lambda done: print(done, "answered"))
    kept = [given for given in found if 10 <= len(given.answer_ids) <= 250 and given.finish == "stop"]
    kept = kept[: len(kept) - len(kept) % BATCH]
    lines = [
        json.dumps({"prompt": given.prompt, "answer": given.answer}, ensure_ascii=False) for given in kept
    ]
    ANSWERS.write_text("\n".join(lines) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("speed", "rollouts", "memory", "agree", "answers", "child"))
    parser.add_argument("child", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--home", type=Path, default=Path(".recoup/grid"), help="where the teacher is made")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--random", action="store_true", help="of the teacher's shape, not the teacher")
    chosen = parser.parse_args()
    commands: dict[str, Callable[[], None]] = {
        "speed": lambda: speed(chosen.home, chosen.rounds),
        "rollouts": lambda: rollout_table(chosen.home, chosen.rounds),
        "memory": lambda: memory_table(chosen.home),
        "agree": lambda: agree(chosen.home),
        "answers": lambda: make_answers(chosen.home),
    }
    if chosen.what == "child":
        contender, kind, vocabulary = chosen.child
        print("\n" + json.dumps(vars(child(contender, chosen.home, kind, int(vocabulary) or None))))
    else:
        from recoup_ml import smollm

        make = make_random if chosen.random else smollm.convert
        make(chosen.home / "teacher")
        commands[chosen.what]()


if __name__ == "__main__":
    main()
