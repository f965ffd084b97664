"""Figures and tables from runs."""
