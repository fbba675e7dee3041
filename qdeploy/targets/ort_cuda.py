"""ONNX Runtime's CUDA provider: a float graph in fp16.

Attention is its MultiHeadAttention, norms it fuses itself. It has no integer convolution, so no table is lowered for
it.
"""

from __future__ import annotations

from qdeploy.targets.base import Numerics, ParityLimits, StandIn, Target

TARGET = Target(
    name="ort-cuda",
    engine="ort-cuda",
    opset=20,
    numerics=Numerics(float_type="fp16"),
    passes=("fuse_attention", "expand_attention", "name_by_layer", "to_fp16"),
    missing_precisions={
        "fp32": "its float graph is fp16",
        "int8": "ONNX Runtime has no integer convolution for CUDA and would run Q and DQ one by one around float ones; "
        "--target tensorrt takes tables to GPUs",
    },
    # Rounding constants to 11 bits is 70 dB; a deep graph loses some of that, a wrong one all.
    parity=ParityLimits(float_min_db=40.0),
    stand_in=StandIn("ort-cpu"),
)
