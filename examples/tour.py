"""A tour of the runtime: python examples/tour.py BUNDLE (exported --with-encoder), pictures to tour/."""

import sys
import threading
from pathlib import Path

import numpy as np

import qdeploy
from qdeploy.base.errors import CancelledError, DeadlineError, RequestError

out = Path("tour")
out.mkdir(exist_ok=True)

with qdeploy.load(sys.argv[1], threads=2) as pipe:
    # Text to image: the seed decides all, whatever runs concurrently or is in the batch.
    cat = pipe("a cat", negative_prompt="blue", steps=10, guidance_scale=5.0, guidance_rescale=0.3, seed=1)
    cat.images[0].save(out / "cat.png")
    print("milliseconds:", {name: round(spent) for name, spent in cat.timings_ms.items()})

    # A batch: two prompts, two pictures each; what was too long to be read is told.
    batch = pipe(["a cat", "a dog " * 40], steps=5, count=2, weighting=True)
    print("pictures:", batch.pixels.shape, "not read:", [len(lost) for lost in batch.truncated.values()])

    # Image to image, and inpainting: white is repainted.
    pipe("a red cat", image=cat.images[0], strength=0.6, steps=10).images[0].save(out / "red-cat.png")
    mask = np.zeros(cat.pixels.shape[1:3], bool)
    mask[: len(mask) // 2] = True
    pipe("a hat", image=cat.images[0], mask=mask, steps=10).images[0].save(out / "hat.png")

    # Watching and stopping: a callback, another thread, a deadline. The pipeline stays usable.
    pipe("a cat", steps=4, callback=lambda step: print(f"step {step.index + 1} of {step.count}"))
    stop = threading.Event()
    stop.set()
    for arguments in ({"cancel": stop}, {"deadline_s": 0.001}, {"steps": 0}):
        try:
            pipe("a cat", **arguments)
        except (CancelledError, DeadlineError, RequestError) as exc:
            print(type(exc).__name__, "-", exc)

    # Latents out and in, and a second pipeline over the same sessions.
    with pipe.share() as second:
        assert np.array_equal(second.decode(cat.latents), cat.pixels)

with qdeploy.load(sys.argv[1], low_memory=True) as frugal:  # one component in memory at a time
    assert np.array_equal(frugal("a cat", steps=2).pixels.shape, cat.pixels.shape)
print("done:", sorted(path.name for path in out.iterdir()))
