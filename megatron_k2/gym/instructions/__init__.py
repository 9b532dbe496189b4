"""Instruction following: rule checks, gold answers for any combination, and a check for hacks."""
