"""Write shards of a data set, as `bridle shard` does.

python training/shard.py --data DIR --modality audio --output_dir OUT --num_workers 8
"""

from bridle_hf.commands import main


if __name__ == "__main__":
    main("shard")
