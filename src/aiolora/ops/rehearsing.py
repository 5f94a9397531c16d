"""Whether kernels are to be compiled and not to be launched: known to ops and to launches."""

from contextvars import ContextVar

rehearsing: ContextVar[bool] = ContextVar("rehearsing", default=False)
