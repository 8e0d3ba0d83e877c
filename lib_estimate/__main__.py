import sys

from lib_estimate.cli import main

sys.exit(main())
