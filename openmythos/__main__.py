"""`python -m openmythos` is the command `openmythos`."""

from openmythos.cli import main

if __name__ == "__main__":
    main()
