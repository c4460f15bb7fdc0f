"""The recipe that made the bundled pair: corpus, tokenizer, target, drafter, export, report. See training/README.md."""
