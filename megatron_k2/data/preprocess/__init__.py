"""Documents to Megatron's ``.bin/.idx``: what ``tools/preprocess_data.py`` does.

``sources`` finds input files, ``line_reader`` and ``records`` read a block of one, encoders give
ids, ``sequences`` the tokens that stock Megatron writes. A worker (``worker``) writes one part a
block (``parts``); ``merge`` joins parts in the order of the input, without duplicates, and notes in
a journal how far it is; ``run`` hands out blocks, ``publish`` gives the files their names. Nothing
here imports torch or Megatron: a start costs 0.3 s.
"""
