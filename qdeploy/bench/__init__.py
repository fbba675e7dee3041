"""Measure bundles: latency, load time, memory and fidelity to the float reference. No torch."""
