"""Weights from the trainer to the engine, and the gate that no unconfirmed token passes."""
