"""Which corpora a training reads, how often, and in which stage: ``tools/blend_data.py``.

``manifest`` is the file that says so; ``corpora`` reads sizes and side files of tokenised corpora,
``rewritings`` whose rephrasing a document is; ``allotment`` gives whole documents to stages,
``repetition`` finds what would be seen too often; ``slices`` writes what Megatron reads, ``report``
and ``picture`` say what is in it. Nothing here imports torch or Megatron.
"""
