"""Bundles as a service: an engine room that makes pictures in order, and HTTP interfaces that clients already speak."""
