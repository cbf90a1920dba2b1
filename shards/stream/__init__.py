"""The training stream: shards become batches."""
