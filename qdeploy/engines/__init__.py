"""Inference engines, one file each; see :mod:`qdeploy.engines.base` for what a file must offer."""
