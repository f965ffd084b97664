"""Pictures as bytes: headers, bounded decoding, views and crops."""
