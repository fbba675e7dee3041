"""What one_step.cpp reads, of a prompt: `python examples/ncnn/write_request.py BUNDLE PROMPT request.txt [STEP]`."""

import json
import sys
from pathlib import Path

import numpy as np

from qdeploy.artifacts.bundle import SCHEDULER, open_bundle, tokenizer_file
from qdeploy.runtime.tokenizer import Tokenizer
from qdeploy.sampling import make_scheduler

GUIDANCE, STEPS, SEED = 5.0, 25, 0

bundle = open_bundle(sys.argv[1])
latents, step = bundle.manifest.latents, int(sys.argv[4]) if len(sys.argv) > 4 else 0
scheduler = make_scheduler(json.loads(bundle.path(SCHEDULER).read_text()) | {"_class_name": "DDIMScheduler"}, STEPS)
alpha, sigma = scheduler.alpha_sigma(step)
negative, prompt = Tokenizer(bundle.path(tokenizer_file("text_encoder")), latents.tokens)(["", sys.argv[2]])
noise = np.random.default_rng(SEED).standard_normal(latents.shape, np.float32)
lines = [
    [len(prompt), *negative, *prompt],
    latents.shape,
    [scheduler.timesteps[step], alpha, sigma, GUIDANCE, latents.scaling_factor],
    noise.reshape(-1),
]
Path(sys.argv[3]).write_text("".join(" ".join(map(str, line)) + "\n" for line in lines))
