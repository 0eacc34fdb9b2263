"""The durable queue: App, tasks, consumers."""
