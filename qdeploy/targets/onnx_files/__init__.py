"""How targets keep their graphs as ONNX files: writing, the products in them, and sizes that they leave open."""
