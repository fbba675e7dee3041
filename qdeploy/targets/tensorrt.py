"""TensorRT: explicit QDQ in its strongly typed form, fp16 wherever nothing is quantized.

It knows no zero points, takes biases in float and wants no Q after a convolution. Weights of 4 bits stay INT8:
TensorRT reads INT4 only for weight-only products.
"""

from __future__ import annotations

from pathlib import Path

from qdeploy.base.errors import EngineUnavailableError
from qdeploy.engines.nvidia.graph_inputs import is_static
from qdeploy.engines.nvidia.profiles import read_profile
from qdeploy.targets.base import Numerics, ParityLimits, Plans, StandIn, Target
from qdeploy.targets.nvidia.plans import build_plans, write_graph_profile
from qdeploy.targets.nvidia.trial_build import build_on_trial


def check(path: Path, component: str) -> str:
    """Check the rules, then build with TensorRT's own library where it is installed; AuditError on a refusal."""
    import onnx_ir as ir

    from qdeploy.targets.nvidia.rules import check_rules

    is_open = not is_static(path)
    if is_open:
        read_profile(path)
    check_rules(ir.load(path), component, has_profile=is_open)
    if is_open:
        return "not built on trial: its sizes are open"
    try:
        return f"built by {build_on_trial(path).library}"
    except EngineUnavailableError as exc:
        return f"not built on trial: {exc}"


TARGET = Target(
    name="tensorrt",
    engine="tensorrt",
    opset=20,  # of 19 and later, whose Q and DQ take fp16 scales, the last that ONNX Runtime reads s8 codes in
    numerics=Numerics(
        half_range_weights=False,
        signed_activations=True,
        two_passes=False,
        quantized_attention=False,
        float_type="fp16",
    ),
    passes=("expand_attention", "name_by_layer", "share_quantize", "fold_ratio", "to_fp16"),
    missing_precisions={"fp32": "what is not in integers there is fp16"},
    # Rounding constants to 11 bits is 70 dB; a deep float graph loses some of that, a wrong one all. Around integers it
    # flips some codes at the edges in the first layer already: the same noise drawn again. On a tiny text encoder's
    # few values it varied by 0.7 dB.
    parity=ParityLimits(float_min_db=40.0, engine_loss_db=1.5),
    stand_in=StandIn("ort-cpu"),
    check=check,
    plans=Plans(write_graph_profile, build_plans),
)
