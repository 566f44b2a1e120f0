"""`python -m kvm2` is the `kvm2` command."""

import sys

from kvm2.cli.main import main

sys.exit(main())
