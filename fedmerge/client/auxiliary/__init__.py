"""Auxiliary losses and augmentations of local training; everything here stays at the client."""
