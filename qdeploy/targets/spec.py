"""What each target's graph needs: its engine, opset, number types and limits, with the reasons for what it has not."""

from __future__ import annotations

from dataclasses import dataclass

from qdeploy.base.errors import UsageError
from qdeploy.targets.base import Numerics


@dataclass(frozen=True)
class TargetSpec:
    """What one target's graph needs; its lowering lives in ``qdeploy/export/targets``.

    engine: that runs the bundle.
    numerics: what it computes.
    integers: whether quantized graphs can be made.
    parity_engine: that stands in for ``engine`` in the export gate on machines where ``engine`` does not run.
    """

    name: str
    engine: str
    opset: int
    numerics: Numerics
    integers: bool = True
    parity_engine: str | None = None

    @property
    def precisions(self) -> tuple[str, ...]:
        """What ``--precision`` may say, the float one first."""
        return (self.numerics.float_type, *(["int8"] if self.integers else []))

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
        TargetSpec("ort-cpu", "ort-cpu", opset=20, numerics=Numerics(conv_output_quantized=True)),
        TargetSpec("openvino", "openvino", opset=20, numerics=Numerics()),
        TargetSpec(
            "tensorrt",
            "tensorrt",
            opset=20,  # of 19 and later, whose Q and DQ take fp16 scales, the last that ONNX Runtime reads s8 codes in
            numerics=Numerics(
                half_range_weights=False,
                signed_activations=True,
                two_passes=False,
                quantized_attention=False,
                float_type="fp16",
            ),
            parity_engine="ort-cpu",
        ),
        TargetSpec(
            "ort-cuda",
            "ort-cuda",
            opset=20,
            numerics=Numerics(float_type="fp16"),
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
