"""What a run costs: memory, time and messages of a step."""
