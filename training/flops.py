from bridle_hf.pretraining.cost import main


if __name__ == "__main__":
    main()
