"""Helpers for the command lines of edge and server."""
