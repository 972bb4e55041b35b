"""`python -m pisa_compile` is the same as `pisa`."""

from .cli import main

if __name__ == "__main__":
    main()
