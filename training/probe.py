"""Probe a frozen encoder, as `bridle probe` does.

python training/probe.py --model DIR_OR_HUB_ID --data DIR_OR_HUB_ID
"""

from bridle_hf.commands import main


if __name__ == "__main__":
    main("probe")
