from bridle_hf.finetuning.finetune import main


if __name__ == "__main__":
    main()
