"""Answering questions with a trained model."""
