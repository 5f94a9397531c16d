"""The OpenAI-compatible server. Needs the extra `aiolora[server]`."""

from aiolora.api.app import create_app, drain

__all__ = ["create_app", "drain"]
