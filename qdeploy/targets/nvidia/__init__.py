"""What targets for NVIDIA's GPUs share: TensorRT's rules, a trial build by its own library, plans and profiles."""
