"""The run file, the DeepSpeed configuration, and what follows from both about precision and tasks."""
