"""`python -m kp_cli`."""

from kp_cli import main

main()
