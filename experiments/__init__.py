"""What compares the models: the corpus of long text that they train on."""
