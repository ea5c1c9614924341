"""Datasets, from files or drawn, and the path from them to the model."""
