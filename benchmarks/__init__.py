"""Measurements that back what the README and docs claim; not part of the installed package."""
