from bridle_hf.pretraining.command import main


if __name__ == "__main__":
    main()
