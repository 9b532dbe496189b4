"""Streams a planned conversion: units of bytes, read, converted and written one at a time."""
