import sys

from lib_estimate.interfaces.cli import main

sys.exit(main())
