"""The files that steps hand on: the QuantTable, the bundle, receipts and the noise correction. No torch."""
