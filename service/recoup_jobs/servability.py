"""Whether vLLM would serve what a recovery hands over: as planned, as its files tell, and how it is started.

What vLLM refuses is at least told late; worse is what it takes without a word: weights that lie elsewhere
than it looks (vllm#34186). Here the configuration and the names of the tensors are read, without torch.
Whether the weights then do what they did in training is asked of the running server: `effect.py`. Before
anything is trained, `foreseen` holds the plan to the same rules, and the student to what vLLM can load.
"""

import re
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from recoup.schemas import Launch, ProblemItem
from recoup.schemas.request import MOST_RANK
from recoup_jobs.errors import Unprocessable
from recoup_jobs.estimate import Planned
from recoup_jobs.findings import Findings
from recoup_jobs.inspection import Model
from recoup_jobs.weights import read_header

RANKS = (8, 16, 32, 64, 128, 256, 320, MOST_RANK)
"""What vLLM takes as --max-lora-rank."""
LARGEST_CONFIG = 1 << 20
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TENSOR = re.compile(r"base_model\.model\.(?P<module>[A-Za-z0-9_.]+)\.lora_[AB]\.weight")
UNSERVED_MODULES = frozenset({"lm_head", "embed_tokens", "wte", "embed_in", "embed_out"})
UNSERVED_FEATURES = (
    "lora_bias",
    "alora_invocation_tokens",
    "layer_replication",
    "use_bdlora",
    "use_qalora",
    "target_parameters",
)
UNSERVED_PACKINGS = frozenset({"bitsandbytes"})
"""Which vLLM 0.32 and 0.33 do not load any more (vllm#39583)."""
WITHOUT_ADAPTERS = frozenset(
    {
        "BloomForCausalLM",
        "Cohere2MoeForCausalLM",
        "DbrxForCausalLM",
        "FalconForCausalLM",
        "FalconMambaForCausalLM",
        "GPT2LMHeadModel",
        "GPTJForCausalLM",
        "Gemma3nForCausalLM",
        "Mamba2ForCausalLM",
        "MambaForCausalLM",
        "OrionForCausalLM",
        "StableLmForCausalLM",
        "Zamba2ForCausalLM",
    }
)
"""Architectures that vLLM serves by itself alone; what stands in none of its lists is left to the server."""
PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})
"""Which leave the base as it is; others by name do not."""


def foreseen(plan: Planned, student: Model) -> list[ProblemItem]:
    """What would keep vLLM from serving what such a plan gives, each with the field that is to be changed."""
    findings, trained = Findings(), plan.trainable
    if plan.output != "merged":
        with findings.at("/output/kind"):
            _require_loadable(student.quantizer)
    if plan.output != "adapter":
        return findings.items
    with findings.at("/output/kind"):
        _require_room_beside(student.config.get("architectures"))
    with findings.at("/training/mode"):
        _require_lora({"peft_type": "LORA", "use_dora": bool(plan.phases) and trained.mode == "dora"})
    with findings.at("/training/lora/rank"):
        _ladder(trained.rank)
    with findings.at("/training/lora/targets"):
        for target in [trained.targets] if isinstance(trained.targets, str) else trained.targets:
            _require_served(target)
    return findings.items


def require_servable(folder: Path) -> int:
    """The rank that a server must be started for; raises `Unprocessable` for an adapter it cannot serve."""
    config = _config(folder)
    _require_lora(config)
    _require_plain(config)
    _require_names(folder)
    return _ladder(max([_number(config, "r"), *_pattern(config, "rank_pattern").values()]))


def launch_adapter(student: str, rank: int) -> Launch:
    """How a vLLM is started that has room for an adapter beside the student."""
    flags = ["--enable-lora", "--max-lora-rank", str(rank)]
    return Launch(
        arguments=[student, "--served-model-name", student.rpartition("/")[2], *flags],
        environment={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"},
    )


def launch_model(folder: str, id: str) -> Launch:
    """How a vLLM is started that serves a whole model, by the name that the gateway looks for."""
    return Launch(arguments=[folder, "--served-model-name", id], environment={})


def _config(folder: Path) -> dict[str, Any]:
    place = folder / ADAPTER_CONFIG
    try:
        config = from_json(place.read_bytes()) if place.stat().st_size <= LARGEST_CONFIG else None
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise _refused("unsupported_adapter", f"the adapter has no {ADAPTER_CONFIG} that can be read")
    return config


def _require_lora(config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise _refused(
            "unsupported_adapter", f"the adapter is of the kind {str(kind)[:40]}, vLLM serves LORA"
        )
    if config.get("use_dora"):
        raise _refused(
            "dora_not_servable", "vLLM serves no DoRA; use training.mode lora, or output.kind merged"
        )


def _require_plain(config: dict[str, Any]) -> None:
    """Nothing in it that vLLM's own `PEFTHelper` refuses."""
    if config.get("modules_to_save"):
        raise _refused("modules_to_save_not_servable", "vLLM serves no whole layers beside an adapter")
    if config.get("bias", "none") != "none":
        raise _refused("bias_not_servable", "vLLM serves no biases of an adapter")
    used = [name for name in UNSERVED_FEATURES if config.get(name)]
    if used:
        raise _refused("adapter_not_servable", f"vLLM serves no adapter with {used[0]}")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in PLAIN_INITS:
        raise _refused("adapter_not_servable", f"init_lora_weights {init[:40]} has changed the base weights")


def _require_names(folder: Path) -> None:
    names = read_header(folder / ADAPTER_WEIGHTS).keys()
    if not names:
        raise _refused("unsupported_adapter", "the adapter holds no tensors")
    for name in names:
        shape = TENSOR.fullmatch(name)
        if shape is None:
            message = (
                f"a tensor is called {name[:120]}, where base_model.model.<layer>.lora_A.weight is looked for"
            )
            raise _refused("wrong_module_names", message)
        _require_served(shape["module"])


def _require_served(module: str) -> None:
    if not UNSERVED_MODULES.isdisjoint(module.split(".")):
        raise _refused("head_not_servable", f"vLLM serves no adapter of {module[:120]}")


def _require_loadable(quantizer: str | None) -> None:
    if quantizer in UNSERVED_PACKINGS:
        message = f"vLLM loads no weights packed by {quantizer}; use output.kind merged where that can be"
        raise _refused("base_not_servable", message)


def _require_room_beside(architectures: Any) -> None:
    named = architectures if isinstance(architectures, list) else []
    if unserved := [name for name in named if name in WITHOUT_ADAPTERS]:
        message = f"vLLM serves no adapter beside {unserved[0]}; use output.kind merged"
        raise _refused("base_takes_no_adapter", message)


def _ladder(rank: int) -> int:
    fits = [step for step in RANKS if step >= rank]
    if not fits:
        raise _refused("rank_not_servable", f"the adapter has rank {rank}, vLLM serves {RANKS[-1]} at most")
    return fits[0]


def _number(config: dict[str, Any], name: str) -> int:
    return _positive(config.get(name), name)


def _pattern(config: dict[str, Any], name: str) -> dict[str, int]:
    found = config.get(name) or {}
    return {key: _positive(value, name) for key, value in found.items()} if isinstance(found, dict) else {}


def _positive(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _refused("unsupported_adapter", f"{name} of the adapter's configuration is no positive integer")
    return value


def _refused(code: str, message: str) -> Unprocessable:
    return Unprocessable(code, message)
