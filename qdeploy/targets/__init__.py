"""One file a target: everything about what its bundles are made for. No torch."""
