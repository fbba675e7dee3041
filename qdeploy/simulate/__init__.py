"""Quantized torch modules: they compute what the integer graph computes, and export themselves as Q/DQ.

Custom ops (``ops``) stand for ONNX's QuantizeLinear and DequantizeLinear. In PyTorch they do the
arithmetic of :mod:`qdeploy.base.numerics`; :mod:`qdeploy.export.graph` translates them one to one.
So the simulator *is* the exported graph, and no layer name has to be matched to an ONNX node.
"""
