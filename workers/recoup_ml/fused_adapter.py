"""An adapter's part added to a layer's output within the product that makes it.

PEFT makes B (A x), scales it by α/r and adds it: three passes over something as wide as the layer's output,
and one more, over its gradient, on the way back. Here the product scales and adds as it goes. Both give the
same but for rounding.
"""

from typing import Any

from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, addmm, nn
from transformers.pytorch_utils import Conv1D


def fuse(adapted: PeftModel) -> PeftModel:
    """`adapted` itself, whose plain adapters of linear layers now are added so; not to be merged in place."""
    for layer in adapted.modules():
        if isinstance(layer, LoraLayer) and isinstance(layer.get_base_layer(), (nn.Linear, Conv1D)):
            for name in layer.lora_A.keys() - layer.lora_variant.keys():
                layer.lora_variant[name] = _Added
    return adapted


class _Added(LoraVariant):  # type: ignore[misc]
    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_others: Any) -> Tensor:
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        scale = module.scaling[active_adapter]
        if result.dtype != up.weight.dtype:  # float32 adapters of a layer that answers in half precision
            return result + up(down(x)) * scale
        inner = down(x).flatten(0, -2)
        return addmm(result.flatten(0, -2), inner, up.weight.T, alpha=scale).view(result.shape)
