"""The CUDA backend: layers in PyTorch, bitsandbytes' operations and Triton's kernels, on one GPU.

Packs are brought to the GPU block by block and laid out anew there. The residual stream, softmax
and logits are float32, products take 16-bit inputs. torch is imported by this package's modules
alone (`device` inside its functions), and all of it runs on torch's CPU device too, for tests.
"""
