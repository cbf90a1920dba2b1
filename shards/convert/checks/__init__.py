"""Checks of the labels of a task, whose findings are sentences in its manifest."""
