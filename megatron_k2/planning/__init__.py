"""What a run would be, before it is one: built from the modules that train, not from formulas."""
