"""Tell what a recipe costs, as `bridle flops` does.

python training/flops.py audio_base --samples 1900000
"""

from bridle_hf.commands import main


if __name__ == "__main__":
    main("flops")
