"""What tests on a GPU share: every one is skipped, and says so, where there is none.

`RECOUP_TEST_DEVICE=cpu` runs those that can on a CPU, to try the tests themselves.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
TRIED_ON_CPU = os.environ.get("RECOUP_TEST_DEVICE") == "cpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available() and not TRIED_ON_CPU:
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if TRIED_ON_CPU else "cuda")


@pytest.fixture
def memory() -> Callable[[], int]:
    """`memory()`: the most bytes that tensors have held since it was asked last."""

    def peak() -> int:
        if not torch.cuda.is_available():
            pytest.skip("memory is counted on a CUDA device only")
        torch.cuda.synchronize()
        found = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return found

    return peak


@pytest.fixture(scope="session")
def half() -> Callable[[Path], Path]:
    """`half(folder)`: a copy of that model in bfloat16, as most are published; a packed one as it is."""

    def copy(folder: Path) -> Path:
        config = json.loads((folder / "config.json").read_text())
        copied = folder.with_name(f"{folder.name}-bfloat16")
        if "quantization_config" in config:
            return folder
        if not copied.exists():
            copied.mkdir()
            for path in folder.iterdir():
                if path.suffix == ".safetensors":
                    tensors = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
                    save_file(tensors, copied / path.name, {"format": "pt"})
                elif path.name == "config.json":
                    (copied / path.name).write_text(json.dumps(config | {"dtype": "bfloat16"}))
                else:
                    (copied / path.name).write_bytes(path.read_bytes())
        return copied

    return copy
