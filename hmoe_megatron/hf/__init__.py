"""Hugging Face: configuration and model, which every exported directory holds, and conversion both ways."""
