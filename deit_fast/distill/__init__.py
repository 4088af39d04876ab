"""Training small models from a teacher: data, loss, loop and evaluation."""
