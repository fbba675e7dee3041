"""Pictures of every line of a text file: python examples/batch.py BUNDLE PROMPTS.txt OUT; goes on where it stopped."""

import logging
import sys
from pathlib import Path

import qdeploy
from qdeploy.base.errors import RequestError

bundle, prompts, out = sys.argv[1], Path(sys.argv[2]).read_text(encoding="utf-8-sig").splitlines(), Path(sys.argv[3])
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
out.mkdir(parents=True, exist_ok=True)
with qdeploy.load(bundle) as pipe:
    for number, prompt in enumerate(prompts):
        path = out / f"{number:05d}.png"
        if path.exists() or not prompt.strip():
            continue
        try:
            result = pipe(prompt, steps=10, guidance_scale=5.0, seed=number)
        except RequestError as exc:
            logging.error("line %d: %s", number + 1, exc)
            continue
        scratch = path.with_suffix(".part")
        result.images[0].save(scratch, format="PNG")
        scratch.replace(path)
        logging.info("%s: %s, UNet %.0f ms", path.name, prompt, result.timings_ms["unet"])
