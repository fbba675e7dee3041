"""Ranges of activations and scales of weights: statistics, histograms, observers, equalization."""
