"""Triton kernels and how they are launched: one file an op. Importing one needs triton; nothing else here does."""
