"""What may leave the device, and the log of what left."""
