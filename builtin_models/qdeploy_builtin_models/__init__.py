"""Weights of ``builtin:emoji`` and ``builtin:emoji-uncond``, a folder each."""
