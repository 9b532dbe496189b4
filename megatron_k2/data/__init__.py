"""Text to tokens: documents, deduplication, tokenizer, Megatron's `.bin/.idx`, n-gram baselines.

What the main job (`make pretrain`) needs, shaped so that blending, Kimi's own tokenizer and
rephrasing can be added as further files. Nothing here imports torch except `tokenize.py`, which
writes with upstream's IndexedDatasetBuilder, and `windows.py`, which reads with upstream's
GPTDataset.
"""
