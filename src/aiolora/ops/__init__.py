"""Arithmetic: every op is a reference in PyTorch, its faster variants, a fake and one line of registration."""
