"""FP8 with a scale a tile: storage of activations, and products as on GPUs, on any device."""
