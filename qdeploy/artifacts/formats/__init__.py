"""The graph formats, one a file: what a file says of itself, read without the libraries that run or make it."""
