"""The models behind the questions of synthesis."""
