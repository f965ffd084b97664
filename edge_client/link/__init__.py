"""Links to servers: connecting, reconnecting, and the questions on them."""
