"""Learned rounding: GPTQ's start, AdaRound, and the reconstruction of one block after the other."""
