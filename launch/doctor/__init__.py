"""What `hydrazero doctor` reports about this machine and this installation."""
