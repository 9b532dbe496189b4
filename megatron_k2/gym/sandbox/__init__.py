"""Where programs that a model wrote run: no network, a private file system, limits on all."""
