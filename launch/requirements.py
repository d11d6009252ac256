"""Print what setup.cfg requires, with some of its extras: a container's layer without our code.

python launch/requirements.py cuda12,gcs
"""

import configparser
import sys
from pathlib import Path


def requirements(setup: Path, extras: list[str]) -> list[str]:
    """Requirements of a package and of some of its extras, as pip takes them.

    Raises:
      SystemExit: for an extra that is not there.
    """
    config = configparser.ConfigParser()
    config.read_string(setup.read_text())
    known = config["options.extras_require"]
    found = config["options"]["install_requires"].split("\n")
    for extra in extras:
        if extra not in known:
            sys.exit(f"setup.cfg has no extra {extra!r}; known: {', '.join(known)}")
        found += known[extra].split("\n")
    return [line.strip() for line in found if line.strip()]


if __name__ == "__main__":
    print("\n".join(requirements(Path("setup.cfg"), [x for x in sys.argv[1].split(",") if x])))
