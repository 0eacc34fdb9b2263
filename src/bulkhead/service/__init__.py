"""The durable queue: an application's tasks, their jobs kept by a backend, and the workers that run them."""
