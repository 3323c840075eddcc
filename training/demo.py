from bridle_hf.demos.demo import main


if __name__ == "__main__":
    main()
