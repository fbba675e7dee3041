"""ONNX graphs computed by PyTorch, quantized products by integer kernels of our own: what ``torch-cuda`` runs."""
