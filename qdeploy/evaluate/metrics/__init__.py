"""The measures, one a file, arrays in and numbers out; torchmetrics does the mathematics where it has it."""
