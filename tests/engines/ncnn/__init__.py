"""The engine ncnn and the check of its files."""
