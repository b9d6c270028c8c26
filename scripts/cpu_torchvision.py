"""Makes the installed torchvision importable beside a CPU build of torch.

torchvision's wheel on PyPI is compiled for CUDA. Beside a CPU build of torch its compiled operators do not load, and
the import fails because their fake kernels are registered for operators that do not exist. The transforms that
processors use are written in Python, so the declarations of the operators are enough. Does nothing where torchvision
works or is not installed.
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

DECLARATIONS = """\
import torch as _torch

_declared = _torch.library.Library("torchvision", "FRAGMENT")  # added by scripts/cpu_torchvision.py
for _name in ("nms", "qnms"):
    _declared.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def works() -> bool:
    """Whether torchvision can be imported."""
    return subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode == 0


def main() -> int:
    """Repair the installation if it needs it; exit code 1 if torchvision still cannot be imported."""
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None or works():
        return 0
    file = Path(spec.origin)
    file.write_text(DECLARATIONS + file.read_text())
    if works():
        return 0
    print("torchvision cannot be imported beside this torch; install the one that belongs to it.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
