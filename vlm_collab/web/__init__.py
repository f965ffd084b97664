"""HTTP code of both servers, the gateway and the service. Needs the `server` or `gateway` extra."""
