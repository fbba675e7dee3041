"""What caching a UNet's deep features would bring: ``python -m benchmarks.feature_cache``, in torch and float32.

Every n-th call is whole; the calls between take the deep features of the last whole one and compute only the upper
resolutions anew (DeepCache, Ma et al. 2024, arXiv 2312.00858). The rival forecasts those calls by reuse, at no cost.
PSNR is that of final latents to the trajectory with every call.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn

from qdeploy.base.files import stage_file
from qdeploy.base.numerics import psnr_db
from qdeploy.calibrate.record.conditioning import encode_prompts
from qdeploy.calibrate.record.prompts import draw_prompts, read_prompts
from qdeploy.demo import GUIDANCE
from qdeploy.models.components import trace_layers
from qdeploy.models.latent_diffusion import LatentDiffusion
from qdeploy.models.source import load_model
from qdeploy.reporting.environment import describe_environment
from qdeploy.reporting.tables import format_markdown
from qdeploy.sampling import make_scheduler, replace_scheduler
from qdeploy.sampling.call_schedule import EVERY_CALL, CallSchedule
from qdeploy.sampling.forecast import Forecast
from qdeploy.sampling.guidance import Array
from qdeploy.sampling.loop import denoise, draw_unit_noise

HERE = Path(__file__).parent
INTERVALS = (2, 3, 5)
COLUMNS = ("guidance scale", "interval", "calls between", "MACs of one", "of the picture", "PSNR to every call, dB")
Predict = Callable[[Array, int, Mapping[str, Array]], Array]


@dataclass(frozen=True)
class CacheFigures:
    """One way at one interval; ``between_macs`` is what a call between costs, as a share of a whole one."""

    guidance_scale: float
    interval: int
    between: str
    between_macs: float
    psnr_db: float

    @property
    def picture_macs(self) -> float:
        """MACs of all calls, as a share of those of every call whole."""
        return (1 + (self.interval - 1) * self.between_macs) / self.interval


class CachedUNet:
    """A UNet whose blocks below the ``kept`` upper resolutions can give their last outputs again."""

    def __init__(self, model: LatentDiffusion, kept: int) -> None:
        inner: Any = model.unet.inner  # diffusers' class, of several
        self._model = model
        down, up = list(inner.down_blocks), list(inner.up_blocks)
        self._deep: list[nn.Module] = [*down[kept:], inner.mid_block, *up[: len(up) - kept]]
        self._outputs: dict[nn.Module, Any] = {}

    def predict(self, x: Array, t: int, context: Mapping[str, Array], *, is_whole: bool) -> Array:
        """The output ``float32[B, C, H, W]``, of a whole call or of one between."""
        feeds = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in context.items()}
        with torch.no_grad(), self._store() if is_whole else self._replay():
            output: Array = self._model.unet(torch.from_numpy(x), torch.tensor(t).expand(len(x)), **feeds).numpy()
        return output

    def measure_share(self, feeds: dict[str, torch.Tensor]) -> float:
        """MACs of a call between, as a share of a whole one's."""
        deep = {part for module in self._deep for part in module.modules()}
        layers = trace_layers(self._model.unet, feeds)
        return sum(call.macs for call in layers if call.module not in deep) / sum(call.macs for call in layers)

    @contextmanager
    def _store(self) -> Iterator[None]:
        """Keep the outputs of the deep blocks."""
        handles = [module.register_forward_hook(self._keep) for module in self._deep]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, module: nn.Module, _inputs: object, output: Any) -> None:
        self._outputs[module] = output

    @contextmanager
    def _replay(self) -> Iterator[None]:
        """Let the deep blocks return what was kept, without computing."""
        for module in self._deep:
            module.forward = lambda *_, output=self._outputs[module], **__: output
        try:
            yield
        finally:
            for module in self._deep:
                del module.forward


def measure_ways(
    model: LatentDiffusion, run: Callable[[Predict, CallSchedule], Array], guidance_scale: float
) -> Iterator[CacheFigures]:
    """Every interval by reuse and by features of each depth."""
    inner: Any = model.unet.inner
    depths = {kept: CachedUNet(model, kept) for kept in range(1, len(inner.down_blocks))}
    whole = depths[1]

    def predict_whole(x: Array, t: int, context: Mapping[str, Array]) -> Array:
        return whole.predict(x, t, context, is_whole=True)

    exact = run(predict_whole, EVERY_CALL)
    for interval in INTERVALS:
        forecast = Forecast("reuse", warmup=0, last=0, window=interval, growth=0)
        final = run(predict_whole, CallSchedule(forecast=forecast))
        yield CacheFigures(guidance_scale, interval, "forecast by reuse", 0.0, compare(exact, final))
        for kept, cached in depths.items():
            share = cached.measure_share(model.make_example("unet", 1))
            final = run(alternate(cached, interval), EVERY_CALL)
            name = f"upper {kept} of {len(depths) + 1} resolutions"
            yield CacheFigures(guidance_scale, interval, name, share, compare(exact, final))


def alternate(cached: CachedUNet, interval: int) -> Predict:
    """Predictions of one trajectory, every ``interval``-th by a whole call."""
    timesteps: list[int] = []

    def predict(x: Array, t: int, context: Mapping[str, Array]) -> Array:
        if not timesteps or timesteps[-1] != t:
            timesteps.append(t)
        return cached.predict(x, t, context, is_whole=(len(timesteps) - 1) % interval == 0)

    return predict


def compare(exact: Array, final: Array) -> float:
    """PSNR of final latents in dB."""
    return float(psnr_db(exact, final, peak=float(np.ptp(exact))))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", "source", default="builtin:emoji", show_default=True, help="A text-to-image model.")
@click.option("--count", type=click.IntRange(1), default=6, show_default=True, help="Pictures.")
@click.option("--steps", type=click.IntRange(6), default=25, show_default=True, help="Of DPM-Solver++.")
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "feature_cache.json", help="Report to write.")
def main(source: str, count: int, steps: int, out: Path) -> None:
    """Make the pictures' latents in every way, print the table and write the report."""
    model = load_model(source)
    config = replace_scheduler(model.scheduler_config, "dpm++")
    conditioning = encode_prompts(model, draw_prompts(read_prompts(None, model.folder), count, seed=0), count)
    assert conditioning is not None  # only an unconditional model has none
    cond = conditioning.select(conditioning.rows[:count])
    uncond = conditioning.select(np.zeros(count, np.int64))
    noise = draw_unit_noise(model.latents.shape, [(0, number) for number in range(count)])
    figures: list[CacheFigures] = []
    for guidance_scale in (GUIDANCE, 7.5):

        def run(predict: Predict, calls: CallSchedule, guidance_scale: float = guidance_scale) -> Array:
            return denoise(predict, make_scheduler(config, steps), noise, cond, uncond, guidance_scale, calls=calls)

        figures += measure_ways(model, run, guidance_scale)
    report = {"environment": describe_environment([], None), "model": source, "count": count, "steps": steps}
    with stage_file(out) as scratch:
        rows = [asdict(each) for each in figures]
        scratch.write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    cells = [
        (
            f"{each.guidance_scale:g}",
            str(each.interval),
            each.between,
            f"{each.between_macs:.0%}",
            f"{each.picture_macs:.0%}",
            f"{each.psnr_db:.1f}",
        )
        for each in figures
    ]
    click.echo(format_markdown(COLUMNS, cells))


if __name__ == "__main__":
    main()
