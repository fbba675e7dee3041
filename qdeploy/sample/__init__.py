"""Many pictures of one bundle, each in a file of its own, made here or on a Ray cluster. No torch."""
