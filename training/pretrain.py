"""Pretrain an encoder and its tokenizer, as `bridle pretrain` does.

accelerate launch training/pretrain.py audio_base --data DIR_OR_HUB_ID --output_dir OUT
"""

from bridle_hf.commands import main


if __name__ == "__main__":
    main("pretrain")
