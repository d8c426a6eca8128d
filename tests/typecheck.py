"""The checker that jaxtyping puts around every annotated function of the package in tests.

As the type checkers do, it takes an int where a float is asked for (PEP 484).
"""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
