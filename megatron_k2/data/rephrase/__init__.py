"""Verified rewritings of documents, as Kimi K2's report (2.2) has them: `tools/rephrase_data.py`.

Texts are cut into excerpts and chunks (`chunks.py`); each chunk is rewritten by a language model
behind an OpenAI-compatible server with the excerpt and what was rewritten so far as context
(`rewriter.py`, `client.py`), in a style and perspective sampled per document (`prompts.py`), and is
kept only if the checks of `fidelity.py` pass. `journal.py` makes a killed run resume per chunk.
The report names no prompts, thresholds, metric or model; those here are our own.
"""
