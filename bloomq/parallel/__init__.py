"""Tensor parallelism: one model on several processes, each with a slice of every matrix.

`cuts` says which slice, `slices` cuts it out of the stored form, `layers` are a backend's layers
on slices, `group` is what the processes tell each other, and `workers` is how they start.
"""
