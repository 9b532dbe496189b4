"""K2's layers in Megatron's terms: YaRN, norm, latent attention, router, experts and their specs.

Pure math lives in files without a Megatron import (yarn, tiled_attention, max_logit); the others
subclass upstream's modules. Importing this package changes nothing upstream.
"""
