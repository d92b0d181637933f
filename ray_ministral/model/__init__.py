"""The model in chunks: Hugging Face's vision tower and projector, Megatron-core's decoder.

Knows torch, transformers and (in `language` and `attention` alone) megatron. Knows nothing of pipelines, Ray or files
other than a Hugging Face model directory.
"""
