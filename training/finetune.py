"""Fine-tune a pretrained encoder, as `bridle finetune` does.

accelerate launch training/finetune.py RECIPE --model DIR_OR_HUB_ID --data DIR_OR_HUB_ID --output_dir OUT
"""

from bridle_hf.commands import main


if __name__ == "__main__":
    main("finetune")
