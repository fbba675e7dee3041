"""Calibration sets, ranges and integer weights; needs the ``quantize`` extra (torch)."""
