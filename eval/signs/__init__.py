"""The generated benchmark: numbers, presence, colours and counts of signs in large pictures."""
