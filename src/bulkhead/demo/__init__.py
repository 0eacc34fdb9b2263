"""What `bulkhead demo` runs: a batch on real input, with jobs that misbehave on purpose."""
