"""`python -m bridle_hf.commands pretrain ...`: the command `bridle` where it is not on the path."""

from bridle_hf.commands import main


if __name__ == "__main__":
    main()
