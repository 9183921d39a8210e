"""Transformer language models whose layers attend in different ways."""
