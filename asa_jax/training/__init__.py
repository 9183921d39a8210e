"""Training: losses, optimizer, step, checkpoints, metrics."""
