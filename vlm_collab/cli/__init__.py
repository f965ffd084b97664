"""What the command lines of both sides share."""
