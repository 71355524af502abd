"""A whole mesh on one machine, and the commands that a user types."""
