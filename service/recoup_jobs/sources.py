"""Model folders, read with suspicion and without torch: where they lie, what they claim, what they hide.

A source names a folder below one of the model roots. Symbolic links may lead anywhere
below that root (a hub cache is made of them), never out of it. Only JSON and safetensors
headers are read; nothing here, and nothing that passed here, makes a loader run code that
a model brought along (CVE-2026-4372: `config.json` alone was enough).
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from recoup_jobs.errors import Unprocessable
from recoup_jobs.weights import TensorInfo, read_header

LONGEST_JSON = 100_000_000
CONFIG_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")
CODE_KEYS = frozenset({"auto_map", "custom_pipelines", "model_file"})
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
QUANTIZERS = ("bitsandbytes", "torchao", "gptq", "awq", "compressed-tensors", "fp8")
"""Methods whose packed weights transformers loads and peft trains an adapter beside.

Of these bitsandbytes (4 and 8 bits) and torchao were run, on a CPU. The others want a GPU and packages of
their own; they are let through on the word of those libraries' documentation. HQQ is not among them:
transformers 5 knows its weights by none of their names and would fill the layers with random numbers.
"""
UNSAFE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".ckpt"})


@dataclass(frozen=True)
class ModelFolder:
    """A folder below a model root; what it gives out lies below that root too."""

    root: Path
    path: Path

    def file(self, name: str) -> Path | None:
        place = (self.path / name).resolve()
        if not place.is_file():
            return None
        if not place.is_relative_to(self.root):
            raise Unprocessable("invalid_model", f"{name} leads out of the model root")
        return place

    def json(self, name: str) -> dict[str, Any] | None:
        place = self.file(name)
        if place is None:
            return None
        try:
            value = from_json(place.read_bytes()) if place.stat().st_size <= LONGEST_JSON else None
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise Unprocessable("invalid_model", f"{name} is no JSON object of at most {LONGEST_JSON} bytes")
        return value


def locate(source: str, roots: Sequence[Path]) -> ModelFolder:
    """The folder that `source` names: relative to a root, or absolute and below one."""
    for root in map(_resolved, roots):
        path = os.path.realpath(root / source)
        if path.startswith(f"{root}{os.sep}") and _is_folder(place := Path(path)):
            return ModelFolder(root, place)
    raise Unprocessable("model_not_found", f"{source} is no folder below a model root of this server")


@lru_cache(maxsize=64)
def _resolved(root: Path) -> Path:
    """Roots are the operator's own, and stay where they are while the service runs."""
    return root.resolve()


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that is too long for any folder
        return False


def model_names(roots: Sequence[Path]) -> list[str]:
    """Every `source` that names a model: folders with a config.json, up to two levels below a root."""
    found = (path.parent.relative_to(root) for root in roots for path in _configs(root))
    return sorted({str(name) for name in found})


def read_config(model: ModelFolder) -> dict[str, Any]:
    config = model.json("config.json")
    if config is None:
        raise Unprocessable("invalid_model", "the folder has no config.json; it is no transformers model")
    return config


def read_quantizer(config: dict[str, Any]) -> str | None:
    """The method that packed the weights, as the configuration names it; None where nothing did.

    Raises `unsupported_quantization` for one that nothing here can train beside.
    """
    packing = config.get("quantization_config")
    if packing is None:
        return None
    fields = packing if isinstance(packing, dict) else {}
    first_style = "bitsandbytes" if fields.keys() & {"load_in_4bit", "load_in_8bit"} else None
    method = fields.get("quant_method", first_style)
    if method not in QUANTIZERS:
        message = f"weights quantized by {str(method)[:50]} cannot be trained; use {', '.join(QUANTIZERS)}"
        raise Unprocessable("unsupported_quantization", message)
    return str(method)


def refuse_remote_code(model: ModelFolder) -> None:
    """Raises `remote_code_refused` if a configuration names code for the loader to run."""
    for name in CONFIG_FILES:
        for key in _code_keys(model.json(name)):
            message = f"{name} has {key}, which makes a loader run code from elsewhere; remove it"
            raise Unprocessable("remote_code_refused", message)


def check_weights(model: ModelFolder) -> dict[str, TensorInfo]:
    """The tensors of sound safetensors weights, whole or in shards; raises where the folder has none."""
    index = model.json(WEIGHTS_INDEX)
    if index is not None:
        return _check_shards(model, index.get("weight_map"))
    if (whole := model.file(WEIGHTS)) is not None:
        return read_header(whole)
    if unsafe := sorted(path.name for path in model.path.iterdir() if path.suffix in UNSAFE_SUFFIXES):
        message = f"{unsafe[0]} may carry code (pickle); convert the weights to safetensors"
        raise Unprocessable("unsafe_weights_format", message)
    raise Unprocessable("weights_not_found", f"the folder has neither {WEIGHTS} nor {WEIGHTS_INDEX}")


def read_vocabulary(model: ModelFolder) -> dict[str, int] | None:
    """Token -> id from tokenizer.json, added tokens included; None where there is no such file."""
    tokenizer = model.json("tokenizer.json")
    if tokenizer is None:
        return None
    try:
        vocab = tokenizer["model"]["vocab"]
        pairs = vocab.items() if isinstance(vocab, dict) else ((row[0], id) for id, row in enumerate(vocab))
        added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
        return dict(pairs) | added
    except (KeyError, TypeError, IndexError):
        raise Unprocessable("invalid_model", "tokenizer.json holds no vocabulary that can be read") from None


def read_chat_template(model: ModelFolder) -> Any:
    """As the folder has it: text, a list of named templates, or None."""
    own_file = model.file("chat_template.jinja")
    if own_file is not None:
        return own_file.read_text("utf-8", errors="replace").strip()
    template = (model.json("tokenizer_config.json") or {}).get("chat_template")
    return template.strip() if isinstance(template, str) else template


def _configs(root: Path) -> Iterator[Path]:
    for depth in ("*", "*/*"):
        yield from root.glob(f"{depth}/config.json")


def _code_keys(value: Any) -> Iterator[str]:
    """Keys at any depth that name code; a bare flag or null names none."""
    if isinstance(value, list):
        for item in value:
            yield from _code_keys(item)
    if isinstance(value, dict):
        for key, inner in value.items():
            names_code = key in CODE_KEYS or key.lstrip("_").startswith("attn_implementation")
            if names_code and inner is not None and not isinstance(inner, bool):
                yield key
            yield from _code_keys(inner)


def _check_shards(model: ModelFolder, weight_map: Any) -> dict[str, TensorInfo]:
    if not isinstance(weight_map, dict) or not weight_map:
        raise Unprocessable("corrupt_weights", f"{WEIGHTS_INDEX} has no weight_map")
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        tensors |= _read_shard(model, shard)
    if missing := sorted(weight_map.keys() - tensors.keys()):
        message = f"no shard holds {missing[0][:200]} ({len(missing)} tensors missing)"
        raise Unprocessable("corrupt_weights", message)
    return tensors


def _read_shard(model: ModelFolder, shard: str) -> dict[str, TensorInfo]:
    place = model.file(shard) if Path(shard).name == shard and shard.endswith(".safetensors") else None
    if place is None:
        raise Unprocessable("corrupt_weights", f"{WEIGHTS_INDEX} names a shard that is not in the folder")
    return read_header(place)
