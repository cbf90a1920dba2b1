"""The run file, the DeepSpeed JSON, and what both say of precision and tasks."""
