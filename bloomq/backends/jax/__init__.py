"""The JAX backend: the layers as traced functions that XLA compiles, on whatever device JAX finds.

Everything is float32. Weights stay in their stored layout and are restored inside the compiled
function. Layers are closures over arrays or tracers, so a model may also be built inside a traced
function, over a tree of parameters (`bloomq.flax`).
"""
