"""Folders that serve an encoder without fedmerge: sentence-transformers, ONNX or OpenVINO."""
