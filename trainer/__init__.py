"""Training: configuration, DeepSpeed engine, losses, loop, checkpoints, metrics, report, command line."""
