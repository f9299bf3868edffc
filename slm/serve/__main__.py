"""`python -m slm.serve MODEL`."""

import sys

from slm.serve.cli import serve_command

if __name__ == "__main__":
    sys.exit(serve_command(sys.argv[1:]))
