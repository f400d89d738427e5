"""Configuration: strict models (`models`), YAML and dotted overrides (`loading`), resolved arithmetic (`plan`)."""
