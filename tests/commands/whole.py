"""Every option that names a place to write, by command: the arguments before it; BUNDLE stands for one."""

from __future__ import annotations

OUTPUT_OPTIONS = {"-o", "--json", "--html", "--plot"}
EVALUATE = ("evaluate", "BUNDLE", "--prompts", "prompts.txt", "--metrics", "psnr")
FILE_COMMANDS = {
    "calibrate -o": ("calibrate", "builtin:emoji", "-o"),
    "quantize -o": ("quantize", "builtin:emoji", "--calib", "calibration.safetensors", "-o"),
    "generate -o": ("generate", "BUNDLE", "a cat", "-o"),
    "bench --json": ("bench", "BUNDLE", "--json"),
    "bench --html": ("bench", "BUNDLE", "--html"),
    "evaluate --html": (*EVALUATE, "-o", "build/no-such-folder", "--html"),
    "inspect --plot": ("inspect", "w8a8.safetensors", "--plot"),
}
FOLDER_COMMANDS = {
    "triton -o": ("triton", "BUNDLE", "-o"),
    "export -o": ("export", "builtin:emoji", "-o"),
    "evaluate -o": (*EVALUATE, "-o"),
    "run -o": ("run", "recipes/lsun_churches_w8a8.toml", "-o"),
    "demo -o": ("demo", "-o"),
}
