"""Model runtimes behind `server_plugin.backends.base.Backend`, each loaded only when asked for."""
