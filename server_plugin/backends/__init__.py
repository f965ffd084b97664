"""Model runtimes behind `server_plugin.backend.Backend`, each loaded only when asked for."""
