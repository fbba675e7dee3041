"""From a lowered ONNX graph to a .tflite file for LiteRT: channels last, and integer layers as XNNPACK takes them."""
