"""Graph passes over onnx-ir models, one file a pass; each changes the model in place and returns a count."""
