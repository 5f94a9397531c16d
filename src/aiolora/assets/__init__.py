"""Small samples to try things with."""
