"""`python -m esmfold2_trimul_tools`: the command where it is not installed."""

from .cli import main

main()
