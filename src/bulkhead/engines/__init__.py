"""Where workers live. Each engine carries out the kernel's instructions; so far there is one, on OS processes."""
