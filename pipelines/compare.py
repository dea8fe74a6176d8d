"""Compare methods as a Ray job: ray job submit --working-dir . -- python pipelines/compare.py COMPARISON [options].

The same as `teddy-ray compare COMPARISON [options]`.
"""

import sys

from teddy_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
