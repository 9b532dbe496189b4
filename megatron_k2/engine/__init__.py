"""Generation: one protocol (``base.py``), a backend a file, and an HTTP server over any of them."""
