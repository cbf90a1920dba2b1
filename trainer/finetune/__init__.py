"""Fine-tuning: runs that start from another model, with new heads that begin as old ones."""
