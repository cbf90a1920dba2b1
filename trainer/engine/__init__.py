"""One training step: the DeepSpeed engine, losses, schedules, averages, and the step that is compiled."""
