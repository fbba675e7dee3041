"""A calibration set: the inputs that each component really sees, in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdeploy.errors import CalibrationError
from qdeploy.files import staged_file

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class CalibrationSet:
    """Recorded inputs of a text-to-image model.

    sample: ``float16[N, C, h, w]``, the UNet's x_t.
    timestep: ``int64[N]``, the t that the UNet was called with for that x_t.
    prompt: ``int64[N]``, row of ``contexts`` for the conditional half.
    contexts: ``float16[P, T, D]``, text embeddings; row 0 is the empty prompt, the unconditional half.
    input_ids: ``int64[P, T]``, the tokens behind ``contexts``.
    latents: ``float16[M, C, h, w]``, final latents, divided by the scaling factor: the decoder's input.
    """

    sample: Tensor
    timestep: Tensor
    prompt: Tensor
    contexts: Tensor
    input_ids: Tensor
    latents: Tensor
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def batches(self, component: str, size: int) -> Iterator[dict[str, Tensor]]:
        """Float32 inputs of ``component``, about ``size`` at a time; the UNet's hold both CFG halves.

        The UNet takes one t a call, so its samples are grouped by timestep.
        """
        if component == "text_encoder":
            yield from ({"input_ids": chunk} for chunk in self.input_ids.split(size))
        elif component == "vae_decoder":
            yield from ({"latents": chunk.float()} for chunk in self.latents.split(size))
        else:
            for t in self.timestep.unique():
                for rows in torch.nonzero(self.timestep == t)[:, 0].split(max(1, size // 2)):
                    x, cond = self.sample[rows].float(), self.contexts[self.prompt[rows]].float()
                    uncond = self.contexts[:1].float().expand_as(cond)
                    yield {
                        "sample": torch.cat([x, x]),
                        "timestep": t,
                        "encoder_hidden_states": torch.cat([uncond, cond]),
                    }

    def count(self, component: str) -> int:
        """How many inputs :meth:`batches` will yield for ``component``, CFG halves counted twice."""
        return {
            "text_encoder": len(self.input_ids),
            "unet": 2 * len(self.sample),
            "vae_decoder": len(self.latents),
        }[component]


TENSORS = ("sample", "timestep", "prompt", "contexts", "input_ids", "latents")


def save_calibration(calibration: CalibrationSet, path: Path) -> None:
    """Write the set to ``path``, aside first and then renamed."""
    from safetensors.torch import save_file

    header = json.dumps({"schema_version": SCHEMA_VERSION, "provenance": dict(calibration.provenance)})
    with staged_file(path) as scratch:
        save_file(
            {name: getattr(calibration, name).contiguous() for name in TENSORS},
            scratch,
            metadata={"qdeploy_calibration": header},
        )


def load_calibration(path: Path) -> CalibrationSet:
    """Read a set; CalibrationError when the file is not one or is cut."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["qdeploy_calibration"])
            if header["schema_version"] != SCHEMA_VERSION:
                raise CalibrationError(
                    f"{path} has calibration schema {header['schema_version']}, this qdeploy reads {SCHEMA_VERSION}"
                )
            tensors = {name: file.get_tensor(name) for name in TENSORS}
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as exc:
        raise CalibrationError(
            f"{path} is not a readable calibration set ({exc}); make it again with `qdeploy calibrate`"
        ) from exc
    return CalibrationSet(**tensors, provenance=header["provenance"])


def check_fits(calibration: CalibrationSet, latent_shape: tuple[int, int, int], context_shape: tuple[int, int]) -> None:
    """CalibrationError unless the set's latents and text embeddings have the model's shapes and are finite."""
    found = (tuple(calibration.sample.shape[1:]), tuple(calibration.contexts.shape[1:]))
    if found != (latent_shape, context_shape):
        raise CalibrationError(
            f"calibration set was recorded for latents {list(found[0])} and text {list(found[1])}, the model has "
            f"{list(latent_shape)} and {list(context_shape)}; calibrate this model"
        )
    for name in ("sample", "contexts", "latents"):
        if not torch.isfinite(getattr(calibration, name)).all():
            raise CalibrationError(f"calibration set holds NaN or infinity in {name!r}; calibrate again")
