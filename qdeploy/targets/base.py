"""What an engine computes, which the simulator needs to know so that both do the same arithmetic."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Numerics:
    """What a target's engine computes; :func:`qdeploy.simulate.simulator.build_simulator` simulates just that.

    The defaults are the numerics that calibration fits layers under.

    conv_output_quantized: a Q follows every convolution but 1x1 ones, which become MatMul.
    half_range_weights: 8-bit weights keep within +-64, exact and fast on every processor; otherwise within +-127.
    signed_activations: codes are int8 around 0, without a zero point.
    two_passes: layers that the table reads in two passes are; otherwise they stay in float.
    quantized_attention: the attentions' own products take the table's bits; otherwise they stay in float.
    float_type: "fp32" or "fp16", of all that is not in integers.
    """

    conv_output_quantized: bool = False
    half_range_weights: bool = True
    signed_activations: bool = False
    two_passes: bool = True
    quantized_attention: bool = True
    float_type: str = "fp32"


CALIBRATION_NUMERICS = Numerics()
