"""Figures about bundles: latency, load time, memory and fidelity to the float twin. No torch."""
