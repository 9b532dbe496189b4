"""Safety: prompts that must be declined, prompts that must be answered, and a loop that evolves."""
