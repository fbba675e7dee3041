"""OpenVINO's CPU plugin.

It runs Conv and MatMul between DequantizeLinear in integers directly, and needs no Q after them.
4-bit weights are stored as INT4 and run on int8 kernels.
"""

from __future__ import annotations

from qdeploy.targets.base import Numerics, ParityLimits, Target

TARGET = Target(
    name="openvino",
    engine="openvino",
    opset=20,
    numerics=Numerics(),
    passes=(
        "expand_attention",
        "name_by_layer",
        "share_quantize",
        "fold_ratio",
        "split_gate",
        "store_fp16",
        "store_int4",
    ),
    missing_precisions={"fp16": "the engine computes in float32 on CPUs"},
    # Sums in another order are 130 dB; a deep graph loses some of that, a wrong one all.
    parity=ParityLimits(float_min_db=80.0),
)
