"""How a traced graph becomes ncnn's files: each ONNX operation as ncnn's layers, without the batch."""
