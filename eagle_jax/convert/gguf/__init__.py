"""Reads GGUF files of Llama-architecture models: weights, config, vocabulary and chat template from one file.

May import the rest of convert except `read`, which opens these files; the package gguf is imported in functions.
"""
