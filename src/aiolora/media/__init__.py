"""Images and recordings: from what a caller sends to what an encoder is given. No adapters, no engine."""
