"""A backend made of several: the layers of one model over GPUs and the CPU, in one process.

Not done: layers that lie in the CPU's memory and are streamed to a GPU to be computed there. That
would be a backend of its own at one place, whose linears hold a matrix in pinned memory and share
two buffers on the device: while one layer is computed, a second stream copies the next. It wins for
prompts only (a decode step copies each weight once for one token, so the bus is the bound, which is
slower than the CPU's own memory), and needs no change here.
"""
