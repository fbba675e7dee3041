"""The metrics, one a file: arrays in, numbers out; computed by torchmetrics where it has them."""
