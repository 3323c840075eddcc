"""Write the report of a run anew, as `bridle report` does.

python training/report.py OUT
"""

from bridle_hf.commands import main


if __name__ == "__main__":
    main("report")
