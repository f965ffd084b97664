"""Reports: figures, tables and text from runs."""
