"""HTTP that the gateway and the service share. It needs the `server` or `gateway` extra."""
