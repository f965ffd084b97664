"""Model runtimes with the interface `server_plugin.backends.base.Backend`, imported when used."""
