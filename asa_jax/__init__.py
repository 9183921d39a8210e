"""Alternating Sparse Attention (ASA) language models: model, data, training, decoding, evaluation."""
