"""Faster computation in bfloat16: packed weights on a CPU, sequences end to end, frozen layers in training."""
