"""AsyncTLS: sparse decoding by a two-level index, with keys and values in host memory."""
