"""Read and check scheduler settings; their meaning is up to the schedulers."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.base.errors import RequestError, UsageError

# Every setting of a scheduler that diffusers 0.42 can convert to ours (`_compatibles`), and LCM's. A config keeps
# another class's settings through `from_config`, so those are known, and read only by their own class.
KNOWN_SETTINGS = frozenset(
    [
        "algorithm_type",
        "beta_end",
        "beta_schedule",
        "beta_start",
        "clip_sample",
        "clip_sample_range",
        "disable_corrector",
        "dynamic_thresholding_ratio",
        "euler_at_final",
        "final_sigmas_type",
        "flow_shift",
        "interpolation_type",
        "lambda_min_clipped",
        "lower_order_final",
        "num_train_timesteps",
        "original_inference_steps",
        "predict_x0",
        "prediction_type",
        "rescale_betas_zero_snr",
        "rho",
        "sample_max_value",
        "set_alpha_to_one",
        "shift_terminal",
        "sigma_data",
        "sigma_max",
        "sigma_min",
        "sigma_schedule",
        "skip_prk_steps",
        "solver_order",
        "solver_p",
        "solver_type",
        "steps_offset",
        "thresholding",
        "time_shift_type",
        "timestep_scaling",
        "timestep_spacing",
        "timestep_type",
        "trained_betas",
        "use_beta_sigmas",
        "use_dynamic_shifting",
        "use_exponential_sigmas",
        "use_flow_sigmas",
        "use_karras_sigmas",
        "use_lu_lambdas",
        "variance_type",
    ]
)
# What diffusers 0.1 wrote into every config, the published LDM folders' among them; neither says anything.
OBSOLETE: Mapping[str, Any] = {"tensor_format": "pt", "timestep_values": None}


def make_unsupported_error(name: str, value: Any, supported: str) -> UsageError:
    """The error for a setting whose value no scheduler here supports."""
    return UsageError(
        f"scheduler setting `{name}`: got {reprlib.repr(value)}, supported: {supported}; edit scheduler_config.json"
    )


def refuse_unknown(config: Mapping[str, Any]) -> None:
    """UsageError on a setting that no scheduler we know has; names with a leading ``_`` are remarks."""
    for name, value in config.items():
        obsolete = name in OBSOLETE and value == OBSOLETE[name]
        if not name.startswith("_") and name not in KNOWN_SETTINGS and not obsolete:
            raise make_unsupported_error(
                name, value, f"no setting of that name, only {', '.join(sorted(KNOWN_SETTINGS))}"
            )


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


def read_number(config: Mapping[str, Any], name: str, default: float) -> float:
    """A real number; may be infinite, never NaN."""
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise make_unsupported_error(name, value, "a number")
    return float(value)


def read_count(config: Mapping[str, Any], name: str, default: int, minimum: int) -> int:
    """An integer of at least ``minimum``."""
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise make_unsupported_error(name, value, f"an integer of at least {minimum}")
    return value


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
