"""A corpus of known, invented facts for experiments on what a model learns from which wording.

people.py invents people, wordings.toml says how their facts are told (as source, rewritten, asked
for), rewriter.py is the rule that rewrites, server.py serves it as a language model is served.
"""
