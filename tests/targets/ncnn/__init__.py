"""The target ncnn: its layers against ONNX Runtime, what it refuses, and whole bundles."""
