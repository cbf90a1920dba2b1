"""Fine-tuning: runs that start from another model, with new heads that start from old ones."""
