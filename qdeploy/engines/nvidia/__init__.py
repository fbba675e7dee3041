"""What the engines for NVIDIA's GPUs share: what lies on the machine, device memory, profiles, built engines."""
