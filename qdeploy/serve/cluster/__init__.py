"""Bundles on Ray Serve: replicas elsewhere that make the pictures of the engine room here."""
