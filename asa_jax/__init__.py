"""Alternating Sparse Attention (ASA) language models, from data to evaluation."""
