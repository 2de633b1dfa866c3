"""Calibrated quantization: codes and scales chosen by what a text's activations make of them."""
