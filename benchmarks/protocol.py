"""How quantization quality is measured: one float reference, recorded once, and two figures against it.

The prompts are fresh (never calibrated on), the scheduler is the model's own, and every row has the
same inputs and the same starting noise. It does not depend on how the UNet under test was made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from qdeploy.base.arrays import AnyArray
from qdeploy.base.errors import UsageError
from qdeploy.base.files import stage_file
from qdeploy.base.numerics import psnr_db, sqnr_db
from qdeploy.base.progress import OnProgress, ignore_progress
from qdeploy.calibrate.record.prompts import draw_prompts
from qdeploy.engines.base import Session
from qdeploy.models.components import TorchComponent
from qdeploy.models.source import LatentDiffusion
from qdeploy.runtime.image import pixels_from_decoded
from qdeploy.sampling import make_scheduler
from qdeploy.sampling.guidance import Array
from qdeploy.sampling.loop import denoise, draw_unit_noise

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
    guidance_scale: float = 2.0  # the demo's
    seed: int = 1234
    calibrated: int = 64
    calibrated_seed: int = 0


@dataclass(frozen=True)
class Reference:
    """The float model's run of the protocol, P pictures in S model calls.

    sample: ``float32[S, P, C, h, w]``, x_t as the UNet is given it; both CFG halves share it.
    timestep: ``int64[S]``.
    contexts: ``float32[1 + P, T, D]``, text embeddings; row 0 is the empty prompt, the first half's.
    noise_pred: ``float32[S, 2, P, C, h, w]``, the float UNet's raw output, half without text first.
    noise: ``float32[P, C, h, w]``, unit starting noise.
    latents: ``float32[P, C, h, w]``, the final ones.
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


def draw_fresh_prompts(prompts: list[str], protocol: Protocol) -> list[str]:
    """The prompts to measure on: drawn from those that the calibration did not draw."""
    calibration_prompts = set(draw_prompts(prompts, protocol.calibrated, protocol.calibrated_seed))
    unused = [prompt for prompt in dict.fromkeys(prompts) if prompt not in calibration_prompts]
    if len(unused) < protocol.pictures:
        raise UsageError(
            f"{len(unused)} of the model's {len(prompts)} prompts are left after calibrating on {protocol.calibrated}, "
            f"expected at least {protocol.pictures}; calibrate on fewer or measure fewer pictures"
        )
    return draw_prompts(unused, protocol.pictures, protocol.seed)


def record_reference(
    model: LatentDiffusion, prompts: Sequence[str], protocol: Protocol, on_progress: OnProgress = ignore_progress
) -> Reference:
    """Run the float model on ``prompts`` (see :func:`draw_fresh_prompts`) and keep all that rows are compared with."""
    contexts = torch.cat([model.embed(model.tokenize([prompt])) for prompt in ["", *prompts]]).numpy()
    scheduler = make_scheduler(model.scheduler_config, protocol.steps)
    noise = draw_unit_noise(model.latents.shape, [(protocol.seed, i) for i in range(len(prompts))])
    float_unet = predict_from_module(model.unet)
    samples: list[Array] = []
    outputs: list[Array] = []

    def predict(x: Array, t: int, context: Array) -> Array:
        samples.append(x[: len(prompts)].copy())
        outputs.append(float_unet(x, t, context))
        on_progress("reference", len(samples), len(scheduler.timesteps))
        return outputs[-1]

    uncond = np.repeat(contexts[:1], len(prompts), axis=0)
    final = denoise(predict, scheduler, noise, contexts[1:], uncond, protocol.guidance_scale)
    halves = np.stack(outputs).reshape(len(samples), HALVES, *final.shape)
    return Reference(
        sample=np.stack(samples),
        timestep=np.asarray(scheduler.timesteps, np.int64),
        contexts=contexts,
        noise_pred=halves,
        noise=noise,
        latents=final,
        pixels=decode_latents(final, model),
        protocol=protocol,
        model_sha256=model.sha256,
    )


def decode_latents(latents: Array, model: LatentDiffusion) -> NDArray[np.uint8]:
    """Pictures ``uint8[P, H, W, 3]`` of final latents, by the float decoder."""
    scaled = torch.from_numpy(latents / np.float32(model.latents.scaling_factor))
    with torch.no_grad():
        return pixels_from_decoded(torch.cat([model.vae_decoder(piece) for piece in scaled.split(8)]).numpy())


