"""The plan of a large run: memory, messages, time and data, by arithmetic from measurements."""
