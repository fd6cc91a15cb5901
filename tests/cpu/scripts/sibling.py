"""Lies beside the script that imports it."""

SIBLING = "sibling found"
