"""The CUDA backend: the layers on torch and bitsandbytes, on one GPU or on torch's CPU device."""
