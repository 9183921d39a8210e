"""Text to token shards (`prepare`), and token shards to packed batches (`pipeline`)."""
