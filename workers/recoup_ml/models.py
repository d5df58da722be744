"""Loading models, and the two halves of one: the backbone up to the last hidden state, and the head.

Splitting a causal language model there is what keeps a recovery small: the teacher's last
hidden states and its output head are an exact cache of its distributions, a few kilobytes
a token, so the teacher is never in memory beside the student. Models are read from local
folders only, safetensors only, and no code that comes with a model is run.
"""

import gc
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from recoup_ml import packed
from recoup_ml.errors import NonFiniteWeights, UnsupportedModel
from recoup_ml.sequences import sees

HALVES = frozenset({torch.bfloat16, torch.float16})


@dataclass(frozen=True)
class Head:
    """From a last hidden state to logits: a linear map; a factor and a soft cap where the family has them."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        """[N, V]; float32 from half precision: rounded to bfloat16, a logit of 20 is off by 0.06."""
        logits_NV = self._linear(hidden_ND)
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        return logits_NV if self.softcap is None else self.softcap * torch.tanh(logits_NV / self.softcap)

    def _linear(self, hidden_ND: Tensor) -> Tensor:
        if self.weight_VD.dtype not in HALVES:
            return nn.functional.linear(hidden_ND, self.weight_VD, self.bias_V)
        learns = torch.is_grad_enabled() and (hidden_ND.requires_grad or self.weight_VD.requires_grad)
        if learns or not hidden_ND.is_cuda:  # a product with wider results is CUDA's, and has no slope
            bias_V = None if self.bias_V is None else self.bias_V.float()
            return nn.functional.linear(hidden_ND.float(), self.weight_VD.float(), bias_V)
        flat_ND = hidden_ND.reshape(-1, hidden_ND.shape[-1])
        logits_NV = torch.mm(flat_ND, self.weight_VD.T, out_dtype=torch.float32)
        if self.bias_V is not None:
            logits_NV += self.bias_V
        return logits_NV.view(*hidden_ND.shape[:-1], -1)

    def detached(self) -> "Head":
        """The same head, keeping its present weights though the model may be changed or moved."""
        return self._with(Tensor.detach)

    def kept(self) -> "Head":
        """The same head, detached; of weights that train a copy, since they may be others soon."""
        return self._with(lambda own: own.detach().clone() if own.requires_grad else own)

    def like(self, tensor: Tensor) -> "Head":
        """The same head in another tensor's dtype and on its device."""
        return self._with(lambda own: own.to(tensor))

    def on(self, place: torch.device) -> "Head":
        """The same head there."""
        return self._with(lambda own: own.to(place))

    def _with(self, change: Callable[[Tensor], Tensor]) -> "Head":
        bias_V = None if self.bias_V is None else change(self.bias_V)
        return replace(self, weight_VD=change(self.weight_VD), bias_V=bias_V)


def device() -> torch.device:
    """The GPU that this process computes on, or the CPU."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def load(folder: Path) -> PreTrainedModel:
    """The model in `folder`, ready to evaluate: float32 on a CPU, its own dtype on a GPU.

    Weights that a quantizer packed stay packed, and frozen.

    Raises:
        NonFiniteWeights: a tensor holds NaN or infinity, or the model computes it.
        UnsupportedModel: hidden state and head do not reproduce the model's logits, weights are missing, or
            what their quantizer needs is not installed.
    """
    on_gpu, quantizer = device().type == "cuda", packed.method(folder)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto" if on_gpu else torch.float32,
            device_map=device() if on_gpu else None,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except ImportError as error:
        if quantizer is None:
            raise
        raise UnsupportedModel(f"{folder.name}: {packed.what_to_install(quantizer, error)}") from error
    _check_whole(loading["missing_keys"], folder)
    if quantizer == "bitsandbytes":
        packed.settle_bitsandbytes(model, folder)
    _check_finite(model, folder)
    _check_head(model.eval(), folder)
    return model


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def load_trained(student: Path, checkpoint: Path) -> PreTrainedModel:
    """The student with its trained adapter inside, or the trained model itself."""
    if is_adapter(checkpoint):
        adapted = PeftModel.from_pretrained(load(student), checkpoint)
        return adapted.get_base_model().eval()
    return load(checkpoint)


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether a quantizer packed the model's weights, so that an adapter is all that can be trained."""
    return getattr(model, "hf_quantizer", None) is not None


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def load_config(folder: Path) -> PreTrainedConfig:
    """The configuration of the model in `folder`, of its text part where it has several."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return config.get_text_config()


def depth(folder: Path) -> int:
    """How many decoder blocks the model in `folder` says it has."""
    return load_config(folder).num_hidden_layers


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to fill batches with; masked everywhere, so any will do."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def last_hidden(
    model: PreTrainedModel,
    ids_BT: Tensor,
    mask_BT: Tensor | None,
    places_BT: Tensor | None = None,
    sees_BTT: Tensor | None = None,
) -> Tensor:
    """The backbone's last hidden states after the final norm, [B, T, D].

    `places_BT` tells sequences apart that lie in one row: each begins anew at 0. Where they share their first
    tokens that does not tell all, and `sees_BTT` says which tokens each may look at.
    """
    backbone = model.get_decoder()
    where = {} if places_BT is None else {"position_ids": places_BT}
    mask = mask_BT if sees_BTT is None else _additive(sees_BTT, model.dtype)
    return backbone(input_ids=ids_BT, attention_mask=mask, use_cache=False, **where).last_hidden_state


def _additive(sees_BTT: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as every attention of transformers that takes one takes it: [B, 1, T, T]."""
    mask_BTT = torch.zeros(sees_BTT.shape, dtype=dtype, device=sees_BTT.device)
    return mask_BTT.masked_fill_(~sees_BTT, torch.finfo(dtype).min).unsqueeze(1)


