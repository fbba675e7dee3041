"""How quantization quality is measured: one float reference, recorded once, and two figures against it.

The prompts are fresh (never calibrated on), the sampler is the model's own, and every row meets the
same inputs and the same starting noise. Who made the UNet under test does not matter here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from qdeploy.calibrate.prompts import draw_prompts
from qdeploy.engines.base import Session
from qdeploy.errors import UsageError
from qdeploy.files import staged_file
from qdeploy.models.components import Component
from qdeploy.models.source import LatentDiffusion
from qdeploy.numerics import psnr_db, sqnr_db
from qdeploy.progress import OnProgress, silent
from qdeploy.runtime.image import pixels_from_decoded
from qdeploy.sampling import make_sampler
from qdeploy.sampling.loop import Array, denoise, unit_noise

# (x float32[B, C, h, w], t, context float32[B, T, D]) -> UNet output like x; of the B rows the first half are
# without text, the second the same pictures with text
Predict = Callable[[Array, int, Array], Array]

TORCH_BATCH = 32  # rows a torch call: 16 pictures' two halves
HALVES = 2  # of classifier-free guidance: without text, with text
SAME_PICTURE_DB = 100.0  # PSNR of equal 8-bit pictures, whose true value, infinity, has no mean


@dataclass(frozen=True)
class Protocol:
    """What is measured on.

    calibrated_seed, calibrated: the seed and count with which ``draw_prompts`` chose the calibration's
    prompts; the measured ones are drawn from the rest.
    """

    pictures: int = 64
    steps: int = 25
    guidance_scale: float = 5.0
    seed: int = 1234
    calibrated: int = 64
    calibrated_seed: int = 0


@dataclass(frozen=True)
class Reference:
    """The float model's run of the protocol, P pictures in S sampler calls.

    sample: ``float32[S, P, C, h, w]``, x_t as the UNet is given it; both CFG halves share it.
    timestep: ``int64[S]``.
    contexts: ``float32[1 + P, T, D]``, text embeddings; row 0 is the empty prompt, the first half's.
    noise_pred: ``float32[S, 2, P, C, h, w]``, the float UNet's raw output, half without text first.
    noise: ``float32[P, C, h, w]``, unit starting noise.
    latents: ``float32[P, C, h, w]``, the sampler's last.
    pixels: ``uint8[P, H, W, 3]``, the decoded pictures.
    """

    sample: Array
    timestep: NDArray[np.int64]
    contexts: Array
    noise_pred: Array
    noise: Array
    latents: Array
    pixels: NDArray[np.uint8]
    protocol: Protocol
    model_sha256: str

    @property
    def cond(self) -> Array:
        """``float32[P, T, D]``."""
        return self.contexts[1:]

    @property
    def uncond(self) -> Array:
        """``float32[P, T, D]``, the empty prompt's for every picture."""
        return np.repeat(self.contexts[:1], len(self.cond), axis=0)


ARRAYS = ("sample", "timestep", "contexts", "noise_pred", "noise", "latents", "pixels")


def fresh_prompts(prompts: list[str], protocol: Protocol) -> list[str]:
    """The prompts to measure on: drawn from those that the calibration did not draw."""
    seen = set(draw_prompts(prompts, protocol.calibrated, protocol.calibrated_seed))
    rest = [prompt for prompt in dict.fromkeys(prompts) if prompt not in seen]
    if len(rest) < protocol.pictures:
        raise UsageError(
            f"{len(rest)} of the model's {len(prompts)} prompts are left after calibrating on {protocol.calibrated}, "
            f"expected at least {protocol.pictures}; calibrate on fewer or measure fewer pictures"
        )
    return draw_prompts(rest, protocol.pictures, protocol.seed)


def record_reference(
    model: LatentDiffusion, prompts: Sequence[str], protocol: Protocol, on_progress: OnProgress = silent
) -> Reference:
    """Run the float model on ``prompts`` (see :func:`fresh_prompts`) and keep everything a row is compared with."""
    encode = model.component("text_encoder")
    with torch.no_grad():
        contexts = torch.cat([encode(model.tokens([prompt])) for prompt in ["", *prompts]]).numpy()
    sampler = make_sampler(model.scheduler_config, protocol.steps)
    noise = unit_noise(model.latents.shape, [(protocol.seed, i) for i in range(len(prompts))])
    float_unet = predict_from_module(model.unet)
    samples: list[Array] = []
    outputs: list[Array] = []

    def predict(x: Array, t: int, context: Array) -> Array:
        samples.append(x[: len(prompts)].copy())
        outputs.append(float_unet(x, t, context))
        on_progress("reference", len(samples), len(sampler.timesteps))
        return outputs[-1]

    uncond = np.repeat(contexts[:1], len(prompts), axis=0)
    final = denoise(predict, sampler, noise, contexts[1:], uncond, protocol.guidance_scale)
    halves = np.stack(outputs).reshape(len(samples), HALVES, *final.shape)
    return Reference(
        sample=np.stack(samples),
        timestep=np.asarray(sampler.timesteps, np.int64),
        contexts=contexts,
        noise_pred=halves,
        noise=noise,
        latents=final,
        pixels=decoded(final, model),
        protocol=protocol,
        model_sha256=model.sha256,
    )


