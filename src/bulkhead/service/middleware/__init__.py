"""Middlewares: one file each. `Middleware` is the base for one's own."""

from bulkhead.service.middleware.base import Middleware, Submission

__all__ = ["Middleware", "Submission"]
