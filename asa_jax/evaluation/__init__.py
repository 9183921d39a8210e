"""Measures a trained run: perplexity, retrieval, recall and multiple choice, and reports it."""
