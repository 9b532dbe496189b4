"""Text to tokens and blends: what the main job needs, and the tools of a large corpus.

`preprocess/`: documents to Megatron's `.bin/.idx`; `rephrase/`: verified rewritings; `blend/`: what
each stage reads. The files beside them serve `make pretrain`: documents, deduplication, tokenizer,
n-gram baselines; of these only `tokenize.py`, which writes with upstream's IndexedDatasetBuilder,
and `windows.py`, which reads with upstream's GPTDataset, import torch.
"""
