from bridle_hf.data.shards.writer import main


if __name__ == "__main__":
    main()
