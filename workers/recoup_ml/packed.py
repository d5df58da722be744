"""Weights that a quantizer packed: which method did it, as plain matrices again, and computing on a CPU.

A packed model keeps its weights as they are; what is learnt is an adapter beside them. Of
bitsandbytes (QLoRA, arXiv 2305.14314; LLM.int8(), arXiv 2208.07339) the packed numbers are read
here without that package, to compare them with the teacher's. Other methods (GPTQ, AWQ,
compressed-tensors, torchao, …) are left to the loaders of transformers, and their weights unread.
"""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from recoup_ml.weights import Weights

PLAIN = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
SIDE = re.compile(r"\.weight\.(absmax|quant_map|nested_\w+|quant_state\.\w+)$|\.SCB$|\.weight_format$")
"""What bitsandbytes keeps beside a packed weight."""


def method(folder: Path) -> str | None:
    """The quantization method that `config.json` names, as transformers spells it."""
    config = json.loads((folder / "config.json").read_text()).get("quantization_config") or {}
    old_style = "bitsandbytes" if config.get("load_in_4bit") or config.get("load_in_8bit") else None
    return config.get("quant_method", old_style)


def what_to_install(quantizer: str, error: ImportError) -> str:
    """A sentence on the package that a quantizer's weights need; `error` is what its loader said."""
    if quantizer == "bitsandbytes":
        return (
            "its weights are packed by bitsandbytes, which is not installed here; "
            "pip install 'recoup-server[quantized]'."
        )
    return f"its weights are packed by {quantizer}, which cannot be read here: {error}"


class PlainWeights:
    """Reads the tensors of a folder as float32, by the names they have in a model that is not packed.

    What only a quantizer can read is as good as absent.
    """

    def __init__(self, folder: Path) -> None:
        self._weights = Weights(folder)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._weights if name in self)

    def __contains__(self, name: str) -> bool:
        if name not in self._weights or SIDE.search(name):
            return False
        return self._is_packed(name) or self._weights[name].dtype in PLAIN

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name]
        if not self._is_packed(name):
            return weight.float()
        if weight.dtype == torch.int8:
            return weight * (self._weights[_row_scales(name)].unsqueeze(1) / 127)
        return self._four_bits(name, weight)

    def _is_packed(self, name: str) -> bool:
        """By bitsandbytes, into four or eight bits."""
        return f"{name}.quant_map" in self._weights or _row_scales(name) in self._weights

    def _four_bits(self, name: str, weight: Tensor) -> Tensor:
        """Two weights a byte, the first in its upper half: W = level * scale of the weight's block."""
        state, bytes_ = self._state(name), weight.view(torch.uint8).flatten()
        indices = torch.stack([bytes_ >> 4, bytes_ & 15], dim=1).flatten().int()
        levels = self._weights[f"{name}.quant_map"][indices]
        scales = self._scales(name, state).repeat_interleave(state["blocksize"])
        return (levels.float() * scales[: len(levels)]).reshape(state["shape"])

    def _scales(self, name: str, state: dict) -> Tensor:
        """The greatest absolute value of each block; these too may be packed, into eight bits."""
        scales = self._weights[f"{name}.absmax"]
        if f"{name}.nested_absmax" not in self._weights:
            return scales.float()
        levels = self._weights[f"{name}.nested_quant_map"][scales.int()]
        nested = self._weights[f"{name}.nested_absmax"].repeat_interleave(state["nested_blocksize"])
        return levels * nested[: len(levels)] + state["nested_offset"]

    def _state(self, name: str) -> dict:
        (place,) = (other for other in self._weights if other.startswith(f"{name}.quant_state."))
        return json.loads(bytes(self._weights[place].tolist()))


def _row_scales(name: str) -> str:
    """Where LLM.int8() keeps the greatest absolute value of each row."""
    return f"{name.removesuffix('weight')}SCB"


def settings(folder: Path) -> BitsAndBytesConfig:
    """How bitsandbytes packed the model in `folder`, to pack another one so."""
    return BitsAndBytesConfig.from_dict(
        json.loads((folder / "config.json").read_text())["quantization_config"]
    )


def settle_bitsandbytes(model: PreTrainedModel, folder: Path) -> None:
    """Has a model that bitsandbytes packed compute on a CPU what its weights say, in training and evaluation.

    Products are taken in float32, and two faults of its CPU kernels (0.50) are gone round. Where a CPU has
    AVX512-BF16, a weight is repacked in its first pass without gradients; from then on the layer
    computes in bfloat16 and passes no gradient on, so that adapters below it do not learn. And where the
    blocks of a weight do not end with its rows, scales are mixed up; such layers are unpacked here.
    The log line that it writes for every eight-bit product is left out.
    """
    from bitsandbytes.nn import Linear4bit

    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    weights = PlainWeights(folder)
    packed = [(name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    for name, linear in packed:
        if linear.weight.device.type == "cpu":
            linear.support_avx512bf16_for_cpu = False
            linear.compute_dtype = linear.weight.quant_state.dtype = torch.float32
            if linear.in_features % linear.weight.quant_state.blocksize:
                model.set_submodule(name, _unpacked(linear, weights[f"{name}.weight"]))


def _unpacked(linear: nn.Linear, weight: Tensor) -> nn.Linear:
    plain = nn.Linear(linear.in_features, linear.out_features, bias=False)
    plain.weight, plain.bias = nn.Parameter(weight), linear.bias
    return plain.requires_grad_(False)
