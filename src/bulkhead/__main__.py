"""`python -m bulkhead` is the command `bulkhead`."""

from bulkhead.cli import main

if __name__ == "__main__":
    main()
