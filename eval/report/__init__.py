"""Reports: figures, tables and text, made from runs."""
