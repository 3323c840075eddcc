from bridle_hf.monitoring.report import main


if __name__ == "__main__":
    main()
