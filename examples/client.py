"""Pictures from a service by OpenAI's client: python examples/client.py http://127.0.0.1:8000, pictures to client/."""

import base64
import sys
from pathlib import Path

import openai

out = Path("client")
out.mkdir(exist_ok=True)
client = openai.OpenAI(base_url=f"{sys.argv[1].rstrip('/')}/v1", api_key="none")
model = next(iter(client.models.list())).id

# One picture, by a seed: the same request makes the same picture again.
made = client.images.generate(model=model, prompt="a cat", extra_body={"num_inference_steps": 10, "seed": 7})
(out / "cat.png").write_bytes(base64.b64decode(made.data[0].b64_json))
print("seed:", made.data[0].seed)

# Previews while it is made; leaving the loop early cancels it.
events = client.images.generate(
    model=model, prompt="a dog", stream=True, partial_images=2, extra_body={"num_inference_steps": 10}
)
for event in events:
    name = f"dog-{event.partial_image_index}" if event.type.endswith("partial_image") else "dog"
    (out / f"{name}.png").write_bytes(base64.b64decode(event.b64_json))

# What cannot be served says which field is at fault.
try:
    client.images.generate(model=model, prompt="a cat", size="1x1")
except openai.BadRequestError as exc:
    print(f"refused: {exc.param}")
print("done:", sorted(path.name for path in out.iterdir()))