def decoded(latents: Array, model: LatentDiffusion) -> NDArray[np.uint8]:
    """Pictures ``uint8[P, H, W, 3]`` of final latents, by the float decoder."""
    scaled = torch.from_numpy(latents / np.float32(model.latents.scaling_factor))
    with torch.no_grad():
        return pixels_from_decoded(torch.cat([model.vae_decoder(piece) for piece in scaled.split(8)]).numpy())


def step_sqnr_db(predict: Predict, reference: Reference, on_progress: OnProgress = silent) -> list[float]:
    """Per sampler call, SQNR in dB of the UNet's raw output on the reference's own inputs, all pictures and halves."""
    context = np.concatenate([reference.uncond, reference.cond])
    curve = []
    for step, (x, t) in enumerate(zip(reference.sample, reference.timestep, strict=True)):
        found = predict(np.concatenate([x, x]), int(t), context)
        curve.append(sqnr_db(reference.noise_pred[step].reshape(found.shape), found))
        on_progress("UNet output by step", step + 1, len(reference.timestep))
    return curve


def pictures_psnr_db(
    predict: Predict, reference: Reference, model: LatentDiffusion, on_progress: OnProgress = silent
) -> list[float]:
    """Per picture, PSNR in dB at 8 bits of the whole loop run with ``predict`` from the reference's noise."""
    sampler = make_sampler(model.scheduler_config, reference.protocol.steps)

    def on_step(index: int, _t: int, _x: Array) -> None:
        on_progress("pictures", index + 1, len(sampler.timesteps))

    guidance = reference.protocol.guidance_scale
    final = denoise(predict, sampler, reference.noise, reference.cond, reference.uncond, guidance, on_step)
    pairs = zip(reference.pixels.astype(np.float32), decoded(final, model).astype(np.float32), strict=True)
    return [min(psnr_db(expected, found, peak=255.0), SAME_PICTURE_DB) for expected, found in pairs]


def picture_psnr_db(
    predict: Predict, reference: Reference, model: LatentDiffusion, on_progress: OnProgress = silent
) -> float:
    """Mean over pictures of :func:`pictures_psnr_db`."""
    return float(np.mean(pictures_psnr_db(predict, reference, model, on_progress)))


def predict_in_pairs(predict: Predict) -> Predict:
    """``predict`` of a static batch of 2, one picture's two halves, made to take any number of pictures.

    The batch holds all pictures' halves without text and then those with text, as :func:`denoise` gives it.
    """

    def paired(x: Array, t: int, context: Array) -> Array:
        count = len(x) // HALVES
        out = np.empty_like(x)
        for i in range(count):
            out[i::count] = predict(x[i::count], t, context[i::count])
        return out

    return paired


def predict_from_session(session: Session) -> Predict:
    """The UNet of an engine's session, a graph of static batch 2."""

    def predict(x: Array, t: int, context: Array) -> Array:
        feeds: dict[str, NDArray] = {
            "sample": x,
            "timestep": np.array(t, np.int64),
            "encoder_hidden_states": context,
        }
        return session.run(feeds)["noise_pred"]

    return predict_in_pairs(predict)


def predict_from_module(component: Component, batch: int = TORCH_BATCH) -> Predict:
    """A torch UNet, float or simulated, ``batch`` rows a call."""

    def predict(x: Array, t: int, context: Array) -> Array:
        pieces = zip(torch.from_numpy(x).split(batch), torch.from_numpy(context).split(batch), strict=True)
        with torch.no_grad():
            return torch.cat([component(sample, torch.tensor(t), text) for sample, text in pieces]).numpy()

    return predict


def save_reference(reference: Reference, path: Path) -> None:
    """Write to a safetensors file, aside first and then renamed."""
    from safetensors.numpy import save_file

    header = json.dumps({"protocol": asdict(reference.protocol), "model_sha256": reference.model_sha256})
    with staged_file(path) as scratch:
        arrays = {name: np.ascontiguousarray(getattr(reference, name)) for name in ARRAYS}
        save_file(arrays, scratch, metadata={"qdeploy_reference": header})


def load_reference(path: Path) -> Reference:
    """Read what :func:`save_reference` wrote."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()["qdeploy_reference"])
        arrays = {name: file.get_tensor(name) for name in ARRAYS}
    return Reference(**arrays, protocol=Protocol(**header["protocol"]), model_sha256=header["model_sha256"])
