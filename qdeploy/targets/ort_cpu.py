"""ONNX Runtime's CPU provider.

It makes QLinearConv of DQ-Conv-Q by itself, and only where a Q follows; a convolution whose result the table leaves in
float becomes a product over its patches here. Linear layers become its MatMulIntegerToFloat here, with their bias,
which it would leave as an Add; float attention its MultiHeadAttention, which never holds all scores. 4-bit weights are
stored as INT4 and run on the same int8 kernels.
"""

from __future__ import annotations

from qdeploy.targets.base import Numerics, ParityLimits, Target

TARGET = Target(
    name="ort-cpu",
    engine="ort-cpu",
    opset=20,
    numerics=Numerics(conv_output_quantized=True),
    passes=(
        "fuse_attention",
        "expand_attention",
        "name_by_layer",
        "share_quantize",
        "fold_ratio",
        "fold_offset",
        "split_gate",
        "unfold_convolution",
        "fuse_linear",
        "unshare_weights",
        "store_fp16",
        "store_int4",
        "check_unshared",
    ),
    missing_precisions={
        "fp16": "ONNX Runtime has no fp16 kernels for CPUs and would cast every value to float32 and back",
    },
    # Sums in another order are 130 dB; a deep graph loses some of that, a wrong one all.
    parity=ParityLimits(float_min_db=80.0),
)
