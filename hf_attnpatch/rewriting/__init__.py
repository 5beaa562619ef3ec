"""What a command that writes a checkpoint owes to the one that it was given."""
