"""Fused GPU kernels for vdm: import the module that you use, such as `kernels.temporal_attention`.

This file holds a docstring and nothing else, on purpose. Hugging Face publishes a package of the same import name, and
transformers probes for it: a failing import here, or a version attribute, breaks transformers for whoever runs it from
this folder.
"""
