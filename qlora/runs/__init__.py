"""What a user does with a recipe or a run: train, resume, load, evaluate, generate, chat."""
