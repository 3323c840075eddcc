"""`python -m bridle_hf.finetuning RECIPE ...`, and the same behind `accelerate launch -m` or `torchrun -m`."""

from bridle_hf.commands import main


if __name__ == "__main__":
    main("finetune")