def step_sqnr_db(predict: Predict, reference: Reference, on_progress: OnProgress = ignore_progress) -> list[float]:
    """Per model call, SQNR in dB of the UNet's raw output on the reference's own inputs, all pictures and halves."""
    context = np.concatenate([reference.uncond, reference.cond])
    curve = []
    for step, (x, t) in enumerate(zip(reference.sample, reference.timestep, strict=True)):
        prediction = predict(np.concatenate([x, x]), int(t), context)
        curve.append(sqnr_db(reference.noise_pred[step].reshape(prediction.shape), prediction))
        on_progress("UNet output by step", step + 1, len(reference.timestep))
    return curve


def pictures_psnr_db(
    predict: Predict, reference: Reference, model: LatentDiffusion, on_progress: OnProgress = ignore_progress
) -> list[float]:
    """Per picture, PSNR in dB at 8 bits of the whole loop run with ``predict`` from the reference's noise."""
    scheduler = make_scheduler(model.scheduler_config, reference.protocol.steps)

    def on_step(index: int, _t: int, _x: Array) -> None:
        on_progress("pictures", index + 1, len(scheduler.timesteps))

    guidance = reference.protocol.guidance_scale
    final = denoise(predict, scheduler, reference.noise, reference.cond, reference.uncond, guidance, on_step)
    pairs = zip(reference.pixels.astype(np.float32), decode_latents(final, model).astype(np.float32), strict=True)
    return [min(psnr_db(expected, actual, peak=255.0), SAME_PICTURE_DB) for expected, actual in pairs]


def picture_psnr_db(
    predict: Predict, reference: Reference, model: LatentDiffusion, on_progress: OnProgress = ignore_progress
) -> float:
    """Mean over pictures of :func:`pictures_psnr_db`."""
    return float(np.mean(pictures_psnr_db(predict, reference, model, on_progress)))


def pair_predict(predict: Predict) -> Predict:
    """``predict`` of a static batch of 2, one picture's two halves, made to take any number of pictures.

    The batch holds all pictures' halves without text and then those with text, as :func:`denoise` gives it.
    """

    def predict_pairs(x: Array, t: int, context: Array) -> Array:
        count = len(x) // HALVES
        out = np.empty_like(x)
        for i in range(count):
            out[i::count] = predict(x[i::count], t, context[i::count])
        return out

    return predict_pairs


def predict_from_session(session: Session) -> Predict:
    """The UNet of an engine's session, a graph of static batch 2."""

    def predict(x: Array, t: int, context: Array) -> Array:
        feeds: dict[str, AnyArray] = {
            "sample": x,
            "timestep": np.array(t, np.int64),
            "encoder_hidden_states": context,
        }
        return session.run(feeds)["noise_pred"]

    return pair_predict(predict)


def predict_from_module(component: TorchComponent, batch: int = TORCH_BATCH) -> Predict:
    """A torch UNet, float or simulated, ``batch`` rows a call."""

    def predict(x: Array, t: int, context: Array) -> Array:
        pieces = zip(torch.from_numpy(x).split(batch), torch.from_numpy(context).split(batch), strict=True)
        with torch.no_grad():
            return torch.cat([component(sample, torch.tensor(t), text) for sample, text in pieces]).numpy()

    return predict


def save_reference(reference: Reference, path: Path) -> None:
    """Write to a safetensors file, atomically."""
    from safetensors.numpy import save_file

    header = json.dumps({"protocol": asdict(reference.protocol), "model_sha256": reference.model_sha256})
    with stage_file(path) as scratch:
        arrays = {name: np.ascontiguousarray(getattr(reference, name)) for name in ARRAYS}
        save_file(arrays, scratch, metadata={"qdeploy_reference": header})


def load_reference(path: Path) -> Reference:
    """Read what :func:`save_reference` wrote."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()["qdeploy_reference"])
        arrays = {name: file.get_tensor(name) for name in ARRAYS}
    return Reference(**arrays, protocol=Protocol(**header["protocol"]), model_sha256=header["model_sha256"])