def can_pack(model: PreTrainedModel) -> bool:
    """Whether sequences that lie in one row stay apart: families differ, so it is tried out."""
    return _stay_apart(model, 0)


def can_share(model: PreTrainedModel) -> bool:
    """Whether the first tokens of such sequences may stand in the row once: that is tried out, too.

    A window of attention, which the few tokens of a trial do not fill, would lose them.
    """
    return getattr(model.config.get_text_config(), "sliding_window", None) is None and _stay_apart(model, 2)


@torch.inference_mode()
def _stay_apart(model: PreTrainedModel, shared: int) -> bool:
    """Two sequences of six tokens in one row, of which the first `shared` stand there once."""
    vocabulary, sizes = model.config.get_text_config().vocab_size, [shared, 6 - shared, 6 - shared]
    ids_BT = torch.arange(3, 3 + sum(sizes), device=model.device).unsqueeze(0) % vocabulary
    rest_T = torch.arange(shared, 6)
    places_BT = torch.cat([torch.arange(shared), rest_T, rest_T]).unsqueeze(0).to(model.device)
    sees_BTT = sees(sizes).to(model.device).unsqueeze(0) if shared else None
    packed_BTD = last_hidden(model, ids_BT, None, places_BT, sees_BTT)
    second_BT = torch.cat([ids_BT[:, :shared], ids_BT[:, 6:]], 1)
    alone_BTD = last_hidden(model, second_BT, torch.ones_like(second_BT))[:, shared:]
    return torch.allclose(packed_BTD[:, 6:], alone_BTD, rtol=1e-2, atol=1e-2 * float(alone_BTD.abs().max()))


def head(model: PreTrainedModel) -> Head:
    """The model's output head; its tensors are the model's own, so gradients reach them."""
    linear, config = model.get_output_embeddings(), model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1.0)
    return Head(linear.weight, getattr(linear, "bias", None), softcap, scale)


@torch.no_grad()
def round_to_bfloat16(model: PreTrainedModel) -> None:
    """Rounds every weight as a bfloat16 checkpoint would; buffers (rotary frequencies) stay exact."""
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())


def release() -> None:
    """Gives memory back after a model was let go."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check_whole(missing: Collection[str], folder: Path) -> None:
    """Of what transformers does not find it makes random numbers, and warns."""
    if missing:
        raise UnsupportedModel(
            f"{folder.name}: transformers {transformers.__version__} finds no weights for {min(missing)}, "
            f"one of {len(missing)} parameters that its files lack or call by other names."
        )


def _check_finite(model: PreTrainedModel, folder: Path) -> None:
    """Looks at plain weights; what is packed shows in the logits."""
    plain = [(name, tensor) for name, tensor in model.named_parameters() if type(tensor) is nn.Parameter]
    broken = [name for name, tensor in plain if not torch.isfinite(tensor).all()]
    if broken:
        raise NonFiniteWeights(f"{folder.name} holds NaN or infinity in {', '.join(broken[:5])}.")


@torch.inference_mode()
def _check_head(model: PreTrainedModel, folder: Path) -> None:
    if type(model.get_output_embeddings().weight) is not nn.Parameter:
        raise UnsupportedModel(
            f"The output head of {folder.name} is quantized, and distillation needs its matrix; "
            "quantize the model without its head (lm_head)."
        )
    ids_BT = torch.arange(3, 11, device=model.device).unsqueeze(0) % model.config.get_text_config().vocab_size
    expected = model(input_ids=ids_BT).logits[0].float()
    found = head(model)(last_hidden(model, ids_BT, torch.ones_like(ids_BT))[0])
    if not expected.isfinite().all():
        raise NonFiniteWeights(f"{folder.name} computes NaN or infinity.")
    scale = float(expected.abs().max()) or 1.0
    if float((expected - found).abs().max()) > 1e-2 * scale:
        raise UnsupportedModel(
            f"{type(model).__name__}: the output head is not a linear map of the last hidden state, "
            "which off_policy relies on."
        )
