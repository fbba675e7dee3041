"""Code shared by the engines for NVIDIA's GPUs: the machine, device memory, profiles, built engines."""
