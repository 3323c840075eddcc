from bridle_hf.monitoring.flops import main


if __name__ == "__main__":
    main()
