"""Caches and their sizes, sampling, and text generation."""
