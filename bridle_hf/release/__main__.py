"""`python -m bridle_hf.release --output_dir OUT --checkpoints_dir DIR`: the released checkpoints, from nothing."""

import logging
import sys

import bridle_hf
from bridle_hf.common.arguments import parse_command_line
from bridle_hf.common.errors import ArgumentError, RunError


def main(argv: list[str]) -> int:
    """Exit status: 0; 2 after one line on what was wrong from the start, 1 after one on what ended the work."""
    bridle_hf.load()
    from bridle_hf.release.arguments import ReleaseArguments
    from bridle_hf.release.release import make_releases

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        (args,) = parse_command_line(ReleaseArguments, argv=argv, takes_recipe=False)
        for line in make_releases(args):
            print(line, flush=True)
    except (ArgumentError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
