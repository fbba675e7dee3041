"""What each target's graph needs: its engine, opset, number types and limits, with the reasons for what it has not."""

from __future__ import annotations

from dataclasses import dataclass

from qdeploy.base.errors import UsageError


@dataclass(frozen=True)
class TargetSpec:
    """What one target's graph needs; its lowering lives in ``qdeploy/export/targets``.

    engine: that runs the bundle.
    half_range_weights: 8-bit weights keep within +-64, exact and fast on every processor; otherwise within +-127.
    conv_output_quantized: ONNX Runtime makes an integer Conv only where a Q follows it; 1x1 ones become MatMul.
    signed_activations: codes are int8 around 0, without a zero point.
    two_passes: layers that the table reads in two passes are; otherwise they stay in float.
    quantized_attention: the attentions' own products take the table's bits; otherwise they stay in float.
    float_type: "fp32" or "fp16", of all that is not in integers.
    integers: whether quantized graphs can be made.
    parity_engine: that stands in for ``engine`` in the export gate on machines where ``engine`` does not run.
    """

    name: str
    engine: str
    opset: int
    conv_output_quantized: bool
    half_range_weights: bool = True
    signed_activations: bool = False
    two_passes: bool = True
    quantized_attention: bool = True
    float_type: str = "fp32"
    integers: bool = True
    parity_engine: str | None = None

    @property
    def precisions(self) -> tuple[str, ...]:
        """What ``--precision`` may say, the float one first."""
        return (self.float_type, "int8") if self.integers else (self.float_type,)

    def check_precision(self, precision: str) -> None:
        """UsageError with the reason unless the target's graphs come in ``precision``."""
        if precision not in PRECISIONS:
            raise UsageError(f"unknown --precision {precision!r}; known: {', '.join(PRECISIONS)}")
        if precision not in self.precisions:
            raise UsageError(
                f"--target {self.name} has no --precision {precision}: {UNSUPPORTED_REASONS[self.name, precision]}; "
                f"it exports as {' or '.join(self.precisions)}"
            )


PRECISIONS = ("fp32", "fp16", "int8")


TARGETS = {
    spec.name: spec
    for spec in (
        TargetSpec("ort-cpu", "ort-cpu", opset=20, conv_output_quantized=True),
        TargetSpec("openvino", "openvino", opset=20, conv_output_quantized=False),
        TargetSpec(
            "tensorrt",
            "tensorrt",
            opset=20,  # of 19 and later, whose Q and DQ take fp16 scales, the last that ONNX Runtime reads s8 codes in
            conv_output_quantized=False,
            half_range_weights=False,
            signed_activations=True,
            two_passes=False,
            quantized_attention=False,
            float_type="fp16",
            parity_engine="ort-cpu",
        ),
        TargetSpec(
            "ort-cuda",
            "ort-cuda",
            opset=20,
            conv_output_quantized=False,
            float_type="fp16",
            integers=False,
            parity_engine="ort-cpu",
        ),
    )
}


UNSUPPORTED_REASONS = {
    ("ort-cpu", "fp16"): "ONNX Runtime has no fp16 kernels for CPUs and would cast every value to float32 and back",
    ("openvino", "fp16"): "the engine computes in float32 on CPUs",
    ("tensorrt", "fp32"): "what is not in integers there is fp16",
    ("ort-cuda", "fp32"): "its float graph is fp16",
    ("ort-cuda", "int8"): "ONNX Runtime has no integer convolution for CUDA and would run Q and DQ one by one around "
    "float ones; --target tensorrt takes tables to GPUs",
}


def get_target(name: str) -> TargetSpec:
    """The target called ``name``; UsageError lists the known ones."""
    if name not in TARGETS:
        raise UsageError(f"unknown --target {name!r}; known targets: {', '.join(sorted(TARGETS))}")
    return TARGETS[name]
