"""Time: who runs when. Books decide, stores hold bytes, one engine thread steps."""
