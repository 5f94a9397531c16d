"""Adapters: what a PEFT folder means, its bytes as rank pages, where they are, what they attach to."""
