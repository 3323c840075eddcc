from bridle_hf.probing.probe import main


if __name__ == "__main__":
    main()
