"""PEFT's settings of a LoRA, which say how strongly each layer's update counts, and where they are found.

``adapter_config.json`` lies next to the weights that PEFT saves; diffusers copies it into the header of its own files.
The arithmetic is ``peft/tuners/lora/layer.py``: alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023,
arXiv:2312.03732). What would change it otherwise is refused by name, a setting that is not known too.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from qdeploy.base.errors import ModelError, join_names

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # of PEFT and of diffusers
DEFAULT_ALPHA = 8.0  # LoraConfig's
MAX_RANK = 2**16
MAX_ALPHA = 1e6
MAX_PATTERNS = 10_000
PLAIN_PATTERN = re.compile(r"\^?[\w.\\-]{1,300}")  # a module's name; PEFT takes any regular expression
# Weights of the model itself are changed by these ways to begin, so that the update is not one of the model given.
OTHER_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
IGNORED = frozenset(
    (
        "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "init_lora_weights",
        "base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version",
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out",
        "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "qalora_group_size",
        "runtime_config", "ephemeral_gpu_offload", "low_cpu_mem_usage",
    )
)  # fmt: skip

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class LoraSettings:
    """What one adapter's config says. Patterns are tails of module names, the first that fits counts.

    rank: stated for all layers; None where nothing is stated.
    alpha: of all layers; None takes the rank, which is strength 1.
    """

    source: str
    rank: int | None = None
    alpha: float | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False

    def compute_strength(self, names: Iterable[str], rank: int) -> float:
        """What ``up @ down`` of ``rank`` is multiplied by in the layer with these ``names``."""
        spellings = tuple(names)
        stated = _find_pattern(self.rank_pattern, spellings, self.rank)
        if stated is not None and stated != rank:
            raise ModelError(
                f"{self.source}: rank {stated} is stated for {spellings[0]}, its weights have rank {rank}; give the "
                f"{CONFIG_FILE} that was saved with them"
            )
        alpha = _find_pattern(self.alpha_pattern, spellings, self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def find_lora_file(path: Path) -> Path:
    """The weights in ``path``, which is their file or the folder that PEFT or diffusers saved."""
    if not path.is_dir():
        return path
    names = sorted(entry.name for entry in path.iterdir())
    weights = [name for name in names if name in WEIGHT_FILES]
    if len(weights) == 1:
        return path / weights[0]
    what = "both of" if weights else "neither of"
    raise ModelError(
        f"{path} is a folder with {what} {' and '.join(WEIGHT_FILES)} (there is {join_names(names) or 'nothing'}); "
        "give the LoRA's .safetensors file"
    )


def settings_from_config(config: Mapping[str, Any], source: str) -> LoraSettings:
    """Read and check a ``LoraConfig``; ModelError names the field."""
    _refuse_other_arithmetic(config, source)
    rank = config.get("r")
    return LoraSettings(
        source,
        None if rank is None else _read_number(config, "r", int, 1, MAX_RANK, source),
        DEFAULT_ALPHA
        if config.get("lora_alpha") is None
        else _read_number(config, "lora_alpha", float, -MAX_ALPHA, MAX_ALPHA, source),
        _read_pattern(config, "rank_pattern", int, 1, MAX_RANK, source),
        _read_pattern(config, "alpha_pattern", float, -MAX_ALPHA, MAX_ALPHA, source),
        _read_flag(config, "use_rslora", source),
    )


def _refuse_other_arithmetic(config: Mapping[str, Any], source: str) -> None:
    kind, bias, init = (config.get(name) for name in ("peft_type", "bias", "init_lora_weights"))
    if kind not in (None, "LORA"):
        raise _make_error(source, "peft_type", kind, "'LORA': LoHa, LoKr, OFT and other methods are not fused")
    if bias not in (None, "none"):
        raise _make_error(source, "bias", bias, "'none': trained biases are not fused")
    if isinstance(init, str) and init.lower().startswith(OTHER_BASE):
        raise _make_error(
            source, "init_lora_weights", init, "a way to begin that leaves the model's own weights; save the adapter "
            "with `path_initial_model_for_weight_conversion`, as PEFT's documentation of it says"
        )  # fmt: skip
    for name, value in config.items():
        if name not in IGNORED and value not in (None, False, [], {}):
            raise _make_error(source, name, value, "null or false: what it does is not fused")


def _find_pattern(pattern: Mapping[str, Number], names: tuple[str, ...], default: Number | None) -> Number | None:
    """The value of the first tail that one of ``names`` has, as PEFT's ``get_pattern_key`` finds it."""
    for key, value in pattern.items():
        tail = key.replace("\\", "").removeprefix("^")
        if any(name == tail or (not key.startswith("^") and name.endswith(f".{tail}")) for name in names):
            return value
    return default


def _read_pattern(
    config: Mapping[str, Any], name: str, kind: type[Number], low: float, high: float, source: str
) -> dict[str, Number]:
    pattern = config.get(name)
    if pattern is None:
        return {}
    if not isinstance(pattern, dict) or len(pattern) > MAX_PATTERNS:
        raise _make_error(source, name, pattern, "an object of module names and numbers")
    for key in pattern:
        if not PLAIN_PATTERN.fullmatch(key):
            raise _make_error(source, name, key, "a module's name; other regular expressions are not read")
    return {key: _read_number(pattern, key, kind, low, high, f"{source} `{name}`") for key in pattern}


def _read_number(
    section: Mapping[str, Any], name: str, kind: type[Number], low: float, high: float, source: str
) -> Number:
    value: Any = section.get(name)
    types = (int,) if kind is int else (int, float)
    if type(value) not in types or not low <= value <= high:
        whole = "whole number" if kind is int else "number"
        raise _make_error(source, name, value, f"a {whole} from {low:g} to {high:g}")
    return kind(value)


def _read_flag(config: Mapping[str, Any], name: str, source: str) -> bool:
    value = config.get(name)
    if value not in (None, True, False) or (isinstance(value, int | float) and not isinstance(value, bool)):
        raise _make_error(source, name, value, "true or false")
    return bool(value)


def _make_error(source: str, name: str, value: object, expected: str) -> ModelError:
    return ModelError(f"{source} `{name}`: got {reprlib.repr(value)}, expected {expected}")
