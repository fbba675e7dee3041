"""Read and check scheduler settings; their meaning is up to the schedulers."""

from __future__ import annotations

import math
import reprlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.base.errors import RequestError, UsageError

# Every setting of a scheduler that diffusers 0.42 can convert to ours (`_compatibles`), and LCM's, by the type of its
# value. A config keeps another class's settings through `from_config`: known, and read only by their own class.
FLAGS = (
    "clip_sample", "euler_at_final", "lower_order_final", "predict_x0", "rescale_betas_zero_snr", "set_alpha_to_one",
    "skip_prk_steps", "thresholding", "use_beta_sigmas", "use_dynamic_shifting", "use_exponential_sigmas",
    "use_flow_sigmas", "use_karras_sigmas", "use_lu_lambdas",
)  # fmt: skip
COUNTS = ("num_train_timesteps", "original_inference_steps", "solver_order", "steps_offset")
NUMBERS = (
    "beta_end", "beta_start", "clip_sample_range", "dynamic_thresholding_ratio", "flow_shift", "lambda_min_clipped",
    "rho", "sample_max_value", "shift_terminal", "sigma_data", "sigma_max", "sigma_min", "timestep_scaling",
)  # fmt: skip
TEXTS = (
    "algorithm_type", "beta_schedule", "final_sigmas_type", "interpolation_type", "prediction_type", "sigma_schedule",
    "solver_type", "time_shift_type", "timestep_spacing", "timestep_type", "variance_type",
)  # fmt: skip
SEEDS = ("noise_sampler_seed",)  # of a class that is not made here
LISTS = ("disable_corrector", "trained_betas")
NULLS = ("solver_p",)  # another scheduler, in memory only
KNOWN_SETTINGS = frozenset([*FLAGS, *COUNTS, *NUMBERS, *TEXTS, *SEEDS, *LISTS, *NULLS])
CONFIG_FILE = "scheduler_config.json"
# Published models have 1000 training timesteps, some 4000; tables and arrays of this length are made of them.
MAX_COUNT = 10_000
MAX_INTEGER = 2**63  # a float holds it
MAX_NUMBER = 1e6  # beyond every noise level, clipping range and scale of a latent-diffusion model
# What diffusers 0.1 wrote into every config, the published LDM folders' among them; neither says anything.
OBSOLETE: Mapping[str, Any] = {"tensor_format": "pt", "timestep_values": None}


def make_unsupported_error(name: str, value: Any, supported: str) -> UsageError:
    """The error for a setting whose value no scheduler here supports."""
    return UsageError(
        f"scheduler setting `{name}`: got {reprlib.repr(value)}, supported: {supported}; edit {CONFIG_FILE}"
    )


def refuse_unknown(config: Mapping[str, Any]) -> None:
    """UsageError on what is no object, or has a setting that no scheduler we know has; ``_…`` are remarks."""
    if not isinstance(config, Mapping):
        raise UsageError(f"scheduler settings: got {reprlib.repr(config)}, expected an object; edit {CONFIG_FILE}")
    for name, value in config.items():
        obsolete = name in OBSOLETE and value == OBSOLETE[name]
        if not name.startswith("_") and name not in KNOWN_SETTINGS and not obsolete:
            raise make_unsupported_error(
                name, value, f"no setting of that name, only {', '.join(sorted(KNOWN_SETTINGS))}"
            )


def check_settings(config: Mapping[str, Any]) -> None:
    """UsageError that names the first setting whose value has another type than any scheduler's, or no sane size.

    Null is left to the scheduler that reads the setting, and so is what its words and numbers mean.
    """
    refuse_unknown(config)
    for name, value in config.items():
        if value is None or name not in KNOWN_SETTINGS:
            continue
        if name in FLAGS:
            read_flag(config, name, False)
        elif name in COUNTS:
            read_count(config, name, 0, minimum=0)
        elif name in NUMBERS:
            read_number(config, name, 0, high=MAX_NUMBER)
        elif name in SEEDS:
            read_number(config, name, 0)
        elif name in TEXTS and not isinstance(value, str):
            raise make_unsupported_error(name, value, "a word")
        elif name in LISTS and not _is_number_list(value):
            raise make_unsupported_error(name, value, f"a list of at most {MAX_COUNT} numbers")
        elif name in NULLS:
            raise make_unsupported_error(name, value, "null")


def _is_number(value: object) -> bool:
    """A number that a float holds, not NaN; True is none."""
    return (isinstance(value, float) and value == value) or (type(value) is int and abs(value) <= MAX_INTEGER)


def _is_number_list(value: object) -> bool:
    return isinstance(value, list) and len(value) <= MAX_COUNT and all(_is_number(item) for item in value)


def read_choice(config: Mapping[str, Any], name: str, default: Any, supported: Sequence[Any]) -> Any:
    """The setting ``name``, which must be one of ``supported`` (True is not 1)."""
    value = config.get(name, default)
    if not any(type(value) is type(known) and value == known for known in supported):
        raise make_unsupported_error(name, value, ", ".join(repr(known) for known in supported))
    return value


def read_flag(config: Mapping[str, Any], name: str, default: bool) -> bool:
    """A true-or-false setting; ``null`` is false, as in diffusers."""
    return bool(read_choice(config, name, default, (True, False, None)))


def refuse_flags(config: Mapping[str, Any], names: Sequence[str]) -> None:
    """UsageError if a flag among ``names`` is on."""
    for name in names:
        if read_flag(config, name, False):
            raise make_unsupported_error(name, True, "False")


def read_number(
    config: Mapping[str, Any], name: str, default: float, low: float = -math.inf, high: float = math.inf
) -> float:
    """A real number from ``low`` to ``high``, never NaN."""
    value = config.get(name, default)
    if not _is_number(value) or not low <= value <= high:
        raise make_unsupported_error(name, value, "a number" + _describe_bounds(low, high))
    return float(value)


def read_positive(config: Mapping[str, Any], name: str, default: float) -> float:
    """A number above 0, up to ``MAX_NUMBER``."""
    return read_number(config, name, default, low=sys.float_info.min, high=MAX_NUMBER)


def read_count(config: Mapping[str, Any], name: str, default: int, minimum: int) -> int:
    """An integer from ``minimum`` to ``MAX_COUNT``."""
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= MAX_COUNT:
        raise make_unsupported_error(name, value, f"an integer of at least {minimum} and at most {MAX_COUNT}")
    return value


def _describe_bounds(low: float, high: float) -> str:
    if low == sys.float_info.min:
        return f" above 0 and up to {high:g}"
    if math.isinf(low) and math.isinf(high):
        return ""
    return f" up to {high:g}" if math.isinf(low) else f" from {low:g} to {high:g}"


def check_steps(steps: int, train_steps: int) -> None:
    """RequestError unless ``1 <= steps <= train_steps``."""
    if not 1 <= steps <= train_steps:
        raise RequestError(f"steps: got {steps}, expected 1 to {train_steps}, the model's training timesteps")


def check_timesteps(timesteps: NDArray[np.int64], train_steps: int) -> None:
    """RequestError if `steps_offset` pushed a timestep past the trained ones."""
    if timesteps.max() >= train_steps:
        raise RequestError(
            f"steps: {len(timesteps)} model calls reach timestep {timesteps.max()}, but the model was trained on "
            f"0 to {train_steps - 1}; ask for fewer steps"
        )
