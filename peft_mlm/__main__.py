"""`python -m peft_mlm`, `accelerate launch -m peft_mlm train ...`, `torchrun -m peft_mlm train ...`."""

import sys

from peft_mlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
