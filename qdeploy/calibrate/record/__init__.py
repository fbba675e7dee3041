"""Recording a calibration set: one file for each mode, and the prompts and pictures that they read."""
