"""Run the demo, as `bridle demo` does.

python training/demo.py --modality audio --output_dir OUT
"""

from bridle_hf.commands import main


if __name__ == "__main__":
    main("demo")
